"""Checks of the annotations of a COCO file.

Invalid annotations are errors. Repairable annotations are repaired with a warning, and those
without an object are dropped with a warning. The fields of an annotation are compared with each
other: a bbox with its mask, the mask with its image.

All rules work on whole columns, so that a million annotations take seconds; only polygons that may
cover no pixel are rasterized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from maskseg.data.coco.packed_segmentations import (
    MIN_COORDINATES,
    NONE,
    POLYGONS,
    RLE,
    SegmentationError,
    clip_polygon,
)
from maskseg.data.coco.parse import MISSING, AnnotationColumns
from maskseg.data.coco.polygon_areas import find_thin_polygons
from maskseg.data.coco.report import MAX_EXAMPLES, Report
from maskseg.ops.rle import Ints, strings_from_counts

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

# px: clipping by more than rounding explains is worth a warning.
CLIP_WARNING_PX = 1.0
# A bbox agrees with its mask if no side differs by more than this: pixels, and the share of the
# mask's larger side. Converters round to pixels and count the last pixel in or out.
BOX_TOLERANCE_PX = 2.0
BOX_TOLERANCE = 0.05
# A bbox of this many times the area of its mask's box is more than a loose box.
LARGE_BOX = 4.0
# Without masks, boxes are taken for corners if at least this share of them leaves the image.
MIN_SHARE_BEYOND = 0.25

# In an image of a longer side, coordinates within 0..1 are not pixels.
_MIN_SIDE_OF_PIXELS = 8

_NO_EXTENT = "box without width or height, dropped"
_OUTSIDE = "annotation outside its image, dropped"
_AS_STATED = "; training uses the bbox as stated"
BOX_IN_FRACTIONS = "bbox in fractions of the image's size instead of pixels"
POLYGON_IN_FRACTIONS = "polygon in fractions of the image's size instead of pixels"
BOX_AS_CORNERS = "bbox that seems to be x1, y1, x2, y2 instead of x, y, width, height" + _AS_STATED


@dataclass(frozen=True)
class ValidAnnotations:
    """The valid annotations, sorted by image, in the file's order within an image.

    rows: i64 [A], rows in the packed segmentations;
    image_index: i64 [A], index in the file's list of images; labels: i64 [A]; ids: i64 [A];
    boxes: f64 [A, 4], x, y, width, height in pixels, clipped to the image;
    disagrees: bool [A], whether the box of the file contradicts the mask;
    mask_boxes: f64 [A, 4], xyxy of the masks, NaN where there is none;
    areas: f64 [A], NaN where absent; crowd: bool [A];
    has_points: bool [A], whether the annotation has as many keypoints as its category.
    """

    rows: Ints
    image_index: Ints
    labels: Ints
    ids: Ints
    boxes: Floats
    disagrees: Bools
    mask_boxes: Floats
    areas: Floats
    crowd: Bools
    has_points: Bools


class _RowFilter:
    """Tracks which rows are still valid, and reports those that are not.

    A row is reported once: later rules skip rows that are not `good` any more.
    """

    def __init__(self, columns: AnnotationColumns, report: Report) -> None:
        self.columns = columns
        self.report = report
        self.good = columns.good.copy()

    def error(self, bad: Bools, kind: str, describe: Callable[[int], str] | None = None) -> None:
        """Reject rows that the user must fix; `describe` explains the problem of one row."""
        rows = np.flatnonzero(bad & self.good)
        if not len(rows):
            return
        examples = []
        for row in rows[:MAX_EXAMPLES].tolist():
            name = self.columns.name(row)
            examples.append(f"{name}: {describe(row)}" if describe else name)
        self.report.error(kind, *examples, count=len(rows))
        self.good[rows] = False

    def drop(self, bad: Bools, kind: str) -> None:
        """Drop rows with a warning."""
        self.good[self._warn(bad, kind)] = False

    def warn(self, repaired: Bools, kind: str) -> None:
        """Warn about rows that are repaired and stay."""
        self._warn(repaired, kind)

    def _warn(self, selected: Bools, kind: str) -> Ints:
        rows = np.flatnonzero(selected & self.good)
        if len(rows):
            names = [self.columns.name(row) for row in rows[:MAX_EXAMPLES].tolist()]
            self.report.warn(kind, *names, count=len(rows))
        return rows


def check_annotations(
    columns: AnnotationColumns,
    image_ids: Ints,
    sizes: Ints,
    category_ids: Ints,
    labels: Ints,
    num_points: Ints,
    report: Report,
) -> ValidAnnotations:
    """Check every annotation and return the valid ones; problems go into the report.

    image_ids: i64 [N]; sizes: i64 [N, 2], height and width, zeros where unknown;
    category_ids: i64 [C], of the file; labels: i64 [C], the label of each category;
    num_points: i64 [C], the number of keypoints of each category.
    """
    rows_left = _RowFilter(columns, report)
    _check_ids(columns, report)
    image_index = _index_in(image_ids, columns.image_ids)
    rows_left.error(image_index < 0, "annotation of an image that is not in the file")
    category = _index_in(category_ids, columns.category_ids)
    rows_left.error(
        category < 0,
        "annotation of a category that is not in the file",
        lambda row: f"category {columns.category_ids[row]}",
    )
    # The extra row is what index -1, an unknown image, selects.
    padded_sizes = np.concatenate([sizes, np.zeros((1, 2), dtype=np.int64)])
    sizes = padded_sizes[image_index]
    # An image without a size has been reported with the images.
    rows_left.good &= sizes.min(axis=1) > 0
    rows_left.error(
        columns.has_box & ~np.isfinite(columns.boxes).all(axis=1), "bbox with NaN or infinity"
    )
    rows_left.warn(columns.ignored, "annotation with ignore=1, read as a crowd")
    extents = np.full((len(columns.ids), 4), np.nan)
    thin = _check_polygons(rows_left, extents)
    _check_polygon_units(rows_left, extents, sizes)
    _clip_polygons(rows_left, extents, sizes)
    _drop_empty_polygons(rows_left, thin, sizes)
    _check_run_lengths(rows_left, extents, sizes)
    boxes, disagrees = _check_boxes(rows_left, extents, sizes)
    _check_presence_of_masks(rows_left)
    has_points = _check_keypoints(rows_left, np.append(num_points, 0)[category])
    ids = _fill_ids(rows_left)
    rows = np.flatnonzero(rows_left.good)
    rows = rows[np.argsort(image_index[rows], kind="stable")]
    return ValidAnnotations(
        rows=rows,
        image_index=image_index[rows],
        labels=np.append(labels, -1)[category[rows]],
        ids=ids[rows],
        boxes=boxes[rows],
        disagrees=disagrees[rows],
        mask_boxes=extents[rows],
        areas=columns.areas[rows],
        crowd=columns.crowd[rows],
        has_points=has_points[rows],
    )


def find_duplicates(values: Ints) -> list[tuple[int, int]]:
    """Return the values that occur more than once, each with its number of occurrences."""
    distinct, counts = np.unique(values, return_counts=True)
    repeated = counts > 1
    return list(zip(distinct[repeated].tolist(), counts[repeated].tolist(), strict=True))


def _index_in(table: Ints, values: Ints) -> Ints:
    """Return the index of each value in the table, -1 if it is not there."""
    if not len(table):
        return np.full(len(values), -1, dtype=np.int64)
    order = np.argsort(table, kind="stable")
    position = np.searchsorted(table[order], values).clip(max=len(table) - 1)
    return np.where(table[order][position] == values, order[position], -1)


def _check_ids(columns: AnnotationColumns, report: Report) -> None:
    ids = columns.ids[columns.good]
    duplicates = find_duplicates(ids[ids != MISSING])
    if duplicates:
        report.error(
            "annotation id that is used more than once",
            *(f"id {number}, {n} times" for number, n in duplicates[:MAX_EXAMPLES]),
            count=len(duplicates),
        )


def _fill_ids(rows_left: _RowFilter) -> Ints:
    """Assign ids to rows without one.

    0 is replaced too: pycocotools writes id 0 for a detection that matches nothing.
    """
    ids = rows_left.columns.ids.copy()
    rows_left.warn(ids == MISSING, "annotation without an id, assigned one")
    rows_left.warn(
        ids == 0, 'annotation with id 0, which pycocotools reads as "no match"; renumbered'
    )
    unnumbered = np.flatnonzero((ids == MISSING) | (ids == 0))
    first = max(int(ids.max(initial=0)), 0) + 1
    new_ids = np.arange(len(unnumbered))
    if first <= np.iinfo(np.int64).max - len(unnumbered):
        new_ids += first
    else:
        new_ids = np.setdiff1d(np.arange(1, 2 * len(ids) + 1), ids)[: len(unnumbered)]
    ids[unnumbered] = new_ids
    return ids


def _check_polygons(rows_left: _RowFilter, extents: Floats) -> Bools:
    """Check coordinates and lengths of polygons; fill `extents` [A, 4] (xyxy) of their rows.

    Returns bool [A], rows whose polygons are all so thin that they may cover no pixel.
    """
    packed = rows_left.columns.segmentations
    lengths = np.diff(packed.coord_starts)
    rows = np.arange(len(packed.kinds))
    row_of_part = np.repeat(rows, np.diff(packed.part_starts))

    def rows_with(parts: Bools | Ints) -> Bools:
        flags = np.zeros(len(rows), dtype=bool)
        flags[row_of_part[parts]] = True
        return flags

    not_finite = np.flatnonzero(~np.isfinite(packed.coords))
    rows_left.error(
        rows_with(np.searchsorted(packed.coord_starts, not_finite, side="right") - 1),
        "polygon with NaN or infinity",
    )
    rows_left.error(rows_with(lengths % 2 == 1), "polygon with an odd number of coordinates")
    short = lengths < MIN_COORDINATES
    rows_left.warn(rows_with(short), "polygon with fewer than 3 points, dropped")
    rows_left.drop(
        (packed.kinds == POLYGONS) & ~rows_with(~short),
        "annotation whose polygons all have fewer than 3 points, dropped",
    )
    used = rows_left.good[row_of_part] & ~short
    thin = np.zeros(len(rows), dtype=bool)
    if not used.any():
        return thin
    coords = packed.coords if used.all() else packed.coords[np.repeat(used, lengths)]
    starts = np.concatenate([[0], np.cumsum(lengths[used] // 2)[:-1]])
    polygon_rows, first_part = np.unique(row_of_part[used], return_index=True)
    for axis in (0, 1):
        values = coords[axis::2]
        part_min = np.minimum.reduceat(values, starts)
        part_max = np.maximum.reduceat(values, starts)
        extents[polygon_rows, axis] = np.minimum.reduceat(part_min, first_part)
        extents[polygon_rows, axis + 2] = np.maximum.reduceat(part_max, first_part)
    thin_parts = find_thin_polygons(coords.reshape(-1, 2), starts)
    thin[polygon_rows] = np.logical_and.reduceat(thin_parts, first_part)
    return thin


def _check_polygon_units(rows_left: _RowFilter, extents: Floats, sizes: Ints) -> None:
    """Report polygons in fractions of the image's size, if all of the file are."""
    rows = np.flatnonzero(rows_left.good & np.isfinite(extents).all(axis=1))
    in_fractions = _is_in_fractions(extents[rows], sizes[rows])
    if len(rows) and in_fractions.all():
        selected = np.zeros(len(extents), dtype=bool)
        selected[rows] = True
        rows_left.error(selected, POLYGON_IN_FRACTIONS)


