"""Matching of boxes to ground truths by IoU, for all images of a batch at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maskseg.ops import boxes as box_ops

POSITIVE = 1
NEGATIVE = 0
IGNORED = -1
# Number of IoU values computed at a time. On a CPU they stay in its cache; on a GPU they need less
# than 1 GB.
BLOCK = 2**21
BLOCK_CUDA = 2**25


@dataclass(frozen=True)
class PaddedTargets:
    """Ground truths by image, padded to the image with the most.

    boxes: f32 [N, M, 4], zeros in the padding; valid: bool [N, M];
    row: i64 [N, M], the row of the flat targets.
    """

    boxes: Tensor
    valid: Tensor
    row: Tensor


def pad_targets(boxes: Tensor, image_index: Tensor, keep: Tensor, num_images: int) -> PaddedTargets:
    """Pad the flat boxes [G, 4] that `keep` [G] selects to [N, M, 4]; M is at least 1."""
    rows = torch.nonzero(keep).squeeze(1)
    image = image_index[rows]
    slot = rank_in_group(image, torch.arange(len(rows), device=rows.device))
    num_slots = int(slot.max()) + 1 if len(rows) else 1
    padded = boxes.new_zeros((num_images, num_slots, 4))
    row = rows.new_zeros((num_images, num_slots))
    valid = torch.zeros((num_images, num_slots), dtype=torch.bool, device=boxes.device)
    padded[image, slot] = boxes[rows]
    row[image, slot] = rows
    valid[image, slot] = True
    return PaddedTargets(padded, valid, row)


def rank_in_group(group: Tensor, priority: Tensor) -> Tensor:
    """Rank of each element within its group, smallest priority first; ties keep their order.

    group, priority: [n]. Returns i64 [n].
    """
    by_priority = torch.argsort(priority, stable=True)
    order = by_priority[torch.argsort(group[by_priority], stable=True)]
    sorted_group = group[order]
    position = torch.arange(len(group), device=group.device)
    first = torch.searchsorted(sorted_group, sorted_group)
    rank = torch.empty_like(position)
    rank[order] = position - first
    return rank


def match_by_iou(
    targets: PaddedTargets,
    boxes: Tensor,
    low: float,
    high: float,
    low_quality: bool,
    block: int = 0,
) -> tuple[Tensor, Tensor]:
    """Match boxes [B, 4] to ground truths and label them (Faster R-CNN, section 3.1.2).

    A box is positive if its best IoU is at least `high`, negative below `low`, ignored between.
    low_quality: the boxes with the highest IoU of a ground truth (all that tie) are positive too.
    block: number of IoU values held at a time, without influence on the result; 0: the fastest.
    Returns the best ground truth i64 [N, B] and the label i64 [N, B].
    """
    if not len(boxes):
        empty = torch.zeros((len(targets.valid), 0), dtype=torch.int64, device=boxes.device)
        return empty, empty.clone()
    blocks = _IoUBlocks(targets, boxes, block or (BLOCK_CUDA if boxes.is_cuda else BLOCK))
    box_ious = []
    box_truths = []
    truth_ious = []
    for iou in blocks:
        best_iou, best_truth = iou.max(dim=1)
        box_ious.append(best_iou)
        box_truths.append(best_truth)
        truth_ious.append(iou.amax(dim=2, keepdim=True))
    best_iou = torch.cat(box_ious, dim=1)
    best_truth = torch.cat(box_truths, dim=1)
    label = torch.full_like(best_truth, IGNORED)
    label[best_iou < low] = NEGATIVE
    label[best_iou >= high] = POSITIVE
    if low_quality:
        top = torch.stack(truth_ious).amax(dim=0)
        # A ground truth that no box touches would otherwise tie with every box.
        top[top <= 0] = torch.inf
        ties = [(iou == top).any(dim=1) for iou in blocks]
        label[torch.cat(ties, dim=1)] = POSITIVE
    return best_truth, label


class _IoUBlocks:
    """The IoUs of all ground truths with blocks of boxes, [N, M, b] each; may be iterated twice.

    All at once, 400 ground truths and the 270 000 anchors of an image of 1333 x 800 would need
    2 GB. A single block is kept; several are computed anew in each iteration.
    """

    def __init__(self, targets: PaddedTargets, boxes: Tensor, block: int) -> None:
        self.targets = targets
        self.parts = torch.split(boxes, max(1, block // targets.valid.numel()))
        self.single: Tensor | None = None
        if len(self.parts) == 1:
            self.single = _padded_iou(targets, boxes)

    def __iter__(self) -> Iterator[Tensor]:
        if self.single is not None:
            yield self.single
            return
        for part in self.parts:
            yield _padded_iou(self.targets, part)


def _padded_iou(targets: PaddedTargets, boxes: Tensor) -> Tensor:
    """IoU of the padded ground truths with boxes [B, 4], -1 in the padding, [N, M, B]."""
    return box_ops.iou(targets.boxes, boxes).masked_fill_(~targets.valid[..., None], -1.0)


def subsample_labels(
    label: Tensor,
    image_index: Tensor,
    key: Tensor,
    num_images: int,
    number: int,
    positive_fraction: float,
) -> Tensor:
    """Sample at most `number` boxes per image, with at most `positive_fraction` positives.

    Negatives fill up the rest.

    label: i64 [B] of POSITIVE / NEGATIVE / IGNORED; key: [B], random values
    (`ops.random_keys.random_keys`), the boxes with the smallest are sampled.
    Returns ascending indices of the sampled boxes, i64.
    """
    max_positives = int(number * positive_fraction)
    # Ignored boxes form a group of their own, behind the others.
    group = torch.where(label == IGNORED, 2 * num_images, 2 * image_index + (label == POSITIVE))
    rank = rank_in_group(group, key)
    positives = torch.bincount(image_index[label == POSITIVE], minlength=num_images)
    positives = positives.clamp(max=max_positives)
    sampled_positive = (label == POSITIVE) & (rank < max_positives)
    sampled_negative = (label == NEGATIVE) & (rank < (number - positives)[image_index])
    return torch.nonzero(sampled_positive | sampled_negative).squeeze(1)


def max_crowd_ioa(boxes: Tensor, image_index: Tensor, crowds: PaddedTargets) -> Tensor:
    """Largest share of each box [B, 4] that a crowd region of its image covers, [B]."""
    shares = box_ops.ioa(boxes[:, None], crowds.boxes[image_index])[:, 0]
    return shares.max(dim=1).values
