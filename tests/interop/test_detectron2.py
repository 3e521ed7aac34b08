"""Conversion of detectron2's models: names of tensors, and equality with recorded detections."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_iou

import maskseg
from maskseg import config as configs
from maskseg.commands.convert import convert
from maskseg.errors import UserError
from maskseg.interop import classes, detectron2
from maskseg.interop.state_dict_names import match_state_dict
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.rcnn import GeneralizedRCNN

MODELS = {
    "mask_rcnn_R_50_FPN_3x": "model=detectron2_mask_rcnn model.backbone.trunk.name=resnet50",
    "mask_rcnn_R_101_FPN_3x": "model=detectron2_mask_rcnn model.backbone.trunk.name=resnet101",
    "mask_rcnn_X_101_32x8d_FPN_3x": (
        "model=detectron2_mask_rcnn_x101 model.backbone.trunk.name=resnext101_32x8d"
    ),
    "keypoint_rcnn_R_50_FPN_3x": (
        "model=detectron2_keypoint_rcnn model.backbone.trunk.name=resnet50"
    ),
}


@pytest.fixture(scope="session")
def reference(shared_data: Path) -> Path:
    """Folder with recorded outputs of the real detectron2: names, shapes and detections."""
    folder = shared_data.parent / "reference" / "detectron2"
    if not folder.is_dir():
        pytest.skip(f"needs detectron2's outputs in {folder}")
    return folder


def recorded(reference: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((reference / f"{name}.json").read_text())
    return found


def build(overrides: list[str], categories: Any) -> tuple[GeneralizedRCNN, Any]:
    """Return a model on the meta device, and its config."""
    config = configs.compose("train", ["experiment=coco_r50_fpn_3x", *overrides])
    configs.set_categories(config, categories)
    with torch.device("meta"):
        model = configs.build_model(config, pretrained=False)
    assert isinstance(model, GeneralizedRCNN)
    return model, config


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_finds_its_place(reference: Path, name: str) -> None:
    about = recorded(reference, name)
    with torch.device("meta"):
        state = {k: torch.zeros(shape) for k, shape in about["shapes"].items()}
    overrides = detectron2.infer_overrides(state)
    assert " ".join(overrides) == MODELS[name]
    number = classes.num_classes(state)
    assert number is not None
    model, config = build(overrides, classes.resolve_classes(number, "keypoint" in name, None)[0])
    own = model.state_dict()
    matched_state, missing, unexpected = match_state_dict(
        detectron2.normalize_state_dict(state), own, detectron2.name_pairs(own)
    )
    assert (missing, unexpected) == ([], [])
    assert len(matched_state) == len(own) == len(state)
    assert {k: v.shape for k, v in matched_state.items()} == {k: v.shape for k, v in own.items()}
    # Settings that cannot be inferred from the tensors.
    assert config.model.backbone.trunk.stride_in_1x1 == about["stride_in_1x1"]
    assert about["input"] == "BGR"
    assert list(config.model.pixel_mean) == about["pixel_mean"][::-1]
    assert list(config.model.pixel_std) == about["pixel_std"][::-1]
    assert config.model.classifier.score_threshold == about["score_thresh"]
    (resize,) = config.data.test_transforms
    assert (list(resize.sizes), resize.max_size) == ([about["min_size"]], about["max_size"])


def write(reference: Path, name: str, path: Path) -> None:
    """Write a file in the format of detectron2's model zoo with the weights of the reference."""
    spec = importlib.util.spec_from_file_location("reference_weights", reference / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = {
        k: module.fill(k, tuple(shape)) for k, shape in recorded(reference, name)["shapes"].items()
    }
    with path.open("wb") as file:
        pickle.dump({"model": state, "__author__": "a test"}, file, protocol=2)


@pytest.fixture(scope="module")
def converted(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function that converts a model by name and returns the path of the checkpoint."""
    folder = tmp_path_factory.mktemp("detectron2")

    def make(name: str) -> Path:
        path = folder / f"{name}.pt"
        if not path.exists():
            write(reference, name, folder / "weights.pkl")
            convert(["source=detectron2", f"weights={folder / 'weights.pkl'}", f"output={path}"])
            (folder / "weights.pkl").unlink()
        return path

    return make


def picture(shared_data: Path, name: str) -> Path:
    (path,) = (shared_data / "coco_tiny").glob(f"*/{name}")
    return path


def matched(wanted: dict[str, Any], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For each detection of detectron2, the IoU and row of our best box of the same class."""
    overlap = box_iou(torch.tensor(wanted["boxes"]), boxes) * (
        torch.tensor(wanted["labels"])[:, None] == labels
    )
    value, row = overlap.max(dim=1)
    return value, row


def mask_iou(mask: Tensor, rle: dict[str, Any]) -> float:
    """Mask IoU; 1 if both masks are empty."""
    own = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return (
        1.0
        if not mask.any() and not coco_mask.area(rle)
        else float(coco_mask.iou([own], [rle], [0])[0, 0])
    )


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_masks_are_detectron2s(
    reference: Path, shared_data: Path, converted: Any, index: int
) -> None:
    name = "mask_rcnn_R_50_FPN_3x"
    wanted = recorded(reference, name)["outputs"][index]
    found = maskseg.load(converted(name), device="cpu")(picture(shared_data, wanted["image"]))
    assert len(found) == len(wanted["boxes"]) == 100
    assert len(set(wanted["labels"])) > 1
    overlap, row = matched(wanted, found.boxes, found.labels)
    scores = (found.scores[row] - torch.tensor(wanted["scores"])).abs()
    bitmaps = found.masks  # decoded once
    masks = torch.tensor(
        [mask_iou(bitmaps[int(r)], m) for r, m in zip(row, wanted["masks"], strict=True)]
    )
    assert overlap.min() > 0.999
    assert scores.max() < 1e-4
    assert masks.min() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_keypoints_are_detectron2s(
    reference: Path, shared_data: Path, converted: Any, index: int
) -> None:
    name = "keypoint_rcnn_R_50_FPN_3x"
    wanted = recorded(reference, name)["outputs"][index]
    found = maskseg.load(converted(name), device="cpu")(picture(shared_data, wanted["image"]))
    assert found.keypoints is not None
    overlap, row = matched(wanted, found.boxes, found.labels)
    assert overlap.min() > 0.99
    assert (found.scores[row] - torch.tensor(wanted["scores"])).abs().max() < 1e-4
    difference = found.keypoints[row] - torch.tensor(wanted["keypoints"])
    apart = difference[..., :2].norm(dim=2)
    assert apart.max() < 1
    assert (
        apart < 0.01
    ).float().mean() > 0.999  # the two highest cells of a heatmap may be swapped
    assert difference[..., 2].abs().max() < 1e-3  # detectron2's are rounded to 0.001


def cells_of_detectron2(sizes: list[float], ratios: list[float]) -> Tensor:
    """Anchors of a cell in detectron2's documented order: by size, then aspect ratio."""
    rows = []
    for size in sizes:
        for ratio in ratios:
            width = (size**2 / ratio) ** 0.5
            rows.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    return torch.tensor(rows)


@pytest.mark.parametrize("sizes", [[32.0], [32.0, 64.0]])
def test_anchors_are_put_in_our_order(sizes: list[float]) -> None:
    ratios = [0.5, 1.0, 2.0]
    theirs = cells_of_detectron2(sizes, ratios)
    (ours,) = AnchorGenerator([sizes], ratios).cell_anchors
    assert torch.equal(ours, theirs) or len(sizes) > 1
    # A head whose objectness is the number of the anchor and whose deltas are its box.
    state = {
        "proposer.head.objectness.bias": torch.arange(len(theirs)).float(),
        "proposer.head.deltas.bias": theirs.flatten(),
        "proposer.head.convs.0.bias": torch.arange(len(theirs)).float(),
    }
    changed = detectron2.reorder_anchors(state, len(sizes), len(ratios))
    assert torch.allclose(changed["proposer.head.deltas.bias"].view(-1, 4), ours)
    assert torch.allclose(theirs[changed["proposer.head.objectness.bias"].long()], ours)
    assert changed["proposer.head.convs.0.bias"] is state["proposer.head.convs.0.bias"]


def test_anchors_in_a_file_are_checked() -> None:
    name = "proposal_generator.anchor_generator.cell_anchors.0"
    cells = AnchorGenerator([[32, 64]]).cell_anchors
    anchors = cells_of_detectron2([32, 64], [0.5, 1.0, 2.0])
    detectron2.check_anchors({name: anchors}, cells, 2)
    state = {name: anchors, "pixel_mean": anchors, "x": anchors}
    assert detectron2.normalize_state_dict(state).keys() == {"x"}
    with pytest.raises(
        UserError, match=r"anchors of level 0 are .* set model\.proposer\.anchors\.sizes"
    ):
        detectron2.check_anchors({name: anchors * 2}, cells, 2)
    with pytest.raises(UserError, match="anchors of level 0"):
        detectron2.check_anchors({name: anchors[:3]}, cells, 2)


def test_colours() -> None:
    weight = torch.rand((4, 3, 7, 7), generator=torch.Generator().manual_seed(0))
    ours = detectron2.to_rgb({"backbone.trunk.stem.conv1.weight": weight})[
        "backbone.trunk.stem.conv1.weight"
    ]
    pixels = torch.arange(3 * 49.0).view(1, 3, 7, 7)
    torch.testing.assert_close(torch.conv2d(pixels, ours), torch.conv2d(pixels.flip(1), weight))
    trunk = {f"backbone.bottom_up.res4.{i}.conv1.weight": torch.zeros(1) for i in range(6)}
    trunk |= {
        f"backbone.bottom_up.res2.0.conv{i}.weight": torch.zeros(64, 64, 1, 1) for i in (1, 2, 3)
    }
    bgr, std = (
        torch.tensor([100.0, 110.0, 120.0]).view(3, 1, 1),
        torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1),
    )
    overrides = detectron2.infer_overrides({**trunk, "pixel_mean": bgr, "pixel_std": std})
    assert overrides[2:] == ["model.pixel_mean=[120,110,100]", "model.pixel_std=[3,2,1]"]
    assert not detectron2.takes_bgr({"pixel_mean": bgr.flip(0)})
    overrides = detectron2.infer_overrides({**trunk, "pixel_mean": bgr.flip(0), "pixel_std": std})
    assert overrides[2:] == ["model.pixel_mean=[120,110,100]", "model.pixel_std=[1,2,3]"]
