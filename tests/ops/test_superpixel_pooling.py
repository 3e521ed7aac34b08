"""Upsampling and means over superpixels, compared with torch's interpolation and the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.superpixel_pooling import cell_weights, segment_means, upsample


@pytest.mark.parametrize("stride", [1, 2, 8, 32])
@pytest.mark.parametrize("cells", [(1, 1), (3, 5), (7, 1)])
def test_upsample_equals_interpolate_for_its_cell_centres(
    stride: int, cells: tuple[int, int], generator: torch.Generator
) -> None:
    maps = torch.randn((2, 4, *cells), generator=generator)
    height, width = (stride * side for side in cells)
    expected = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        upsample(maps, height, width, (stride, stride), (stride / 2, stride / 2)), expected
    )


def by_formula(
    map_: Tensor, y: float, x: float, stride: tuple[float, float], centre: tuple[float, float]
) -> float:
    """The map at a point in continuous pixels; beyond the outermost centres, their value."""
    result = 0.0
    (i, low), (j, left) = (
        divmod((at - c) / s, 1) for at, s, c in zip((y, x), stride, centre, strict=True)
    )
    for row, down in ((i, 1 - low), (i + 1, low)):
        for column, across in ((j, 1 - left), (j + 1, left)):
            index = (
                int(min(max(row, 0), map_.shape[0] - 1)),
                int(min(max(column, 0), map_.shape[1] - 1)),
            )
            result += down * across * float(map_[index])
    return result


@pytest.mark.parametrize(
    ("stride", "centre"),
    [
        ((4.0, 4.0), (0.5, 0.5)),
        ((16.0, 16.0), (0.5, 0.5)),
        ((3.2, 5.5), (0.4, 0.7)),
        ((8.0, 8.0), (-3.5, -3.5)),
        ((2.0, 2.0), (20.0, 1.0)),
    ],
)
def test_upsample_equals_the_formula(
    stride: tuple[float, float], centre: tuple[float, float], generator: torch.Generator
) -> None:
    maps = torch.randn((2, 4, 3), generator=generator)
    height = 13
    width = 17
    result = upsample(maps, height, width, stride, centre)
    assert result.shape == (2, height, width)
    expected = [
        [
            [by_formula(m, y + 0.5, x + 0.5, stride, centre) for x in range(width)]
            for y in range(height)
        ]
        for m in maps
    ]
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-5, rtol=0)


def test_weights_literal() -> None:
    # The centres are 0.5, 2.5 and 4.5: those of every other pixel.
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert cell_weights(7, 3, 2.0, 0.5, torch.zeros(1)).tolist() == expected


@pytest.mark.parametrize(("pixels", "cells"), [(1, 1), (5, 1), (1, 6), (100, 7)])
def test_weights_sum_to_one(pixels: int, cells: int) -> None:
    result = cell_weights(pixels, cells, 14.7, 3.3, torch.zeros(1))
    assert result.shape == (pixels, cells)
    assert (result >= 0).all()
    assert ((result > 0).sum(dim=1) <= 2).all()
    torch.testing.assert_close(result.sum(dim=1), torch.ones(pixels))


def test_upsample_ignores_autocast(generator: torch.Generator) -> None:
    maps = torch.randn((3, 5, 4), generator=generator)
    expected = upsample(maps, 20, 16, (4, 4), (0.5, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsample(maps, 20, 16, (4, 4), (0.5, 0.5)), expected)
    assert upsample(maps.bfloat16(), 20, 16, (4, 4), (0.5, 0.5)).dtype == torch.float32


@pytest.mark.parametrize(
    ("cells", "size", "stride", "centre"),
    [
        ((9, 13), (35, 51), (4.0, 4.0), (0.5, 0.5)),
        ((4, 3), (13, 17), (3.2, 5.5), (0.4, 0.7)),
        ((2, 2), (20, 3), (16.0, 16.0), (15.5, 15.5)),
        ((1, 1), (1, 1), (4.0, 4.0), (0.5, 0.5)),
    ],
)
def test_means_and_gradients_equal_those_of_the_pixels(
    cells: tuple[int, int],
    size: tuple[int, int],
    stride: tuple[float, float],
    centre: tuple[float, float],
    generator: torch.Generator,
) -> None:
    maps = torch.randn((3, *cells), generator=generator).requires_grad_()
    coarse = torch.randint(-1, 12, (size[0] // 3 + 1, size[1] // 3 + 1), generator=generator)
    labels = (
        coarse.repeat_interleave(3, 0).repeat_interleave(3, 1)[: size[0], : size[1]].contiguous()
    )
    labels[labels == 5] = 6  # a segment without pixels
    result = segment_means(maps, labels, 14, stride, centre)
    assert result.shape == (14, 3)
    pixels = upsample(maps, *size, stride, centre)
    zero = torch.zeros(3)
    expected = torch.stack(
        [pixels[:, labels == k].mean(dim=1) if (labels == k).any() else zero for k in range(14)]
    )
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    towards = torch.randn((14, 3), generator=generator)
    if expected.requires_grad and (labels >= 0).any():
        (ours,) = torch.autograd.grad(result, maps, towards)
        (theirs,) = torch.autograd.grad(expected, maps, towards)
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


def test_means_without_pixels_are_zeros() -> None:
    labels = torch.full((4, 6), -1)
    assert (
        segment_means(torch.ones(2, 2, 3), labels, 3, (2, 2), (1, 1)).tolist() == [[0.0, 0.0]] * 3
    )


def test_means_of_single_pixels_equal_the_pixels(generator: torch.Generator) -> None:
    maps = torch.randn((2, 3, 4), generator=generator)
    result = segment_means(maps, torch.arange(60).view(6, 10), 60, (2, 2.5), (1, 1.25))
    torch.testing.assert_close(
        result.T.reshape(2, 6, 10), upsample(maps, 6, 10, (2, 2.5), (1, 1.25)), atol=2e-6, rtol=1e-5
    )
