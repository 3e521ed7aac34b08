"""Exports checkpoints as state dicts for the models of torchvision, where it has such a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskseg import config as configs
from maskseg.config.restore import trained_model
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.interop import classes
from maskseg.interop.state_dict_names import describe_names
from maskseg.interop.torchvision import EPS, rescale_norms, to_torchvision
from maskseg.structures import Categories

# Keys of the model that do not change its predictions.
_HARMLESS = re.compile(
    r"sampler\..*|.*num_classes|backbone\.trunk\.(weights|norm_eps|frozen_stages)|classifier\.beta"
    r"|proposer\.(train_limits\..*|sampler\..*|beta|normalize_by)"
    r"|heads\.mask\.(target_mode|threshold)|heads\.keypoint\.(max_regions|ranges|loss_weight)"
)
_BATCH_NORMS = ("FrozenBN", "BN", "SyncBN")  # equal in inference
# Keys that are arguments of torchvision's builders.
_BUILDER_ARGUMENTS = {
    "pixel_mean": "image_mean",
    "pixel_std": "image_std",
    "proposer.test_limits.pre_nms_top_n": "rpn_pre_nms_top_n_test",
    "proposer.test_limits.post_nms_top_n": "rpn_post_nms_top_n_test",
    "proposer.nms_threshold": "rpn_nms_thresh",
    "classifier.score_threshold": "box_score_thresh",
    "classifier.nms_threshold": "box_nms_thresh",
    "classifier.max_detections": "box_detections_per_img",
    "classifier.box_weights": "bbox_reg_weights",
}
# Heads of a model -> torchvision's name of the builder, and the config group of its equivalent.
_BUILDERS = {
    (): ("fasterrcnn", "mask_rcnn"),
    ("mask",): ("maskrcnn", "mask_rcnn"),
    ("keypoint",): ("keypointrcnn", "keypoint_rcnn"),
}
_CLASSES = {"fasterrcnn": "FasterRCNN", "maskrcnn": "MaskRCNN", "keypointrcnn": "KeypointRCNN"}
_DEFAULT_SIZES = {"min_size": 800, "max_size": 1333}  # px; of torchvision's models
_DEFAULT_KEYPOINTS = 17

_Model = dict[str, Any]  # the resolved config of a model, as plain values


@dataclass(frozen=True)
class _Family:
    """A family of torchvision's models.

    kind: such as `maskrcnn`; group: the config group of its equivalent; is_v2: the improved variant
    with norms in the pyramid and the heads.
    """

    kind: str
    group: str
    is_v2: bool


@dataclass(frozen=True)
class _Builder:
    """The call that builds a model of torchvision.

    kind: such as `maskrcnn`; is_v2: the improved variant with norms in the pyramid and the heads;
    trunk: such as `resnet50`; arguments: of the builder.
    """

    kind: str
    is_v2: bool
    trunk: str
    arguments: dict[str, object]

    @property
    def function(self) -> str:
        """The name of the builder function, which torchvision only has for ResNet-50."""
        return f"{self.kind}_resnet50_fpn{'_v2' if self.is_v2 else ''}"

    def build(self) -> nn.Module:
        """Build the model."""
        model: nn.Module
        if self.trunk == "resnet50":
            function = getattr(detection, self.function)
            model = function(weights=None, weights_backbone=None, **self.arguments)
        else:
            backbone = resnet_fpn_backbone(backbone_name=self.trunk, weights=None)
            model = getattr(detection, _CLASSES[self.kind])(backbone, **self.arguments)
        return model

    def code(self) -> str:
        """The call as a user would write it."""
        arguments = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        if self.trunk == "resnet50":
            function = f"torchvision.models.detection.{self.function}"
            return f"{function}(weights=None, weights_backbone=None, {arguments})"
        backbone = f"resnet_fpn_backbone(backbone_name={self.trunk!r}, weights=None)"
        return f"{_CLASSES[self.kind]}({backbone}, {arguments})"


def export(weights: Path, output: Path, overrides: list[str]) -> None:
    """Write the state dict of a checkpoint, and print the call that builds its model.

    overrides: the command line of `tools/convert.py`.
    Raises UserError for a model that torchvision does not have.
    """
    model, config, categories = trained_model(weights, overrides, "convert")
    settings = yaml.safe_load(configs.to_yaml(config, resolve=True))
    # With COCO's classes, torchvision's labels are COCO's category ids, which have gaps.
    is_coco = categories.ids == classes.coco_categories().ids
    rows = list(categories.ids) if is_coco else list(range(1, len(categories) + 1))
    num_rows = max(rows) + 1
    transforms = settings["data"].get("test_transforms") or []
    builder = _select_builder(settings["model"], transforms, categories, num_rows)
    norm_eps = float(settings["model"]["backbone"]["trunk"]["norm_eps"])
    state = rescale_norms(model.state_dict(), norm_eps)
    state = to_torchvision(state, rows, num_rows)
    _check_tensors(state, builder)
    with replacing(output, "the state dict") as file:
        torch.save(state, file)
    print(f"written to {output}: {len(state)} tensors, for\n{builder.code()}")
    print(
        f"label {rows[0]} is {categories.names[0]!r}, {rows[-1]} is {categories.names[-1]!r}; "
        f"frozen norms have eps {EPS}"
    )


def _select_builder(
    model: _Model, transforms: Sequence[Mapping[str, object]], categories: Categories, rows: int
) -> _Builder:
    """Select the builder and its arguments for the model of a config.

    transforms: of the images in inference; rows: number of classes with the background.
    Raises UserError that lists what torchvision does not support.
    """
    family = _find_family(model)
    values = configs.flatten(model)
    trunk = str(values.get("backbone.trunk.name", ""))
    equivalent = _equivalent_model(family, trunk, categories)
    differences = {}
    for key in {**equivalent, **values}:
        value = values.get(key)
        if not _is_equivalent(key, value, equivalent.get(key)):
            differences[key] = value
    _check_supported(family, differences, equivalent, categories)
    arguments = {"num_classes": rows, **_builder_arguments(differences)}
    if family.kind == "keypointrcnn" and categories.num_points != _DEFAULT_KEYPOINTS:
        arguments["num_keypoints"] = categories.num_points
    arguments |= _image_sizes(transforms)
    return _Builder(family.kind, family.is_v2, trunk, arguments)


def _find_family(model: _Model) -> _Family:
    """The family of a model. Raises UserError if torchvision has none with its heads."""
    heads = tuple(model.get("heads") or {})
    if heads not in _BUILDERS:
        raise UserError(f"torchvision has no model with the heads {', '.join(heads)} together")
    kind, group = _BUILDERS[heads]
    is_v2 = model["backbone"].get("norm") is not None and kind != "keypointrcnn"
    return _Family(kind, group, is_v2)


def _equivalent_model(family: _Family, trunk: str, categories: Categories) -> dict[str, object]:
    """The config of the model that torchvision builds by default, with dotted keys."""
    suffix = "_v2" if family.is_v2 else ""
    overrides = [f"model=torchvision_{family.group}{suffix}", "data=coco"]
    if family.kind == "fasterrcnn":
        overrides.append("~model/heads@model.heads.mask")
    if not family.is_v2:
        overrides.append(f"model.backbone.trunk.name={trunk}")
    config = configs.compose("train", overrides)
    configs.set_categories(config, categories)
    settings = yaml.safe_load(configs.to_yaml(config, resolve=True))
    return configs.flatten(settings["model"])


def _check_supported(
    family: _Family,
    differences: Mapping[str, object],
    equivalent: Mapping[str, object],
    categories: Categories,
) -> None:
    """Raise UserError for differences that are no arguments of the builder."""
    unsupported = []
    for key, value in differences.items():
        if key not in _BUILDER_ARGUMENTS:
            unsupported.append(f"model.{key}={value} instead of {equivalent.get(key)}")
    if family.kind == "keypointrcnn" and len(set(categories.point_ranges)) > 1:
        unsupported.append("different keypoints for different classes")
    if unsupported:
        raise UserError(
            f"torchvision cannot express this model: {describe_names(differences=unsupported)}; "
            "to convert it nevertheless, set these keys on the command line"
        )


def _builder_arguments(differences: Mapping[str, object]) -> dict[str, object]:
    """The arguments of the builder for the keys that differ from its defaults."""
    arguments: dict[str, object] = {}
    for key, value in differences.items():
        name = _BUILDER_ARGUMENTS[key]
        if name in ("image_mean", "image_std"):
            assert isinstance(value, list)
            # The range of the pixels is 0-255 here and 0-1 in torchvision.
            value = [round(float(v) / 255, 6) for v in value]
        arguments[name] = value
    return arguments


def _is_equivalent(key: str, value: object, other: object) -> bool:
    """Whether two values of a key of the model give equal predictions."""
    are_batch_norms = key.endswith("norm") and value in _BATCH_NORMS and other in _BATCH_NORMS
    return bool(value == other or are_batch_norms or _HARMLESS.fullmatch(key))


def _image_sizes(transforms: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The arguments for the resizing of images, which torchvision's models do themselves."""
    for step in transforms:
        if str(step.get("_target_")).endswith(".ResizeShortestEdge"):
            sizes = step["sizes"]
            assert isinstance(sizes, list)
            max_size = step.get("max_size", _DEFAULT_SIZES["max_size"])
            arguments = {"min_size": sizes[-1], "max_size": max_size}
            return {key: size for key, size in arguments.items() if size != _DEFAULT_SIZES[key]}
    return {}


def _check_tensors(state: dict[str, Tensor], builder: _Builder) -> None:
    """Compare names and shapes with those of torchvision's model. Raises UserError."""
    with torch.device("meta"):
        model = builder.build()
    expected = _shapes(model.state_dict())
    shapes = _shapes(state)
    misshapen = []
    for name, shape in shapes.items():
        if name in expected and shape != expected[name]:
            misshapen.append(f"{name} {list(shape)} instead of {list(expected[name])}")
    lists = {
        "missing": [name for name in expected if name not in shapes],
        "left_over": [name for name in shapes if name not in expected],
        "of_another_shape": misshapen,
    }
    if any(lists.values()):
        raise UserError(
            f"torchvision cannot express this model: {describe_names(**lists)} in {builder.code()}"
        )


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors, without the counters of batch norms."""
    return {
        name: tensor.shape
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
