"""Coarse maps at the pixels, beside torch's interpolation and the formula; means over superpixels beside numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.superpixels import cell_weights, segment_means, upsample


@pytest.mark.parametrize("stride", [1, 2, 8, 32])
@pytest.mark.parametrize("cells", [(1, 1), (3, 5), (7, 1)])
def test_equal_to_interpolate_where_cells_lie_as_it_has_them(stride: int, cells: tuple[int, int], generator: torch.Generator) -> None:
    maps = torch.randn((2, 4, *cells), generator=generator)
    height, width = (stride * side for side in cells)
    wanted = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample(maps, height, width, (stride, stride), (stride / 2, stride / 2)), wanted)


def by_formula(map_: Tensor, y: float, x: float, stride: tuple[float, float], centre: tuple[float, float]) -> float:
    """The map at a point in continuous pixels: its cells' centres are a grid that goes on with its outermost values."""
    found = 0.0
    (i, low), (j, left) = (divmod((at - c) / s, 1) for at, s, c in zip((y, x), stride, centre, strict=True))
    for row, down in ((i, 1 - low), (i + 1, low)):
        for column, across in ((j, 1 - left), (j + 1, left)):
            here = int(min(max(row, 0), map_.shape[0] - 1)), int(min(max(column, 0), map_.shape[1] - 1))
            found += down * across * float(map_[here])
    return found


@pytest.mark.parametrize(
    ("stride", "centre"),
    [((4.0, 4.0), (0.5, 0.5)), ((16.0, 16.0), (0.5, 0.5)), ((3.2, 5.5), (0.4, 0.7)), ((8.0, 8.0), (-3.5, -3.5)), ((2.0, 2.0), (20.0, 1.0))],
)
def test_by_the_formula(stride: tuple[float, float], centre: tuple[float, float], generator: torch.Generator) -> None:
    maps, height, width = torch.randn((2, 4, 3), generator=generator), 13, 17
    found = upsample(maps, height, width, stride, centre)
    assert found.shape == (2, height, width)
    wanted = [[[by_formula(m, y + 0.5, x + 0.5, stride, centre) for x in range(width)] for y in range(height)] for m in maps]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=0)


def test_weights_literal() -> None:
    # Centres at 0.5, 2.5, 4.5: every other pixel's centre lies on one.
    wanted = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert cell_weights(7, 3, 2.0, 0.5, torch.zeros(1)).tolist() == wanted


@pytest.mark.parametrize(("pixels", "cells"), [(1, 1), (5, 1), (1, 6), (100, 7)])
def test_weights_sum_to_one(pixels: int, cells: int) -> None:
    found = cell_weights(pixels, cells, 14.7, 3.3, torch.zeros(1))
    assert found.shape == (pixels, cells)
    assert (found >= 0).all()
    assert ((found > 0).sum(dim=1) <= 2).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(pixels))


def test_upsample_is_not_rounded_by_autocast(generator: torch.Generator) -> None:
    maps = torch.randn((3, 5, 4), generator=generator)
    wanted = upsample(maps, 20, 16, (4, 4), (0.5, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsample(maps, 20, 16, (4, 4), (0.5, 0.5)), wanted)
    assert upsample(maps.bfloat16(), 20, 16, (4, 4), (0.5, 0.5)).dtype == torch.float32


def test_means_by_numpy(generator: torch.Generator) -> None:
    values, numbers = torch.randn((3, 400), generator=generator), torch.randint(-1, 12, (400,), generator=generator)
    numbers[numbers == 5] = 6  # a number that no pixel has
    found = segment_means(values, numbers, 14)
    assert found.shape == (14, 3)
    for number in range(14):
        inside = (numbers == number).numpy()
        wanted = values.numpy()[:, inside].mean(axis=1) if inside.any() else np.zeros(3)
        np.testing.assert_allclose(found[number], wanted, atol=1e-6)
    assert (numbers == -1).any()


def test_means_of_nothing() -> None:
    assert segment_means(torch.zeros(2, 0), torch.zeros(0, dtype=torch.int64), 3).tolist() == [[0.0, 0.0]] * 3
    assert segment_means(torch.ones(2, 4), torch.full((4,), -1), 1).tolist() == [[0.0, 0.0]]


def test_gradients(generator: torch.Generator) -> None:
    numbers, chosen = torch.randint(-1, 5, (12 * 8,), generator=generator), torch.randn((5, 2), generator=generator)
    maps = torch.randn((2, 3, 2), generator=generator)

    def ours(x: Tensor) -> Tensor:
        return (segment_means(upsample(x, 12, 8, (4, 4), (2, 2)).flatten(1), numbers, 5) * chosen).sum()

    def theirs(x: Tensor) -> Tensor:
        pixels = F.interpolate(x[None], size=(12, 8), mode="bilinear", align_corners=False)[0].flatten(1)
        inside = F.one_hot(numbers + 1, 6)[:, 1:].float()
        return ((pixels @ inside / inside.sum(dim=0)).T * chosen).sum()

    gradients = [torch.autograd.grad(function(x), x)[0] for function in (ours, theirs) for x in [maps.clone().requires_grad_()]]
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1])
