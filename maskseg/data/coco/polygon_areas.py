"""Areas and perimeters of many polygons at once, to find those that may cover no pixel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskseg.ops.rle import Ints

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# px: a polygon that contains a circle of this radius covers pixels in every rasterization.
_MIN_RADIUS = 1.5
_CHUNK = 1_000_000  # points that are handled at once, to bound the memory


def find_thin_polygons(points: Floats, starts: Ints) -> Bools:
    """Find the polygons that may cover no pixel; the others certainly cover some.

    points: f64 [points, 2], the finite points of all polygons; starts: i64 [n], the first point of
    each polygon. Returns bool [n].

    A region of area A and perimeter P contains a circle of radius A / P: no point is farther from
    the border than the largest such circle's radius r, so that the region lies in a strip of
    width r along the border, and A <= r P. A polygon that winds around a region twice has more
    area than its bounding box and counts as thin, because the even-odd rule empties the region.
    """
    thin = np.zeros(len(starts), dtype=bool)
    ends = np.append(starts[1:], len(points))
    first = 0
    while first < len(starts):
        last = int(np.searchsorted(ends, starts[first] + _CHUNK, side="right"))
        last = max(last, first + 1)
        offset = starts[first]
        chunk = points[offset : ends[last - 1]]
        thin[first:last] = _find_thin(chunk, starts[first:last] - offset)
        first = last
    return thin


@np.errstate(over="ignore", invalid="ignore")  # polygons far outside of their image
def _find_thin(points: Floats, starts: Ints) -> Bools:
    following = np.arange(1, len(points) + 1)
    following[np.append(starts[1:], len(points)) - 1] = starts
    edges = points[following] - points
    # Relative to the first point of the polygon, so that large coordinates do not cancel.
    lengths = np.diff(np.append(starts, len(points)))
    relative = points - np.repeat(points[starts], lengths, axis=0)
    cross = relative[:, 0] * edges[:, 1] - relative[:, 1] * edges[:, 0]
    area = np.abs(np.add.reduceat(cross, starts)) / 2
    perimeter = np.add.reduceat(np.hypot(edges[:, 0], edges[:, 1]), starts)
    sides = np.maximum.reduceat(points, starts) - np.minimum.reduceat(points, starts)
    winds_twice = area > sides.prod(axis=1) * (1 + 1e-9)
    return np.asarray((area <= _MIN_RADIUS * perimeter) | winds_twice)
