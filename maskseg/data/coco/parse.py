"""A COCO JSON file -> lists of images and categories, and the annotations as columns.

Annotations are packed while the JSON is parsed: the tree of Python objects that COCO's own file would make (several gigabytes) never exists.

An image may name the classes that it shows without saying where, `category_ids: [3, 17]` beside its `file_name`. Each that has no annotation there
becomes a crowd over the whole image: its class is there, and no region of the image is surely background.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.packed_segmentations import Packer, SegmentationError, Segmentations
from maskseg.data.coco.report import Report
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.ops.rle import Ints

MISSING = -(2**63)  # an id that is not given
_LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Columns:
    """The A annotations of a file as they came, one column a field.

    ids: i64 [A], MISSING where there is none; image_ids, category_ids: i64 [A]; boxes: f64 [A, 4], x, y, width, height, NaN where `has_box` is
    not set; areas: f64 [A], NaN where there is none; crowd: bool [A]; good: bool [A], rows that could be read and belong to the file;
    points: the numbers of all keypoints; point_starts: i64 [A + 1], where those of each row begin.
    """

    ids: Ints
    image_ids: Ints
    category_ids: Ints
    boxes: NDArray[np.float64]
    has_box: NDArray[np.bool_]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    good: NDArray[np.bool_]
    segmentations: Segmentations
    points: NDArray[np.float32]
    point_starts: Ints

    def points_of(self, row: int) -> NDArray[np.float32]:
        """f32 [n, 3]: the keypoints of a row as they came (pixel indices and visibility)."""
        return self.points[self.point_starts[row] : self.point_starts[row + 1]].reshape(-1, 3)

    def name(self, row: int) -> str:
        """The annotation of a row, for messages."""
        own = "annotation without id" if self.ids[row] == MISSING else f"annotation {self.ids[row]}"
        return f"{own} (image {self.image_ids[row]})"


@dataclass(frozen=True)
class RawCoco:
    """A file as it came: image and category objects unchecked, annotations packed."""

    images: list[Any]
    categories: list[Any]
    columns: Columns


class _Row(int):
    """Stands in the parsed tree for an annotation that was packed into this row."""

    __slots__ = ()


def integer(value: Any) -> int | None:
    """An integer of 64 bits, also if JSON has it as 3.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and MISSING < value < 2**63 else None


def read_json(path: Path, max_pixels: int, report: Report) -> RawCoco | None:
    """Reads the file; what cannot be read goes into the report. None if it is no COCO file at all. Raises UserError if it cannot be opened."""
    columns = _Packer(max_pixels, report)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        report.error("not JSON: the file is not UTF-8 text", str(error))
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        tree = parse_json(text, object_hook=columns.pack)
    except json.JSONDecodeError as error:
        where = f"; it ends after {len(text)} characters"
        report.error("not JSON: the file is cut short or damaged", f"{error}{where}")
        return None
    except (ValueError, RecursionError) as error:
        report.error("not JSON: the file is cut short or damaged", str(error))
        return None
    if not isinstance(tree, dict):
        report.error(
            "not a COCO data set",
            f"the file holds a {type(tree).__name__}, not an object with {', '.join(_LISTS)}",
        )
        return None
    lacking = [key for key in _LISTS if not isinstance(tree.get(key), list)]
    if lacking:
        report.error("not a COCO data set", *(f"it has no list '{key}'" for key in lacking))
        return None
    rows = _rows(tree["annotations"], report)
    rows = np.concatenate(
        [rows, _label_images(tree["images"], tree["categories"], columns, report)]
    )
    return RawCoco(tree["images"], tree["categories"], columns.columns(rows))


def _rows(annotations: list[Any], report: Report) -> Ints:
    for entry in annotations:
        if type(entry) is not _Row:
            told = (
                f"annotation {entry.get('id')} has no image_id"
                if isinstance(entry, dict) and "image_id" not in entry
                else f"{entry!r}"
            )
            report.error("entry of 'annotations' that is no annotation", told[:80])
    return np.array([entry for entry in annotations if type(entry) is _Row], dtype=np.int64)


def _label_images(
    images: list[Any], categories: list[Any], columns: _Packer, report: Report
) -> Ints:
    """Packs the crowds of images that name their classes. -> their rows, i64 [L]."""
    labelled = [image for image in images if isinstance(image, dict) and image.get("category_ids")]
    if not labelled:
        return np.zeros(0, dtype=np.int64)
    known = {integer(c.get("id")) for c in categories if isinstance(c, dict)}
    shown = set(zip(columns.image_ids, columns.category_ids, strict=True))
    number, rows = max(0, max(columns.ids, default=0)), []
    for image in labelled:
        own, name = image["category_ids"], f"image {image.get('id')!s:.40}"
        ids = [integer(i) for i in own] if isinstance(own, list) else [None]
        if None in ids or not set(ids) <= known:
            report.error(
                "category_ids of an image that are not ids of categories", f"{name}: {own!r}"[:120]
            )
            continue
        place, height, width = (integer(image.get(key)) for key in ("id", "height", "width"))
        if place is None or not height or not width:
            continue  # which the checks tell
        for category in sorted({i for i in ids if i is not None and (place, i) not in shown}):
            number += 1
            values = {
                "id": number,
                "image_id": place,
                "category_id": category,
                "bbox": [0, 0, width, height],
                "iscrowd": 1,
            }
            rows.append(columns.pack(values))
    return np.array(rows, dtype=np.int64)


