"""Pyramid pooling and the layer behind it: equal to torch's pooling and a wide layer to F.linear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.variants.cfm.pyramid_ops import (
    CHANNELS,
    LONG,
    MANY,
    flattened,
    pooled_pyramid,
    wide_linear,
)

SIDES = (6, 3, 2, 1)


def bins(count: int, channels: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn((count, 6, 6, channels), generator=generator).permute(0, 3, 1, 2)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_pooling_equals_torchs_with_its_gradient(count: int) -> None:
    own, other = bins(count).requires_grad_(), bins(count).contiguous().requires_grad_()
    parts, wanted = (
        pooled_pyramid(own, SIDES),
        [F.adaptive_max_pool2d(other, side) for side in SIDES],
    )
    for part, one in zip(parts, wanted, strict=True):
        assert torch.equal(part, one)
    (found,) = torch.autograd.grad(sum(p.square().sum() for p in parts), own)
    (expected,) = torch.autograd.grad(sum(p.square().sum() for p in wanted), other)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_parts_lie_behind_each_other(count: int, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        parts = pooled_pyramid(bins(count), SIDES)
        assert torch.equal(
            flattened(parts),
            torch.cat(
                [F.adaptive_max_pool2d(bins(count), side).flatten(1) for side in SIDES], dim=1
            ),
        )


@pytest.mark.parametrize("rows", [0, 1, MANY - 1, MANY, MANY + 3])
@pytest.mark.parametrize("inputs", [60, LONG, LONG + CHANNELS, LONG + 5])
def test_a_wide_layer_with_its_gradient(rows: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator, requires_grad=True)
        for shape in ((rows, inputs), (4, inputs), (4,))
    )
    found, wanted = wide_linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == (rows, 4)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    towards = torch.randn(found.shape, generator=generator)
    for a, b in zip(
        *(torch.autograd.grad(out, (x, weight, bias), towards) for out in (found, wanted)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_lower_precision_stays_what_it_is() -> None:
    x, weight, bias = (
        torch.randn(MANY, LONG).bfloat16(),
        torch.randn(4, LONG).bfloat16(),
        torch.zeros(4).bfloat16(),
    )
    assert torch.equal(wide_linear(x, weight, bias), F.linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert wide_linear(x.float(), weight.float(), bias.float()).dtype == torch.bfloat16
