"""PASCAL VOC's segmentations (Everingham et al. 2010).

The images of a split are named in a list; PNG files encode the object and the class of each pixel.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from maskseg.data.coco.documents import (
    CocoAnnotation,
    CocoCategory,
    CocoDocument,
    CocoImage,
    CocoObject,
)
from maskseg.data.coco.report import Report
from maskseg.data.datasets.coco import CocoSource, SourceParts
from maskseg.data.datasets.semantic_maps import ENCODINGS, SemanticMaps, read_values
from maskseg.data.image_files import image_size
from maskseg.errors import UserError
from maskseg.files import replacing

CLASSES = (  # of ids 1 .. 20
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
VERSION = 1  # increase it if the same files yield another JSON
_VOID = 255
_NAME = re.compile(r"(\d{4}_)?\d{1,8}")  # 2007_000032, or 000032 before VOC2008
_FOLDERS = ("JPEGImages", "SegmentationClass", "SegmentationObject")

ObjectMasks = Iterator[tuple[int, NDArray[np.bool_]]]  # category id and mask [H, W] of each object


class CachedCocoSource(CocoSource, ABC):
    """Base class of datasets with VOC's layout, which are converted to COCO files once.

    `train_json` and `val_json` are generated from lists of image names. A file is generated again
    if the list, the sizes of the files it is derived from, or the classes have changed. Image ids
    are the digits of the names.

    cache: the folder of the COCO files, for messages; train_list, val_list: files with one name
    per line. Other keys: `CocoSource`.
    """

    def __init__(
        self,
        root: str,
        cache: str,
        train_list: str | None = None,
        val_list: str | None = None,
        **keys: Unpack[SourceParts],
    ) -> None:
        super().__init__(root=root, **keys)
        self.cache = cache
        self.lists = {"train": train_list, "val": val_list}

    @abstractmethod
    def _check(self) -> None:
        """Raise UserError if a folder or file that all images need is missing."""

    @abstractmethod
    def _classes(self) -> tuple[dict[int, str], dict[int, str]]:
        """Return the names of things and of stuff, by id."""

    @abstractmethod
    def _ground_truth_files(self, split: str, name: str) -> list[Path]:
        """Return the files that an image's objects are derived from; some may not exist."""

    @abstractmethod
    def _objects(self, split: str, name: str, height: int, width: int) -> ObjectMasks:
        """Yield the objects of an image. Raises UserError."""

    def prepare(self) -> None:
        """Generate the COCO files that are missing or outdated (about a minute).

        Raises UserError with a report if files are missing or inconsistent.
        """
        self._check()
        generated: set[str] = set()
        for split in self.splits():
            target = self.split(split).single_file()
            list_file = self.lists[split]
            if list_file is None:
                raise UserError(
                    f"data.{split}_list is not set: the file that names the images of "
                    f"data.{split}_json={target}"
                )
            # Both splits may name one file: a model that is tested on its training images.
            if target not in generated:
                generated.add(target)
                self._generate(split, Path(target), Path(list_file))

    def _generate(self, split: str, target: Path, list_file: Path) -> None:
        """Write the COCO file of a split unless it is up to date."""
        names = read_list(list_file)
        header = self._header(split, names)
        if _has_header(target, header):
            return
        print(
            f"{target}: generating it from {len(names)} images, once for all trainings", flush=True
        )
        content = self._convert(split, names, list_file)
        # The header must come first in the file, so it replaces the opening brace.
        self._write(target, header + json.dumps(content).encode()[1:])

    def _header(self, split: str, names: list[str]) -> bytes:
        """Return the beginning of the COCO file, with a hash of everything it is derived from."""
        sizes = []
        for name in names:
            files = self._ground_truth_files(split, name)
            sizes.append([path.stat().st_size if path.is_file() else -1 for path in files])
        things, stuff = self._classes()
        inputs = [VERSION, names, sizes, list(things.items()), list(stuff.items())]
        digest = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        return f'{{"info": {{"made_of": "{digest}"}}, '.encode()

    def _convert(self, split: str, names: list[str], list_file: Path) -> CocoDocument:
        """Return the lists of the COCO file."""
        images: list[CocoImage] = []
        annotations: list[CocoAnnotation] = []
        report = Report(str(list_file))
        for name in tqdm(names, desc="objects", disable=None):
            try:
                image, rows = self._convert_image(split, name)
            except UserError as error:
                report.error("image whose files cannot be used", str(error))
                continue
            images.append(image)
            for row in rows:
                annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **row})
        if report.errors:
            raise UserError(report.text())
        things, stuff = self._classes()
        return {
            "images": images,
            "annotations": annotations,
            "categories": _to_entries(things),
            "stuff_categories": _to_entries(stuff),
        }

    def _convert_image(self, split: str, name: str) -> tuple[CocoImage, list[CocoObject]]:
        """Return the COCO entries of an image and of its objects. Raises UserError."""
        file_name = f"{name}.jpg"
        folder = Path(self.split(split).images or "")
        height, width = image_size(folder / file_name, self.reading.max_pixels)
        image_id = int(name.replace("_", ""))
        rows = [
            _to_annotation(category_id, mask)
            for category_id, mask in self._objects(split, name, height, width)
        ]
        image: CocoImage = {
            "id": image_id,
            "file_name": file_name,
            "height": height,
            "width": width,
        }
        return image, rows

    def _write(self, target: Path, content: bytes) -> None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, "the COCO file") as file:
                file.write(content)
        except (UserError, OSError) as error:
            raise UserError(
                f"{error}; data.cache={self.cache} must be a folder that can be written to: "
                "name another one"
            ) from error


