"""Our checkpoints -> state dicts that torchvision's own models load, where torchvision has such a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
import yaml
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskseg import config as configs
from maskseg.config.restore import trained_model
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.interop import classes
from maskseg.interop.state_dict_names import told
from maskseg.interop.torchvision import EPS, refold, to_torchvision
from maskseg.structures import Categories

# Keys of the model that change nothing of what it finds.
_HARMLESS = re.compile(
    r"sampler\..*|.*num_classes|backbone\.trunk\.(weights|norm_eps|frozen_stages)|classifier\.beta"
    r"|proposer\.(train_limits\..*|positive_iou|negative_iou|num_samples|positive_fraction|beta|divide_by|crowd_overlap)"
    r"|heads\.mask\.(target_rule|threshold)|heads\.keypoint\.(max_regions|ranges|loss_weight)"
)
_BATCH_NORMS = ("FrozenBN", "BN", "SyncBN")  # alike once they are trained
# Keys that torchvision's builders take under a name of their own.
_KEYWORDS = {
    "pixel_mean": "image_mean",
    "pixel_std": "image_std",
    "proposer.test_limits.per_level": "rpn_pre_nms_top_n_test",
    "proposer.test_limits.per_image": "rpn_post_nms_top_n_test",
    "proposer.nms_threshold": "rpn_nms_thresh",
    "classifier.score_threshold": "box_score_thresh",
    "classifier.nms_threshold": "box_nms_thresh",
    "classifier.max_detections": "box_detections_per_img",
    "classifier.box_weights": "bbox_reg_weights",
}
_KINDS = {
    (): ("fasterrcnn", "mask_rcnn"),
    ("mask",): ("maskrcnn", "mask_rcnn"),
    ("keypoint",): ("keypointrcnn", "keypoint_rcnn"),
}
_CLASSES = {"fasterrcnn": "FasterRCNN", "maskrcnn": "MaskRCNN", "keypointrcnn": "KeypointRCNN"}


def export(weights: Path, output: Path, words: list[str]) -> None:
    """Writes the state dict and prints the call that makes its model. Raises UserError for a model that torchvision does not have."""
    model, config, categories = trained_model(weights, words, "convert")
    settings = yaml.safe_load(configs.to_yaml(config, resolve=True))
    kind, v2, keywords = _plan(settings, categories)
    coco = categories.ids == classes.coco().ids  # torchvision's labels are then COCO's ids
    rows = list(categories.ids) if coco else list(range(1, len(categories) + 1))
    keywords = {"num_classes": max(rows) + 1, **keywords}
    state = refold(model.state_dict(), float(settings["model"]["backbone"]["trunk"]["norm_eps"]))
    state = to_torchvision(state, rows, max(rows) + 1)
    trunk = settings["model"]["backbone"]["trunk"]["name"]
    call = _check(state, kind, v2, trunk, keywords)
    with replacing(output, "the state dict") as file:
        torch.save(state, file)
    print(f"written to {output}: {len(state)} tensors, for\n{call}")
    print(
        f"label {rows[0]} is {categories.names[0]!r}, {rows[-1]} is {categories.names[-1]!r}; frozen norms have eps {EPS}"
    )


def _plan(settings: dict[str, Any], categories: Categories) -> tuple[str, bool, dict[str, Any]]:
    """Which of torchvision's models it is, and what its builder must be told. Raises UserError that names what torchvision cannot do."""
    model = settings["model"]
    heads = tuple(model.get("heads") or {})
    if heads not in _KINDS:
        raise UserError(f"torchvision has no model with the heads {', '.join(heads)} together")
    kind, name = _KINDS[heads]
    v2 = model["backbone"].get("norm") is not None and kind != "keypointrcnn"
    reference = [
        f"model=torchvision_{name}{'_v2' if v2 else ''}",
        "experiment=coco_r50_fpn_3x",
        "data=coco",
    ]
    reference += [] if heads else ["~model/heads@model.heads.mask"]
    own = configs.flat(model)
    trunk = own.get("backbone.trunk.name", "")
    wanted = configs.compose(
        "train", [*reference, *([] if v2 else [f"model.backbone.trunk.name={trunk}"])]
    )
    configs.set_categories(wanted, categories)
    other = configs.flat(yaml.safe_load(configs.to_yaml(wanted, resolve=True))["model"])
    different = {k: own.get(k) for k in {**other, **own} if not _alike(k, own.get(k), other.get(k))}
    keywords = {_KEYWORDS[k]: v for k, v in different.items() if k in _KEYWORDS}
    refused = [
        f"model.{k}={v} instead of {other.get(k)}"
        for k, v in different.items()
        if k not in _KEYWORDS
    ]
    if kind == "keypointrcnn":
        keywords |= {"num_keypoints": categories.num_points} if categories.num_points != 17 else {}
        refused += (
            ["keypoints of their own for several classes"]
            if len(set(categories.point_ranges)) > 1
            else []
        )
    if refused:
        hint = "to convert it nevertheless, say these keys on the command line"
        raise UserError(
            f"torchvision cannot express this model: {told(differences=refused)}; {hint}"
        )
    for key in ("image_mean", "image_std"):
        if key in keywords:
            keywords[key] = [round(float(v) / 255, 6) for v in cast(list[float], keywords[key])]
    return kind, v2, keywords | _sizes(settings["data"].get("test_transforms") or [])


def _alike(key: str, value: Any, other: Any) -> bool:
    both_norms = key.endswith("norm") and value in _BATCH_NORMS and other in _BATCH_NORMS
    return bool(value == other or both_norms or _HARMLESS.fullmatch(key))


def _sizes(transforms: list[dict[str, Any]]) -> dict[str, Any]:
    """torchvision's models resize by themselves."""
    for step in transforms:
        if step.get("_target_", "").endswith(".ResizeShortestEdge"):
            found = {"min_size": step["sizes"][-1], "max_size": step.get("max_size", 1333)}
            return {k: v for k, v in found.items() if v != {"min_size": 800, "max_size": 1333}[k]}
    return {}


def _check(
    state: dict[str, Tensor], kind: str, v2: bool, trunk: str, keywords: dict[str, Any]
) -> str:
    """Builds torchvision's model without memory and compares names and shapes. -> the call, as a user would write it."""
    said = ", ".join(f"{k}={v}" for k, v in keywords.items())
    detection: Any = torchvision.models.detection
    with torch.device("meta"):
        model: nn.Module
        if trunk == "resnet50":
            name = f"{kind}_resnet50_fpn{'_v2' if v2 else ''}"
            model = getattr(detection, name)(weights=None, weights_backbone=None, **keywords)
            call = (
                f"torchvision.models.detection.{name}(weights=None, weights_backbone=None, {said})"
            )
        else:
            model = getattr(detection, _CLASSES[kind])(
                resnet_fpn_backbone(backbone_name=trunk, weights=None), **keywords
            )
            call = f"{_CLASSES[kind]}(resnet_fpn_backbone(backbone_name={trunk!r}, weights=None), {said})"
    wanted = {
        k: v.shape for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    own = {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}
    shapes = [
        f"{k} {list(own[k])} instead of {list(wanted[k])}"
        for k in own
        if k in wanted and own[k] != wanted[k]
    ]
    lists = {
        "missing": [k for k in wanted if k not in own],
        "left_over": [k for k in own if k not in wanted],
        "of_another_shape": shapes,
    }
    if any(lists.values()):
        raise UserError(f"torchvision cannot express this model: {told(**lists)} in {call}")
    return call