def _is_in_fractions(values: Floats, sizes: Ints) -> Bools:
    """Find rows f64 [n, 4] within 0..1, which are not pixels of an image of more than a few."""
    within = (values >= 0).all(axis=1) & (values <= 1).all(axis=1)
    return np.asarray(within & (sizes.min(axis=1) > _MIN_SIDE_OF_PIXELS))


def _clip_polygons(rows_left: _RowFilter, extents: Floats, sizes: Ints) -> None:
    """Clip polygons that cross the image's border; update `extents`."""
    packed = rows_left.columns.segmentations
    limits = sizes[:, ::-1]
    # How far each row reaches out of its image, px; NaN where there are no polygons.
    overshoot = np.maximum(-extents[:, :2], extents[:, 2:] - limits).max(axis=1)
    outside = np.zeros(len(sizes), dtype=bool)
    for row in np.flatnonzero(rows_left.good & (overshoot > 0)).tolist():
        height, width = sizes[row].tolist()
        clipped = (clip_polygon(part, height, width) for part in packed.polygons(row))
        parts = tuple(part for part in clipped if len(part))
        packed.clipped[row] = parts
        outside[row] = not parts
        if parts:
            points = np.concatenate(parts)
            extents[row] = *points.min(axis=0), *points.max(axis=0)
    rows_left.drop(outside, _OUTSIDE)
    rows_left.warn(overshoot > CLIP_WARNING_PX, "polygon that extends beyond its image, clipped")


