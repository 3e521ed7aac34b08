"""Draws keypoints and the skeleton edges between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ImageDraw

from maskseg.visualization.layout import Colour

Edges = Sequence[tuple[int, int]]  # pairs of points that a line connects
Skeleton = tuple[NDArray[np.float64], Edges, Colour]

_RIM: Colour = (20, 20, 20)


@dataclass(frozen=True)
class Keypoints:
    """The keypoints of D objects.

    points: [D, P, 3]: x and y in pixels, and visibility or score; skeleton_edges: the edges of each
    class, or () for none.
    """

    points: ArrayLike
    skeleton_edges: Sequence[Edges] = ()


def draw_skeletons(draw: ImageDraw.ImageDraw, skeletons: Iterable[Skeleton], longest: int) -> None:
    """Draw skeletons: points f64 [P, 3] in pixels of the image, edges, color.

    Points whose third value (visibility or score) is not positive are not drawn, nor are their
    edges. longest: the longer side of the image in pixels; line widths are proportional to it.
    """
    width = max(2, round(longest / 300))
    radius = max(2.0, longest / 260)
    for points, edges, colour in skeletons:
        visible = points[:, 2] > 0
        drawn_edges = [(a, b) for a, b in edges if visible[a] and visible[b]]
        # A dark rim first: it keeps lines visible on a mask of the same color.
        for line_width, ink in ((width + 2, _RIM), (width, colour)):
            for a, b in drawn_edges:
                draw.line((*points[a, :2], *points[b, :2]), fill=ink, width=line_width)
        for x, y, _ in points[visible]:
            circle = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(circle, fill=colour, outline=_RIM)
