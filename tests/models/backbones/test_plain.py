"""Receptive fields: known values, and the gradient of one cell, for layers and for trunks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg import config as configs
from maskseg.errors import UserError
from maskseg.models.backbones.alexnet import AlexNet
from maskseg.models.backbones.plain import (
    Conv,
    Layer,
    PlainTrunk,
    ReceptiveField,
    Stage,
    min_input_size,
    receptive_field,
)
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.backbones.vgg import VGG16
from maskseg.models.box_head import BoxHead, BoxHeadMLP
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.structures import Batch, Features, Losses, Regions

ALEXNET = [
    (11, 4, 2),
    (3, 2, 0),
    (5, 1, 2),
    (3, 2, 0),
    (3, 1, 1),
    (3, 1, 1),
    (3, 1, 1),
    (3, 2, 0),
    (6, 1, 0),
]


def stack(layers: list[Layer]) -> nn.Sequential:
    """Return convolutions along one axis, all of whose weights are 1."""
    convs = nn.Sequential(*(nn.Conv1d(1, 1, k, s, p, bias=False) for k, s, p in layers)).double()
    for conv in convs:
        nn.init.ones_(conv.weight)
    return convs


def seen(map_: Tensor, cell: int, images: Tensor) -> tuple[int, int]:
    """Return the first and last pixel, on the last axis, with a gradient of one cell."""
    (gradient,) = torch.autograd.grad(map_[..., cell].sum(), images, retain_graph=True)
    pixels = torch.nonzero(gradient.flatten(0, -2).sum(0)).squeeze(1)
    return int(pixels[0]), int(pixels[-1])


def test_literals() -> None:
    assert receptive_field([]) == ReceptiveField(1, 1, 0.5)
    assert receptive_field([(3, 1, 1)]) == ReceptiveField(1, 3, 0.5)
    assert receptive_field([(2, 2, 0)]) == ReceptiveField(2, 2, 1.0)
    assert receptive_field([(7, 2, 3), (3, 2, 1)]) == ReceptiveField(4, 11, 0.5)
    assert receptive_field(ALEXNET) == ReceptiveField(32, 355, 111.5)
    assert (min_input_size([]), min_input_size([(3, 1, 1)]), min_input_size(ALEXNET)) == (1, 1, 223)


@pytest.mark.parametrize("seed", range(20))
def test_stacks_against_the_gradient(seed: int) -> None:
    draw = random.Random(seed)
    layers = []
    for _ in range(draw.randint(1, 5)):
        kernel = draw.randint(1, 6)
        layers.append((kernel, draw.randint(1, min(3, kernel)), draw.randint(0, kernel - 1)))
    field = receptive_field(layers)
    pixels = torch.zeros(1, 1, 2000 + 4 * field.size, dtype=torch.float64, requires_grad=True)
    map_ = stack(layers)(pixels)
    for cell in (
        -(-field.size // field.stride),
        1000 // field.stride + field.size // field.stride,
    ):  # far from the border
        first, last = seen(map_, cell, pixels)
        assert last + 1 - first == field.size
        assert (first + last + 1) / 2 == field.centre + cell * field.stride


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_input_has_a_cell_and_a_smaller_one_none(seed: int) -> None:
    draw = random.Random(seed)
    layers = []
    for _ in range(draw.randint(1, 5)):
        kernel = draw.randint(1, 7)
        layers.append((kernel, draw.randint(1, 3), draw.randint(0, kernel // 2)))
    side = min_input_size(layers)
    assert stack(layers)(torch.zeros(1, 1, side, dtype=torch.float64)).shape[-1] >= 1
    if side > 1:
        with pytest.raises(RuntimeError):
            stack(layers)(torch.zeros(1, 1, side - 1, dtype=torch.float64))


TRUNKS: dict[str, tuple[type[PlainTrunk], dict[str, Any]]] = {
    "alexnet": (AlexNet, {"levels": ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]}),
    "alexnet, whole windows": (AlexNet, {"fc6_padding": 0}),
    "alexnet, another padding": (AlexNet, {"fc6_padding": 2}),
    "vgg16": (VGG16, {"levels": ["conv1", "conv2", "conv3", "conv4", "conv5"]}),
}


def thin(trunk: PlainTrunk) -> PlainTrunk:
    """Return the trunk with one channel; convolutions are sums and max poolings averages.

    The gradient of a cell is then nonzero exactly in its receptive field.
    """
    for stage in trunk.stages.values():
        for name, layer in list(stage.named_children()):
            if isinstance(layer, nn.Conv2d):
                channels = 3 if layer.in_channels == 3 else 1
                conv = nn.Conv2d(channels, 1, layer.kernel_size, layer.stride, layer.padding)
                nn.init.ones_(conv.weight)
                setattr(stage, name, conv)
            elif isinstance(layer, nn.MaxPool2d):
                setattr(stage, name, nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding))
    return trunk.double()


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("name", TRUNKS)
def test_levels_are_where_the_gradient_says(name: str, across: bool) -> None:
    kind, keys = TRUNKS[name]
    with torch.device("meta"):
        trunk = kind(**keys)
    trunk = thin(trunk)
    images = torch.ones((1, 3, 224, 1024), dtype=torch.float64, requires_grad=True)
    features = trunk(images if across else images.transpose(2, 3))
    assert list(features) == list(trunk.levels)
    for level, map_ in zip(trunk.levels.values(), features.values(), strict=True):
        cells = map_ if across else map_.transpose(2, 3)
        cell = 512 // level.stride
        first, last = seen(cells, cell, images)
        assert 0 < first < last < 1023
        assert (first + last + 1) / 2 == level.centre + cell * level.stride


SMALL = {
    "a": Stage(0, (Conv("features.0", 4, 3, padding=1), Conv("features.2", 4, 3, padding=1))),
    "b": Stage(2, (Conv("features.5", 6, 3, padding=1),)),
    "c": Stage(3, (Conv("classifier.0", 8, 2),)),
}


def test_stages_behind_the_last_level_are_not_built_and_levels_come_finest_first() -> None:
    assert list(PlainTrunk("net", SMALL, ["b"], None, 0).stages) == ["a", "b"]
    trunk = PlainTrunk("net", SMALL, ["c", "a"], None, 0)
    assert list(trunk.levels) == list(trunk(torch.zeros(1, 3, 16, 16))) == ["a", "c"]
    assert [level.channels for level in trunk.levels.values()] == [4, 8]


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_stages_get_no_gradient(frozen: int) -> None:
    trunk = PlainTrunk("net", SMALL, ["a", "b", "c"], None, frozen)
    features = trunk(torch.rand(2, 3, 32, 32))
    assert all(not f.requires_grad for f in features.values()) == (frozen == 3)
    if frozen < 3:
        sum(f.sum() for f in features.values()).backward()
    for i, stage in enumerate(trunk.stages.values()):
        assert all(
            (p.grad is None) == (i < frozen) and p.requires_grad == (i >= frozen)
            for p in stage.parameters()
        )


def test_a_level_is_not_changed_by_the_stages_behind_it() -> None:
    trunk = PlainTrunk("net", SMALL, ["a", "b", "c"], None, 0)
    alone = PlainTrunk("net", SMALL, ["a"], None, 0)
    alone.load_state_dict(
        {k: v for k, v in trunk.state_dict().items() if k.startswith("stages.a.")}
    )
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(alone(images)["a"], trunk(images)["a"])
    assert trunk(images)["a"].min() == 0


def test_small_images_are_filled_up_with_zeros() -> None:
    trunk = PlainTrunk("net", SMALL, ["a", "b", "c"], None, 0)
    assert trunk.min_side == 10
    images = torch.randn(2, 3, 3, 12)
    filled = torch.zeros(2, 3, 10, 12)
    filled[:, :, :3] = images
    for one, other in zip(trunk(images).values(), trunk(filled).values(), strict=True):
        assert torch.equal(one, other)
    assert trunk(torch.randn(1, 3, 1, 1))["c"].shape == (1, 8, 1, 1)
    assert trunk(torch.randn(0, 3, 32, 32))["c"].shape == (0, 8, 6, 6)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match="levels of net must be some of a, b, c, not d, e"):
        PlainTrunk("net", SMALL, ["d", "a", "e"], None, 0)
    with pytest.raises(UserError, match="levels of net must be some of a, b, c, not none"):
        PlainTrunk("net", SMALL, [], None, 0)
    with pytest.raises(UserError, match=r"frozen_stages must be 0 to 2 \(a, b\), not 3"):
        PlainTrunk("net", SMALL, ["b"], None, 3)


@pytest.mark.parametrize(
    ("name", "kind", "levels"),
    [
        ("alexnet", AlexNet, ["conv3", "conv4", "conv5", "fc6", "fc7"]),
        ("vgg16", VGG16, ["conv3", "conv4", "conv5"]),
        ("resnet", ResNet, ["c2", "c3", "c4", "c5"]),
    ],
)
def test_every_backbone_composes_and_builds(
    name: str, kind: type[nn.Module], levels: list[str]
) -> None:
    config = configs.compose("train", [f"model/backbone={name}", "model.backbone.weights=null"])
    with torch.device("meta"):
        backbone = configs.build(config.model.backbone)
    assert type(backbone) is kind
    assert list(backbone.levels) == levels


def test_the_trunk_alone_has_the_keys_of_the_one_below_a_pyramid() -> None:
    folder = configs.config_folder() / "model"
    assert OmegaConf.load(folder / "backbone" / "resnet.yaml") == OmegaConf.load(
        folder / "trunk" / "resnet.yaml"
    )


class Whole(nn.Module):
    """A proposer of one region per image, the whole image."""

    def forward(self, _: Features, batch: Batch) -> tuple[Regions, Losses]:
        boxes = F.pad(batch.sizes.flip(1).float(), (2, 0))
        return Regions(boxes, torch.arange(len(boxes)), torch.ones(len(boxes))), {}


def test_a_backbone_without_a_pyramid_in_a_whole_model(make_model: Any, make_batch: Any) -> None:
    backbone = VGG16(frozen_stages=2)
    classifier = BoxHead(MultiLevelRoIAlign({"conv5": 16}, 7), BoxHeadMLP(512, 7, 16), 3)
    model: GeneralizedRCNN = make_model(
        heads=False, backbone=backbone, proposer=Whole(), classifier=classifier
    )
    losses = model(make_batch([(40, 64), (32, 32)], [[(5, 5, 60, 38, 1)], []]))
    sum(losses.values(), torch.zeros(())).backward()
    gradients = [backbone.get_parameter(f"stages.conv{i}.conv2.weight").grad for i in (2, 3, 4, 5)]
    assert gradients[0] is None
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[1:])
