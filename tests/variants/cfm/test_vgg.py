"""Masked features of VGG-16.

Equality with torchvision, initialization of the layers, positions of pooled regions, both designs
on every kind of trunk, and the class of pixels that no segment covers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from made.runs import lines
from made.tools import done
from torch import Tensor, nn

from maskseg import config as configs
from maskseg.data.collate import concatenate_regions, segment_regions
from maskseg.data.datasets.pascal_context import PascalContextSource
from maskseg.data.datasets.scenes import make_scenes
from maskseg.data.datasets.voc import VocSource
from maskseg.errors import UserError
from maskseg.evaluation.semantic import SemanticConfusion
from maskseg.masks.superpixel import SegmentProposals
from maskseg.models.backbones.alexnet import AlexNet
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.backbones.vgg import VGG16
from maskseg.structures import Batch, FeatureSpec, Regions, Targets
from maskseg.variants.cfm import layers as cfm_layers
from maskseg.variants.cfm import prepare
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.layers import FullyConnected, build_paths
from maskseg.variants.cfm.net import CFMNet
from maskseg.variants.cfm.proposer import DrawnSegments, SegmentProposer
from maskseg.variants.cfm.pyramid_ops import flatten_parts
from maskseg.variants.cfm.settings import MaskingSettings, MLPSettings, PoolerSettings
from maskseg.variants.cfm.store import write_store

NONE = torch.zeros(0, dtype=torch.int64)
ON_SCENES = [
    "experiment=voc_cfm_vgg16",
    "data=scenes",
    "data.stuff_json=${data.train_json}",
    "data.val_semantic=${data.root}/stuff",
]
NUMBERS = ["data.num_classes=5", "data.num_things=4"]
TINY = [*ON_SCENES, "model.backbone.weights=null", "model.classifier.mlp.width=16"]


def segments(count: int, side: int = 64, seed: int = 0, image: int = 0) -> Regions:
    """Random sets of the 16 x 16-pixel squares of an image; the first has all."""
    cells = side // 16
    labels = (np.arange(side)[:, None] // 16 * cells + np.arange(side) // 16).astype(np.int32)
    members = np.random.default_rng(seed).random((count, cells**2)) < 0.4
    members[:, 0] = True
    members[:1] = True
    return segment_regions(SegmentProposals(labels, members), image)


def filled(shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Create weights and biases of these shapes, with which signals neither vanish nor explode."""
    noise = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    result = {}
    for name, shape in shapes.items():
        values = noise.repeat(shape.numel() // len(noise) + 1)[: shape.numel()].view(shape)
        result[name] = values.mul_(0.1 if len(shape) == 1 else (2 / shape[1:].numel()) ** 0.5)
    return result


@pytest.mark.slow
@torch.no_grad()
def test_a_segment_of_the_whole_image_equals_torchvision(tmp_path: Path) -> None:
    """With the bins of the config, a segment of the whole 224 x 224 image has VGG-16's own fc7.

    On each path of both designs.
    """
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(weights=None).eval()
    theirs.classifier = theirs.classifier[:6]  # up to the ReLU and dropout of fc7
    saved = filled({name: value.shape for name, value in theirs.state_dict().items()})
    theirs.load_state_dict(saved, assign=True)
    torch.save(saved, tmp_path / "vgg16.pth")
    words = [*ON_SCENES, *NUMBERS, f"model.backbone.weights={tmp_path / 'vgg16.pth'}"]
    model = configs.build_model(configs.compose("train", words)).eval()
    classifier = model.classifier
    assert isinstance(classifier, CFMClassifier)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    whole = segments(1, 224)
    expected = theirs(image)
    assert expected.std() > 0.1
    assert whole.masks is not None
    rest = model.backbone(image), whole.boxes, whole.image_index, whole.masks  # type: ignore[operator]
    result = classifier.compute_vectors(*rest)
    classifier.masking = replace(classifier.masking, design="pool_first")
    classifier.layers["both"] = classifier.layers["box"]
    result = torch.cat([result, classifier.compute_vectors(*rest)], dim=1)
    assert result.shape == (1, 3 * 4096)
    for part in result.split(4096, dim=1):
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.fixture
def small_vgg(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Fully connected layers like those of VGG-16, with 3 channels and width 8."""
    shapes = {
        "layers.0.weight": (8, 3 * 49),
        "layers.0.bias": (8,),
        "layers.1.weight": (8, 8),
        "layers.1.bias": (8,),
    }
    state = filled({name: torch.Size(shape) for name, shape in shapes.items()})
    monkeypatch.setattr(cfm_layers, "VGG16_SHAPE", (3, 7, 8, 2))
    monkeypatch.setattr(cfm_layers, "load_fc_state", lambda _: state)
    return state


def test_further_levels_start_at_zero_and_learn(small_vgg: dict[str, Tensor]) -> None:
    paths = build_paths(["segment", "box"], 3, [7, 2, 1], MLPSettings(8, 2, weights="vgg16.pth"))
    x = [torch.rand(4, 3, side, side) for side in (7, 2, 1)]
    expected = (
        x[0].flatten(1) @ small_vgg["layers.0.weight"].T + small_vgg["layers.0.bias"]
    ).relu()
    expected = (expected @ small_vgg["layers.1.weight"].T + small_vgg["layers.1.bias"]).relu()
    for path in paths.values():
        result = path(x)
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        columns = path[0].weight[:, 3 * 49 :], path[0].weight.grad[:, 3 * 49 :]
        assert not columns[0].any()
        assert columns[1].any()
    assert (
        paths["segment"][0].weight.data_ptr() != paths["box"][0].weight.data_ptr()
    )  # the paths have separate layers


@pytest.mark.parametrize(
    ("channels", "pyramid", "width", "layers"),
    [(4, [7], 8, 2), (3, [6, 7], 8, 2), (3, [7], 16, 2), (3, [7], 8, 3)],
)
@pytest.mark.usefixtures("small_vgg")
def test_weights_for_other_shapes_raise(
    channels: int, pyramid: list[int], width: int, layers: int
) -> None:
    with pytest.raises(
        UserError,
        match="weights of VGG-16 need its shape: .*"
        f" not {channels}, {pyramid[0]}, {width} and {layers}",
    ):
        build_paths(["both"], channels, pyramid, MLPSettings(width, layers, weights="vgg16.pth"))
    assert build_paths(["both"], channels, pyramid, MLPSettings(width, layers))


@pytest.mark.parametrize(
    ("width", "layers", "dropout"), [(0, 2, 0.0), (8, 0, 0.0), (8, 2, 1.0), (8, 2, -0.1)]
)
def test_invalid_layer_arguments(width: int, layers: int, dropout: float) -> None:
    with pytest.raises(UserError, match=r"mlp\.(width|layers|dropout)=.*: expected a"):
        MLPSettings(width, layers, dropout)


def test_dropout_applies_in_training_and_changes_no_state_names() -> None:
    torch.manual_seed(0)
    layers = FullyConnected(2, [5], 400, 2, dropout=0.5)
    x = [torch.rand(20, 2, 5, 5)]
    other = FullyConnected(2, [5], 400, 2)
    other.load_state_dict(layers.state_dict())
    torch.testing.assert_close(layers.eval()(x), other(x))
    first = layers[1](
        layers[0](x)
    )  # with dropout after the last layer only: what it keeps is doubled
    first = first[:, :, None, None]
    alone = FullyConnected(400, [1], 400, 1, dropout=0.5)
    alone.load_state_dict(
        {name: layers.state_dict()[f"2.{name[2:]}"] for name in alone.state_dict()}
    )
    expected = alone.eval()([first])
    result = alone.train()([first])
    kept = result != 0
    torch.testing.assert_close(result[kept], 2 * expected[kept])
    assert 0.4 < float((expected[~kept] != 0).sum() / (expected != 0).sum()) < 0.6
    torch.manual_seed(1)
    dropped = layers.train()(
        x
    )  # after both layers: differs from dropout after the last one, where values are kept
    kept = dropped != 0
    assert not torch.allclose(dropped[kept], 2 * other(x)[kept], rtol=0.01)


class Flattened(nn.Module):
    """Replaces layers and returns their input."""

    def forward(self, parts: list[Tensor]) -> Tensor:
        return flatten_parts(parts)


@lru_cache
def trunk_levels() -> dict[str, FeatureSpec]:
    with torch.device("meta"):
        return {
            "alexnet": AlexNet().levels["conv5"],
            "vgg16": VGG16().levels["conv5"],
            "resnet18": ResNet("resnet18").levels["c4"],
        }


@pytest.mark.parametrize("name", ["alexnet", "vgg16", "resnet18"])
def test_regions_are_pooled_at_the_true_cell_centers(name: str) -> None:
    """On a map whose values are the positions of its cells, bins contain their own positions.

    They lie in the box, whatever the center of the first cell is.
    """
    at = trunk_levels()[name]
    assert at.stride == 16
    at = FeatureSpec(at.stride, at.centre, 2)
    place = at.centre + at.stride * torch.arange(16.0)
    features = {"x": torch.stack([place.expand(16, 16), place[:, None].expand(16, 16)])[None]}
    model = CFMClassifier(
        ["x"],
        {"x": at},
        num_classes=2,
        pooler=PoolerSettings(size=4, pyramid=[4]),
        masking=MaskingSettings(masked_sides=[4]),
        mlp=MLPSettings(width=1),
    )
    model.layers = nn.ModuleDict({path: Flattened() for path in ("segment", "box")})
    whole = segments(1, 256)
    assert whole.masks is not None
    box = torch.tensor([[64.0, 80.0, 184.0, 144.0]])
    bins = torch.stack(
        [
            (64 + 120 * (torch.arange(4) + 0.5) / 4).expand(4, 4),
            (80 + 64 * (torch.arange(4) + 0.5) / 4)[:, None].expand(4, 4),
        ]
    )
    for result in model.compute_vectors(
        features, box, torch.zeros(1, dtype=torch.int64), whole.masks
    ).split(32, dim=1):
        torch.testing.assert_close(result.view(2, 4, 4), bins)


def make_net(kind: str, design: str, **keys: Any) -> CFMNet:
    torch.manual_seed(0)
    backbone, levels = {
        "c4": lambda: (ResNet("resnet18", norm="BN", frozen_stages=2), ["c4"]),
        "fpn": lambda: (
            FPN(ResNet("resnet18", norm="BN", frozen_stages=2), channels=8),
            ["p2", "p3", "p4", "p5"],
        ),
        "conv5": lambda: (VGG16(levels=["conv5"], frozen_stages=2), ["conv5"]),
    }[kind]()
    at = {name: backbone.levels[name] for name in levels}
    classifier = CFMClassifier(
        levels,
        at,
        num_classes=3,
        pooler=PoolerSettings(size=14, pyramid=[7, 1], sampling_ratio=1, canonical_size=100.0),
        masking=MaskingSettings(design, masked_sides=[7]),
        mlp=MLPSettings(width=16, dropout=0.5),
        score_threshold=0.2,
    )
    return CFMNet(
        2,
        backbone=backbone,
        proposer=SegmentProposer(method=lambda _: None),
        sampler=DrawnSegments(3),
        classifier=classifier,
        **keys,
    )


def make_batch(proposals: Regions) -> Batch:
    images = torch.randint(
        0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    sizes = torch.tensor([[64, 64], [48, 64]])
    return Batch(
        images,
        sizes,
        sizes,
        [0, 1],
        ["a", "b"],
        Targets(torch.zeros(0, 4), NONE, NONE, NONE.bool()),
        proposals=proposals,
    )


@pytest.mark.parametrize("design", ["full_map", "pool_first"])
@pytest.mark.parametrize("kind", ["c4", "fpn", "conv5"])
def test_a_step_of_training_and_no_proposals(kind: str, design: str) -> None:
    model = make_net(kind, design)
    result = concatenate_regions([segments(5), segments(4, seed=1, image=1)])
    drawn = Regions(
        result.boxes,
        result.image_index,
        result.scores,
        torch.tensor([0, 1, 2, 3, -1, 3, 2, 1, 0]),
        result.masks,
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses = model.train()(make_batch(drawn))
    assert list(losses) == ["segment_class"]
    assert abs(losses["segment_class"].item() - np.log(4)) < 1
    losses["segment_class"].backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    frozen = {name for name, value in model.named_parameters() if value.grad is None}
    parts = ("stages.conv1.", "stages.conv2.") if kind == "conv5" else ("stem.", "layer1.")
    assert frozen
    assert all(
        any(part in name for part in (*parts, "layer4.")) for name in frozen
    )  # layer4 follows c4
    stays = frozen | {
        name
        for name, value in model.named_parameters()
        if value.grad is not None and not value.grad.any()
    }
    assert not any(name.startswith("classifier.") for name in stays)
    assert len(stays) < len(before) / 2
    assert all(
        torch.equal(value, before[name]) == (name in stays)
        for name, value in model.named_parameters()
    )
    outputs = model.eval().predict(make_batch(result[NONE]))
    assert len(outputs.detections) == 0
    assert (outputs.semantic["classes"] == -1).all()
    losses = model(make_batch(drawn[NONE]))
    assert losses["segment_class"] == 0


def test_uncovered_pixels_get_the_background_label() -> None:
    result = concatenate_regions([segments(3), segments(0, image=1)])
    model = make_net("conv5", "full_map", background_label=2).eval()
    plain = make_net("conv5", "full_map").eval()
    with torch.no_grad():
        for net in (model, plain):  # all segments are things with label 1
            net.classifier.scores.weight.zero_()  # type: ignore[union-attr]
            net.classifier.scores.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))  # type: ignore[union-attr]
    batch = make_batch(result[torch.tensor([1, 2])])
    classes, without = (net.predict(batch).semantic["classes"] for net in (model, plain))
    assert set(without[0].unique().tolist()) == {-1, 1}
    assert torch.equal(classes[0], torch.where(without[0] < 0, 2, without[0]))
    assert (classes[1, :48] == 2).all()
    assert (classes[1, 48:] == -1).all()  # the padding
    truth = torch.full((64, 64), 2)
    truth[:16, :16] = 1
    confusion = SemanticConfusion(3)
    confusion.add(classes[0], truth)
    share = float((classes[0] == 2).sum()) / float((truth == 2).sum())
    assert confusion.per_class()[2]["iou"] == pytest.approx(share)
    assert confusion.per_class()[2]["iou"] > 0


@pytest.mark.parametrize("label", [3, -2])
def test_an_invalid_background_label_raises(label: int) -> None:
    with pytest.raises(
        UserError,
        match="model.background_label must be the label of a class, 0 to 2, or -1 for none,"
        f" not {label}",
    ):
        make_net("conv5", "full_map", background_label=label)


def test_the_experiment_builds() -> None:
    model = configs.build_model(configs.compose("train", [*TINY, *NUMBERS]))
    assert isinstance(model, CFMNet)
    assert (model.num_things, model.background_label) == (4, 4)
    assert list(model.classifier.feature_specs.items()) == [("conv5", FeatureSpec(16, 8.0, 512))]  # type: ignore[union-attr, operator]
    assert all(layers.dropout == 0.5 for layers in model.classifier.layers.values())  # type: ignore[union-attr, operator]
    assert isinstance(model.backbone, VGG16)
    assert not any(
        p.requires_grad
        for name in ("conv1", "conv2")
        for p in model.backbone.stages[name].parameters()
    )


def test_its_data_are_things_and_an_untrained_background() -> None:
    source = configs.build_source(configs.compose("train", ["experiment=voc_cfm_vgg16"]).data)
    assert isinstance(source, VocSource)
    assert (
        source.split("train").transforms[0].sizes
        == source.split("val").transforms[0].sizes
        == [600]
    )
    assert source.split("train").semantic is None
    assert source.split("val").semantic is not None
    assert source.class_options.stuff_json is not None
    sampler = source.segments.make_sampler(20, 21).settings  # type: ignore[misc]
    assert (sampler.thing_fraction, sampler.stuff_fraction) == (0.25, 0.0)


def test_the_experiment_with_stuff() -> None:
    config = configs.compose(
        "train", ["experiment=context_cfm_vgg16", *NUMBERS, "model.backbone.weights=null"]
    )
    model = configs.build_model(config)
    assert isinstance(model, CFMNet)
    assert model.background_label == -1
    source = configs.build_source(config.data)
    assert isinstance(source, PascalContextSource)
    assert source.split("train").semantic is not None
    assert source.segments.make_sampler(20, 59).settings.stuff_fraction == 0.25  # type: ignore[misc]


def test_a_model_of_a_checkpoint_reads_no_weights() -> None:
    config = configs.compose("train", [*TINY, *NUMBERS, "model.classifier.mlp.weights=absent.pth"])
    with pytest.raises(UserError, match=r"cfm: weights of VGG-16 need its shape"):
        configs.build_model(config)
    assert isinstance(configs.build_model(config, pretrained=False), CFMNet)


@pytest.mark.slow
def test_the_experiment_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cv2")
    monkeypatch.setattr(
        prepare, "write_store", lambda *given: write_store(*given[:-1], 1)
    )  # worker processes would take longest
    make_scenes(tmp_path / "scenes", num_train=4, num_val=2, size=128, num_workers=0)
    words = [
        *TINY,
        "data.root=scenes",
        "data.num_train=4",
        "data.num_val=2",
        "data.size=128",
        "data.num_workers=0",
        "trainer.device=cpu",
    ]
    words += [
        "data.train_transforms=[]",
        "data.test_transforms=[]",
        "batch_size=4",
        "trainer.max_steps=2",
        "trainer.log_every=1",
        "run_dir=run",
    ]
    words += [
        f"model.proposer.method.{key}"
        for key in ("color_spaces=[lab]", "scales=[40.0]", "max_proposals=60")
    ]
    with contextlib.chdir(tmp_path):
        done("train", *words)
        assert all("loss/segment_class" in line for line in lines(tmp_path / "run"))
        (result,) = lines(tmp_path / "run", "val")
        assert {"semantic/mIoU", "segm/AP"} <= set(result)
        done("evaluate", "checkpoint=run", "output=evaluation", "trainer.device=cpu")
        assert (tmp_path / "evaluation" / "metrics.json").is_file()
