"""Parse a COCO JSON file into lists of images and categories, and columns of annotations.

Annotations are packed into arrays while the JSON is parsed. The tree of Python objects that
COCO's own training file would create (several gigabytes) never exists.

An image may name the classes it shows without locating them: `category_ids: [3, 17]` beside its
`file_name`. Each of these classes without an annotation in the image becomes a crowd over the
whole image: the class is present, so no region of the image is certain background.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.packed_segmentations import (
    SegmentationError,
    SegmentationPacker,
    Segmentations,
)
from maskseg.data.coco.report import Report
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.ops.rle import Ints

MISSING = -(2**63)  # marks an id that is not given
_LISTS = ("images", "annotations", "categories")
_MAX_AREA = 1e300  # larger areas, and infinity, count as missing

_Problem = tuple[str, str]  # kind and detail of an error in the report


@dataclass(frozen=True)
class AnnotationColumns:
    """The A annotations of a file, unchecked, one column per field.

    ids: i64 [A], MISSING where absent; image_ids, category_ids: i64 [A];
    boxes: f64 [A, 4], x, y, width, height in pixels, NaN where `has_box` is False;
    areas: f64 [A], NaN where absent; crowd: bool [A];
    good: bool [A], rows that could be parsed and belong to the file's list of annotations;
    points: f32 [numbers], the keypoints of all rows;
    point_starts: i64 [A + 1], start of each row in `points`.
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
        """Return the keypoints of a row as in the file, f32 [n, 3]: pixel indices, visibility."""
        return self.points[self.point_starts[row] : self.point_starts[row + 1]].reshape(-1, 3)

    def name(self, row: int) -> str:
        """Name the annotation of a row, for messages."""
        if self.ids[row] == MISSING:
            return f"annotation without id (image {self.image_ids[row]})"
        return f"annotation {self.ids[row]} (image {self.image_ids[row]})"


@dataclass(frozen=True)
class ParsedCoco:
    """A parsed file: unchecked image and category objects, and packed annotations."""

    images: list[object]
    categories: list[object]
    columns: AnnotationColumns


class _PackedRow(int):
    """Row of a packed annotation; stands in for the annotation in the parsed tree."""

    __slots__ = ()


def as_int64(value: object) -> int | None:
    """Return `value` if it is a 64-bit integer (also written as 3.0), None otherwise."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and MISSING < value < 2**63 else None


def read_json(path: Path, max_pixels: int, report: Report) -> ParsedCoco | None:
    """Parse a COCO JSON file; problems go into the report.

    max_pixels: limit for the size of an RLE mask. Returns None if the file is not a COCO dataset
    at all. Raises UserError if it cannot be opened.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        report.error("not JSON: the file is not UTF-8 text", str(error))
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    packer = _AnnotationPacker(max_pixels, report)
    try:
        tree = parse_json(text, object_hook=packer.pack)
    except json.JSONDecodeError as error:
        report.error(
            "not JSON: the file is truncated or damaged",
            f"{error}; the file ends after {len(text)} characters",
        )
        return None
    except (ValueError, RecursionError) as error:
        report.error("not JSON: the file is truncated or damaged", str(error))
        return None
    if not isinstance(tree, dict):
        report.error(
            "not a COCO dataset",
            f"the file holds a {type(tree).__name__}, not an object with {', '.join(_LISTS)}",
        )
        return None
    missing_lists = [key for key in _LISTS if not isinstance(tree.get(key), list)]
    if missing_lists:
        report.error("not a COCO dataset", *(f"it has no list '{key}'" for key in missing_lists))
        return None
    annotation_rows = _list_rows(tree["annotations"], report)
    label_rows = _pack_image_labels(tree["images"], tree["categories"], packer, report)
    columns = packer.to_columns(np.concatenate([annotation_rows, label_rows]))
    return ParsedCoco(tree["images"], tree["categories"], columns)


def _list_rows(annotations: list[object], report: Report) -> Ints:
    """Return the packed rows that the file's list of annotations consists of, i64 [A]."""
    rows = []
    for entry in annotations:
        if type(entry) is _PackedRow:
            rows.append(entry)
            continue
        description = f"{entry!r}"
        if isinstance(entry, dict) and "image_id" not in entry:
            description = f"annotation {entry.get('id')} has no image_id"
        report.error("entry of 'annotations' that is not an annotation", description[:80])
    return np.array(rows, dtype=np.int64)


def _pack_image_labels(
    images: list[object], categories: list[object], packer: _AnnotationPacker, report: Report
) -> Ints:
    """Pack a crowd for each class that an image names without an annotation.

    Returns the new rows, i64 [L].
    """
    labelled = [image for image in images if isinstance(image, dict) and image.get("category_ids")]
    if not labelled:
        return np.zeros(0, dtype=np.int64)
    known_ids = {as_int64(c.get("id")) for c in categories if isinstance(c, dict)}
    annotated = set(zip(packer.image_ids, packer.category_ids, strict=True))
    next_id = max(0, max(packer.ids, default=0)) + 1
    rows = []
    for image in labelled:
        category_ids = _parse_category_ids(image, known_ids, report)
        image_id = as_int64(image.get("id"))
        height = as_int64(image.get("height"))
        width = as_int64(image.get("width"))
        if image_id is None or not height or not width:
            continue  # the checks of the image report this
        for category_id in sorted(category_ids):
            if (image_id, category_id) in annotated:
                continue
            values = {
                "id": next_id,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [0, 0, width, height],
                "iscrowd": 1,
            }
            rows.append(packer.pack(values))
            next_id += 1
    return np.array(rows, dtype=np.int64)


