"""torchvision's detectors with random weights whose scores and boxes differ, so that a comparison means something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskseg.benchmarks import torchvision_model

HOLES = [
    12,
    26,
    29,
    30,
    45,
    66,
    68,
    69,
    71,
    83,
]  # labels of torchvision's 91 that COCO has no objects of


def spread(model: Any) -> Any:
    """Labels that do not exist are never found, as after a training."""
    box = torchvision_model.spread(model).roi_heads.box_predictor
    if len(box.cls_score.bias) == 91:
        with torch.no_grad():
            box.cls_score.weight[HOLES] = 0
            box.cls_score.bias[HOLES] = -50
    return model


def centre(model: Any, image: Tensor) -> None:
    """As the benchmark does it, for labels that exist."""
    number = len(model.roi_heads.box_predictor.cls_score.bias)
    torchvision_model.centre(
        model, image, [i for i in range(number) if number != 91 or i not in HOLES]
    )


def published(name: str, **keys: Any) -> Any:
    """A model of torchvision's by the name of its builder."""
    torch.manual_seed(0)
    return spread(getattr(detection, name)(weights=None, weights_backbone=None, **keys))


def small(num_classes: int = 4, **keys: Any) -> Any:
    """A Mask R-CNN with a ResNet-18 and frozen norms."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return spread(detection.MaskRCNN(backbone, num_classes, **keys))


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision named them when it published COCO_V1."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            name = name.replace(
                f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}."
            )
            for block in ("inner_blocks", "layer_blocks"):
                name = name.replace(f"backbone.fpn.{block}.{i}.0.", f"backbone.fpn.{block}.{i}.")
        renamed[name] = tensor
    return renamed
