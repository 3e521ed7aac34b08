"""PASCAL-Context: VOC2010's images with a class for every pixel (Mottaghi et al. 2014), of which the usual 59 are kept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.data.datasets.matlab import MatError, read_mat
from maskseg.data.datasets.semantic_maps import Encoding, SemanticMaps
from maskseg.data.datasets.stuff import read_labels
from maskseg.data.datasets.voc import (
    CLASSES,
    ListedSource,
    Objects,
    check_root,
    truth_files,
    voc_objects,
)
from maskseg.errors import UserError
from maskseg.superpixels.methods import connected

MIN_REGION = 25  # pixels of the smallest connected region that is taken for an object
_ALIASES = {
    "diningtable": "table",
    "bedcloth": "bedclothes",
    "clothes": "cloth",
}  # of the 59 names, those that the 459 have in another spelling
_VARIABLE = "LabelMap"


class PascalContextSource(ListedSource):
    """PASCAL-Context as it is distributed. root: its folder; voc: VOC2010 of VOCdevkit, whose images it is of; other keys: `ListedSource`.

    labels: the names of all classes; classes: those that are used, by name; category ids are the numbers of `labels`. Those of VOC's 20
    classes are things, the others stuff; pixels of the rest are unlabelled, or with `background` of a further class of stuff of that name, id 0.
    Instances are those of VOC's SegmentationObject where it has the image (of about a fifth); elsewhere each 4-connected region of a thing's
    class of at least MIN_REGION pixels is one: objects of one class that touch are then one, an object that is cut in two is two.
    train_semantic, val_semantic: the folder of .mat files.
    """

    def __init__(
        self,
        root: str,
        cache: str,
        voc: str,
        labels: str,
        classes: str,
        background: bool = False,
        **keys: Any,
    ) -> None:
        super().__init__(root, cache, **keys)
        self.voc, self.labels, self.classes, self.background = (
            Path(voc),
            Path(labels),
            Path(classes),
            background,
        )
        self._read_maps: dict[str, ContextMaps] = {}

    def _check(self) -> None:
        check_root(str(self.voc), "voc", ("JPEGImages",))
        for split in self.splits():
            self._maps(split, self._folder(split), None)

    def _folder(self, split: str) -> str:
        folder = self.semantic[split]
        if folder is None:
            raise UserError(
                f"data.{split}_semantic is not set: the folder of .mat files, of which the objects are made"
            )
        return folder

    @cached_property
    def _numbers(self) -> dict[int, str]:
        """The used classes, names by id."""
        plain = {
            _plain(name): number for number, name in read_labels(self.labels, "data.labels").items()
        }
        found: dict[int, str] = {}
        for name in map(_plain, read_labels(self.classes, "data.classes").values()):
            number = plain.get(name, plain.get(_ALIASES.get(name, "")))
            if number is None:
                raise UserError(
                    f"data.classes={self.classes}: {name!r} is no class of data.labels={self.labels}"
                )
            found[number] = name
        return found

    @cached_property
    def _things(self) -> dict[str, int]:
        """Ids of the used classes that VOC has, by VOC's names."""
        voc = {_ALIASES.get(name, name): name for name in CLASSES}
        return {
            voc[own]: number
            for number, name in self._numbers.items()
            if (own := _ALIASES.get(name, name)) in voc
        }

    def _classes(self) -> tuple[dict[int, str], dict[int, str]]:
        if not self._things:
            raise UserError(
                f"data.classes={self.classes}: none of VOC's classes, which have the instances"
            )
        things = {number: name for name, number in self._things.items()}
        stuff = {number: name for number, name in self._numbers.items() if number not in things}
        return things, stuff | ({0: "background"} if self.background else {})

    def _maps(self, split: str, folder: str, ids: Sequence[int] | None) -> ContextMaps:
        highest = max(read_labels(self.labels, "data.labels"))
        encoding = Encoding(range(highest + 1), other=0 if self.background else None)
        return ContextMaps(folder, f"data.{split}_semantic", self.max_pixels, ids, encoding)

    def _truths(self, split: str, name: str) -> list[Path]:
        return [Path(self._folder(split)) / f"{name}.mat", *truth_files(self.voc, name)]

    def _objects(self, split: str, name: str, height: int, width: int) -> Objects:
        if split not in self._read_maps:
            self._read_maps[split] = self._maps(split, self._folder(split), None)
        classes = self._read_maps[split].of(name, height, width).numpy()
        if truth_files(self.voc, name)[0].is_file():
            found = (
                (self._things.get(CLASSES[k - 1]), mask)
                for k, mask in voc_objects(self.voc, name, height, width, self.max_pixels)
            )
            yield from ((number, mask) for number, mask in found if number is not None)
        else:
            yield from regions(classes, list(self._things.values()))


class ContextMaps(SemanticMaps):
    """The class of each pixel, from the .mat files of a folder: that of `a.jpg` is `a.mat` there."""

    suffix = ".mat"

    def _values(self, path: Path, height: int, width: int) -> NDArray[Any]:
        try:
            variables = read_mat(path)
            if _VARIABLE not in variables:
                raise MatError(
                    f"it has no variable {_VARIABLE} ({', '.join(variables) or 'none at all'})"[
                        :200
                    ]
                )
            array = variables[_VARIABLE]
            if array.shape != (height, width):
                raise UserError(
                    f"{path}: {_VARIABLE} is {' x '.join(map(str, array.shape))} (height x width), the image {height} x {width}"
                )
            numbers = array.numbers()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except MatError as error:
            raise UserError(f"{path}: no map of PASCAL-Context, or damaged ({error})") from error
        if numbers.dtype not in (np.uint8, np.uint16):
            raise UserError(f"{path}: {_VARIABLE} is of type {numbers.dtype}, not uint16")
        return np.ascontiguousarray(numbers, dtype=np.uint16)


def regions(classes: NDArray[np.int16], wanted: Sequence[int]) -> Objects:
    """The connected regions of the wanted classes of a map [H, W] as objects, without specks."""
    pieces = connected(np.where(np.isin(classes, wanted), classes, -1))
    _, first, sizes = np.unique(pieces, return_index=True, return_counts=True)
    ids = classes.ravel()[first]
    for piece in np.flatnonzero((sizes >= MIN_REGION) & np.isin(ids, wanted)).tolist():
        yield int(ids[piece]), pieces == piece


def _plain(name: str) -> str:
    """A class's name as both files have it: they put blanks in other places."""
    return name.replace(" ", "").lower()
