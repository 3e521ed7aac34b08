"""Keypoints and the lines between them, drawn on a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import ImageDraw

Skeleton = tuple[NDArray[np.float64], Sequence[tuple[int, int]], tuple[int, int, int]]

_INK = (20, 20, 20)


def draw_skeletons(draw: ImageDraw.ImageDraw, skeletons: Iterable[Skeleton], longest: int) -> None:
    """Each skeleton: points [P, 3] in the picture's pixels (x, y, visibility or score; not drawn where that is not above 0), the pairs of them that a
    line joins, and a colour. longest: the longer side of the picture, by which lines are as thick as can be seen."""
    width = max(2, round(longest / 300))
    radius = max(2.0, longest / 260)
    for points, lines, colour in skeletons:
        there = points[:, 2] > 0
        joined = [(a, b) for a, b in lines if there[a] and there[b]]
        for thick, ink in (
            (width + 2, _INK),
            (width, colour),
        ):  # a dark rim, so that they are seen on a mask of the same colour
            for a, b in joined:
                draw.line((*points[a, :2], *points[b, :2]), fill=ink, width=thick)
        for x, y, _ in points[there]:
            draw.ellipse(
                (x - radius, y - radius, x + radius, y + radius), fill=colour, outline=_INK
            )
