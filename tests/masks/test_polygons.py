"""Polygons of masks, filled again with pycocotools."""

from __future__ import annotations

import numpy as np
from made.bitmaps import random_masks
from pycocotools import mask as coco_mask

from maskseg.masks.polygons import coco_polygons, mask_to_polygons, mask_to_rings


def filled(outlines: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(outlines, *shape))).astype(bool)


def test_a_box_is_four_points() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[3:5, 4:10] = True
    (points,) = coco_polygons(mask)
    assert {(x, y) for x, y in zip(points[::2], points[1::2], strict=True)} == {
        (4, 3),
        (10, 3),
        (10, 5),
        (4, 5),
    }
    mask[:] = True
    assert sorted(coco_polygons(mask)[0]) == sorted([0.0, 0, 12, 0, 12, 9, 0, 9])
    assert coco_polygons(np.zeros((9, 12), dtype=bool)) == []


def test_components_by_size() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[1, 1], mask[2, 2] = True, True  # they touch only at a corner
    mask[5:8, 5:9] = True
    outlines = coco_polygons(mask)
    assert len(outlines) == 3
    assert max(outlines[0][::2]) == 9
    assert np.array_equal(filled(outlines, mask.shape), mask)


def test_ellipses_round_trip() -> None:
    y, x = np.mgrid[:80, :100]
    for a, b in ((30, 20), (7, 35), (3.3, 2.2), (1, 1)):
        mask = ((x - 50) / a) ** 2 + ((y - 40) / b) ** 2 <= 1
        refilled = filled(coco_polygons(mask), mask.shape)
        assert (refilled & mask).sum() / (refilled | mask).sum() > 0.99, (a, b)


def test_holes_are_filled_and_any_mask_has_outlines() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:18, 2:18] = True
    whole = mask.copy()
    mask[8:12, 8:12] = False
    assert np.array_equal(filled(coco_polygons(mask), mask.shape), whole)
    for mask in random_masks(30):
        for points in coco_polygons(mask):
            assert len(points) >= 6
            assert len(points) % 2 == 0
            assert max(points[::2]) <= mask.shape[1]
            assert max(points[1::2]) <= mask.shape[0]


def holes_filled(mask: np.ndarray) -> np.ndarray:
    """The mask with everything that no path of neighbours outside of it leads to."""
    outside = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(outside)
    reached[0, 0] = True
    while True:
        grown = reached.copy()
        for y in (-1, 0, 1):
            for x in (-1, 0, 1):  # background touches at corners, too
                grown |= np.roll(reached, (y, x), axis=(0, 1))
        grown &= outside
        if np.array_equal(grown, reached):
            return ~reached[1:-1, 1:-1]
        reached = grown


def test_outlines_cover_exactly_the_mask() -> None:
    for mask in filter(np.any, random_masks(40)):
        whole = holes_filled(mask)
        for tolerance in (0, 0.5):
            outlines = [p.ravel().tolist() for p in mask_to_polygons(mask, tolerance)]
            assert np.array_equal(filled(outlines, mask.shape), whole)


def test_a_tolerance_drops_corners() -> None:
    y, x = np.mgrid[:80, :100]
    mask = ((x - 50) / 30) ** 2 + ((y - 40) / 20) ** 2 <= 1
    counts = [len(mask_to_polygons(mask, tolerance)[0]) for tolerance in (0, 0.5, 2)]
    assert counts[0] > counts[1] > 3 * counts[2] > 9
    for corner in mask_to_polygons(mask, 2)[0]:
        assert (mask_to_polygons(mask, 0)[0] == corner).all(axis=1).any()


def test_rings_with_holes_are_exact() -> None:
    masks = [*random_masks(40, 30, 20, seed=3), np.ones((5, 7), dtype=bool)]
    ring = np.zeros((12, 12), dtype=bool)
    ring[1:11, 1:11] = True
    ring[3:9, 3:9] = False
    ring[5:7, 5:7] = True  # an island in the hole
    for mask in [*masks, ring]:
        for tolerance in (0.0, 0.4):
            inside = np.zeros_like(mask)
            for points in mask_to_rings(mask, tolerance):
                inside ^= filled([points.ravel().tolist()], mask.shape)
            np.testing.assert_array_equal(inside, mask)
    assert len(mask_to_rings(ring)) == 3
    assert mask_to_rings(np.zeros((9, 12), dtype=bool)) == []