def _drop_empty_polygons(rows_left: _RowFilter, thin: Bools, sizes: Ints) -> None:
    """Drop annotations whose polygons cover no pixel.

    thin: bool [A], the rows that may be empty, besides the clipped ones. They are rasterized.
    """
    packed = rows_left.columns.segmentations
    suspects = thin.copy()
    suspects[list(packed.clipped)] = True
    rows = np.flatnonzero(suspects & rows_left.good)
    empty = np.zeros(len(thin), dtype=bool)
    empty[rows] = True
    # One call for all images of the same size: a call takes longer than a small polygon.
    distinct_sizes, group = np.unique(sizes[rows], axis=0, return_inverse=True)
    for number, (height, width) in enumerate(distinct_sizes.tolist()):
        of_size = rows[group.ravel() == number].tolist()
        polygons = []
        row_of_polygon = []
        for row in of_size:
            parts = packed.polygons(row)
            polygons += [part.ravel() for part in parts]
            row_of_polygon += [row] * len(parts)
        no_pixels = strings_from_counts(np.array([height * width]), np.array([1]))[0].encode()
        rles = coco_mask.frPyObjects(polygons, height, width)
        has_pixels = [rle["counts"] != no_pixels for rle in rles]
        empty[np.array(row_of_polygon)[has_pixels]] = False
    rows_left.drop(empty, "annotation whose polygons cover no pixel, dropped")


