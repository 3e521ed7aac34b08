"""Which ground truth a box stands for, for all images of a batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskseg.ops import boxes as box_ops

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
BLOCK, BLOCK_CUDA = (
    2**21,
    2**25,
)  # overlaps that are computed together: those of a CPU stay in its cache, those of a GPU need under 1 GB


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


def label_by_iou(
    truth: PaddedTruth, boxes: Tensor, low: float, high: float, low_quality: bool, block: int = 0
) -> tuple[Tensor, Tensor]:
    """The best truth of each box [B, 4] and what the box is (Faster R-CNN, section 3.1.2).

    A box is positive from IoU `high` on, negative below `low`, ignored between; with `low_quality` the boxes that overlap a truth most (all that
    tie) are positive too. block: as many overlaps are held at a time, which changes nothing else; 0: what is fastest.
    -> best i64 [N, B], label i64 [N, B].
    """
    if not len(boxes):
        nothing = torch.zeros((len(truth.valid), 0), dtype=torch.int64, device=boxes.device)
        return nothing, nothing.clone()
    block = block or (BLOCK_CUDA if boxes.is_cuda else BLOCK)
    # All at once, 400 truths and the 270 000 anchors of a picture of 1333 x 800 would need 2 GB. What is too much to hold is computed twice.
    parts = torch.split(boxes, max(1, block // truth.valid.numel()))
    held = [_overlaps(truth, part) for part in parts] if len(parts) == 1 else None
    of_boxes, of_truths = [], []
    for iou in held or (_overlaps(truth, part) for part in parts):
        of_boxes.append(iou.max(dim=1))
        of_truths.append(iou.amax(dim=2, keepdim=True))
    value, best = (torch.cat(found, dim=1) for found in zip(*of_boxes, strict=True))
    label = torch.full_like(best, IGNORED)
    label[value < low] = NEGATIVE
    label[value >= high] = POSITIVE
    if low_quality:
        top = torch.stack(of_truths).amax(dim=0)
        # A truth that no box touches would otherwise tie with every box.
        top[top <= 0] = torch.inf
        label[
            torch.cat(
                [
                    (iou == top).any(dim=1)
                    for iou in held or (_overlaps(truth, part) for part in parts)
                ],
                dim=1,
            )
        ] = POSITIVE
    return best, label


def _overlaps(truth: PaddedTruth, boxes: Tensor) -> Tensor:
    """IoU of the padded truths with boxes [B, 4], -1 where there is no truth. -> [N, M, B]."""
    return box_ops.iou(truth.boxes, boxes).masked_fill_(~truth.valid[..., None], -1.0)


def draw(
    label: Tensor,
    image_index: Tensor,
    key: Tensor,
    num_images: int,
    number: int,
    positive_fraction: float,
) -> Tensor:
    """A random subset: at most `number` boxes an image, at most that share of them positive, filled up with negatives.

    label: i64 [B] of POSITIVE / NEGATIVE / IGNORED; key: [B], random (`ops.draws.random_keys`): those with the smallest are drawn.
    -> i64, ascending indices into the B boxes.
    """
    most_positive = int(number * positive_fraction)
    # Ignored boxes form a group of their own, behind the others.
    group = torch.where(label == IGNORED, 2 * num_images, 2 * image_index + (label == POSITIVE))
    rank = rank_in_group(group, key)
    positives = torch.bincount(image_index[label == POSITIVE], minlength=num_images).clamp(
        max=most_positive
    )
    chosen = ((label == POSITIVE) & (rank < most_positive)) | (
        (label == NEGATIVE) & (rank < (number - positives)[image_index])
    )
    return torch.nonzero(chosen).squeeze(1)


def crowd_cover(boxes: Tensor, image_index: Tensor, crowds: PaddedTruth) -> Tensor:
    """The largest share of each box [B, 4] that one crowd region of its image covers. -> [B]."""
    shares = box_ops.covered(boxes[:, None], crowds.boxes[image_index])[:, 0]
    return shares.max(dim=1).values
