"""RoIAlign over the levels of a feature pyramid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from maskseg.ops import boxes as box_ops


def assign_levels(boxes: Tensor, lowest: int, highest: int, canonical_size: float = 224.0, canonical_level: int = 4) -> Tensor:
    """The pyramid level of each box (FPN, eq. 1): a box of `canonical_size` goes to `canonical_level`. [R, 4] -> i64 [R], `lowest`..`highest`.

    torchvision adds 1e-6 to the logarithm, detectron2 1e-8 to the ratio: boxes of exactly canonical size go up, here too.
    """
    level = torch.floor(canonical_level + torch.log2(box_ops.area(boxes).clamp(min=1e-12).sqrt() / canonical_size) + 1e-6)
    return level.clamp(lowest, highest).to(torch.int64)


def roi_align_levels(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign (Mask R-CNN, section 3) of each box on its level.

    features: L maps [N, C, H_l, W_l]; boxes: f32 [R, 4] in pixels; level: i64 [R] in 0..L-1. -> [R, C, size, size] of the features' type.
    """
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
    out = features[0].new_zeros((len(boxes), features[0].shape[1], size, size))
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        rows = torch.nonzero(level == i).squeeze(1)
        pooled = roi_align(feature.float(), rois[rows], (size, size), 1.0 / stride, sampling_ratio, aligned)
        out = out.index_put((rows,), pooled.to(out.dtype))
    return out
