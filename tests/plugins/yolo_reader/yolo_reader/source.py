"""The dataset: text files of polygons, which are converted to COCO files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maskseg.data.coco.report import Report
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.image_files import image_size
from maskseg.errors import UserError
from maskseg.files import parse_yaml, write_json

IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class YoloSource(CocoSource):
    """Images with a text file each, a line for each object (YOLO's format for segmentation).

    A line is `class x y x y x y ...`, the corners of a polygon as fractions of the image's width
    and height; or `class x y width height` for a box with this center. Images without a text file
    have no objects. `names` in the YAML file of the dataset has the names of the classes 0, 1, ...

    The COCO files `train_json` and `val_json` are made when they are missing or outdated.

    root: the folder of the dataset; names: the YAML file.
    train_labels, val_labels: the folders of the text files. Other keys: `CocoSource`.
    """

    def __init__(
        self,
        root: str,
        names: str,
        train_labels: str | None = None,
        val_labels: str | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(root=root, **keys)
        self.names = Path(names)
        self.labels = {"train": train_labels, "val": val_labels}

    def prepare(self) -> None:
        """Make the COCO files that are missing or outdated. Raises UserError with a report."""
        for split in self.splits():
            images = Path(self.split(split).images or "")
            labels = Path(self.labels[split] or "")
            for key, folder in ((f"{split}_images", images), (f"{split}_labels", labels)):
                if not folder.is_dir():
                    raise UserError(f"data.{key}={folder}: there is no such folder")
            target = Path(str(self.split(split).json))
            if _is_outdated(target, [self.names, images, labels, *labels.glob("*.txt")]):
                content = self._convert(images, labels)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_json(target, content)

    def _convert(self, images: Path, labels: Path) -> dict[str, Any]:
        """The content of the COCO file of a split."""
        names = read_names(self.names)
        report = Report(str(labels))
        rows: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGES)
        for image_id, path in enumerate(files, start=1):
            height, width = image_size(path, self.reading.max_pixels)
            row = {"id": image_id, "file_name": path.name, "height": height, "width": width}
            rows.append(row)
            text_file = labels / f"{path.stem}.txt"
            for annotation in _read_objects(text_file, height, width, len(names), report):
                number = len(annotations) + 1
                annotations.append({"id": number, "image_id": image_id, "iscrowd": 0, **annotation})
        if report.errors:
            raise UserError(report.text())
        categories = [{"id": index, "name": name} for index, name in enumerate(names)]
        return {"images": rows, "annotations": annotations, "categories": categories}


def _is_outdated(target: Path, inputs: list[Path]) -> bool:
    """Whether a file is missing or older than one of those that it is made of."""
    if not target.is_file():
        return True
    changes = [path.stat().st_mtime_ns for path in inputs if path.exists()]
    return max(changes) > target.stat().st_mtime_ns


def read_names(path: Path) -> list[str]:
    """The names of the classes 0, 1, ... in the YAML file of a dataset. Raises UserError."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the names of the classes cannot be read ({error})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: `names` must be a list of the names of the classes")
    return [str(name) for name in names]


def _read_objects(
    path: Path, height: int, width: int, num_classes: int, report: Report
) -> Iterator[dict[str, Any]]:
    """Yield the COCO annotation of each line, without ids; lines with errors are reported."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        place = f"{path.name}, line {number}"
        numbers = _parse_numbers(words[1:])
        if numbers is None or not words[0].isdigit() or int(words[0]) >= num_classes:
            report.error(f"line without a class below {num_classes} and numbers", place)
        elif len(numbers) == 4:
            yield {"category_id": int(words[0]), **_box(numbers, height, width)}
        elif len(numbers) >= 6 and len(numbers) % 2 == 0:
            yield {"category_id": int(words[0]), **_polygon(numbers, height, width)}
        else:
            report.error("line that has neither a box nor a polygon", place)


def _parse_numbers(words: list[str]) -> list[float] | None:
    """The finite numbers, None where a word is none."""
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _box(numbers: list[float], height: int, width: int) -> dict[str, Any]:
    """The COCO keys of a box, which has no mask."""
    x, y, w, h = numbers
    bbox = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
    return {"bbox": bbox, "area": bbox[2] * bbox[3]}


def _polygon(numbers: list[float], height: int, width: int) -> dict[str, Any]:
    """The COCO keys of a polygon."""
    points = np.array(numbers).reshape(-1, 2) * (width, height)
    low = points.min(axis=0)
    sides = points.max(axis=0) - low
    following = np.roll(points, -1, axis=0)
    # The shoelace formula.
    area = abs(np.sum(points[:, 0] * following[:, 1] - points[:, 1] * following[:, 0])) / 2
    return {
        "segmentation": [points.ravel().tolist()],
        "bbox": [*low.tolist(), *sides.tolist()],
        "area": float(area),
    }