class VocSource(CachedCocoSource):
    """VOC2007 to VOC2012 as distributed.

    root: the folder of one year, such as VOCdevkit/VOC2012; other keys: `CachedCocoSource`.

    Things are the 20 classes with ids 1 .. 20. Their instances are those of SegmentationObject;
    the class of an instance is the most frequent one of its pixels in SegmentationClass. The only
    class of stuff is `background`, id 0. Void (255) belongs to no instance and is unlabelled in
    the semantic maps.
    """

    def _check(self) -> None:
        check_root(str(self.root), "root", _FOLDERS)

    def _classes(self) -> tuple[dict[int, str], dict[int, str]]:
        return dict(enumerate(CLASSES, 1)), {0: "background"}

    def _ground_truth_files(self, split: str, name: str) -> list[Path]:  # noqa: ARG002
        return ground_truth_files(Path(str(self.root)), name)

    def _objects(
        self,
        split: str,  # noqa: ARG002 - all splits share the folders
        name: str,
        height: int,
        width: int,
    ) -> ObjectMasks:
        return voc_objects(Path(str(self.root)), name, height, width, self.reading.max_pixels)


def check_root(root: str, key: str, folders: tuple[str, ...]) -> None:
    """Raise UserError if one of VOC's folders does not exist."""
    missing = [name for name in folders if not (Path(root) / name).is_dir()]
    if missing:
        raise UserError(
            f"data.{key}={root}: there is no folder {missing[0]} in it; it must be the folder of "
            "one year in VOCdevkit, such as VOCdevkit/VOC2012"
        )


def ground_truth_files(root: Path, name: str) -> list[Path]:
    """Return the files with the objects and the classes of an image."""
    return [root / folder / f"{name}.png" for folder in ("SegmentationObject", "SegmentationClass")]


def voc_objects(root: Path, name: str, height: int, width: int, max_pixels: int) -> ObjectMasks:
    """Yield VOC's class id and the mask of each instance of an image. Raises UserError."""
    path, classes_path = ground_truth_files(root, name)
    numbers = read_values(path, height, width, max_pixels, "map of objects")
    maps = SemanticMaps(classes_path.parent, "data.root", max_pixels, encoding=ENCODINGS["voc"])
    classes = maps.load(classes_path.name, height, width).numpy()
    for number in np.unique(numbers).tolist():
        if number in (0, _VOID):
            continue
        mask = numbers == number
        # One count per class; unlabelled pixels (-1) and background (0) do not vote.
        votes = np.bincount(classes[mask] + 1, minlength=len(CLASSES) + 2)[2:]
        if not votes.any():
            raise UserError(f"{path}: object {number} has no pixel of a class in {classes_path}")
        yield int(votes.argmax()) + 1, mask


def read_list(path: Path) -> list[str]:
    """Read a list of image names, one per line. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: the list of images cannot be read ({reason})") from error
    names: list[str] = []
    known: set[str] = set()
    for line_number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            continue
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: line {line_number}, {line[:60]!r}, is not a name of an image of VOC, "
                "such as 2007_000032"
            )
        if name in known:
            raise UserError(f"{path}: line {line_number} names {name} again")
        known.add(name)
        names.append(name)
    if not names:
        raise UserError(f"{path}: no name of an image in it")
    return names


def _to_entries(names: dict[int, str]) -> list[CocoCategory]:
    return [{"id": category_id, "name": name} for category_id, name in names.items()]


def _to_annotation(category_id: int, mask: NDArray[np.bool_]) -> CocoObject:
    """Return the COCO annotation of an object, without ids."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "category_id": category_id,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(coco_mask.area(rle)),
        "iscrowd": 0,
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
    }


def _has_header(path: Path, header: bytes) -> bool:
    """Return whether a file exists and begins with these bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False
