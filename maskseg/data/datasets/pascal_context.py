"""PASCAL-Context: VOC2010's images with a class for every pixel (Mottaghi et al. 2014).

The usual 59 of its 459 classes are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from maskseg.data.datasets.coco import SourceParts
from maskseg.data.datasets.matlab import MatArray, MatError, read_mat
from maskseg.data.datasets.semantic_maps import Encoding, SemanticMaps
from maskseg.data.datasets.stuff import read_labels
from maskseg.data.datasets.voc import (
    CLASSES,
    CachedCocoSource,
    ObjectMasks,
    check_root,
    ground_truth_files,
    voc_objects,
)
from maskseg.errors import UserError
from maskseg.superpixels.methods import label_components

MIN_REGION = 25  # pixels; smaller connected regions are not objects
_ALIASES = {  # spellings of the 59 names -> of the 459 names
    "diningtable": "table",
    "bedcloth": "bedclothes",
    "clothes": "cloth",
}
_VARIABLE = "LabelMap"


class PascalContextSource(CachedCocoSource):
    """PASCAL-Context as distributed.

    root: its folder; voc: VOC2010 of VOCdevkit, which has the images; labels: file with the names
    of all classes, whose numbers are the category ids; classes: file with the names of the used
    classes; background: give the pixels of other classes the id 0, a stuff class `background`,
    instead of leaving them unlabelled. train_semantic, val_semantic: the folder of .mat files.
    Other keys: `CachedCocoSource`.

    The classes of VOC are things, all others stuff. Instances are those of VOC's SegmentationObject
    for the images it covers (about a fifth). In other images, each 4-connected region of a thing
    class with at least MIN_REGION pixels is an instance: touching objects of one class are merged,
    and an object that is split by an occluder counts as several.
    """

    def __init__(
        self,
        root: str,
        cache: str,
        voc: str,
        labels: str,
        classes: str,
        background: bool = False,
        **keys: Unpack[SourceParts],
    ) -> None:
        super().__init__(root, cache, **keys)
        self.voc = Path(voc)
        self.labels = Path(labels)
        self.classes = Path(classes)
        self.background = background
        self._opened_maps: dict[str, ContextMaps] = {}

    def _check(self) -> None:
        check_root(str(self.voc), "voc", ("JPEGImages",))
        for split in self.splits():
            self._open_maps(split, self._folder(split), None)

    def _folder(self, split: str) -> str:
        folder = self.split(split).semantic
        if folder is None:
            raise UserError(
                f"data.{split}_semantic is not set: the folder of .mat files that the objects "
                "are derived from"
            )
        return folder

    @cached_property
    def _used_classes(self) -> dict[int, str]:
        """Names of the used classes by id."""
        labels = read_labels(self.labels, "data.labels")
        id_of_name = {_normalize(name): class_id for class_id, name in labels.items()}
        names: dict[int, str] = {}
        for label in read_labels(self.classes, "data.classes").values():
            name = _normalize(label)
            class_id = id_of_name.get(name, id_of_name.get(_ALIASES.get(name, "")))
            if class_id is None:
                raise UserError(
                    f"data.classes={self.classes}: {name!r} is not a class of "
                    f"data.labels={self.labels}"
                )
            names[class_id] = name
        return names

    @cached_property
    def _things(self) -> dict[str, int]:
        """Ids of the used classes that VOC has, by VOC's names."""
        voc_names = {_ALIASES.get(name, name): name for name in CLASSES}
        things = {}
        for class_id, name in self._used_classes.items():
            canonical_name = _ALIASES.get(name, name)
            if canonical_name in voc_names:
                things[voc_names[canonical_name]] = class_id
        return things

    def _classes(self) -> tuple[dict[int, str], dict[int, str]]:
        if not self._things:
            raise UserError(
                f"data.classes={self.classes}: none of VOC's classes, which have the instances"
            )
        things = {class_id: name for name, class_id in self._things.items()}
        stuff = {
            class_id: name
            for class_id, name in self._used_classes.items()
            if class_id not in things
        }
        if self.background:
            stuff[0] = "background"
        return things, stuff

    def _open_maps(self, split: str, folder: str, ids: Sequence[int] | None) -> ContextMaps:
        max_id = max(read_labels(self.labels, "data.labels"))
        encoding = Encoding(range(max_id + 1), background_id=0 if self.background else None)
        return ContextMaps(folder, f"data.{split}_semantic", self.reading.max_pixels, ids, encoding)

    def _ground_truth_files(self, split: str, name: str) -> list[Path]:
        return [Path(self._folder(split)) / f"{name}.mat", *ground_truth_files(self.voc, name)]

    def _objects(self, split: str, name: str, height: int, width: int) -> ObjectMasks:
        if split not in self._opened_maps:
            self._opened_maps[split] = self._open_maps(split, self._folder(split), None)
        # Read also for images with objects of VOC: a missing or damaged map is an error for all.
        classes = self._opened_maps[split].load(name, height, width).numpy()
        if not ground_truth_files(self.voc, name)[0].is_file():
            yield from regions(classes, list(self._things.values()))
            return
        for voc_id, mask in voc_objects(self.voc, name, height, width, self.reading.max_pixels):
            class_id = self._things.get(CLASSES[voc_id - 1])
            if class_id is not None:
                yield class_id, mask


class ContextMaps(SemanticMaps):
    """The class of each pixel, from .mat files; the map of the image `a.jpg` is `a.mat`."""

    suffix = ".mat"

    def _read_values(self, path: Path, height: int, width: int) -> NDArray[np.unsignedinteger]:
        try:
            array = _read_label_map(path)
            if array.shape != (height, width):
                raise UserError(
                    f"{path}: {_VARIABLE} is {' x '.join(map(str, array.shape))} "
                    f"(height x width), the image {height} x {width}"
                )
            numbers = array.numbers()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except MatError as error:
            raise UserError(f"{path}: not a map of PASCAL-Context, or damaged ({error})") from error
        if numbers.dtype not in (np.uint8, np.uint16):
            raise UserError(f"{path}: {_VARIABLE} is of type {numbers.dtype}, not uint16")
        return np.ascontiguousarray(numbers, dtype=np.uint16)


def _read_label_map(path: Path) -> MatArray:
    """Return the variable with the map. Raises OSError and MatError."""
    variables = read_mat(path)
    if _VARIABLE not in variables:
        names = ", ".join(variables) or "none at all"
        raise MatError(f"it has no variable {_VARIABLE} ({names})"[:200])
    return variables[_VARIABLE]


def regions(classes: NDArray[np.int16], thing_ids: Sequence[int]) -> ObjectMasks:
    """Yield the connected regions of the given classes of a map [H, W] as objects.

    Regions with fewer than MIN_REGION pixels are dropped.
    """
    is_thing = np.isin(classes, thing_ids)
    components = label_components(np.where(is_thing, classes, -1))
    _, first_pixel, areas = np.unique(components, return_index=True, return_counts=True)
    ids = classes.ravel()[first_pixel]
    used = (areas >= MIN_REGION) & np.isin(ids, thing_ids)
    for component in np.flatnonzero(used).tolist():
        yield int(ids[component]), components == component


def _normalize(name: str) -> str:
    """Return a class name in the form that both files share: their use of spaces differs."""
    return name.replace(" ", "").lower()
