"""torchvision's Mask R-CNN weights under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# torchvision's name -> ours, first match wins; torchvision puts the background first, see `from_torchvision`.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"backbone\.body\.(conv1|bn1)\.", r"backbone.trunk.stem.\1."),
    (r"backbone\.body\.(layer\d)\.", r"backbone.trunk.\1."),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.", r"backbone.lateral.p{\1+2}."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.", r"backbone.output.p{\1+2}."),
    (r"rpn\.head\.conv\.(\d)\.0\.", r"proposer.head.convs.\1."),
    (r"rpn\.head\.cls_logits\.", "proposer.head.objectness."),
    (r"rpn\.head\.bbox_pred\.", "proposer.head.deltas."),
    (r"roi_heads\.box_head\.fc(\d)\.", r"classifier.trunk.layers.{\1-6}."),
    (r"roi_heads\.box_predictor\.cls_score\.", "classifier.scores."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "classifier.deltas."),
    (r"roi_heads\.mask_head\.(\d)\.", r"heads.mask.convs.\1."),
    (r"roi_heads\.mask_predictor\.conv5_mask\.", "heads.mask.deconv."),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "heads.mask.predictor."),
)


def our_name(name: str) -> str:
    """The name of torchvision's tensor in `GeneralizedRCNN`. Raises KeyError for a tensor that has no place there."""
    for pattern, template in RENAMED:
        if re.match(pattern, name):
            new = re.sub("^" + pattern, template, name)
            return re.sub(r"\{(\d)([+-])(\d)\}", lambda m: str(int(m[1]) + int(m[2] + m[3])), new)
    raise KeyError(f"torchvision's tensor {name!r} has no place in this model")


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `torchvision.models.detection.MaskRCNN` (ResNet-FPN) -> state dict of ours.

    torchvision counts the background as class 0: class scores are rotated so that it comes last, deltas and masks lose its part.
    """
    converted = {our_name(name): tensor for name, tensor in state.items()}
    for kind in ("weight", "bias"):
        converted[f"classifier.scores.{kind}"] = converted[f"classifier.scores.{kind}"].roll(-1, dims=0)
        converted[f"classifier.deltas.{kind}"] = converted[f"classifier.deltas.{kind}"][4:]
        converted[f"heads.mask.predictor.{kind}"] = converted[f"heads.mask.predictor.{kind}"][1:]
    return converted
