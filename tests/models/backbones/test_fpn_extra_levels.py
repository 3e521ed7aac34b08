"""Levels of the trunk that FPN returns after the pyramid."""

from __future__ import annotations

import pytest
import torch

from maskseg.errors import UserError
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet


def test_extra_levels_are_the_trunks() -> None:
    torch.manual_seed(0)
    trunk = ResNet("resnet18", norm="GN")
    plain, extended = FPN(trunk, 16).eval(), FPN(trunk, 16, extra_levels=["c2", "c4"]).eval()
    extended.load_state_dict(plain.state_dict())
    images = torch.randn((2, 3, 64, 96))
    with torch.no_grad():
        own, without, found = trunk(images), plain(images), extended(images)
    assert list(found) == list(extended.levels) == ["p2", "p3", "p4", "p5", "p6", "c2", "c4"]
    assert all(torch.equal(found[name], without[name]) for name in without)
    for name in ("c2", "c4"):
        assert torch.equal(found[name], own[name])
        assert extended.levels[name] == trunk.levels[name]
        assert found[name].shape[1] == extended.levels[name].channels
    assert list(plain.levels) == list(without) == ["p2", "p3", "p4", "p5", "p6"]


def test_a_level_that_the_trunk_has_not() -> None:
    message = "fpn: extra_levels has p3, c9, the trunk has c2, c3, c4, c5"
    with pytest.raises(UserError, match=message):
        FPN(ResNet("resnet18"), 16, extra_levels=["c2", "p3", "c9"])
