"""The form for inference: equality with the model."""

from __future__ import annotations

import copy

import pytest
import torch
from made.training import make_model
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from maskseg.models.backbones.resnet import ResNet
from maskseg.models.box_head import BoxHeadMLP
from maskseg.models.fuse import for_inference
from maskseg.models.layers.conv_norm import (
    AbsorbedNorm,
    ConvWithFrozenNorm,
    absorb_frozen_norms,
    conv_norm_pairs,
    fuse_conv_norm,
)
from maskseg.models.layers.norms import norm_layer
from maskseg.ops.linear import MIN_CONV_ROWS
from maskseg.variants.cfm.pyramid import FusedPyramidLinear, PyramidLinear


def stirred(module: nn.Module) -> nn.Module:
    """Set random statistics and weights of the norms."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | FrozenBatchNorm2d):
            with torch.no_grad():
                for name, low, high in (
                    ("running_mean", -1, 1),
                    ("running_var", 0.2, 2),
                    ("weight", -1.5, 1.5),
                    ("bias", -1, 1),
                ):
                    getattr(part, name).uniform_(low, high)
    return module


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [{}, {"stride": 2, "padding": 1}, {"groups": 4, "dilation": 2}])
def test_one_convolution_for_both(norm: str, bias: bool, shape: dict[str, int]) -> None:
    torch.manual_seed(0)
    both = stirred(
        nn.Sequential(nn.Conv2d(8, 16, 3, bias=bias, **shape), norm_layer(norm, 1e-3)(16))
    ).eval()
    assert conv_norm_pairs(both) == [("0", "1")]
    one = fuse_conv_norm(both[0], both[1])
    x = torch.randn(2, 8, 11, 9)
    assert torch.allclose(one(x), both(x), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_a_trunk_without_norms_gives_the_same(name: str, norm: str) -> None:
    torch.manual_seed(0)
    trunk = stirred(ResNet(name, norm=norm)).eval()
    before = copy.deepcopy(trunk.state_dict())
    fast = for_inference(trunk)
    left = [
        m
        for m in fast.modules()
        if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d | ConvWithFrozenNorm)
    ]
    assert not left
    x = torch.randn(1, 3, 64, 96)
    for one, other in zip(fast(x).values(), trunk(x).values(), strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()
    after = trunk.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert not any(p.requires_grad for p in fast.parameters())


def test_a_frozen_norm_applied_by_its_convolution_learns_the_same() -> None:
    torch.manual_seed(0)
    plain = stirred(
        nn.Sequential(
            nn.Conv2d(4, 8, 3, bias=False),
            FrozenBatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1, bias=False),
            FrozenBatchNorm2d(8),
        )
    )
    merged = copy.deepcopy(plain)
    absorb_frozen_norms(merged)
    merged.load_state_dict(plain.state_dict())
    assert [type(m) for m in merged] == [
        ConvWithFrozenNorm,
        AbsorbedNorm,
        nn.ReLU,
        ConvWithFrozenNorm,
        AbsorbedNorm,
    ]
    assert list(merged.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    first, second = plain(x), merged(y)
    assert torch.allclose(first, second, atol=1e-5)
    first.square().sum().backward()
    second.square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    for one, other in zip(plain.parameters(), merged.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-3)
    copied = copy.deepcopy(merged)  # its convolutions refer to its own norms
    assert isinstance(copied[0], ConvWithFrozenNorm)
    assert copied[0].norm[0] is copied[1]


@pytest.mark.parametrize("regions", [0, 3, MIN_CONV_ROWS])
@pytest.mark.parametrize("convs", [0, 1])
def test_the_first_linear_layer_as_a_convolution(regions: int, convs: int) -> None:
    torch.manual_seed(0)
    trunk = BoxHeadMLP(6, size=5, width=16, convs=convs, channels=4)
    x = torch.randn(regions, 6, 5, 5)
    wanted = trunk.convs(x).flatten(1)
    for layer in trunk.layers:
        wanted = layer(wanted).relu()
    assert torch.allclose(trunk(x), wanted, atol=1e-5)
    assert torch.allclose(for_inference(trunk)(x), wanted, atol=1e-5)
    assert torch.allclose(
        for_inference(trunk)(x.to(memory_format=torch.channels_last)), wanted, atol=1e-5
    )


@pytest.mark.parametrize("regions", [0, 3, MIN_CONV_ROWS])
@pytest.mark.parametrize("sides", [(6, 3, 2, 1), (6,), (2, 1), (7, 6)])
def test_a_layer_behind_pooled_pyramids(sides: tuple[int, ...], regions: int) -> None:
    torch.manual_seed(0)
    layer = PyramidLinear(5, sides, 16)
    parts = [torch.randn(regions, 5, side, side) for side in sides]
    wanted = F.linear(
        torch.cat([part.flatten(1) for part in parts], dim=1), layer.weight, layer.bias
    )
    torch.testing.assert_close(layer(parts), wanted, atol=1e-5, rtol=1e-4)
    fast = for_inference(nn.Sequential(layer))
    assert isinstance(fast[0], FusedPyramidLinear)
    torch.testing.assert_close(fast(parts), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        fast([part.to(memory_format=torch.channels_last) for part in parts]),
        wanted,
        atol=1e-5,
        rtol=1e-4,
    )
    half = for_inference(nn.Sequential(layer), torch.bfloat16)
    assert half([part.bfloat16() for part in parts]).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    fast = for_inference(make_model(), dtype)
    layers = [
        m for m in fast.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    assert layers
    assert {m.weight.dtype for m in layers} == {dtype}
    assert {b.dtype for name, b in fast.named_buffers() if "pixel" in name} == {torch.float32}
