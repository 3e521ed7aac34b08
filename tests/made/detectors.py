"""torchvision's detectors with random weights.

Their scores and boxes vary, so that a comparison is meaningful.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskseg.benchmarks import torchvision_model

# Those of torchvision's 91 labels that do not occur in COCO.
UNUSED_LABELS = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


def spread(model: Any) -> Any:
    """Set random weights. As after a training, unused labels are never predicted."""
    box = torchvision_model.randomize_weights(model).roi_heads.box_predictor
    if len(box.cls_score.bias) == 91:
        with torch.no_grad():
            box.cls_score.weight[UNUSED_LABELS] = 0
            box.cls_score.bias[UNUSED_LABELS] = -50
    return model


def centre(model: Any, image: Tensor) -> None:
    """Apply the benchmark's `center_scores` to all labels in use."""
    number = len(model.roi_heads.box_predictor.cls_score.bias)
    unused = UNUSED_LABELS if number == 91 else []
    labels = [label for label in range(number) if label not in unused]
    torchvision_model.center_scores(model, image, labels)


def published(name: str, **keys: Any) -> Any:
    """Build a model of torchvision by the name of its builder."""
    torch.manual_seed(0)
    return spread(getattr(detection, name)(weights=None, weights_backbone=None, **keys))


def small(num_classes: int = 4, **keys: Any) -> Any:
    """Build a Mask R-CNN with a ResNet-18 and frozen norms."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return spread(detection.MaskRCNN(backbone, num_classes, **keys))


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the names in torchvision's COCO_V1 files."""
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
