"""Outlines of masks, filled again by pycocotools."""

from __future__ import annotations

import numpy as np
import pytest
from made.bitmaps import random_masks
from pycocotools import mask as coco_mask

from maskseg.annotation.polygons import polygons

pytest.importorskip("cv2")


def filled(outlines: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outlines, *shape))).astype(bool)


def test_a_box_is_four_points() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[3:5, 4:10] = True
    (points,) = polygons(mask)
    assert {(x, y) for x, y in zip(points[::2], points[1::2], strict=True)} == {
        (4, 3),
        (10, 3),
        (10, 5),
        (4, 5),
    }
    mask[:] = True
    assert sorted(polygons(mask)[0]) == sorted([0.0, 0, 12, 0, 12, 9, 0, 9])
    assert polygons(np.zeros((9, 12), dtype=bool)) == []


def test_pieces_by_size() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[1, 1], mask[2, 2] = True, True  # they touch at a corner alone
    mask[5:8, 5:9] = True
    found = polygons(mask)
    assert len(found) == 3
    assert max(found[0][::2]) == 9
    assert np.array_equal(filled(found, mask.shape), mask)


def test_ellipses_come_back() -> None:
    y, x = np.mgrid[:80, :100]
    for a, b in ((30, 20), (7, 35), (3.3, 2.2), (1, 1)):
        mask = ((x - 50) / a) ** 2 + ((y - 40) / b) ** 2 <= 1
        again = filled(polygons(mask), mask.shape)
        assert (again & mask).sum() / (again | mask).sum() > 0.99, (a, b)


def test_holes_are_filled_and_any_mask_has_outlines() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:18, 2:18] = True
    whole = mask.copy()
    mask[8:12, 8:12] = False
    assert np.array_equal(filled(polygons(mask), mask.shape), whole)
    for mask in random_masks(30):
        for points in polygons(mask):
            assert len(points) >= 6
            assert len(points) % 2 == 0
            assert max(points[::2]) <= mask.shape[1]
            assert max(points[1::2]) <= mask.shape[0]
