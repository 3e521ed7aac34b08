"""Selection of boxes by score: the best of each group, and non-maximum suppression within groups."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from maskseg.ops.matching import rank_in_group

FEW = 1000  # boxes, up to which one call that shifts the groups apart costs less (on a CPU)


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
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    if boxes.is_cuda or len(boxes) <= FEW:
        # Groups lie side by side, a whole number of pixels apart. (torchvision's shift by the largest coordinate lets them overlap where
        # coordinates are negative.)
        extent = (boxes.max() - boxes.min()).double().ceil() + 1
        kept_rows = (
            torch.as_tensor(
                nms(boxes.double() + (group * extent)[:, None], scores.double(), threshold)
            )
            .sort()
            .values
        )
        return kept_rows[torch.argsort(scores[kept_rows], descending=True, stable=True)]
    # Sorted by group once: the library searches all boxes for those of each group.
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    lengths = torch.unique_consecutive(group[order], return_counts=True)[1].tolist()
    kept = torch.ones(len(order), dtype=torch.bool)
    for box, score, keep in zip(
        *(torch.split(t, lengths) for t in (boxes[order].double(), scores[order].double(), kept)),
        strict=True,
    ):
        if len(box) > 1:
            keep.zero_()[nms(box, score, threshold)] = True
    order = order[kept].sort().values  # of equal scores the first one comes first, here as above
    return order[torch.argsort(scores[order], descending=True, stable=True)]


def best(scores: Tensor, number: int) -> Tensor:
    """Ascending indices of the `number` highest scores [n], and of those that tie with the last of them."""
    if len(scores) <= number:
        return torch.arange(len(scores), device=scores.device)
    return torch.nonzero(scores >= scores.topk(number, sorted=False).values.min()).squeeze(1)
