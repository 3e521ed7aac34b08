"""Outlines of masks as polygons."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


class _Turn(NamedTuple):
    """A turn of an outline, with its directions before and after.

    codes: the pixels around the corner that are set: 1 above it at the left, 2 above it at the
    right, 4 below it at the left, 8 below it at the right, added up.
    """

    codes: tuple[int, ...]
    arriving: str
    leaving: str


# Pixels that only touch at a corner (1 + 8 and 2 + 4) are apart: each has its own convex turn.
_TURNS = (
    _Turn((8, 1 + 8), "up", "right"),
    _Turn((4, 2 + 4), "right", "down"),
    _Turn((1, 1 + 8), "down", "left"),
    _Turn((2, 2 + 4), "left", "up"),
    _Turn((2 + 4 + 8,), "right", "up"),
    _Turn((1 + 4 + 8,), "down", "right"),
    _Turn((1 + 2 + 8,), "up", "left"),
    _Turn((1 + 2 + 4,), "left", "down"),
)
_IS_TURN = np.isin(np.arange(16), [code for turn in _TURNS for code in turn.codes])

# Tolerance of the simplified outlines in px. Up to half a pixel, no pixel center changes sides.
TOLERANCE = 0.5


def mask_to_polygons(mask: Bools, tolerance: float = TOLERANCE) -> list[Floats]:
    """Trace the outlines of a mask [H, W] along the edges of its pixels.

    tolerance: largest distance in px by which the outlines are simplified (Douglas and Peucker);
    0 keeps every corner, so that the polygons cover exactly the pixels of the mask.
    Returns f64 [points, 2] (x, y) in continuous pixels, one polygon per 4-connected component, the
    largest first. Holes are filled: COCO polygons have none.
    """
    outlines = []
    for outline in _trace_outlines(mask):
        area = _signed_area(outline)
        if area > 0:  # the outline of a hole turns the other way
            outlines.append((area, outline))
    outlines.sort(key=lambda pair: -pair[0])
    return [_simplify(outline, tolerance) for _, outline in outlines]


def mask_to_rings(mask: Bools, tolerance: float = TOLERANCE) -> list[Floats]:
    """Trace the outlines of a mask [H, W] and of its holes, as `mask_to_polygons` does.

    A pixel is in the mask if an odd number of rings contain it.
    """
    return [_simplify(outline, tolerance) for outline in _trace_outlines(mask)]


def coco_polygons(mask: Bools) -> list[list[float]]:
    """The simplified outlines of a mask [H, W] as COCO polygons, [x, y, x, y, ...]."""
    return [polygon.ravel().tolist() for polygon in mask_to_polygons(mask)]


def _trace_outlines(mask: Bools) -> list[Floats]:
    """All closed outlines of a mask, of holes too, by their corners, each f64 [points, 2].

    They run along the edges between pixels, with the mask on their right hand: an outer outline is
    clockwise, as y points down.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = np.pad(crop, 1).view(np.uint8)
    # Which of the four pixels around each corner of a pixel are set, as bits.
    code = inside[:-1, :-1] + 2 * inside[:-1, 1:] + 4 * inside[1:, :-1] + 8 * inside[1:, 1:]
    places = np.argwhere(_IS_TURN[code])
    codes = code[places[:, 0], places[:, 1]]
    selected = [np.flatnonzero(np.isin(codes, turn.codes)) for turn in _TURNS]
    corners = places[np.concatenate(selected)]
    counts = [len(rows) for rows in selected]
    arriving = np.repeat([turn.arriving for turn in _TURNS], counts)
    leaving = np.repeat([turn.leaving for turn in _TURNS], counts)
    following = np.empty(len(corners), dtype=np.int64)
    for direction in ("up", "down", "left", "right"):
        # Along a line, each straight piece ends before the next one of its direction begins.
        is_vertical = direction in ("up", "down")
        starts = _sort_by_line(corners, leaving == direction, is_vertical)
        ends = _sort_by_line(corners, arriving == direction, is_vertical)
        following[starts] = ends
    corners += np.array([rows[0], columns[0]])
    return [corners[cycle][:, ::-1].astype(np.float64) for cycle in _find_cycles(following)]


def _sort_by_line(corners: Ints, selected: Bools, is_vertical: bool) -> Ints:
    """The indices of the selected corners [n, 2] (y, x), line by line."""
    index = np.flatnonzero(selected)
    y, x = corners[index].T
    return np.asarray(index[np.lexsort((y, x) if is_vertical else (x, y))])


def _find_cycles(following: Ints) -> list[list[int]]:
    """The cycles of a permutation."""
    successors = following.tolist()
    visited = bytearray(len(successors))
    cycles = []
    for start in range(len(successors)):
        cycle = []
        index = start
        while not visited[index]:
            visited[index] = 1
            cycle.append(index)
            index = successors[index]
        if cycle:
            cycles.append(cycle)
    return cycles


def _signed_area(points: Floats) -> float:
    """Area of a polygon [points, 2]; positive if it is clockwise, as y points down."""
    x, y = points.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _simplify(points: Floats, tolerance: float) -> Floats:
    """Drop points of a closed polygon that lie within `tolerance` of the line that remains."""
    if tolerance <= 0 or len(points) <= 4:
        return points
    # Two points far from each other stay: the first one and that which is farthest from it.
    first = int(points.sum(axis=1).argmin())
    ring = np.concatenate([points[first:], points[: first + 1]])
    middle = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    keep = np.zeros(len(ring), dtype=bool)
    keep[[0, middle, -1]] = True
    while True:  # all pieces between two kept points at once
        kept = np.flatnonzero(keep)
        piece = np.minimum(np.cumsum(keep) - 1, len(kept) - 2)
        distances = _distances(ring, ring[kept[piece]], ring[kept[piece + 1]])
        farthest = np.maximum.reduceat(distances[:-1], kept[:-1])[piece]
        splits = np.flatnonzero((distances == farthest) & (farthest > tolerance))
        if not len(splits):
            break
        _, first_of_piece = np.unique(piece[splits], return_index=True)
        keep[splits[first_of_piece]] = True
    simplified = ring[:-1][keep[:-1]]
    return simplified if len(simplified) > 2 else points


def _distances(points: Floats, starts: Floats, ends: Floats) -> Floats:
    """Distance of each point [n, 2] to its own line segment, f64 [n]."""
    directions = ends - starts
    lengths = np.maximum((directions**2).sum(axis=1), 1)  # squared; corners are whole pixels
    along = ((points - starts) * directions).sum(axis=1) / lengths
    nearest = starts + along.clip(0, 1)[:, None] * directions
    return np.asarray(np.hypot(*(points - nearest).T))
