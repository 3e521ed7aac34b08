"""AlexNet: equality with torchvision, positions of the cells, small images, weight files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.models.backbones.alexnet import AlexNet
from maskseg.models.fuse import for_inference


@lru_cache
def theirs() -> nn.Module:
    """torchvision's network with random weights of which every layer's output has a spread."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.alexnet(weights=None).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.normal_(layer.bias, std=0.1)
    return network


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with these weights."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(theirs().state_dict(), path)
    return str(path)


def taps(images: Tensor) -> dict[str, Tensor]:
    """torchvision's maps and vectors after each ReLU, for 224 x 224 pixels."""
    network: Any = theirs()
    found, x = {}, images
    places = {1: "conv1", 4: "conv2", 7: "conv3", 9: "conv4", 11: "conv5"}
    for i, layer in enumerate(network.features):
        x = layer(x)
        if i in places:
            found[places[i]] = x.clone()
    x = network.avgpool(x).flatten(1)
    for i, layer in enumerate(network.classifier):
        x = layer(x)
        if i in (2, 5):
            found[f"fc{6 if i == 2 else 7}"] = x.clone()[:, :, None, None]
    return found


@torch.no_grad()
def test_torchvisions_numbers_on_an_image_of_224_pixels(file: str) -> None:
    wanted = taps(images := torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    found = AlexNet(file, list(wanted), fc6_padding=0)(images)
    assert list(found) == list(wanted)
    for name, map_ in found.items():
        assert wanted[name].std() > 0.1
        assert map_.shape == wanted[name].shape
        assert (map_ - wanted[name]).abs().max() < 1e-5 * wanted[name].abs().max()
    assert found["fc7"].shape == (2, 4096, 1, 1)


@torch.no_grad()
def test_padding_adds_cells_around_the_same_ones(file: str) -> None:
    images = torch.randn(1, 3, 288, 320)
    exact, padded = AlexNet(file, ["fc6", "fc7"], fc6_padding=0), AlexNet(file, ["fc6", "fc7"])
    for name, map_ in padded(images).items():
        whole = exact(images)[name]
        assert whole.shape[-2:] == (288 // 32 - 6, 320 // 32 - 6)
        assert map_.shape[-2:] == (288 // 32, 320 // 32)
        torch.testing.assert_close(map_[:, :, 3:-3, 3:-3], whole, rtol=1e-4, atol=1e-5)
        shift = exact.levels[name].centre - padded.levels[name].centre
        assert shift == 3 * padded.levels[name].stride


def test_the_cells_lie_evenly_over_an_image() -> None:
    with torch.device("meta"):
        trunk = AlexNet()
        features = trunk(torch.zeros(1, 3, 352, 480))
    for name, level in trunk.levels.items():
        for side, cells in zip((352, 480), features[name].shape[-2:], strict=True):
            last = level.centre + (cells - 1) * level.stride
            assert abs(level.centre - (side - last)) <= 1
            assert cells == side // level.stride - (name < "fc")


@pytest.mark.parametrize("padding", [0, 3])
def test_images_of_any_size(padding: int) -> None:
    with torch.device("meta"):
        trunk = AlexNet(fc6_padding=padding)
        assert trunk.min_side == (63 if padding else 223)
        for size in ((1, 1), (32, 32), (32, 1333), (223, 64)):
            assert all(min(map_.shape) >= 1 for map_ in trunk(torch.zeros(2, 3, *size)).values())
        assert trunk(torch.zeros(1, 3, 481, 321))["fc7"].shape[-2:] == (
            (14 + 2 * padding - 5, 9 + 2 * padding - 5)
        )
        assert AlexNet(levels=["conv5"]).min_side == 31


@torch.no_grad()
def test_the_form_for_inference(file: str) -> None:
    trunk, images = AlexNet(file), torch.randn(1, 3, 96, 128)
    wanted, fast, half = (
        trunk(images),
        for_inference(trunk)(images),
        for_inference(trunk, torch.bfloat16)(images),
    )
    for name, map_ in wanted.items():
        torch.testing.assert_close(fast[name], map_, rtol=1e-4, atol=1e-4)
        assert half[name].dtype == torch.bfloat16
        assert (half[name] - map_).norm() < 0.03 * map_.norm()


def test_seven_stages_can_be_frozen() -> None:
    with torch.device("meta"):
        trunk = AlexNet(frozen_stages=6)
        assert {n.split(".")[1] for n, p in trunk.named_parameters() if p.requires_grad} == {"fc7"}
        with pytest.raises(
            UserError, match=r"frozen_stages must be 0 to 7 \(conv1, .*fc7\), not 8"
        ):
            AlexNet(frozen_stages=8)
        with pytest.raises(
            UserError, match=r"levels of alexnet must be some of conv1, .*, not pool5"
        ):
            AlexNet(levels=["pool5"])
        for padding in (-1, 6):
            with pytest.raises(UserError, match=f"fc6_padding must be 0 to 5, not {padding}"):
                AlexNet(fc6_padding=padding)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = theirs().state_dict()
    path = tmp_path / "alexnet.pth"
    few = {k: v for k, v in state.items() if k.startswith("features.")}
    torch.save(few, path)
    with pytest.raises(
        UserError, match=r"alexnet.pth' do not fit alexnet: 4 missing \(\['classifier.1.weight'"
    ):
        AlexNet(str(path))
    own = AlexNet(str(path), levels=["conv5"]).state_dict()  # needs no classifier weights
    assert torch.equal(own["stages.conv5.conv1.weight"], state["features.10.weight"])
    torch.save(few | {"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(
        UserError,
        match=r"do not fit alexnet: features.0.weight is \[64, 3, 3, 3\], not \[64, 3, 11, 11\]",
    ):
        AlexNet(str(path), levels=["conv5"])
    torch.save(few | {"features.3.bias": torch.full((192,), torch.nan)}, path)
    with pytest.raises(UserError, match=r"features.3.bias has non-finite values"):
        AlexNet(str(path), levels=["conv5"])
    with pytest.raises(
        UserError, match="no such file, and torchvision has IMAGENET1K_V1, DEFAULT for alexnet"
    ):
        AlexNet("IMAGENET21K")


def test_a_state_dict_there_and_back(file: str) -> None:
    trunk, other = AlexNet(file, ["conv3"]), AlexNet(levels=["conv3"])
    other.load_state_dict(trunk.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(trunk(images)["conv3"], other(images)["conv3"])
