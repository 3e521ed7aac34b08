"""Class activation maps of torchvision's classifiers: logits, cell centers and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from maskseg.annotation import cam
from maskseg.annotation.cam import CAMModel, compute_cam, merge_classes
from maskseg.errors import UserError
from maskseg.structures import FeatureSpec
from maskseg.visualization.cam import resample_to_pixels

FAMILIES = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "squeezenet1_0",
    "squeezenet1_1",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "shufflenet_v2_x0_5",
]


def noise(height: int = 96, width: int = 128, seed: int = 0) -> Tensor:
    return torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(seed))


def randomize(model: CAMModel) -> None:
    """Randomize the statistics of the norms and the bias of the classification layer."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1
    model.classifier.bias.data = torch.randn(model.classifier.bias.shape, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mean_of_the_map_is_torchvisions_logit(name: str) -> None:
    torch.manual_seed(0)
    model = CAMModel(name, None).train()  # has no effect
    randomize(model)
    images = noise()
    logits, maps = model.activation(images)
    expected = model.net(images)
    bias = (
        0.0 if name.startswith("squeezenet") else model.classifier.bias
    )  # its bias is already in the map
    most = expected.abs().max()
    torch.testing.assert_close(logits / most, expected / most, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        (maps.mean(dim=(2, 3)) + bias) / most, expected / most, rtol=0, atol=2e-6
    )
    assert maps.std(dim=(2, 3)).max() > 0
    one, _ = model.activation(images[1:])
    torch.testing.assert_close(one / most, logits[1:] / most, rtol=0, atol=2e-6)


def test_every_supported_network_has_a_tested_family() -> None:
    kinds = {torchvision.models.get_model_builder(name).__module__ for name in FAMILIES}
    others = [
        name
        for name in cam.supported_networks()
        if torchvision.models.get_model_builder(name).__module__ not in kinds
    ]
    assert others == []
    assert len(cam.supported_networks()) > 40


@pytest.mark.parametrize(
    "name",
    [
        "vgg16",
        "alexnet",
        "mobilenet_v3_small",
        "convnext_tiny",
        "vit_b_16",
        "googlenet",
        "resnet19",
        "fasterrcnn_resnet50_fpn",
    ],
)
def test_other_networks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*resnet18.*squeezenet1_1"):
        CAMModel(name, None)


def linearize(net: nn.Module) -> None:
    """Make the network linear with constant weights.

    The gradient of a cell is then symmetric about the center of its receptive field.
    """
    for name, module in list(net.named_modules()):
        parent = net.get_submodule(name.rpartition(".")[0]) if name else net
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MaxPool2d):
            kernel, stride, padding = module.kernel_size, module.stride, module.padding
            setattr(
                parent,
                name.rpartition(".")[2],
                nn.AvgPool2d(kernel, stride, padding, module.ceil_mode),
            )
        elif isinstance(module, nn.BatchNorm2d):
            setattr(parent, name.rpartition(".")[2], nn.Identity())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "squeezenet1_0",
        "squeezenet1_1",
        "densenet121",
        "mobilenet_v2",
        "regnet_x_400mf",
        "shufflenet_v2_x0_5",
    ],
)
def test_the_cells_centres(name: str) -> None:
    torch.manual_seed(0)
    model = CAMModel(name, None)
    linearize(model.net)
    side, cells = 704, {}
    images = (
        torch.rand((1, 3, side, side)) * 1e-3
    ).requires_grad_()  # small values pass ReLU6 unchanged
    with torch.enable_grad():
        maps = CAMModel.activation.__wrapped__(model, images)[1]  # type: ignore[attr-defined]
        for i in (side // model.level.stride // 2, side // model.level.stride // 2 + 1):
            (grad,) = torch.autograd.grad(maps[0, 0, i, i - 1], images, retain_graph=True)
            weight = grad.abs().sum(dim=(0, 1))
            across, down = weight.sum(dim=0), weight.sum(dim=1)
            pixels = torch.arange(side) + 0.5
            cells[i] = (
                float((down * pixels).sum() / down.sum()),
                float((across * pixels).sum() / across.sum()),
            )
    for i, (y, x) in cells.items():
        assert y == pytest.approx(model.level.centre + i * model.level.stride, abs=0.3)
        assert x == pytest.approx(model.level.centre + (i - 1) * model.level.stride, abs=0.3)


def test_compute_cam_literal() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])  # two channels, 1 x 2 cells
    weight, bias = torch.tensor([[1.0, -1.0], [2.0, 0.0]]), torch.tensor([0.5, 0.0])
    logits, maps = compute_cam(features, weight, bias)
    assert maps.tolist() == [[[[1.0, -2.0]], [[2.0, 4.0]]]]
    assert logits.tolist() == [[0.0, 3.0]]
    logits, maps = compute_cam(features, weight, bias, torch.tensor([[[True, False]]]))
    assert maps.tolist() == [[[[1.0, 0.0]], [[2.0, 0.0]]]]
    assert logits.tolist() == [[1.5, 2.0]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_cam(features + 1e-3, weight, bias)[0].dtype == torch.float32


def test_at_pixels_literal() -> None:
    level, maps = FeatureSpec(4, 2.0, 1), torch.tensor([[[0.0, 4.0]]])  # centers at 2 and 6
    assert resample_to_pixels(maps, level, (4, 8), (4, 8))[0, 0].tolist() == [
        0.0,
        0.0,
        0.5,
        1.5,
        2.5,
        3.5,
        4.0,
        4.0,
    ]
    # the network saw the image at half its size: centers at 4 and 12
    assert resample_to_pixels(maps, level, (4, 8), (8, 16))[0, 0, 4:12].tolist() == [
        0.25,
        0.75,
        1.25,
        1.75,
        2.25,
        2.75,
        3.25,
        3.75,
    ]


def test_merge_classes_takes_the_member_with_the_highest_logit() -> None:
    logits, maps = (
        torch.tensor([[1.0, 3.0, 2.0, -1.0], [5.0, 3.0, 2.0, 6.0]]),
        torch.arange(8.0).view(2, 4, 1, 1),
    )
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])
    class_logits, where, sums = merge_classes(logits, maps, probabilities, [[0, 1, 2], [3]])
    assert class_logits.tolist() == [[3.0, -1.0], [5.0, 6.0]]
    assert where.flatten(1).tolist() == [[1.0, 3.0], [4.0, 7.0]]
    torch.testing.assert_close(sums, torch.tensor([[0.8, 0.2], [0.6, 0.4]]))