def _check_run_lengths(rows_left: _RowFilter, extents: Floats, sizes: Ints) -> None:
    """Check size and run lengths of RLE masks; fill `extents` of their rows."""
    columns = rows_left.columns
    packed = columns.segmentations
    has_rle = packed.kinds == RLE
    stated = np.stack([packed.heights, packed.widths], axis=1)
    rows_left.error(
        has_rle & (stated != sizes).any(axis=1),
        "RLE whose size differs from its image's",
        lambda row: (
            f"{stated[row, 0]} x {stated[row, 1]}, "
            f"the image is {sizes[row, 0]} x {sizes[row, 1]} (height x width)"
        ),
    )
    rows = np.flatnonzero(has_rle & rows_left.good)
    boxes, is_valid = packed.rle_boxes(rows)
    for row in rows[~is_valid].tolist():
        try:
            packed.counts(row)
        except SegmentationError as error:
            rows_left.report.error(error.kind, f"{columns.name(row)}: {error.detail}")
            rows_left.good[row] = False
    extents[rows] = boxes
    empty = np.zeros(len(sizes), dtype=bool)
    empty[rows] = ~boxes.any(axis=1)
    rows_left.drop(empty, "annotation with an empty mask, dropped")


def _check_keypoints(rows_left: _RowFilter, expected: Ints) -> Bools:
    """Check number and values of the keypoints.

    expected: i64 [A], the number of keypoints of each row's category.
    Returns bool [A], rows with the expected number.
    """
    columns = rows_left.columns
    counts = np.diff(columns.point_starts) // 3
    rows_left.warn(
        (counts > 0) & (expected == 0), "keypoints of a category without keypoints, dropped"
    )
    rows_left.error(
        (counts > 0) & (expected > 0) & (counts != expected),
        "number of keypoints that differs from the category's",
        lambda row: f"{counts[row]} points, the category has {expected[row]}",
    )
    row_of_point = np.repeat(np.arange(len(counts)), counts)
    triples = columns.points.reshape(-1, 3)
    invalid = ~np.isfinite(triples).all(axis=1) | ~np.isin(triples[:, 2], (0, 1, 2))
    bad = np.zeros(len(counts), dtype=bool)
    bad[row_of_point[invalid]] = True
    rows_left.error(
        bad & (expected > 0), "keypoints with NaN, infinity, or a visibility that is not 0, 1 or 2"
    )
    return np.asarray((counts > 0) & (counts == expected))


def _has_no_extent(corners: Floats) -> Bools:
    """Find boxes xyxy without width or height in single precision, which the training uses.

    From 600 to 600 + 1e-6, for example, is no width in float32.
    """
    single = corners.astype(np.float32)
    return np.asarray(~(single[:, 2:] > single[:, :2]).all(axis=1))


@np.errstate(
    over="ignore", invalid="ignore", divide="ignore"
)  # rows that were rejected before may hold anything
def _check_boxes(rows_left: _RowFilter, extents: Floats, sizes: Ints) -> tuple[Floats, Bools]:
    """Compare boxes with their masks and their images.

    A box without extent or outside its image is taken from its mask, or dropped if there is none.
    The others are clipped.
    Returns f64 [A, 4], x, y, width, height: the file's numbers where nothing was changed; and
    bool [A], the rows whose boxes contradict their masks.
    """
    columns = rows_left.columns
    limits = np.tile(sizes[:, ::-1], 2).astype(np.float64)
    stated = columns.boxes.copy()
    stated[:, 2:] += stated[:, :2]
    has_mask = ~_has_no_extent(extents)
    _check_box_units(rows_left, stated, has_mask, sizes)
    no_extent = columns.has_box & _has_no_extent(stated)
    outside = columns.has_box & ~no_extent & _has_no_extent(stated.clip(0, limits))
    rows_left.warn(no_extent & has_mask, "bbox without width or height, taken from its mask")
    rows_left.warn(outside & has_mask, "bbox outside its image, taken from its mask")
    uses_box = columns.has_box & ~((no_extent | outside) & has_mask)
    corners = np.where(uses_box[:, None], stated, extents)
    rows_left.drop(_has_no_extent(corners), _NO_EXTENT)
    clipped = corners.clip(0, limits)
    rows_left.drop(_has_no_extent(clipped), _OUTSIDE)
    is_compared = uses_box & has_mask
    disagrees = _compare_with_masks(rows_left, is_compared, clipped, extents, sizes)
    changed = (clipped != corners).any(axis=1) | ~uses_box
    overshoot = np.abs(clipped - corners).max(axis=1)
    rows_left.warn(
        uses_box & ~disagrees & (overshoot > CLIP_WARNING_PX),
        "bbox that extends beyond its image, clipped",
    )
    sides = np.concatenate([clipped[:, :2], clipped[:, 2:] - clipped[:, :2]], axis=1)
    return np.where(changed[:, None], sides, columns.boxes), disagrees


