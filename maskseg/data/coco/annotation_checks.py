"""The annotations of a COCO file: what is broken is named, what can be mended is mended, and what holds no object is left out.

All rules work on whole columns, so that a million annotations take seconds; only run lengths are looked at one by one.
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
    runs_box,
)
from maskseg.data.coco.parse import MISSING, Columns
from maskseg.data.coco.report import SHOWN, Report
from maskseg.ops.rle import Ints

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
OVERSHOOT = (
    1.0  # px: what reaches further out of the image than rounding explains is worth a warning
)

_NO_EXTENT = "box of no width or height, left out"
_OUTSIDE = "annotation outside its image, left out"


@dataclass(frozen=True)
class Kept:
    """The annotations that stay, sorted by image (in the file's order within one).

    rows: i64 [A], their rows in the packed segmentations; image_index: i64 [A], place in the file's list of images; labels: i64 [A];
    ids: i64 [A]; boxes: f64 [A, 4], x, y, width, height inside the image, as the file has them; areas: f64 [A], NaN where there is none;
    has_points: bool [A], whether there are keypoints, as many as the category has.
    """

    rows: Ints
    image_index: Ints
    labels: Ints
    ids: Ints
    boxes: Floats
    areas: Floats
    crowd: Bools
    has_points: Bools


class _Judge:
    """The rows that are still good, and the way a row loses that."""

    def __init__(self, columns: Columns, report: Report) -> None:
        self.columns, self.report, self.good = columns, report, columns.good.copy()

    def error(self, bad: Bools, kind: str, tell: Callable[[int], str] | None = None) -> None:
        """Rows that must be mended by the user; `tell` adds what is wrong with one."""
        self._strike(bad, kind, tell, self.report.error)

    def drop(self, bad: Bools, kind: str) -> None:
        """Rows that are left out."""
        self._strike(bad, kind, None, self.report.warn)

    def _strike(
        self, bad: Bools, kind: str, tell: Callable[[int], str] | None, say: Callable[..., None]
    ) -> None:
        rows = np.flatnonzero(bad & self.good)
        if len(rows):
            names = [
                self.columns.name(r) + (f": {tell(r)}" if tell else "")
                for r in rows[:SHOWN].tolist()
            ]
            say(kind, *names, count=len(rows))
            self.good[rows] = False

    def warn(self, rows: Bools, kind: str) -> None:
        """Rows that are mended and stay."""
        found = np.flatnonzero(rows & self.good)
        if len(found):
            self.report.warn(
                kind, *(self.columns.name(r) for r in found[:SHOWN].tolist()), count=len(found)
            )


def check_annotations(
    columns: Columns,
    image_ids: Ints,
    sizes: Ints,
    category_ids: Ints,
    labels: Ints,
    num_points: Ints,
    report: Report,
) -> Kept:
    """Judges every annotation.

    image_ids: i64 [N]; sizes: i64 [N, 2] (height, width), zeros where unknown; category_ids: i64 [C] of the file, the
    label of each, and how many keypoints it has.
    """
    judge = _Judge(columns, report)
    _check_ids(columns, report)
    image_index = _place(image_ids, columns.image_ids)
    judge.error(image_index < 0, "annotation of an image that is not in the file")
    category = _place(category_ids, columns.category_ids)
    judge.error(
        category < 0,
        "annotation of a category that is not in the file",
        lambda r: f"category {columns.category_ids[r]}",
    )
    sizes = np.concatenate([sizes, np.zeros((1, 2), dtype=np.int64)])[
        image_index
    ]  # row -1 is the unknown image
    judge.good &= sizes.min(axis=1) > 0  # an image without a size was named before
    judge.error(
        columns.has_box & ~np.isfinite(columns.boxes).all(axis=1), "bbox with NaN or infinity"
    )
    extents = np.full((len(columns.ids), 4), np.nan)
    _check_polygons(judge, extents)
    _clip_polygons(judge, extents, sizes)
    _check_runs(judge, extents, sizes)
    boxes = _check_boxes(judge, extents, sizes)
    has_points = _check_points(judge, np.append(num_points, 0)[category])
    rows = np.flatnonzero(judge.good)
    rows = rows[np.argsort(image_index[rows], kind="stable")]
    label = np.append(labels, -1)[category[rows]]
    ids = _fill_ids(judge)
    return Kept(
        rows,
        image_index[rows],
        label,
        ids[rows],
        boxes[rows],
        columns.areas[rows],
        columns.crowd[rows],
        has_points[rows],
    )


def duplicates(values: Ints) -> list[tuple[int, int]]:
    """Values that occur more than once, and how often."""
    found, counts = np.unique(values, return_counts=True)
    return list(zip(found[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True))


def _place(table: Ints, values: Ints) -> Ints:
    """Where each value stands in the table; -1 if nowhere."""
    if not len(table):
        return np.full(len(values), -1, dtype=np.int64)
    order = np.argsort(table, kind="stable")
    position = np.searchsorted(table[order], values).clip(max=len(table) - 1)
    return np.where(table[order][position] == values, order[position], -1)


def _check_ids(columns: Columns, report: Report) -> None:
    ids = columns.ids[columns.good]
    twice = duplicates(ids[ids != MISSING])
    if twice:
        report.error(
            "annotation id that is used more than once",
            *(f"id {i}, {n} times" for i, n in twice[:SHOWN]),
            count=len(twice),
        )


def _fill_ids(judge: _Judge) -> Ints:
    """Ids for rows that lack one. 0 is no id either: pycocotools writes 0 for a detection that matches nothing."""
    ids = judge.columns.ids.copy()
    judge.warn(ids == MISSING, "annotation without an id, numbered")
    judge.warn(ids == 0, "annotation with id 0, which pycocotools takes for none; renumbered")
    without = np.flatnonzero((ids == MISSING) | (ids == 0))
    ids[without] = max(int(ids.max(initial=0)), 0) + 1 + np.arange(len(without))
    return ids


def _check_polygons(judge: _Judge, extents: Floats) -> None:
    """NaN, odd and short polygons; fills `extents` [A, 4] (xyxy) of rows with polygons."""
    packed = judge.columns.segmentations
    lengths, rows = np.diff(packed.coord_starts), np.arange(len(packed.kinds))
    owner = np.repeat(rows, np.diff(packed.part_starts))

    def owners(parts: Bools | Ints) -> Bools:
        flags = np.zeros(len(rows), dtype=bool)
        flags[owner[parts]] = True
        return flags

    broken = np.flatnonzero(~np.isfinite(packed.coords))
    judge.error(
        owners(np.searchsorted(packed.coord_starts, broken, side="right") - 1),
        "polygon with NaN or infinity",
    )
    judge.error(owners(lengths % 2 == 1), "polygon with an odd number of coordinates")
    short = lengths < MIN_COORDINATES
    judge.warn(owners(short), "polygon part of fewer than 3 points, left out")
    judge.drop(
        (packed.kinds == POLYGONS) & ~owners(~short),
        "annotation whose polygons all have fewer than 3 points, left out",
    )
    use = judge.good[owner] & ~short
    if not use.any():
        return
    coords = packed.coords if use.all() else packed.coords[np.repeat(use, lengths)]
    starts = np.concatenate([[0], np.cumsum(lengths[use] // 2)[:-1]])
    which, first = np.unique(owner[use], return_index=True)
    for axis in (0, 1):
        values = coords[axis::2]
        extents[which, axis] = np.minimum.reduceat(np.minimum.reduceat(values, starts), first)
        extents[which, axis + 2] = np.maximum.reduceat(np.maximum.reduceat(values, starts), first)


def _clip_polygons(judge: _Judge, extents: Floats, sizes: Ints) -> None:
    """Cuts polygons at the image's border, where they cross it."""
    packed, limits = judge.columns.segmentations, sizes[:, ::-1]
    beyond = np.maximum(-extents[:, :2], extents[:, 2:] - limits).max(
        axis=1
    )  # NaN where there are no polygons
    outside = np.zeros(len(sizes), dtype=bool)
    for row in np.flatnonzero(judge.good & (beyond > 0)).tolist():
        height, width = sizes[row].tolist()
        cut = (clip_polygon(part, height, width) for part in packed.polygons(row))
        parts = tuple(part for part in cut if len(part))
        packed.clipped[row] = parts
        outside[row] = not parts
        if parts:
            points = np.concatenate(parts)
            extents[row] = *points.min(axis=0), *points.max(axis=0)
    judge.drop(outside, _OUTSIDE)
    judge.warn(beyond > OVERSHOOT, "polygon that reaches out of its image, cut")


def _check_runs(judge: _Judge, extents: Floats, sizes: Ints) -> None:
    """Run lengths of a wrong size, that don't add up, or of nothing; fills `extents` of rows without a box."""
    columns = judge.columns
    packed, has_runs = columns.segmentations, columns.segmentations.kinds == RLE
    stated = np.stack([packed.heights, packed.widths], axis=1)
    judge.error(
        has_runs & (stated != sizes).any(axis=1),
        "RLE of another size than its image",
        lambda r: (
            f"{stated[r, 0]} x {stated[r, 1]}, the image is {sizes[r, 0]} x {sizes[r, 1]} (height x width)"
        ),
    )
    empty = np.zeros(len(sizes), dtype=bool)
    for row in np.flatnonzero(has_runs & judge.good).tolist():
        try:
            counts = packed.counts(row)
        except SegmentationError as error:
            judge.report.error(error.kind, f"{columns.name(row)}: {error.detail}")
            judge.good[row] = False
            continue
        empty[row] = not counts[1::2].any()
        if not columns.has_box[row]:
            extents[row] = runs_box(counts, int(packed.heights[row]))
    judge.drop(empty, "annotation with an empty mask, left out")


def _check_points(judge: _Judge, expected: Ints) -> Bools:
    """Keypoints of another number than their category's, or that are no numbers; expected: i64 [A]. -> bool [A], rows that have what is expected."""
    columns = judge.columns
    counts = np.diff(columns.point_starts) // 3
    judge.warn((counts > 0) & (expected == 0), "keypoints of a category that names none, left out")
    judge.error(
        (counts > 0) & (expected > 0) & (counts != expected),
        "keypoints of another number than their category's",
        lambda r: f"{counts[r]} points, the category has {expected[r]}",
    )
    owner = np.repeat(np.arange(len(counts)), counts)
    triples = columns.points.reshape(-1, 3)
    bad = np.zeros(len(counts), dtype=bool)
    bad[owner[~np.isfinite(triples).all(axis=1) | ~np.isin(triples[:, 2], (0, 1, 2))]] = True
    judge.error(
        bad & (expected > 0), "keypoints with NaN, infinity, or a visibility that is not 0, 1 or 2"
    )
    return np.asarray((counts > 0) & (counts == expected))


def _flat(corners: Floats) -> Bools:
    """Boxes xyxy without an extent in single precision, as training will see them: from 600 to 600 + 1e-6 is no width there."""
    single = corners.astype(np.float32)
    return np.asarray(~(single[:, 2:] > single[:, :2]).all(axis=1))


@np.errstate(over="ignore", invalid="ignore")  # of boxes that were struck off before
def _check_boxes(judge: _Judge, extents: Floats, sizes: Ints) -> Floats:
    """Boxes of no extent and outside boxes leave; others are cut at the image's border. -> f64 [A, 4], x, y, width, height."""
    columns, limits = judge.columns, np.tile(sizes[:, ::-1], 2).astype(np.float64)
    given = columns.boxes.copy()
    given[:, 2:] += given[:, :2]
    corners = np.where(columns.has_box[:, None], given, extents)
    judge.drop(_flat(corners), _NO_EXTENT)
    cut = corners.clip(0, limits)
    judge.drop(_flat(cut), _OUTSIDE)
    changed = (cut != corners).any(axis=1) | ~columns.has_box
    judge.warn(
        columns.has_box & (np.abs(cut - corners).max(axis=1) > OVERSHOOT),
        "bbox that reaches out of its image, cut",
    )
    sides = np.concatenate([cut[:, :2], cut[:, 2:] - cut[:, :2]], axis=1)
    return np.where(changed[:, None], sides, columns.boxes)
