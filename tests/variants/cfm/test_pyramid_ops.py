"""Pyramid pooling equals torch's pooling, and `wide_linear` equals F.linear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.variants.cfm.pyramid_ops import (
    MIN_INPUTS,
    MIN_ROWS,
    WINDOW_CHANNELS,
    flatten_parts,
    pool_pyramid,
    wide_linear,
)

SIDES = (6, 3, 2, 1)


def bins(count: int, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn((count, 6, 6, channels), generator=generator).permute(0, 3, 1, 2)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_pooling_equals_torchs_with_its_gradient(count: int) -> None:
    x = bins(count).requires_grad_()
    other = bins(count).contiguous().requires_grad_()
    parts = pool_pyramid(x, SIDES)
    reference = [F.adaptive_max_pool2d(other, side) for side in SIDES]
    for part, one in zip(parts, reference, strict=True):
        assert torch.equal(part, one)
    (result,) = torch.autograd.grad(sum(p.square().sum() for p in parts), x)
    (expected,) = torch.autograd.grad(sum(p.square().sum() for p in reference), other)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_flatten_parts_concatenates(count: int, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        parts = pool_pyramid(bins(count), SIDES)
        assert torch.equal(
            flatten_parts(parts),
            torch.cat(
                [F.adaptive_max_pool2d(bins(count), side).flatten(1) for side in SIDES], dim=1
            ),
        )


@pytest.mark.parametrize("rows", [0, 1, MIN_ROWS - 1, MIN_ROWS, MIN_ROWS + 3])
@pytest.mark.parametrize("inputs", [60, MIN_INPUTS, MIN_INPUTS + WINDOW_CHANNELS, MIN_INPUTS + 5])
def test_a_wide_layer_with_its_gradient(rows: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((rows, inputs), (4, inputs), (4,))
    )
    result = wide_linear(x, weight, bias)
    expected = F.linear(x, weight, bias)
    assert result.shape == (rows, 4)
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-4)
    towards = torch.randn(result.shape, generator=generator)
    for a, b in zip(
        *(torch.autograd.grad(out, (x, weight, bias), towards) for out in (result, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_lower_precision_is_kept() -> None:
    x = torch.randn(MIN_ROWS, MIN_INPUTS).bfloat16()
    weight = torch.randn(4, MIN_INPUTS).bfloat16()
    bias = torch.zeros(4).bfloat16()
    assert torch.equal(wide_linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert wide_linear(x.float(), weight.float(), bias.float()).dtype == torch.bfloat16