def _parse_category_ids(
    image: dict[str, object], known_ids: set[int | None], report: Report
) -> set[int]:
    """Return the `category_ids` of an image; invalid ones are reported and yield an empty set."""
    values = image["category_ids"]
    ids = {as_int64(value) for value in values} if isinstance(values, list) else {None}
    valid_ids = {value for value in ids if value is not None and value in known_ids}
    if len(valid_ids) == len(ids):
        return valid_ids
    report.error(
        "category_ids of an image that are not ids of categories",
        f"image {image.get('id')!s:.40}: {values!r}"[:120],
    )
    return set()


def _to_array(typecode: Literal["d", "f"], value: object) -> array[float] | None:
    """Return numbers as an array, an empty one for null and []; None for anything else."""
    if not value:
        return array(typecode)
    if not isinstance(value, list):
        return None
    try:
        return array(typecode, value)
    except (TypeError, OverflowError):
        return None


class _AnnotationPacker:
    """Stores annotations in columns while the JSON parser reads them."""

    def __init__(self, max_pixels: int, report: Report) -> None:
        self.report = report
        self.ids = array("q")
        self.image_ids = array("q")
        self.category_ids = array("q")
        self.boxes = array("d")
        self.has_box = array("b")
        self.areas = array("d")
        self.crowd = array("b")
        self.good = array("b")
        self.segmentations = SegmentationPacker(max_pixels)
        self.points = array("f")
        self.point_counts = array("q")

    def pack(self, values: dict[str, object]) -> dict[str, object] | _PackedRow:
        """Pack an annotation and return its row; return any other object unchanged.

        The JSON parser passes every object of the file, inner ones first. An object is an
        annotation if it has an image_id and a category, a box or a mask.
        """
        if "image_id" not in values or not (
            "category_id" in values or "bbox" in values or "segmentation" in values
        ):
            return values
        row = _PackedRow(len(self.ids))
        problems = self._add_ids(values)
        problems += self._add_box(values.get("bbox"))
        problems += self._add_keypoints(values.get("keypoints"))
        problems += self._add_crowd(values.get("iscrowd") or 0)
        self._add_area(values.get("area"))
        try:
            self.segmentations.add(values.get("segmentation"))
        except SegmentationError as error:
            problems.append((error.kind, error.detail))
        if not values.get("bbox") and not values.get("segmentation"):
            problems.append(("annotation with neither bbox nor segmentation", ""))
        self.good.append(not problems)
        for kind, detail in problems:
            annotation_id = f"{values.get('id', 'without id')!s:.40}"
            name = f"annotation {annotation_id} (image {values['image_id']!s:.40})"
            self.report.error(kind, f"{name}: {detail}" if detail else name)
        return row

    def _add_ids(self, values: dict[str, object]) -> list[_Problem]:
        problems = []
        for key, column in (("image_id", self.image_ids), ("category_id", self.category_ids)):
            number = as_int64(values.get(key))
            column.append(0 if number is None else number)
            if number is None:
                problems.append((f"{key} that is not an integer", f"{values.get(key)!r}"[:80]))
        number = as_int64(values.get("id"))
        if number is None and values.get("id") is not None:
            problems.append(("annotation id that is not an integer", ""))
        self.ids.append(MISSING if number is None else number)
        return problems

    def _add_box(self, box: object) -> list[_Problem]:
        """Store a bbox; null and [] count as missing."""
        numbers = _to_array("d", box)
        if numbers is not None and len(numbers) == 4:
            self.has_box.append(True)
            self.boxes.extend(numbers)
            return []
        self.has_box.append(False)
        self.boxes.extend([np.nan] * 4)
        if numbers is not None and not len(numbers):
            return []
        return [("bbox that is not four numbers", f"{box!r}"[:80])]

    def _add_keypoints(self, points: object) -> list[_Problem]:
        """Store x, y and visibility of each keypoint; null and [] count as no keypoints."""
        numbers = _to_array("f", points)
        if numbers is not None and len(numbers) % 3 == 0:
            self.point_counts.append(len(numbers))
            self.points.extend(numbers)
            return []
        self.point_counts.append(0)
        return [("keypoints that are not x, y, visibility of each point", f"{points!r}"[:80])]

    def _add_crowd(self, crowd: object) -> list[_Problem]:
        self.crowd.append(crowd == 1)
        if crowd in (0, 1):
            return []
        return [("iscrowd that is neither 0 nor 1", f"{crowd!r}"[:80])]

    def _add_area(self, area: object) -> None:
        if isinstance(area, int | float) and 0 < area < _MAX_AREA:
            self.areas.append(float(area))
        else:
            self.areas.append(np.nan)

    def to_columns(self, rows: Ints) -> AnnotationColumns:
        """Return the columns; `rows` are those that belong to the file's list of annotations.

        Objects elsewhere in the file may look like annotations; they are marked as not good.
        """
        listed = np.zeros(len(self.ids), dtype=bool)
        listed[rows] = True
        point_counts = np.array(self.point_counts, dtype=np.int64)
        return AnnotationColumns(
            ids=np.array(self.ids, dtype=np.int64),
            image_ids=np.array(self.image_ids, dtype=np.int64),
            category_ids=np.array(self.category_ids, dtype=np.int64),
            boxes=np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            has_box=np.array(self.has_box, dtype=bool),
            areas=np.array(self.areas, dtype=np.float64),
            crowd=np.array(self.crowd, dtype=bool),
            good=np.array(self.good, dtype=bool) & listed,
            segmentations=self.segmentations.to_segmentations(),
            points=np.array(self.points, dtype=np.float32),
            point_starts=np.concatenate([[0], np.cumsum(point_counts)]).astype(np.int64),
        )