def test_weights_of_a_file_and_their_number_of_classes(tmp_path: Path) -> None:
    net = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=7)
    path = tmp_path / "own.pth"
    torch.save(net.state_dict(), path)
    model = CAMModel("squeezenet1_1", str(path))
    images = noise(64, 64)
    torch.testing.assert_close(model.activation(images)[0], net.eval()(images))
    assert model.class_names == []
    assert CAMModel("squeezenet1_1", None).class_names[207] == "golden retriever"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv1.weight"), "1 tensors are missing"),
        (lambda s: s.update({"more": torch.zeros(1)}), "1 are unexpected"),
        (lambda s: s.update({"conv1.weight": torch.zeros(1)}), "size mismatch"),
        (lambda s: s["fc.bias"].fill_(float("nan")), r"fc\.bias has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    state = torchvision.models.resnet18(weights=None, num_classes=3).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"do not fit resnet18: .*{message}") as raised:
        CAMModel("resnet18", str(tmp_path / "w.pth"))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="no such file, and torchvision has IMAGENET1K_V1"):
        CAMModel("resnet18", "IMAGENET1K_V9")


def test_keys_of_published_densenet_files(tmp_path: Path) -> None:
    state = torchvision.models.densenet121(weights=None, num_classes=2).state_dict()
    old = {
        cam.re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value
        for key, value in state.items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "w.pth")
    torch.testing.assert_close(
        CAMModel("densenet121", str(tmp_path / "w.pth")).net.state_dict(), state
    )


def test_normalise_matches_torchvisions_preset() -> None:
    pixels = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    for name in ("resnet18", "efficientnet_v2_l"):  # the second one has a different mean
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        model = object.__new__(CAMModel)
        nn.Module.__init__(model)
        model._register_pixel_statistics(name)
        expected = torchvision.transforms.functional.normalize(
            pixels.float() / 255, preset.mean, preset.std
        )
        torch.testing.assert_close(model.normalise(pixels), expected)


def test_probabilities() -> None:
    assert CAMModel("squeezenet1_1", None).probabilities(torch.zeros((1, 4))).tolist() == [
        [0.25] * 4
    ]