def _check_box_units(rows_left: _RowFilter, stated: Floats, has_mask: Bools, sizes: Ints) -> None:
    """Report boxes without masks that are no x, y, width, height in pixels, if all seem so.

    stated: f64 [A, 4], xyxy by the definition of COCO.
    """
    columns = rows_left.columns
    is_checked = rows_left.good & columns.has_box & ~has_mask
    rows = np.flatnonzero(is_checked)
    if not len(rows):
        return
    boxes = columns.boxes[rows]
    if not (has_mask & rows_left.good).any() and _is_in_fractions(boxes, sizes[rows]).all():
        rows_left.error(is_checked, BOX_IN_FRACTIONS)
        return
    limits = sizes[rows, ::-1]
    beyond = (stated[rows, 2:] > limits + CLIP_WARNING_PX).any(axis=1)
    fit_as_corners = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits)
    if fit_as_corners.all() and beyond.mean() >= MIN_SHARE_BEYOND:
        rows_left.warn(is_checked, BOX_AS_CORNERS)


def _compare_with_masks(
    rows_left: _RowFilter, is_compared: Bools, boxes: Floats, extents: Floats, sizes: Ints
) -> Bools:
    """Warn about boxes that contradict their masks.

    boxes, extents: f64 [A, 4], xyxy, of the boxes and of the masks, inside the image.
    Returns bool [A], the rows with a warning.
    """
    tolerance = np.maximum(
        BOX_TOLERANCE_PX, BOX_TOLERANCE * (extents[:, 2:] - extents[:, :2]).max(axis=1)
    )
    differs = np.abs(boxes - extents).max(axis=1) > tolerance
    candidates = is_compared & differs
    numbers = rows_left.columns.boxes  # x, y, width and height as stated
    limits = sizes[:, ::-1]
    as_corners = np.concatenate([numbers[:, :2], np.minimum(numbers[:, 2:], limits)], axis=1)
    are_corners = candidates & (np.abs(as_corners - extents).max(axis=1) <= tolerance)
    are_fractions = candidates & ~are_corners & _is_in_fractions(numbers, sizes)
    named = are_corners | are_fractions
    protrusion = np.maximum(boxes[:, :2] - extents[:, :2], extents[:, 2:] - boxes[:, 2:])
    exposes_mask = candidates & ~named & (protrusion.max(axis=1) > tolerance)
    ratio = _areas(boxes) / _areas(extents)
    is_large = candidates & ~named & ~exposes_mask & (ratio >= LARGE_BOX)
    for flags, kind in (
        (are_corners, "bbox that is x1, y1, x2, y2 of its mask instead of x, y, width, height"),
        (are_fractions, BOX_IN_FRACTIONS),
        (exposes_mask, "bbox that does not enclose its mask"),
        (is_large, f"bbox of at least {LARGE_BOX:g} times the area of its mask's box"),
    ):
        rows_left.warn(flags, kind + _AS_STATED)
    return np.asarray((named | exposes_mask | is_large) & rows_left.good)


def _areas(corners: Floats) -> Floats:
    return np.asarray((corners[:, 2:] - corners[:, :2]).prod(axis=1))


def _check_presence_of_masks(rows_left: _RowFilter) -> None:
    """Warn about objects without a mask beside objects with one; crowds need none."""
    columns = rows_left.columns
    is_object = rows_left.good & ~columns.crowd
    has_none = columns.segmentations.kinds == NONE
    if (is_object & ~has_none).any():
        rows_left.warn(is_object & has_none, "object without a mask, beside objects with masks")
