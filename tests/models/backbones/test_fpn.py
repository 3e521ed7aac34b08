"""FPN: equality with torchvision for the same weights."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.structures import FeatureSpec

CHANNELS = {"c2": 8, "c3": 12, "c4": 16, "c5": 20}


class Trunk(nn.Module):
    """A trunk that returns the given maps."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = {
            k: FeatureSpec(4 * 2**i, 0.5, c) for i, (k, c) in enumerate(CHANNELS.items())
        }

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return maps


@pytest.mark.parametrize("norm", [None, "GN", "BN"])
@pytest.mark.parametrize("side", [4, 5])  # of c5; p6 of an odd side is rounded up
def test_equal_to_torchvision(norm: str | None, side: int) -> None:
    torch.manual_seed(0)
    groups = {None: None, "GN": lambda c: nn.GroupNorm(32, c), "BN": nn.BatchNorm2d}[norm]
    theirs = FeaturePyramidNetwork(list(CHANNELS.values()), 64, LastLevelMaxPool(), groups)
    ours = FPN(Trunk(), 64, norm)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0.1, 0.1)
    names = {"inner_blocks": "lateral", "layer_blocks": "output"}
    pieces = {k: k.split(".") for k in theirs.state_dict()}
    ours.load_state_dict(
        {
            ".".join([names[p[0]], f"p{int(p[1]) + 2}", *p[2:]]): theirs.state_dict()[k]
            for k, p in pieces.items()
        }
    )
    maps = {
        k: torch.randn((2, c, side * 2 ** (3 - i), 3 * 2 ** (3 - i)))
        for i, (k, c) in enumerate(CHANNELS.items())
    }
    wanted = theirs(OrderedDict(maps))
    found = ours(maps)
    assert list(found) == list(ours.levels) == ["p2", "p3", "p4", "p5", "p6"]
    for ours_, theirs_ in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(ours_, theirs_)


def test_levels_are_what_comes_out() -> None:
    fpn = FPN(ResNet("resnet18"), 16).eval()
    with torch.no_grad():
        features = fpn(torch.zeros((1, 3, 64, 128)))
    for level, map_ in zip(fpn.levels.values(), features.values(), strict=True):
        assert map_.shape == (1, 16, 64 // level.stride, 128 // level.stride)
        assert level.channels == 16
        assert level.centre == 0.5
    assert torch.equal(features["p6"], features["p5"][:, :, ::2, ::2])


def test_norm_replaces_the_bias() -> None:
    with_norm, without = FPN(Trunk(), 64, "GN"), FPN(Trunk(), 64)
    assert sum(isinstance(m, nn.GroupNorm) and m.num_groups == 32 for m in with_norm.modules()) == 8
    assert all(m.bias is None for m in with_norm.modules() if isinstance(m, nn.Conv2d))
    assert all(m.bias is not None for m in without.modules() if isinstance(m, nn.Conv2d))


def test_a_pyramid_over_a_trunk_that_ends_sooner() -> None:
    fpn = FPN(ResNet("resnet18", out_level="c4"), channels=8).eval()
    features = fpn(torch.zeros((1, 3, 64, 96)))
    assert list(features) == list(fpn.levels) == ["p2", "p3", "p4", "p5"]
    for level, map_ in zip(fpn.levels.values(), features.values(), strict=True):
        assert map_.shape == (1, 8, 64 // level.stride, 96 // level.stride)


def test_the_start_of_the_weights() -> None:
    """Uniform with variance 1 / inputs: Caffe2's filler, as in torchvision and detectron2."""
    pyramid = FPN(ResNet("resnet18", norm="BN"), 64)
    for layer, inputs in ((pyramid.lateral["p5"], 512), (pyramid.output["p2"], 64 * 9)):
        (conv,) = (m for m in layer.modules() if isinstance(m, nn.Conv2d))
        assert conv.weight.std().item() == pytest.approx((1 / inputs) ** 0.5, rel=0.05)
