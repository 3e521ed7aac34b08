"""Fine-tuning from published and other foreign weights: what fits is taken, the rest is named."""

from __future__ import annotations

import hashlib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made.detectors import small
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from maskseg import config as configs
from maskseg.config.initial_weights import load_initial_weights
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.interop import detectron2, initial_weights
from maskseg.interop.initial_weights import adapt_classes, find_weights, published_address
from maskseg.interop.state_dict_names import translate
from maskseg.interop.torchvision_hashes import norm_eps
from maskseg.structures import Categories

COCO_LIKE = Categories(("Person", "widget", "cell_phone"), (1, 2, 3))
KEYS = [
    "experiment=coco_r50_fpn_1x",
    "model=torchvision_mask_rcnn",
    "model.backbone.trunk.name=resnet18",
    "model.classifier.mlp.width=64",
]


def compose(*overrides: str, categories: Categories = COCO_LIKE) -> Any:
    config = deepcopy(_compose(overrides))
    configs.set_categories(config, categories)
    return config


@cache
def _compose(overrides: tuple[str, ...]) -> Any:
    return configs.compose("train", [*KEYS, *overrides])


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    """The weights of a small Mask R-CNN of torchvision with COCO's 91 labels."""
    detector = small(91)
    detector.roi_heads.box_head = TwoMLPHead(256 * 7 * 7, 64)
    detector.roi_heads.box_predictor = FastRCNNPredictor(64, 91)
    state: dict[str, Tensor] = detector.state_dict()
    return state


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model with the user's classes."""
    return configs.build_model(compose())


