"""Images of segments: colors at known pixels, distinct neighbors, sizes, extreme images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from made.label_maps import GREY, halves

from maskseg.variants.hash.pictures import segment_panel, step_pictures
from maskseg.visualization import layout, segments
from maskseg.visualization.layout import TILE_SIDE
from maskseg.visualization.segments import draw_boundaries, draw_segments

RED = (255, 0, 0)


def test_boundaries_lie_on_the_larger_label() -> None:
    image = draw_boundaries(GREY, halves(), RED)
    middle = TILE_SIDE // 2
    assert (image[:, middle] == RED).all()
    assert (image[:, middle + 1] == 45).all()  # the rim
    np.testing.assert_array_equal(
        np.delete(image, (middle, middle + 1), axis=1),
        np.delete(GREY, (middle, middle + 1), axis=1),
    )
    assert (draw_boundaries(GREY, halves())[:, middle] == (255, 255, 0)).all()
    np.testing.assert_array_equal(draw_boundaries(GREY, halves(right=0)), GREY)
    assert (GREY == 90).all()  # the input is not modified


@pytest.mark.parametrize(("left", "right"), [(-1, 3), (3, -1)])
def test_nothing_is_drawn_on_negative_labels(left: int, right: int) -> None:
    labels = halves(left=left, right=right)
    for image in (draw_boundaries(GREY, labels, RED), draw_segments(GREY, labels)):
        changed = (image != GREY).any(axis=2)
        assert not changed[labels < 0].any()
        assert changed[:, TILE_SIDE // 2 - (left > right)].all()


@pytest.mark.parametrize("width", [1, 2, 3])
def test_outlines_equal_a_loop(width: int) -> None:
    labels = np.random.default_rng(width).integers(-3, 3, (9, 12)).repeat(2, axis=0)
    outline = segments.outline_pixels(labels, width)
    steps = [
        (dy * k, dx * k)
        for k in range(1, width + 1)
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
    ]
    for (y, x), label in np.ndenumerate(labels):
        near = [
            labels[y + dy, x + dx]
            for dy, dx in steps
            if 0 <= y + dy < labels.shape[0] and 0 <= x + dx < labels.shape[1]
        ]
        assert outline[y, x] == (label >= 0 and any(n < label for n in near))


@pytest.mark.parametrize(("side", "width"), [(640, 1), (1000, 1), (1600, 2), (2400, 3)])
def test_outlines_grow_with_the_image(side: int, width: int) -> None:
    image = draw_boundaries(np.zeros((8, side, 3), np.uint8), halves((8, side)), RED)
    assert (image == RED).all(axis=2).sum() == 8 * width


def test_small_images_are_enlarged_with_their_labels() -> None:
    small = np.full((256, 200, 3), 50, dtype=np.uint8)
    assert draw_segments(small, halves((256, 200))).shape == (768, 600, 3)
    image = draw_boundaries(small, halves((256, 200)), RED)
    assert np.flatnonzero((image == RED).all(axis=(0, 2))).tolist() == [300]


def test_segments_are_half_filled() -> None:
    labels = halves(left=70, right=12)  # labels with gaps
    image = draw_segments(GREY, labels)
    left = image[100, 100]
    right = image[100, TILE_SIDE - 100]
    share = segments._FILL
    palette = np.round(90 * (1 - share) + share * np.array(layout.PALETTE))
    assert sum(np.array_equal(left, colour) for colour in palette) == 1
    assert sum(np.array_equal(right, colour) for colour in palette) == 1
    assert not np.array_equal(left, right)
    assert (image[:, TILE_SIDE // 2 - 1] == 255).all()
    np.testing.assert_array_equal(draw_segments(GREY, halves(left=-1, right=-7)), GREY)


@pytest.mark.parametrize(
    ("count", "shape"), [(4, (3, 5)), (30, (12, 12)), (200, (20, 30)), (12, (12, 40))]
)
def test_adjacent_segments_differ(count: int, shape: tuple[int, int]) -> None:
    # Scattered, so that each segment touches many others.
    labels = np.random.default_rng(count).integers(-1, count, shape)
    _, index = np.unique(np.append(-1, labels), return_inverse=True)
    index = index[1:].reshape(shape) - 1
    colours = segments._assign_colours(index)
    assert len(colours) == index.max() + 1
    for (y, x), label in np.ndenumerate(index):
        for near in index[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].ravel():
            assert label < 0 or near < 0 or near == label or colours[near] != colours[label]


def test_colours_beyond_the_palette() -> None:
    pairs = list(itertools.combinations(range(40), 2))  # every pair touches
    labels = np.full((3 * len(pairs), 2), -1)
    labels[::3] = pairs
    colours = segments._assign_colours(labels)
    assert len(set(colours)) == 40
    assert set(layout.PALETTE) <= set(colours)


def test_segments_with_most_neighbours_choose_first() -> None:
    labels = np.zeros((60, 3), dtype=np.int64)  # one segment around 20 others
    labels[1::3, 1] = np.arange(1, 21)
    assert set(segments._assign_colours(labels)) == set(layout.PALETTE)


def test_the_palette_is_used_evenly() -> None:
    labels = np.arange(18)[:, None] * np.ones((1, 4), dtype=np.int64)
    colours = segments._assign_colours(labels)
    assert all(colours.count(colour) == 2 for colour in layout.PALETTE)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
def test_extreme_sizes(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 9, np.uint8)
    labels = np.arange(shape[0] * shape[1]).reshape(shape) // 2
    codes = np.linspace(0, 1, 3 * labels.size).reshape(3, *shape)
    assert (draw_segments(image, labels) != 9).any()
    assert draw_boundaries(image, labels).shape == draw_segments(image, labels).shape
    assert segment_panel(image, labels, codes, labels, labels).any()
    steps = step_pictures(
        image, codes, codes, labels, np.zeros((labels.max() + 1, 3), dtype=bool), labels
    )
    assert len({step.shape for step in steps.values()}) == 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="uint8"):
        draw_boundaries(GREY.astype(np.float32), halves())
    with pytest.raises(ValueError, match=r"labels have .*\(3, 4\)"):
        draw_segments(GREY, np.zeros((3, 4), dtype=int))
    with pytest.raises(ValueError, match=r"labels have .*\(900, 900\)"):
        segment_panel(GREY, halves(), np.zeros((2, 3, 4)), halves((900, 900)))
