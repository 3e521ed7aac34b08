"""Selection of boxes by score: the best of each group, and non-maximum suppression within groups."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from maskseg.ops.matching import rank_in_group


def top_per_group(scores: Tensor, group: Tensor, most: int) -> Tensor:
    """Indices of the `most` highest scores of each group, ordered by group, then descending score. scores, group: [n]."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    rank = rank_in_group(group[order], torch.arange(len(order), device=order.device))
    return order[rank < most]


def nms_per_group(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that no better box of their group overlaps at IoU > `threshold`, by descending score.

    One call for all images, levels and classes of a batch: give each its own group number.
    """
    return torch.as_tensor(batched_nms(boxes.double(), scores.double(), group, threshold))
