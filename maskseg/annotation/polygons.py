"""Masks as polygons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskseg.superpixels.opencv import opencv

STRAIGHT = 0.5  # pixels that an outline may be off: less than half a pixel changes none


def polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """The outlines of a mask [H, W] as COCO has them, x and y in turn in continuous pixels, one a connected piece (pixels that touch at a corner
    alone are apart), the largest first. Holes are filled: COCO's polygons have none."""
    cv2, rows, columns = (
        opencv(),
        np.flatnonzero(mask.any(axis=1)),
        np.flatnonzero(mask.any(axis=0)),
    )
    if not len(rows):
        return []
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    # Twice as large, an outline through the centres of pixels tells the two edges of each pixel apart.
    count, pieces = cv2.connectedComponents(
        crop.repeat(2, axis=0).repeat(2, axis=1), connectivity=4
    )
    found = []
    for piece in range(1, count):
        own = pieces == piece
        (outline, *_), _ = cv2.findContours(
            own.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        edges = (outline + outline % 2) // 2
        simple = cv2.approxPolyDP(edges, STRAIGHT, True).reshape(-1, 2)
        found.append(
            (
                int(own.sum()),
                (simple + np.array([columns[0], rows[0]])).ravel().astype(float).tolist(),
            )
        )
    return [points for _, points in sorted(found, key=lambda one: -one[0])]
