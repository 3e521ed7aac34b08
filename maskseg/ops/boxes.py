"""Boxes, xyxy in continuous pixel coordinates: area, overlap, clipping, and the regression code of Faster R-CNN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A predicted log-size is cut here so that exp() stays finite: a side grows at most from 16 to 1000 pixels (torchvision and detectron2 alike).
MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...], in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Common area of [..., n, 4] and [..., m, 4] -> [..., n, m]; leading dimensions broadcast."""
    a, b = first[..., :, None, :], second[..., None, :, :]
    # In place: of hundreds of objects with 200 000 anchors, new memory for each step would cost more than the arithmetic.
    width = (
        torch.minimum(a[..., 2], b[..., 2]).sub_(torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    )
    height = (
        torch.minimum(a[..., 3], b[..., 3]).sub_(torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    )
    return width.mul_(height)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of [..., n, 4] and [..., m, 4] -> [..., n, m]; 0 between two empty boxes."""
    inter = intersection(first, second)
    union = (area(first)[..., :, None] + area(second)[..., None, :]).sub_(inter)
    return inter.div_(union).masked_fill_(~(union > 0), 0.0)


def covered(boxes: Tensor, others: Tensor) -> Tensor:
    """The share of each box that another covers: [..., n, 4], [..., m, 4] -> [..., n, m]; 0 for an empty box."""
    inter = intersection(boxes, others)
    own = area(boxes)[..., :, None]
    return torch.where(own > 0, inter / own, torch.zeros_like(inter))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes [R, 4] cut at their images' borders; sizes: [R, 2] (height, width) of each box's image."""
    limit = sizes.flip(-1).repeat(1, 2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Deltas (dx, dy, dw, dh) that lead from `anchors` [n, 4] to `boxes` [n, 4] (Faster R-CNN, eq. 2), times `weights`. -> [n, 4]."""
    size, anchor_size = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + 0.5 * size - anchors[:, :2] - 0.5 * anchor_size) / anchor_size
    return torch.cat([shift, torch.log(size / anchor_size)], dim=1) * boxes.new_tensor(weights)


def decode(deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """The inverse of `encode`: deltas [n, ..., 4] of anchors [n, ..., 4] (broadcast) -> boxes of the deltas' shape, float32."""
    deltas, anchors = (
        deltas.float() / deltas.new_tensor(weights, dtype=torch.float32),
        anchors.float(),
    )
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half = 0.5 * anchor_size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - half, centre + half], dim=-1)