class _Packer:
    """Puts annotations into columns as the JSON parser meets them."""

    def __init__(self, max_pixels: int, report: Report) -> None:
        self.report = report
        self.ids, self.image_ids, self.category_ids = array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.has_box, self.crowd, self.good = array("b"), array("b"), array("b")
        self.segmentations = Packer(max_pixels)
        self.points, self.point_counts = array("f"), array("q")

    def pack(self, values: dict[str, Any]) -> Any:
        """Every object of the file comes by here, inner ones first; an annotation is one with an image_id and something to learn."""
        if "image_id" not in values or not (
            "category_id" in values or "bbox" in values or "segmentation" in values
        ):
            return values
        row = _Row(len(self.ids))
        problems = []
        for key, column in (("image_id", self.image_ids), ("category_id", self.category_ids)):
            number = integer(values.get(key))
            column.append(0 if number is None else number)
            if number is None:
                problems.append((f"{key} that is not an integer", f"{values.get(key)!r}"[:80]))
        number = integer(values.get("id"))
        if number is None and values.get("id") is not None:
            problems.append(("annotation id that is not an integer", ""))
        self.ids.append(MISSING if number is None else number)
        problems += self._box(values.get("bbox"))
        problems += self._keypoints(values.get("keypoints"))
        crowd = values.get("iscrowd") or 0
        if crowd not in (0, 1):
            problems.append(("iscrowd that is neither 0 nor 1", f"{crowd!r}"[:80]))
        self.crowd.append(crowd == 1)
        area = values.get("area")
        self.areas.append(
            float(area) if isinstance(area, int | float) and 0 < area < 1e300 else np.nan
        )
        try:
            self.segmentations.add(values.get("segmentation"))
        except SegmentationError as error:
            problems.append((error.kind, error.detail))
        if not values.get("bbox") and not values.get("segmentation"):
            problems.append(("annotation with neither bbox nor segmentation", ""))
        self.good.append(not problems)
        for kind, detail in problems:
            name = f"annotation {values.get('id', 'without id')!s:.40} (image {values['image_id']!s:.40})"
            self.report.error(kind, f"{name}: {detail}" if detail else name)
        return row

    def _box(self, box: Any) -> list[tuple[str, str]]:
        """Stores a bbox; null and [] count as missing."""
        problem = []
        try:
            numbers = array("d", box or ())
        except (TypeError, OverflowError):
            numbers = array("d", [0])
        if len(numbers) not in (0, 4):
            problem.append(("bbox that is not four numbers", f"{box!r}"[:80]))
        self.has_box.append(len(numbers) == 4)
        self.boxes.extend(numbers if len(numbers) == 4 else array("d", [np.nan] * 4))
        return problem

    def _keypoints(self, points: Any) -> list[tuple[str, str]]:
        """Stores x, y, visibility of each; null and [] count as none."""
        try:
            numbers = array("f", points or ())
            wrong = len(numbers) % 3 != 0
        except (TypeError, OverflowError):
            numbers, wrong = array("f"), True
        self.point_counts.append(0 if wrong else len(numbers))
        self.points.extend(() if wrong else numbers)
        return (
            [("keypoints that are not x, y, visibility of each point", f"{points!r}"[:80])]
            if wrong
            else []
        )

    def columns(self, rows: Ints) -> Columns:
        """The columns; only `rows` belong to the file's list of annotations."""
        listed = np.zeros(len(self.ids), dtype=bool)
        listed[rows] = True
        return Columns(
            ids=np.array(self.ids, dtype=np.int64),
            image_ids=np.array(self.image_ids, dtype=np.int64),
            category_ids=np.array(self.category_ids, dtype=np.int64),
            boxes=np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            has_box=np.array(self.has_box, dtype=bool),
            areas=np.array(self.areas, dtype=np.float64),
            crowd=np.array(self.crowd, dtype=bool),
            good=np.array(self.good, dtype=bool) & listed,
            segmentations=self.segmentations.packed(),
            points=np.array(self.points, dtype=np.float32),
            point_starts=np.concatenate(
                [[0], np.cumsum(np.array(self.point_counts, dtype=np.int64))]
            ).astype(np.int64),
        )
