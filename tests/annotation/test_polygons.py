"""Polygons of masks, filled again with pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from made.bitmaps import random_masks
from pycocotools import mask as coco_mask

from maskseg.annotation.polygons import mask_to_polygons, mask_to_rings

pytest.importorskip("cv2")


def filled(outlines: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outlines, *shape))).astype(bool)


def test_a_box_is_four_points() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[3:5, 4:10] = True
    (points,) = mask_to_polygons(mask)
    assert {(x, y) for x, y in zip(points[::2], points[1::2], strict=True)} == {
        (4, 3),
        (10, 3),
        (10, 5),
        (4, 5),
    }
    mask[:] = True
    assert sorted(mask_to_polygons(mask)[0]) == sorted([0.0, 0, 12, 0, 12, 9, 0, 9])
    assert mask_to_polygons(np.zeros((9, 12), dtype=bool)) == []


def test_components_by_size() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[1, 1], mask[2, 2] = True, True  # they touch only at a corner
    mask[5:8, 5:9] = True
    outlines = mask_to_polygons(mask)
    assert len(outlines) == 3
    assert max(outlines[0][::2]) == 9
    assert np.array_equal(filled(outlines, mask.shape), mask)


def test_ellipses_round_trip() -> None:
    y, x = np.mgrid[:80, :100]
    for a, b in ((30, 20), (7, 35), (3.3, 2.2), (1, 1)):
        mask = ((x - 50) / a) ** 2 + ((y - 40) / b) ** 2 <= 1
        refilled = filled(mask_to_polygons(mask), mask.shape)
        assert (refilled & mask).sum() / (refilled | mask).sum() > 0.99, (a, b)


def test_holes_are_filled_and_any_mask_has_outlines() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:18, 2:18] = True
    whole = mask.copy()
    mask[8:12, 8:12] = False
    assert np.array_equal(filled(mask_to_polygons(mask), mask.shape), whole)
    for mask in random_masks(30):
        for points in mask_to_polygons(mask):
            assert len(points) >= 6
            assert len(points) % 2 == 0
            assert max(points[::2]) <= mask.shape[1]
            assert max(points[1::2]) <= mask.shape[0]


def test_rings_with_holes_are_exact_below_half_a_pixel() -> None:
    masks = [*random_masks(40, 30, 20, seed=3), np.ones((5, 7), dtype=bool)]
    ring = np.zeros((12, 12), dtype=bool)
    ring[1:11, 1:11] = True
    ring[3:9, 3:9] = False
    ring[5:7, 5:7] = True  # an island in the hole
    for mask in [*masks, ring]:
        inside = np.zeros_like(mask)
        for points in mask_to_rings(mask, 0.5):
            inside ^= filled([points], mask.shape)
        np.testing.assert_array_equal(inside, mask)
    assert len(mask_to_rings(ring, 0.5)) == 3
    assert mask_to_rings(np.zeros((9, 12), dtype=bool), 1.0) == []
