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
    if not mask.any():
        return []
    doubled, offset = _double(mask)
    count, components = cv2.connectedComponents(doubled, connectivity=4)
    areas = []
    polygons = []
    for index in range(1, count):
        component = components == index
        (outline, *_), _ = cv2.findContours(
            component.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        simplified = cv2.approxPolyDP(_pixel_edges(outline), TOLERANCE, True).reshape(-1, 2)
        areas.append(int(component.sum()))
        polygons.append((simplified + offset).ravel().astype(float).tolist())
    order = sorted(range(len(polygons)), key=lambda i: -areas[i])
    return [polygons[i] for i in order]


def mask_to_rings(mask: NDArray[np.bool_], tolerance: float) -> list[list[float]]:
    """Outlines of a mask [H, W] and of its holes: [x, y, x, y, ...] in continuous pixels.

    A pixel is in the mask if an odd number of rings contain it. tolerance: of the simplified rings,
    in pixels.
    """
    cv2 = opencv()
    if not mask.any():
        return []
    doubled, offset = _double(mask)
    outlines, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = []
    for outline in outlines:
        simplified = cv2.approxPolyDP(_pixel_edges(outline), tolerance, True).reshape(-1, 2)
        if len(simplified) > 2:
            rings.append((simplified + offset).ravel().astype(float).tolist())
    return rings


def _double(mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A mask that is not empty, cropped and twice as large, and the (x, y) of the crop.

    OpenCV's outlines pass through pixel centers. In an image of twice the size they distinguish the
    two edges of a pixel.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    crop = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8)
    return crop.repeat(2, axis=0).repeat(2, axis=1), np.array([columns[0], rows[0]])


def _pixel_edges(outline: NDArray[np.int32]) -> NDArray[np.int32]:
    """Convert an outline in the doubled image to the edges of the pixels."""
    return (outline + outline % 2) // 2