@pytest.fixture
def initial(model: nn.Module) -> dict[str, Tensor]:
    """The initial weights of the model; each test starts from new ones."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(
    model: nn.Module, init: Path | str, *overrides: str
) -> tuple[dict[str, Tensor], list[str]]:
    lines: list[str] = []
    config = compose(*overrides)
    trainer = Trainer(1, device="cpu", init=str(init), init_partial=config.trainer.init_partial)
    load_initial_weights(model, trainer, config, COCO_LIKE, lambda text, **_: lines.append(text))
    # The only difference from torchvision's model is the width of the box head in these tests.
    narrow = "warning: the weights were trained in another model: model.classifier.mlp.width=1024"
    return model.state_dict(), [line for line in lines if line != f"{narrow} (here 64)"]


def check_classes(
    state: dict[str, Tensor], theirs: dict[str, Tensor], initial: dict[str, Tensor]
) -> None:
    """Persons and phones (labels 1 and 77 of torchvision) are taken over, the widget is not."""
    scores = theirs["roi_heads.box_predictor.cls_score.weight"]
    deltas = theirs["roi_heads.box_predictor.bbox_pred.weight"]
    masks = theirs["roi_heads.mask_predictor.mask_fcn_logits.bias"]
    ours = state["classifier.cls_score.weight"]
    assert torch.equal(ours[[0, 2, 3]], scores[[1, 77, 0]])  # the background last
    assert torch.equal(ours[1], initial["classifier.cls_score.weight"][1])
    assert torch.equal(state["classifier.bbox_pred.weight"][8:], deltas[4 * 77 : 4 * 78])
    assert torch.equal(
        state["classifier.bbox_pred.weight"][4:8], initial["classifier.bbox_pred.weight"][4:8]
    )
    assert torch.equal(state["heads.mask.predictor.bias"][[0, 2]], masks[[1, 77]])
    assert state["heads.mask.predictor.bias"][1] == initial["heads.mask.predictor.bias"][1]


def test_a_file_of_torchvision(
    model: nn.Module, initial: dict[str, Tensor], theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"model": theirs, "epoch": 3}, tmp_path / "theirs.pth")
    state, lines = load(model, tmp_path / "theirs.pth")
    check_classes(state, theirs, initial)
    for ours, name in (
        ("backbone.trunk.layer2.0.conv1.weight", "backbone.body.layer2.0.conv1.weight"),
        ("proposer.head.deltas.bias", "rpn.head.bbox_pred.bias"),
        ("heads.mask.convs.3.0.weight", "roi_heads.mask_head.3.0.weight"),
    ):
        assert torch.equal(state[ours], theirs[name])
    assert lines == [
        f"started from {tmp_path / 'theirs.pth'}",
        "classes with weights of their name: Person, cell_phone; reset: widget",
    ]


def test_a_file_of_detectron2(
    model: nn.Module, initial: dict[str, Tensor], theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    """The same weights under detectron2's names, with the background last and BGR images."""
    renamed = {}
    for name, tensor in initial_weights.read_foreign_weights(
        saved(theirs, tmp_path / "theirs.pth")
    ).tensors.items():
        renamed[translate(name, detectron2.PAIRS) or name] = tensor
    renamed["backbone.bottom_up.stem.conv1.weight"] = renamed[
        "backbone.bottom_up.stem.conv1.weight"
    ].flip(1)
    path = saved({"model": renamed}, tmp_path / "model_final.pth")
    state, lines = load(model, path)
    check_classes(state, theirs, initial)
    assert torch.equal(
        state["backbone.trunk.stem.conv1.weight"], theirs["backbone.body.conv1.weight"]
    )
    assert lines[1].startswith("classes with weights of their name: Person, cell_phone")
    # detectron2's conventions differ from torchvision's: the model is not that of the weights.
    assert "stride_in_1x1=True (here False)" in lines[2]
    assert "anchors.rounded=False (here True)" in lines[2]


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_heads_that_the_file_lacks_are_named(
    model: nn.Module, initial: dict[str, Tensor], theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    """As for the weights of a Faster R-CNN, whose classes have no known names here either."""
    boxes = {name: tensor for name, tensor in theirs.items() if ".mask_" not in name}
    for kind, rows in (("cls_score", 6), ("bbox_pred", 24)):
        for part in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{kind}.{part}"
            boxes[key] = boxes[key][:rows]
    state, lines = load(model, saved(boxes, tmp_path / "boxes.pth"))
    for name, tensor in state.items():
        if name.startswith(("heads.", "classifier.cls_score.", "classifier.bbox_pred.")):
            assert torch.equal(tensor, initial[name])
    assert lines[1:] == [
        "the names of the file's classes are not known: all classes are reset",
        "not in the file, from scratch: heads.mask",
    ]


def test_other_tensors_must_fit(
    model: nn.Module, initial: dict[str, Tensor], theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    broken = {**theirs, "extra.weight": torch.zeros(2)}
    del broken["backbone.body.layer2.0.conv1.weight"]
    path = saved(broken, tmp_path / "broken.pth")
    with pytest.raises(UserError) as raised:
        load(model, path)
    message = str(raised.value)
    assert "1 missing (backbone.trunk.layer2.0.conv1.weight)" in message
    assert "1 unexpected (extra.weight)" in message
    assert message.endswith("trainer.init_partial=true takes what fits")
    state, lines = load(model, path, "trainer.init_partial=true")
    assert "2 tensors do not fit: backbone.trunk.layer2.0.conv1.weight, extra.weight" in lines[0]
    name = "backbone.trunk.layer2.0.conv1.weight"
    assert torch.equal(state[name], initial[name])


def test_checkpoints_follow_the_names_of_classes_too(
    model: nn.Module, initial: dict[str, Tensor], tmp_path: Path
) -> None:
    old = Categories(("widget", "dog", "person"), (5, 6, 7))
    checkpoint = {
        "config": configs.to_yaml(compose(categories=old)),
        "categories": old.to_dict(),
        "model": {name: tensor + 1 for name, tensor in initial.items()},
        "step": 1,
    }
    save_checkpoint(tmp_path / "old.pt", checkpoint)
    state, lines = load(model, tmp_path / "old.pt")
    name = "classifier.cls_score.bias"
    expected = torch.stack(
        [initial[name][2] + 1, initial[name][0] + 1, initial[name][2], initial[name][3] + 1]
    )
    assert torch.equal(state[name], expected)
    assert lines[1:] == ["classes with weights of their name: Person, widget; reset: cell_phone"]


def test_norms_are_rescaled_to_the_eps_of_the_model(
    theirs: dict[str, Tensor], tmp_path: Path
) -> None:
    path = saved(theirs, tmp_path / "theirs.pth")
    name = "backbone.trunk.stem.bn1"
    for eps in (0.0, 1e-5, 1e-3):
        tensors = initial_weights.read_foreign_weights(path, eps).tensors
        scale = tensors[f"{name}.weight"] / (tensors[f"{name}.running_var"] + eps).sqrt()
        weight, variance = (
            theirs[f"backbone.body.bn1.{part}"] for part in ("weight", "running_var")
        )
        assert torch.allclose(scale, weight / (variance + 1e-5).sqrt(), rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["model=torchvision_mask_rcnn"], "maskrcnn_resnet50_fpn"),
        (["model=mask_rcnn"], "maskrcnn_resnet50_fpn"),
        (["model=torchvision_mask_rcnn_v2"], "maskrcnn_resnet50_fpn_v2"),
        (["model=torchvision_keypoint_rcnn"], "keypointrcnn_resnet50_fpn"),
        (["model=mask_rcnn", "~model/heads@model.heads.mask"], "fasterrcnn_resnet50_fpn"),
        (
            ["model=torchvision_mask_rcnn_v2", "~model/heads@model.heads.mask"],
            "fasterrcnn_resnet50_fpn_v2",
        ),
    ],
)
def test_coco_is_the_published_model_with_these_heads(
    overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configs.compose("train", ["experiment=coco_r50_fpn_1x", *overrides])
    person = Categories(("person",), (1,), (("nose", "left_eye"),), ((),))
    configs.set_categories(config, person)
    with torch.device("meta"):
        state = configs.build_model(config, pretrained=False).state_dict()
    addresses: list[str] = []

    def record(address: str) -> Path:
        addresses.append(address)
        return Path(address)

    monkeypatch.setattr(initial_weights, "fetch", record)
    for init in ("coco", name, f"https://example.invalid/{name}.pth"):
        find_weights(init, state)
    url = get_model_weights(name).COCO_V1.url
    assert addresses == [url, url, f"https://example.invalid/{name}.pth"]
    assert find_weights("runs/coco", state) is None


def test_five_models_are_published() -> None:
    assert len({published_address(name) for name in initial_weights.PUBLISHED}) == 5


@pytest.mark.parametrize("name", initial_weights.PUBLISHED)
def test_norms_of_the_published_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchvision runs the first COCO_V1 models with an eps of 0, their successors with 1e-5."""
    (tmp_path / "weights.pth").write_bytes(b"weights")
    prefix = hashlib.sha256(b"weights").hexdigest()[:8]
    weights = get_model_weights(name).COCO_V1
    monkeypatch.setattr(weights.value, "url", f"https://example.invalid/{name}-{prefix}.pth")
    assert norm_eps(tmp_path / "weights.pth") == (1e-5 if name.endswith("_v2") else 0.0)


def test_coco_needs_the_published_trunk(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"trainer\.init=coco: .*resnet50.*the model has resnet18"):
        find_weights("coco", model.state_dict())


def test_what_is_no_detector_is_refused(model: nn.Module, tmp_path: Path) -> None:
    path = saved({"fc.weight": torch.zeros(3, 2)}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="neither a checkpoint of maskseg nor the weights of a"):
        load(model, path)
    with pytest.raises(UserError, match=r"absent\.pth: no such checkpoint"):
        load(model, tmp_path / "absent.pth")


def test_rows_that_all_classes_share_stay() -> None:
    old = Categories(("a", "b"), (1, 2))
    new = Categories(("b", "c"), (1, 2))
    state = {"classifier.bbox_pred.bias": torch.arange(4.0), "other": torch.ones(1)}
    adapted = adapt_classes(state, old, {name: t + 9 for name, t in state.items()}, new)
    assert torch.equal(adapted.tensors["classifier.bbox_pred.bias"], torch.arange(4.0))
    assert (adapted.taken, adapted.reset) == ([], [])
    unknown = adapt_classes(state, None, state, new)
    assert unknown.tensors == state
