"""GrabCut from boxes, maps and strokes: literals, distinct objects, and degenerate inputs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from maskseg.annotation.grabcut import (
    BACKGROUND,
    FOREGROUND,
    MAYBE_BACKGROUND,
    MAYBE_FOREGROUND,
    box_mask,
    ellipse_map,
    ellipse_mask,
    grabcut,
    make_trimap,
    normalise_map,
    pixel_window,
    refine_with_strokes,
)

pytest.importorskip("cv2")
Bools = NDArray[np.bool_]


def disc(height: int, width: int, y: float, x: float, radius: float) -> Bools:
    rows, columns = np.ogrid[:height, :width]
    return np.asarray((rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2 <= radius**2)


def scene(mask: Bools, seed: int = 0) -> NDArray[np.uint8]:
    """A noisy red object on a noisy blue background."""
    noise = np.random.default_rng(seed).integers(0, 60, (*mask.shape, 3))
    return np.asarray(
        np.where(mask[..., None], (180, 40, 40), (40, 60, 170)) + noise, dtype=np.uint8
    )


def iou(a: Bools, b: Bools) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((1, 2, 4, 5), (2, 5), (1, 4)),
        ((0.6, 0.4, 3.6, 2.4), (0, 2), (1, 4)),  # pixel centers are at .5
        ((-5, -5, 50, 50), (0, 10), (0, 12)),
        ((3.1, 4.6, 3.2, 4.7), (4, 5), (3, 4)),  # contains no center, but overlaps a pixel
        ((12, 0, 20, 5), (0, 0), (0, 0)),
        ((-4, 0, 0, 5), (0, 0), (0, 0)),
        ((5, 5, 5, 9), (0, 0), (0, 0)),
    ],
)
def test_pixels_of_a_box(
    box: tuple[float, ...], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    assert pixel_window(box, 10, 12) == (slice(*rows), slice(*columns))


def test_the_ellipse_touches_the_sides() -> None:
    result = ellipse_mask((1, 1, 7, 5), 6, 8)
    assert result.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert ellipse_mask((2, 2, 2.1, 4), 6, 8).sum() == 2  # contains no pixel center
    assert not ellipse_mask((9, 2, 12, 4), 6, 8).any()
    values = ellipse_map((1, 1, 7, 5), 6, 8)
    assert (values >= 0.5).tolist() == result.tolist()
    assert values.dtype == np.float32
    assert 0.9 < values.max() <= 1
    assert not values[~box_mask((1, 1, 7, 5), 6, 8)].any()


def test_maps_are_scaled_in_the_image_or_in_the_box() -> None:
    scores = np.array([[-2.0, 0.0], [2.0, 6.0]], dtype=np.float32)
    assert normalise_map(scores, 2, 2).tolist() == [[0, 0.25], [0.5, 1]]
    assert normalise_map(scores, 2, 2, (0, 0, 2, 1)).tolist() == [[0, 1], [1, 1]]
    large = normalise_map(scores, 20, 40)
    assert large.shape == (20, 40)
    assert (large.min(), large.max()) == (0, 1)
    assert not normalise_map(np.full((3, 3), 7.0), 5, 5).any()
    assert not normalise_map(np.array([[np.nan, 1], [2, 3]]), 5, 5).any()
    assert not normalise_map(scores, 2, 2, (5, 5, 6, 6)).any()


def test_a_map_is_digitised() -> None:
    values = np.array([[0, 0.19, 0.2, 0.49], [0.5, 0.79, 0.8, 1]], dtype=np.float32)
    values[values == np.float32(0.2)] = 0.2000001  # 0.2 is smaller in single precision
    values[values == np.float32(0.8)] = 0.8000001
    b, mb, mf, f = BACKGROUND, MAYBE_BACKGROUND, MAYBE_FOREGROUND, FOREGROUND
    assert make_trimap(values, 0.2, 0.5, 0.8).tolist() == [[b, b, mb, mb], [mf, mf, f, f]]
    assert make_trimap(values, 0, 0.5, 1).tolist() == [
        [mb] * 4,
        [mf] * 4,
    ]  # t2 = 1: no sure foreground
    assert make_trimap(values, 0.2, 0.5, 0.8, (0, 1, 3, 2)).tolist() == [[b] * 4, [mf, mf, f, b]]
    for wrong in (
        (0.5, 0.5, 0.8),
        (-0.1, 0.5, 0.8),
        (0, 0.5, 1.1),
        (0.5, 0.4, 0.8),
        (float("nan"), 0.5, 0.8),
    ):
        with pytest.raises(ValueError, match="thresholds"):
            make_trimap(values, *wrong)


@pytest.mark.parametrize("side", [0, 64, 192])
@pytest.mark.parametrize("size", [(60, 80), (400, 300)])
def test_a_distinct_object_is_segmented(size: tuple[int, int], side: int) -> None:
    height, width = size
    radius = height / 4
    truth = disc(height, width, height / 2, width / 2, radius)
    box = (width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius)
    image = scene(truth)
    trimap = np.where(
        box_mask(box, height, width), np.uint8(MAYBE_FOREGROUND), np.uint8(BACKGROUND)
    )
    result = grabcut(image, trimap, side=side)
    assert result.fallback_reason == ""
    assert iou(result.mask, truth) > (0.97 if side == 0 else 0.9)
    assert np.array_equal(result.mask, grabcut(image, trimap, side=side).mask)


def test_the_crop_gives_the_same_mask_as_the_full_image() -> None:
    truth = disc(80, 100, 40, 50, 20)
    trimap = np.where(
        box_mask((28, 18, 72, 62), 80, 100), np.uint8(MAYBE_FOREGROUND), np.uint8(BACKGROUND)
    )
    crop, whole = (
        grabcut(scene(truth), trimap, side=0, full_image=full_image) for full_image in (False, True)
    )
    assert iou(crop.mask, whole.mask) > 0.97
    assert not crop.mask[trimap == BACKGROUND].any()


def test_sure_seeds_stay() -> None:
    """Also seeds that contradict the colors, inside and outside the object."""
    truth = disc(60, 60, 30, 30, 15)
    trimap = np.full((60, 60), MAYBE_FOREGROUND, dtype=np.uint8)
    trimap[:3], trimap[-3:], trimap[:, :3], trimap[:, -3:] = (BACKGROUND,) * 4
    trimap[28:32, 28:32], trimap[8:12, 8:12] = BACKGROUND, FOREGROUND
    result = grabcut(scene(truth), trimap, side=0).mask
    assert not result[28:32, 28:32].any()
    assert result[8:12, 8:12].all()


@pytest.mark.parametrize("size", [(700, 620), (90, 77)])
def test_a_crop_that_is_scaled_keeps_its_sure_seeds(size: tuple[int, int]) -> None:
    """The object extends slightly beyond its box.

    A pixel in it is sure background, and a column of pixels through it is sure foreground.
    """
    height, width = size
    radius, middle = 0.2 * height, (0.45 * height, 0.5 * width)
    box = tuple(middle[1 - axis] + sign * 0.95 * radius for sign in (-1, 1) for axis in (0, 1))
    image = scene(disc(height, width, *middle, radius))
    trimap = np.where(
        box_mask(box, height, width), np.uint8(MAYBE_FOREGROUND), np.uint8(BACKGROUND)
    )
    trimap[int(0.5 * height), int(0.55 * width)], trimap[:, int(0.5 * width)] = (
        BACKGROUND,
        FOREGROUND,
    )
    for side in (0, 64, 192):
        result = grabcut(image, trimap, side=side)
        assert result.fallback_reason == ""
        assert iou(result.mask, disc(height, width, *middle, radius)) > 0.8
        assert not result.mask[trimap == BACKGROUND].any()
        assert result.mask[trimap == FOREGROUND].all()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (BACKGROUND, "no foreground"),
        (MAYBE_BACKGROUND, "no foreground"),
        (FOREGROUND, "no background"),
        (MAYBE_FOREGROUND, "no back"),
    ],
)
def test_seeds_of_one_kind_give_the_fallback(code: int, why: str) -> None:
    image, trimap = scene(disc(9, 12, 4, 6, 3)), np.full((9, 12), code, dtype=np.uint8)
    result = grabcut(image, trimap)
    assert result.fallback_reason.startswith(why)
    assert (result.mask == bool(code & 1)).all()
    fallback = box_mask((1, 1, 3, 3), 9, 12)
    assert np.array_equal(grabcut(image, trimap, fallback=fallback).mask, fallback)


def test_a_collapsed_cut_gives_the_fallback() -> None:
    """Probable foreground that looks like the background."""
    image = scene(disc(60, 60, 5, 5, 1))
    trimap = np.where(
        box_mask((20, 20, 40, 40), 60, 60), np.uint8(MAYBE_FOREGROUND), np.uint8(BACKGROUND)
    )
    ellipse = ellipse_mask((20, 20, 40, 40), 60, 60)
    result = grabcut(image, trimap, iterations=5, fallback=ellipse)
    assert result.fallback_reason == "the cut collapsed"
    assert np.array_equal(result.mask, ellipse)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (7, 1), (3, 3), (5, 200), (40, 50)])
@pytest.mark.parametrize("constant", [True, False])
def test_any_seeds_on_any_image_give_a_mask(size: tuple[int, int], constant: bool) -> None:
    rng = np.random.default_rng(0)
    image = (
        np.full((*size, 3), 7, dtype=np.uint8)
        if constant
        else rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    )
    for number in range(12):
        trimap = rng.integers(0, 4, size).astype(np.uint8)
        before = image.copy(), trimap.copy()
        result = grabcut(image, trimap, 2, side=(0, 30)[number % 2]).mask
        assert result.dtype == bool
        assert result.shape == size
        assert result.any() or not (trimap & 1).any()
        assert np.array_equal(image, before[0])
        assert np.array_equal(trimap, before[1])


def test_strokes_refine_a_mask() -> None:
    """Two discs: the box contains one, strokes add the other and then remove the first."""
    first, second = disc(100, 160, 50, 50, 20), disc(100, 160, 50, 100, 15)
    image, none = scene(first | second), np.zeros((100, 160), dtype=bool)
    box = (30, 30, 70, 70)
    assert iou(refine_with_strokes(image, box, none, none).mask, first) > 0.9
    add, away = disc(100, 160, 50, 100, 5), disc(100, 160, 50, 50, 18)
    assert iou(refine_with_strokes(image, box, add, none).mask, first | second) > 0.9
    result = refine_with_strokes(image, box, add, away).mask
    assert not result[away].any()
    assert result[add].all()
    assert iou(result, second) > 0.7
    twice = refine_with_strokes(image, box, first, first).mask
    assert not twice[first].any()  # pixels painted with both are background
    assert np.array_equal(
        refine_with_strokes(image, None, add, none).mask,
        refine_with_strokes(image, (0, 0, 160, 100), add, none).mask,
    )


@pytest.mark.parametrize(
    "box", [(0, 0, 30, 20), (500, 0, 510, 9), (0.2, 0.2, 0.3, 0.3), (-9, -9, 99, 99)]
)
def test_strokes_without_an_object(box: tuple[float, ...]) -> None:
    none, every = np.zeros((20, 30), dtype=bool), np.ones((20, 30), dtype=bool)
    image = np.full((20, 30, 3), 9, dtype=np.uint8)
    assert refine_with_strokes(image, box, every, none).mask.all()
    assert not refine_with_strokes(image, box, none, every).mask.any()
    assert refine_with_strokes(image, box, none, none).mask.any() == box_mask(box, 20, 30).any()
