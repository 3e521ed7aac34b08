"""Checks of the annotations of a COCO file.

Invalid annotations are errors. Repairable annotations are repaired with a warning, and those
without an object are dropped with a warning.

All rules work on whole columns, so that a million annotations take seconds; only run lengths are
checked one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.packed_segmentations import (
    MIN_COORDINATES,
    POLYGONS,
    RLE,
    SegmentationError,
    clip_polygon,
    rle_box,
)
from maskseg.data.coco.parse import MISSING, AnnotationColumns
from maskseg.data.coco.report import MAX_EXAMPLES, Report
from maskseg.ops.rle import Ints

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

# px: clipping by more than rounding explains is worth a warning.
CLIP_WARNING_PX = 1.0

_NO_EXTENT = "box without width or height, dropped"
_OUTSIDE = "annotation outside its image, dropped"


@dataclass(frozen=True)
class ValidAnnotations:
    """The valid annotations, sorted by image, in the file's order within an image.

    rows: i64 [A], rows in the packed segmentations;
    image_index: i64 [A], index in the file's list of images; labels: i64 [A]; ids: i64 [A];
    boxes: f64 [A, 4], x, y, width, height in pixels, clipped to the image;
    areas: f64 [A], NaN where absent; crowd: bool [A];
    has_points: bool [A], whether the annotation has as many keypoints as its category.
    """

    rows: Ints
    image_index: Ints
    labels: Ints
    ids: Ints
    boxes: Floats
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
    extents = np.full((len(columns.ids), 4), np.nan)
    _check_polygons(rows_left, extents)
    _clip_polygons(rows_left, extents, sizes)
    _check_run_lengths(rows_left, extents, sizes)
    boxes = _check_boxes(rows_left, extents, sizes)
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
    ids[unnumbered] = max(int(ids.max(initial=0)), 0) + 1 + np.arange(len(unnumbered))
    return ids


def _check_polygons(rows_left: _RowFilter, extents: Floats) -> None:
    """Check coordinates and lengths of polygons; fill `extents` [A, 4] (xyxy) of their rows."""
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
    if not used.any():
        return
    coords = packed.coords if used.all() else packed.coords[np.repeat(used, lengths)]
    starts = np.concatenate([[0], np.cumsum(lengths[used] // 2)[:-1]])
    polygon_rows, first_part = np.unique(row_of_part[used], return_index=True)
    for axis in (0, 1):
        values = coords[axis::2]
        part_min = np.minimum.reduceat(values, starts)
        part_max = np.maximum.reduceat(values, starts)
        extents[polygon_rows, axis] = np.minimum.reduceat(part_min, first_part)
        extents[polygon_rows, axis + 2] = np.maximum.reduceat(part_max, first_part)


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


def _check_run_lengths(rows_left: _RowFilter, extents: Floats, sizes: Ints) -> None:
    """Check size and run lengths of RLE masks; fill `extents` of rows without a bbox."""
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
    empty = np.zeros(len(sizes), dtype=bool)
    for row in np.flatnonzero(has_rle & rows_left.good).tolist():
        try:
            counts = packed.counts(row)
        except SegmentationError as error:
            rows_left.report.error(error.kind, f"{columns.name(row)}: {error.detail}")
            rows_left.good[row] = False
            continue
        empty[row] = not counts[1::2].any()
        if not columns.has_box[row]:
            extents[row] = rle_box(counts, int(packed.heights[row]))
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


@np.errstate(over="ignore", invalid="ignore")  # rows that were rejected before may hold anything
def _check_boxes(rows_left: _RowFilter, extents: Floats, sizes: Ints) -> Floats:
    """Drop boxes without extent or outside their image, and clip the others.

    Returns f64 [A, 4], x, y, width, height: the file's numbers where nothing was clipped.
    """
    columns = rows_left.columns
    limits = np.tile(sizes[:, ::-1], 2).astype(np.float64)
    corners = columns.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    corners = np.where(columns.has_box[:, None], corners, extents)
    rows_left.drop(_has_no_extent(corners), _NO_EXTENT)
    clipped = corners.clip(0, limits)
    rows_left.drop(_has_no_extent(clipped), _OUTSIDE)
    changed = (clipped != corners).any(axis=1) | ~columns.has_box
    overshoot = np.abs(clipped - corners).max(axis=1)
    rows_left.warn(
        columns.has_box & (overshoot > CLIP_WARNING_PX),
        "bbox that extends beyond its image, clipped",
    )
    sides = np.concatenate([clipped[:, :2], clipped[:, 2:] - clipped[:, :2]], axis=1)
    return np.where(changed[:, None], sides, columns.boxes)
