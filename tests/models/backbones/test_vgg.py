"""VGG-16: equality with torchvision, its fully connected layers, frozen blocks, weight files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.models.backbones.vgg import VGG16, load_fc_state
from maskseg.models.box_head import BoxHeadMLP
from maskseg.models.fuse import for_inference

LEVELS = ["conv1", "conv2", "conv3", "conv4", "conv5"]


@lru_cache
def features() -> nn.Sequential:
    """torchvision's convolutions with random weights, biases too."""
    torch.manual_seed(0)
    parts: nn.Sequential = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in parts:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return parts


def state() -> dict[str, Tensor]:
    return {f"features.{k}": v for k, v in features().state_dict().items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with these weights, without the classifier."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state(), path)
    return str(path)


@pytest.mark.parametrize("size", [(64, 96), (75, 50)])
@torch.no_grad()
def test_torchvisions_numbers(file: str, size: tuple[int, int]) -> None:
    wanted, x = [], torch.randn(2, 3, *size)
    found = VGG16(file, LEVELS)(x)
    for layer in features():
        if isinstance(layer, nn.MaxPool2d):
            wanted.append(x.clone())
        x = layer(x)
    assert list(found) == LEVELS
    for map_, theirs in zip(found.values(), wanted, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(map_, theirs, rtol=1e-4, atol=1e-5)


def test_levels() -> None:
    with torch.device("meta"):
        trunk = VGG16(levels=LEVELS)
    assert [(v.stride, v.centre, v.channels) for v in trunk.levels.values()] == [
        (1, 0.5, 64),
        (2, 1.0, 128),
        (4, 2.0, 256),
        (8, 4.0, 512),
        (16, 8.0, 512),
    ]
    assert list(VGG16().levels) == ["conv3", "conv4", "conv5"]
    assert trunk.min_side == 16
    with pytest.raises(UserError, match=r"levels of vgg16 must be some of conv1, .*, not conv6"):
        VGG16(levels=["conv6"])


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_frozen_blocks_get_no_gradient(frozen: int) -> None:
    trunk = VGG16(frozen_stages=frozen)
    maps = trunk(torch.rand(1, 3, 32, 32))
    if frozen < 5:
        sum(m.sum() for m in maps.values()).backward()
    for i, block in enumerate(trunk.stages.values()):
        assert all((p.grad is None) == (i < frozen) for p in block.parameters())


def test_gradients_are_torchvisions(file: str) -> None:
    trunk, images = VGG16(file, ["conv5"], frozen_stages=2), torch.randn(1, 3, 48, 48)
    trunk(images)["conv5"].square().mean().backward()
    theirs = features()
    theirs.zero_grad()
    theirs[:-1](images).square().mean().backward()
    for ours, place in (
        (("conv3", "conv1"), 10),
        (("conv4", "conv2"), 19),
        (("conv5", "conv3"), 28),
    ):
        found = trunk.get_submodule(f"stages.{'.'.join(ours)}").weight.grad
        torch.testing.assert_close(found, theirs[place].weight.grad, rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_the_form_for_inference(file: str) -> None:
    trunk, images = VGG16(file), torch.randn(1, 3, 64, 32)
    wanted, fast, half = (
        trunk(images),
        for_inference(trunk)(images),
        for_inference(trunk, torch.bfloat16)(images),
    )
    for name, map_ in wanted.items():
        torch.testing.assert_close(fast[name], map_, rtol=1e-4, atol=1e-4)
        assert half[name].dtype == torch.bfloat16
        assert (half[name] - map_).norm() < 0.05 * map_.norm()


@torch.no_grad()
def test_the_classifier_over_pooled_regions(tmp_path: Path) -> None:
    """Equal to torchvision's classifier for 7 x 7 cells, flattened by channel, row, column."""
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(weights=None).eval()
    shapes = {
        k: v.shape
        for k, v in theirs.state_dict().items()
        if k.startswith(("classifier.0.", "classifier.3."))
    }
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) / 80
    saved = {
        k: noise.repeat(shape.numel() // len(noise) + 1)[: shape.numel()].view(shape)
        for k, shape in shapes.items()
    }
    torch.save(saved, tmp_path / "vgg16.pth")
    theirs.load_state_dict(saved, strict=False, assign=True)
    pooled = torch.rand(3, 512, 7, 7, generator=torch.Generator().manual_seed(1))
    trunk = BoxHeadMLP(in_channels=512, size=7, width=4096, layers=2)
    trunk.load_state_dict(load_fc_state(str(tmp_path / "vgg16.pth")))
    wanted = theirs.classifier[:6](theirs.avgpool(pooled).flatten(1))
    assert wanted.std() > 0.1
    found = trunk(pooled)
    assert found.shape == (3, trunk.width) == (3, 4096)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features.28.bias": None}, r"1 missing \(\['features.28.bias'\]\)"),
        (
            {"features.5.weight": torch.zeros(128, 64, 1, 1)},
            r"features.5.weight is \[128, 64, 1, 1\], not \[128, 64, 3, 3\]",
        ),
        ({"features.0.bias": torch.zeros(64, 1)}, r"features.0.bias is \[64, 1\], not \[64\]"),
        ({"features.0.bias": torch.zeros(())}, r"features.0.bias is \[\], not \[64\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "other.pth"
    torch.save(state() | change, path)
    with pytest.raises(UserError, match=f"other.pth' do not fit vgg16: {words}") as error:
        VGG16(str(path))
    assert "\n" not in str(error.value)


def test_a_classifier_that_is_not_there_is_named(file: str) -> None:
    with pytest.raises(UserError, match=r"do not fit vgg16: 4 missing \(\['classifier.0.weight'"):
        load_fc_state(file)
    names = "IMAGENET1K_V1, IMAGENET1K_FEATURES, DEFAULT"
    with pytest.raises(UserError, match=f"no such file, and torchvision has {names} for vgg16"):
        load_fc_state("IMAGENET1K_V9")


def test_a_state_dict_there_and_back(file: str) -> None:
    trunk, other = VGG16(file), VGG16()
    other.load_state_dict(trunk.state_dict())
    images = torch.randn(1, 3, 32, 32)
    for one, two in zip(trunk(images).values(), other(images).values(), strict=True):
        assert torch.equal(one, two)
