"""Selection of boxes by score: top k per group, and non-maximum suppression within groups."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from maskseg.ops.matching import rank_in_group

# Up to this many boxes on a CPU, one call with the groups shifted apart is the fastest.
MAX_SHIFTED_BOXES = 1000


def top_per_group(scores: Tensor, group: Tensor, k: int) -> Tensor:
    """Indices of the `k` highest scores of each group, by group, then descending score.

    scores, group: [n].
    """
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    rank = rank_in_group(group[order], torch.arange(len(order), device=order.device))
    return order[rank < k]


def nms_per_group(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within groups at IoU > `threshold`.

    One call serves all images, levels and classes of a batch if each has its own group number.
    boxes: [n, 4]; scores, group: [n]. Returns indices of the remaining boxes by descending score.
    """
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    if boxes.is_cuda or len(boxes) <= MAX_SHIFTED_BOXES:
        kept = _nms_of_shifted_groups(boxes, scores, group, threshold)
    else:
        kept = _nms_by_group(boxes, scores, group, threshold)
    # `kept` is ascending, so that of equal scores the first box comes first.
    return kept[torch.argsort(scores[kept], descending=True, stable=True)]


def _nms_of_shifted_groups(
    boxes: Tensor, scores: Tensor, group: Tensor, threshold: float
) -> Tensor:
    """One NMS of all groups, moved apart so that they do not overlap; ascending indices.

    The shift is a whole number of pixels. torchvision's `batched_nms` shifts by the largest
    coordinate, which lets groups overlap if there are negative coordinates.
    """
    extent = (boxes.max() - boxes.min()).double().ceil() + 1
    shifted = boxes.double() + (group * extent)[:, None]
    kept = torch.as_tensor(nms(shifted, scores.double(), threshold))
    return kept.sort().values


def _nms_by_group(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """One NMS per group; ascending indices.

    The boxes are sorted by group once. torchvision's `batched_nms` searches all boxes for those of
    each group.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    lengths = torch.unique_consecutive(group[order], return_counts=True)[1].tolist()
    kept = torch.ones(len(order), dtype=torch.bool)
    group_boxes = torch.split(boxes[order].double(), lengths)
    group_scores = torch.split(scores[order].double(), lengths)
    group_kept = torch.split(kept, lengths)
    for box, score, keep in zip(group_boxes, group_scores, group_kept, strict=True):
        if len(box) > 1:
            keep.zero_()[nms(box, score, threshold)] = True
    return order[kept].sort().values


def top_k_with_ties(scores: Tensor, k: int) -> Tensor:
    """Ascending indices of the `k` highest scores [n] and of all scores that tie with the k-th."""
    if len(scores) <= k:
        return torch.arange(len(scores), device=scores.device)
    return torch.nonzero(scores >= scores.topk(k, sorted=False).values.min()).squeeze(1)
