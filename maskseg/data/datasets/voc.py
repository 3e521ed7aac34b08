"""PASCAL VOC's segmentations (Everingham et al. 2010): lists of names, and PNGs that say the object and the class of each pixel."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from maskseg.data.coco.report import Report
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.semantic_maps import ENCODINGS, SemanticMaps, read_values
from maskseg.data.image_files import image_size
from maskseg.errors import UserError
from maskseg.files import replacing

CLASSES = (
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
)  # fmt: skip - of ids 1 .. 20
VERSION = 1  # raise it when the same files give another JSON
_VOID = 255
_NAME = re.compile(r"(\d{4}_)?\d{1,8}")  # 2007_000032, or 000032 before VOC2008
_FOLDERS = ("JPEGImages", "SegmentationClass", "SegmentationObject")

Objects = Iterator[tuple[int, NDArray[np.bool_]]]  # category id and mask [H, W] of each


class ListedSource(CocoSource, ABC):
    """A data set of VOC's layout: its COCO files, `train_json` and `val_json`, are made of lists of names, once, and kept.

    A file is made again where the list, the sizes of the files behind it or the keys that it follows from are others. Image ids are the
    digits of the names. cache: the folder of the COCO files, for messages; train_list, val_list: files with a name a line. Other keys: `CocoSource`.
    """

    def __init__(
        self,
        root: str,
        cache: str,
        train_list: str | None = None,
        val_list: str | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(root=root, **keys)
        self.cache, self.lists = cache, {"train": train_list, "val": val_list}

    @abstractmethod
    def _check(self) -> None:
        """Raises UserError where a folder or a file that all images need is not there."""

    @abstractmethod
    def _classes(self) -> tuple[dict[int, str], dict[int, str]]:
        """Names by id: of things and of stuff."""

    @abstractmethod
    def _truths(self, split: str, name: str) -> list[Path]:
        """The files that an image's objects follow from, where they are there."""

    @abstractmethod
    def _objects(self, split: str, name: str, height: int, width: int) -> Objects:
        """The objects of an image. Raises UserError."""

    def prepare(self) -> None:
        """Makes the COCO files that are not there (a minute). Raises UserError with a report where files are missing or do not fit each other."""
        self._check()
        made: set[str] = set()
        for split in self.splits():
            target, path = str(self.json[split]), self.lists[split]
            if path is None:
                raise UserError(
                    f"data.{split}_list is not set: the file that names the images of data.{split}_json={target}"
                )
            if (
                target not in made
            ):  # a training that is tested on its own images names one file twice
                made.add(target)
                self._make(split, Path(target), Path(path))

    def _make(self, split: str, target: Path, listed: Path) -> None:
        names, classes, images = read_list(listed), self._classes(), Path(self.images[split] or "")
        sizes = [
            [path.stat().st_size if path.is_file() else -1 for path in self._truths(split, name)]
            for name in names
        ]
        inputs = hashlib.sha256(
            json.dumps([VERSION, names, sizes, *(list(c.items()) for c in classes)]).encode()
        ).hexdigest()
        head = f'{{"info": {{"made_of": "{inputs}"}}, '.encode()
        if _begins(target, head):
            return
        print(f"{target}: making it of {len(names)} images, once for all trainings", flush=True)
        records, annotations, report = [], list[dict[str, Any]](), Report(str(listed))
        for name in tqdm(names, desc="objects", disable=None):
            try:
                file_name = f"{name}.jpg"
                height, width = image_size(images / file_name, self.max_pixels)
                number = int(name.replace("_", ""))
                rows = [
                    _row(number, category, mask)
                    for category, mask in self._objects(split, name, height, width)
                ]
            except UserError as error:
                report.error("image whose files cannot be used", str(error))
                continue
            records.append({"id": number, "file_name": file_name, "height": height, "width": width})
            annotations += [{"id": len(annotations) + i, **row} for i, row in enumerate(rows, 1)]
        if report.errors:
            raise UserError(report.text())
        lists = [[{"id": i, "name": name} for i, name in named.items()] for named in classes]
        body = {
            "images": records,
            "annotations": annotations,
            "categories": lists[0],
            "stuff_categories": lists[1],
        }
        self._write(target, head + json.dumps(body).encode()[1:])

    def _write(self, target: Path, content: bytes) -> None:
        advice = (
            f"data.cache={self.cache} must be a folder that can be written to: name another one"
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target, "the COCO file") as file:
                file.write(content)
        except (UserError, OSError) as error:
            raise UserError(f"{error}; {advice}") from error


