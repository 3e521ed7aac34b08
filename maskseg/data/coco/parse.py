"""Parse a COCO JSON file into lists of images and categories, and columns of annotations.

Annotations are packed into arrays while the JSON is parsed. The tree of Python objects that
COCO's own training file would create (several gigabytes) never exists.

An image without annotations may name the classes it shows: `category_ids: [3, 17]` beside its
`file_name`. Each of them becomes a crowd over the whole image: the class is present, so no region
of the image is certain background. Where images with annotations have this field too, it is a
field of the exporter's own and is not read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.packed_segmentations import (
    SegmentationError,
    SegmentationPacker,
    Segmentations,
)
from maskseg.data.coco.report import MAX_EXAMPLES, Report
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.ops.rle import Ints

MISSING = -(2**63)  # marks an id that is not given
_NO_TEXT = "not JSON: the file is not UTF-8 text"
_DAMAGED = "not JSON: the file is truncated or damaged"
_UNPARSABLE = "JSON that cannot be parsed"
_NO_DATASET = "not a COCO dataset"
UNREADABLE = (_NO_TEXT, _DAMAGED, _UNPARSABLE, _NO_DATASET)  # kinds of files without a dataset
_LISTS = ("images", "annotations", "categories")
_MAX_AREA = 1e300  # larger areas, and infinity, count as missing

Crowds = Literal["ignore", "objects"]  # how annotations with iscrowd=1 are read
CROWDS: tuple[Crowds, ...] = get_args(Crowds)

_Problem = tuple[str, str]  # kind and detail of an error in the report


@dataclass(frozen=True)
class AnnotationColumns:
    """The A annotations of a file, unchecked, one column per field.

    ids: i64 [A], MISSING where absent; image_ids, category_ids: i64 [A];
    boxes: f64 [A, 4], x, y, width, height in pixels, NaN where `has_box` is False;
    areas: f64 [A], NaN where absent; crowd: bool [A], `ignored` or iscrowd=1, if crowds are read;
    ignored: bool [A], annotations with ignore=1;
    good: bool [A], rows that could be parsed and belong to the file's list of annotations;
    list_index: i64 [A], place in the file's list of annotations, -1 for rows of other origin;
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
    ignored: NDArray[np.bool_]
    good: NDArray[np.bool_]
    list_index: Ints
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
    """A parsed file: unchecked image and category objects, and packed annotations.

    num_entries: the length of the file's list of annotations.
    """

    images: list[object]
    categories: list[object]
    columns: AnnotationColumns
    num_entries: int


class _PackedRow(int):
    """Row of a packed annotation; stands in for the annotation in the parsed tree."""

    __slots__ = ()


