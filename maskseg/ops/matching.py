"""Which ground truth a box stands for, for all images of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskseg.ops import boxes as box_ops

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


@dataclass(frozen=True)
class PaddedTruth:
    """Ground truths by image, padded to the fullest one.

    boxes: f32 [N, M, 4] (zeros where there is none); valid: bool [N, M]; row: i64 [N, M], the row of the flat targets.
    """

    boxes: Tensor
    valid: Tensor
    row: Tensor


def pad_by_image(boxes: Tensor, image_index: Tensor, keep: Tensor, num_images: int) -> PaddedTruth:
    """Flat boxes [G, 4], of which those with keep [G] count, as [N, M, 4]; M is at least 1."""
    rows = torch.nonzero(keep).squeeze(1)
    image = image_index[rows]
    slot = rank_in_group(image, torch.arange(len(rows), device=rows.device))
    most = int(slot.max()) + 1 if len(rows) else 1
    padded = boxes.new_zeros((num_images, most, 4))
    row = rows.new_zeros((num_images, most))
    valid = torch.zeros((num_images, most), dtype=torch.bool, device=boxes.device)
    padded[image, slot], row[image, slot], valid[image, slot] = boxes[rows], rows, True
    return PaddedTruth(padded, valid, row)


def rank_in_group(group: Tensor, priority: Tensor) -> Tensor:
    """The place of each element within its group, smallest priority first; equal ones in their order. [n], [n] -> i64 [n]."""
    by_priority = torch.argsort(priority, stable=True)
    order = by_priority[torch.argsort(group[by_priority], stable=True)]
    sorted_group = group[order]
    position = torch.arange(len(group), device=group.device)
    first = torch.searchsorted(sorted_group, sorted_group)
    rank = torch.empty_like(position)
    rank[order] = position - first
    return rank


def label_by_iou(iou: Tensor, valid: Tensor, low: float, high: float, low_quality: bool) -> tuple[Tensor, Tensor]:
    """The best truth of each box and what the box is (Faster R-CNN, section 3.1.2).

    iou: [N, M, B] of M padded truths with B boxes; valid: [N, M]. A box is positive from IoU `high` on, negative below `low`, ignored between;
    with `low_quality` the boxes that overlap a truth most (all that tie) are positive too. -> best i64 [N, B], label i64 [N, B].
    """
    iou = torch.where(valid[..., None], iou, torch.full_like(iou, -1.0))
    value, best = iou.max(dim=1)
    label = torch.full_like(best, IGNORED)
    label[value < low] = NEGATIVE
    label[value >= high] = POSITIVE
    if low_quality:
        top = iou.max(dim=2, keepdim=True).values
        # A truth that no box touches would otherwise tie with every box.
        label[((iou == top) & (top > 0)).any(dim=1)] = POSITIVE
    return best, label


def draw(label: Tensor, image_index: Tensor, key: Tensor, num_images: int, number: int, positive_fraction: float) -> Tensor:
    """A random subset: at most `number` boxes an image, at most that share of them positive, filled up with negatives.

    label: i64 [B] of POSITIVE / NEGATIVE / IGNORED; key: [B], random (`ops.draws.random_keys`): those with the smallest are drawn.
    -> i64, ascending indices into the B boxes.
    """
    most_positive = int(number * positive_fraction)
    # Ignored boxes form a group of their own, behind the others.
    group = torch.where(label == IGNORED, 2 * num_images, 2 * image_index + (label == POSITIVE))
    rank = rank_in_group(group, key)
    positives = torch.bincount(image_index[label == POSITIVE], minlength=num_images).clamp(max=most_positive)
    chosen = ((label == POSITIVE) & (rank < most_positive)) | ((label == NEGATIVE) & (rank < (number - positives)[image_index]))
    return torch.nonzero(chosen).squeeze(1)


def crowd_cover(boxes: Tensor, image_index: Tensor, crowds: PaddedTruth) -> Tensor:
    """The largest share of each box [B, 4] that one crowd region of its image covers. -> [B]."""
    shares = box_ops.covered(boxes[:, None], crowds.boxes[image_index])[:, 0]
    return shares.max(dim=1).values