class VocSource(ListedSource):
    """VOC2007 .. VOC2012 as they are distributed. root: the folder VOC2012 of VOCdevkit; other keys: `ListedSource`.

    Things are the 20 classes, with ids 1 .. 20, their instances those of SegmentationObject, each of the class that most of its pixels have in
    SegmentationClass; the one class of stuff is `background`, id 0. Void (255) belongs to no instance and is unlabelled in the semantic maps.
    """

    def _check(self) -> None:
        check_root(str(self.root), "root", _FOLDERS)

    def _classes(self) -> tuple[dict[int, str], dict[int, str]]:
        return dict(enumerate(CLASSES, 1)), {0: "background"}

    def _truths(self, split: str, name: str) -> list[Path]:  # noqa: ARG002 - all splits share the folders
        return truth_files(Path(str(self.root)), name)

    def _objects(self, split: str, name: str, height: int, width: int) -> Objects:  # noqa: ARG002
        return voc_objects(Path(str(self.root)), name, height, width, self.max_pixels)


def check_root(root: str, key: str, folders: tuple[str, ...]) -> None:
    """Raises UserError where a folder of VOC's is not there."""
    lacking = [name for name in folders if not (Path(root) / name).is_dir()]
    if lacking:
        raise UserError(
            f"data.{key}={root}: there is no folder {lacking[0]} in it; it is to be a year's folder of VOCdevkit, such as VOCdevkit/VOC2012"
        )


def truth_files(root: Path, name: str) -> list[Path]:
    """Where the objects and the classes of an image are."""
    return [root / folder / f"{name}.png" for folder in ("SegmentationObject", "SegmentationClass")]


def voc_objects(root: Path, name: str, height: int, width: int, max_pixels: int) -> Objects:
    """The instances of an image, by number: VOC's class id and mask. Raises UserError."""
    path, classes_path = truth_files(root, name)
    numbers = read_values(path, height, width, max_pixels, "map of objects")
    classes = (
        SemanticMaps(classes_path.parent, "data.root", max_pixels, encoding=ENCODINGS["voc"])
        .of(classes_path.name, height, width)
        .numpy()
    )
    for number in np.unique(numbers).tolist():
        if number not in (0, _VOID):
            mask = numbers == number
            votes = np.bincount(classes[mask] + 1, minlength=22)[
                2:
            ]  # nothing and background have none
            if not votes.any():
                raise UserError(
                    f"{path}: object {number} has no pixel of a class in {classes_path}"
                )
            yield int(votes.argmax()) + 1, mask


def read_list(path: Path) -> list[str]:
    """The names in a list of images, a line each. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: the list of images cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if name and not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: line {number}, {line[:60]!r}, is no name of an image of VOC, such as 2007_000032"
            )
        if name and names.setdefault(name, number) != number:
            raise UserError(f"{path}: line {number} names {name} again")
    if not names:
        raise UserError(f"{path}: no name of an image in it")
    return list(names)


def _row(image: int, category: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The COCO annotation of an object, without its id."""
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "image_id": image,
        "category_id": category,
        "bbox": coco_mask.toBbox(code).tolist(),
        "area": int(coco_mask.area(code)),
        "iscrowd": 0,
        "segmentation": {"size": list(code["size"]), "counts": code["counts"].decode("ascii")},
    }


def _begins(path: Path, head: bytes) -> bool:
    """Whether a file is there and begins so."""
    try:
        with path.open("rb") as file:
            return file.read(len(head)) == head
    except OSError:
        return False