def as_int64(value: object) -> int | None:
    """Return `value` if it is a 64-bit integer (also written as 3.0), None otherwise."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and MISSING < value < 2**63 else None


def read_json(
    path: Path, max_pixels: int, report: Report, crowds: Crowds = "ignore"
) -> ParsedCoco | None:
    """Parse a COCO JSON file; problems go into the report.

    max_pixels: limit for the size of an RLE mask.
    crowds: `objects` reads annotations with iscrowd=1 as objects.
    Returns None if the file is not a COCO dataset at all. Raises UserError if it cannot be opened.
    """
    packer = _AnnotationPacker(max_pixels, report, crowds)
    tree = read_tree(path, report, packer.pack)
    return None if tree is None else _pack_lists(tree, packer, report)


def parse_tree(
    tree: Mapping[str, Any], max_pixels: int, report: Report, crowds: Crowds = "ignore"
) -> ParsedCoco:
    """Pack a dataset that is in memory, of `read_tree`; else like `read_json`."""
    return _pack_lists(tree, _AnnotationPacker(max_pixels, report, crowds), report)


def _pack_lists(tree: Mapping[str, Any], packer: _AnnotationPacker, report: Report) -> ParsedCoco:
    annotation_rows = _list_rows(tree["annotations"], packer, report)
    label_rows = _pack_image_labels(tree["images"], tree["categories"], packer, report)
    columns = packer.to_columns(annotation_rows, label_rows)
    return ParsedCoco(tree["images"], tree["categories"], columns, len(tree["annotations"]))


def read_tree(
    path: Path, report: Report, object_hook: Callable[[dict[str, Any]], object] | None = None
) -> dict[str, Any] | None:
    """Parse a JSON file with the lists of a COCO dataset; problems go into the report.

    object_hook: replaces each JSON object by its result.
    Returns None if the file is not a COCO dataset. Raises UserError if it cannot be opened.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        report.error(_NO_TEXT, str(error))
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        tree = parse_json(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        report.error(
            _DAMAGED,
            f"{error}; the file ends after {len(text)} characters",
        )
        return None
    except (ValueError, RecursionError) as error:
        report.error(_UNPARSABLE, str(error))
        return None
    if not isinstance(tree, dict):
        report.error(
            _NO_DATASET,
            f"the file holds a {type(tree).__name__}, not an object with {', '.join(_LISTS)}",
        )
        return None
    missing_lists = [key for key in _LISTS if not isinstance(tree.get(key), list)]
    if missing_lists:
        report.error(_NO_DATASET, *(f"it has no list '{key}'" for key in missing_lists))
        return None
    return tree


def _list_rows(annotations: list[object], packer: _AnnotationPacker, report: Report) -> Ints:
    """Return the packed row of each entry of the list of annotations, i64 [entries], or -1."""
    rows = []
    for entry in annotations:
        row = packer.pack_if_annotation(entry) if isinstance(entry, dict) else entry
        if type(row) is _PackedRow:
            rows.append(int(row))
            continue
        rows.append(-1)
        description = f"{entry!r}"
        if isinstance(entry, dict) and "image_id" not in entry:
            description = f"annotation {entry.get('id')} has no image_id"
        report.error("entry of 'annotations' that is not an annotation", description[:80])
    return np.array(rows, dtype=np.int64)


def _pack_image_labels(
    images: list[object], categories: list[object], packer: _AnnotationPacker, report: Report
) -> Ints:
    """Pack a crowd for each class that an image without annotations names.

    Returns the new rows, i64 [L].
    """
    labelled = _labelled_images(images, set(packer.image_ids), report)
    known_ids = {as_int64(c.get("id")) for c in categories if isinstance(c, dict)}
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
            values = {
                "id": next_id,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [0, 0, width, height],
                "ignore": 1,
            }
            rows.append(packer.add(values))
            next_id += 1
    return np.array(rows, dtype=np.int64)


def _labelled_images(
    images: list[object], annotated_ids: set[int], report: Report
) -> list[dict[str, object]]:
    """Return the images whose `category_ids` are labels.

    None is, if an image with annotations has the field: annotation tools keep one of this name.
    """
    labelled = [image for image in images if isinstance(image, dict) and image.get("category_ids")]
    own_fields = [image for image in labelled if as_int64(image.get("id")) in annotated_ids]
    kind = "image without annotations whose category_ids are read as crowds over the whole image"
    selected = labelled
    if own_fields:
        kind = "image with category_ids beside annotations, which are not read"
        selected = own_fields
    if selected and annotated_ids:
        names = [f"image {image.get('id')!s:.40}" for image in selected[:MAX_EXAMPLES]]
        report.warn(kind, *names, count=len(selected))
    return [] if own_fields else labelled


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


def _segmentation_of(values: Mapping[str, Any]) -> object:
    """Return the segmentation; None for [[]], as which some exporters write a box alone."""
    segmentation = values.get("segmentation")
    if isinstance(segmentation, list) and not any(segmentation) and values.get("bbox"):
        return None
    return segmentation


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

    def __init__(self, max_pixels: int, report: Report, crowds: Crowds) -> None:
        self.report = report
        self.crowds = crowds
        self.ids = array("q")
        self.image_ids = array("q")
        self.category_ids = array("q")
        self.boxes = array("d")
        self.has_box = array("b")
        self.areas = array("d")
        self.crowd = array("b")
        self.ignored = array("b")
        self.good = array("b")
        self.segmentations = SegmentationPacker(max_pixels)
        self.points = array("f")
        self.point_counts = array("q")

    def pack(self, values: dict[str, Any]) -> dict[str, Any] | _PackedRow:
        """Pack an annotation and return its row; return any other object unchanged.

        The JSON parser passes every object of the file, inner ones first. An object is an
        annotation if it has an image_id and a category, a box or a mask. One with a file name may
        be an image of an exporter that writes such fields there; its place in the file decides.
        """
        return values if "file_name" in values else self.pack_if_annotation(values)

    def pack_if_annotation(self, values: dict[str, Any]) -> dict[str, Any] | _PackedRow:
        """Pack an object with the fields of an annotation; return any other object unchanged."""
        if "image_id" not in values or not (
            "category_id" in values or "bbox" in values or "segmentation" in values
        ):
            return values
        return self.add(values)

    def add(self, values: Mapping[str, Any]) -> _PackedRow:
        """Pack an annotation and return its row."""
        row = _PackedRow(len(self.ids))
        problems = self._add_ids(values)
        problems += self._add_box(values.get("bbox"))
        problems += self._add_keypoints(values.get("keypoints"))
        problems += self._add_crowd(values.get("iscrowd") or 0, values.get("ignore"))
        self._add_area(values.get("area"))
        try:
            self.segmentations.add(_segmentation_of(values))
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

    def _add_ids(self, values: Mapping[str, object]) -> list[_Problem]:
        problems = []
        for key, column in (("image_id", self.image_ids), ("category_id", self.category_ids)):
            number = as_int64(values.get(key))
            column.append(0 if number is None else number)
            if number is None:
                problems.append(
                    (f"{key} that is not an integer of 64 bits", f"{values.get(key)!r:.80}")
                )
        number = as_int64(values.get("id"))
        if number is None and values.get("id") is not None:
            problems.append(("annotation id that is not an integer of 64 bits", ""))
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

    def _add_crowd(self, crowd: object, ignore: object) -> list[_Problem]:
        is_ignored = ignore == 1
        is_crowd = crowd == 1 and self.crowds == "ignore"
        self.ignored.append(is_ignored)
        self.crowd.append(is_crowd or is_ignored)
        if crowd in (0, 1):
            return []
        return [("iscrowd that is neither 0 nor 1", f"{crowd!r}"[:80])]

    def _add_area(self, area: object) -> None:
        if isinstance(area, int | float) and 0 < area < _MAX_AREA:
            self.areas.append(float(area))
        else:
            self.areas.append(np.nan)

    def to_columns(self, annotation_rows: Ints, label_rows: Ints) -> AnnotationColumns:
        """Return the columns.

        annotation_rows: i64 [entries], the row of each entry of the list of annotations, -1 for an
        entry that is none. label_rows: i64 [L], rows that stand for the labels of images. Objects
        elsewhere in the file may look like annotations; they are marked as not good.
        """
        list_index = np.full(len(self.ids), -1, dtype=np.int64)
        places = np.flatnonzero(annotation_rows >= 0)
        list_index[annotation_rows[places]] = places
        is_label = np.zeros(len(self.ids), dtype=bool)
        is_label[label_rows] = True
        point_counts = np.array(self.point_counts, dtype=np.int64)
        return AnnotationColumns(
            ids=np.array(self.ids, dtype=np.int64),
            image_ids=np.array(self.image_ids, dtype=np.int64),
            category_ids=np.array(self.category_ids, dtype=np.int64),
            boxes=np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            has_box=np.array(self.has_box, dtype=bool),
            areas=np.array(self.areas, dtype=np.float64),
            crowd=np.array(self.crowd, dtype=bool),
            ignored=np.array(self.ignored, dtype=bool) & ~is_label,
            good=np.array(self.good, dtype=bool) & (is_label | (list_index >= 0)),
            list_index=list_index,
            segmentations=self.segmentations.to_segmentations(),
            points=np.array(self.points, dtype=np.float32),
            point_starts=np.concatenate([[0], np.cumsum(point_counts)]).astype(np.int64),
        )
