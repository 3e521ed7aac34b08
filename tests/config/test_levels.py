"""Strides and channels are those of the backbone, and are written nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskseg import config as configs
from maskseg.errors import UserError
from maskseg.structures import Categories

TINY = ["model.backbone.trunk.name=resnet18", "model.backbone.trunk.weights=null"]


def build(*overrides: str) -> nn.Module:
    config = configs.compose("train", ["model=mask_rcnn", *overrides])
    configs.set_categories(config, Categories(("a", "b"), (1, 2)))
    with torch.device("meta"):
        return configs.build_model(config)


def test_a_pyramid() -> None:
    model = build(*TINY, "model.backbone.channels=24")
    assert model.proposer.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert model.classifier.pooler.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    assert model.heads["mask"].pooler.strides == model.classifier.pooler.strides
    assert model.proposer.head.objectness.in_channels == 24
    assert model.heads["mask"].convs[0][0].in_channels == 24
    assert model.classifier.mlp.layers[0].in_features == 24 * 7 * 7


def test_a_backbone_without_a_pyramid() -> None:
    trunk = ["model/backbone=resnet", "model.backbone.name=resnet18", "model.backbone.weights=null"]
    c4 = ["model.proposer.strides={c4: 16}", "model.classifier.pooler.strides={c4: 16}"]
    anchors = ["model.proposer.anchors.sizes=[[32,64,128]]", "model.proposer.head.per_cell=9"]
    model = build(*trunk, *c4, *anchors)
    assert model.proposer.strides == {"c4": 16}
    assert model.proposer.head.objectness.in_channels == 256
    assert model.heads["mask"].convs[0][0].in_channels == 256


def test_levels_that_do_not_exist_or_differ() -> None:
    with pytest.raises(UserError, match=r"model\.proposer\.strides=.*the backbone has p2, p3"):
        build(*TINY, "model.proposer.strides={c9: 4}", "model.proposer.anchors.sizes=[[32]]")
    with pytest.raises(UserError, match="have different numbers of channels: 64, 128, 256, 512"):
        build(
            "model/backbone=resnet", "model.backbone.name=resnet18", "model.backbone.weights=null"
        )
