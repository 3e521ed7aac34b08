"""torchvision's detectors with random weights whose scores and boxes differ, so that a comparison means something."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

HOLES = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]  # labels of torchvision's 91 that COCO has no objects of


def spread(model: Any) -> Any:
    """Features stay of order one, a hundred detections survive. Labels that do not exist are never found, as after a training."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d) and "backbone.body" in name:
            # Small variances, as trained weights have them: there the eps matters.
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5e-3, 1.5e-3)
                module.bias.normal_(0, 0.1)
                last = name.endswith("bn3") or (name.endswith("bn2") and not hasattr(model.get_submodule(name.rsplit(".", 1)[0]), "bn3"))
                module.weight.uniform_(0.8, 1.2).mul_(1e-3**0.5 * (0.2 if last else 1))
        elif isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.05)
                module.running_var.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.05)
    box = model.roi_heads.box_predictor
    with torch.no_grad():
        for layer, factor in {model.rpn.head.cls_logits: 5, model.rpn.head.bbox_pred: 3, box.bbox_pred: 20, box.cls_score: 30}.items():
            layer.weight *= factor
            nn.init.normal_(layer.bias, 0, 0.05)
        if len(box.cls_score.bias) == 91:
            box.cls_score.weight[HOLES] = 0
            box.cls_score.bias[HOLES] = -50
    return model.eval()


def centre(model: Any, image: Tensor) -> None:
    """Class scores read the eight directions in which the regions of an image, f32 [3, H, W], differ most, and so differ themselves."""
    layer, seen = model.roi_heads.box_predictor.cls_score, []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model([image])
        handle.remove()
        (features,) = seen
        exists = [i for i in range(len(layer.bias)) if len(layer.bias) != 91 or i not in HOLES]
        middle = features.mean(dim=0)
        _, size, directions = torch.linalg.svd(features - middle, full_matrices=False)
        read = directions[:8] * (len(features) ** 0.5 / size[:8, None])
        layer.weight[exists] = torch.randn((len(exists), 8)) @ read
        layer.bias[exists] = -(layer.weight[exists] @ middle)


def published(name: str, **keys: Any) -> Any:
    """A model of torchvision's by the name of its builder."""
    return spread(getattr(detection, name)(weights=None, weights_backbone=None, **keys))


def small(num_classes: int = 4, **keys: Any) -> Any:
    """A Mask R-CNN with a ResNet-18 and frozen norms."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return spread(detection.MaskRCNN(backbone, num_classes, **keys))


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision named them when it published COCO_V1."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            name = name.replace(f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
            for block in ("inner_blocks", "layer_blocks"):
                name = name.replace(f"backbone.fpn.{block}.{i}.0.", f"backbone.fpn.{block}.{i}.")
        renamed[name] = tensor
    return renamed
