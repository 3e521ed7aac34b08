"""Conversion of masks to polygons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskseg.superpixels.opencv import opencv

# Tolerance of the simplified outlines in px. Below half a pixel, no pixel changes sides.
TOLERANCE = 0.5


def mask_to_polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Outlines of a mask [H, W] as COCO polygons: [x, y, x, y, ...] in continuous pixels.

    One polygon per 4-connected component, the largest first. Holes are filled: COCO polygons have
    none.
    """
    cv2 = opencv()
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    offset = np.array([columns[0], rows[0]])
    # OpenCV's outlines pass through pixel centers. In an image of twice the size they distinguish
    # the two edges of a pixel.
    doubled = crop.repeat(2, axis=0).repeat(2, axis=1)
    count, components = cv2.connectedComponents(doubled, connectivity=4)
    areas = []
    polygons = []
    for index in range(1, count):
        component = components == index
        (outline, *_), _ = cv2.findContours(
            component.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        edges = (outline + outline % 2) // 2
        simplified = cv2.approxPolyDP(edges, TOLERANCE, True).reshape(-1, 2)
        areas.append(int(component.sum()))
        polygons.append((simplified + offset).ravel().astype(float).tolist())
    order = sorted(range(len(polygons)), key=lambda i: -areas[i])
    return [polygons[i] for i in order]
