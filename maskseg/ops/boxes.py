"""Boxes, xyxy in continuous pixel coordinates: area, overlap, clipping, and box regression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Predicted log-scales are clamped so that exp() stays finite: a side grows from 16 to at most
# 1000 pixels. torchvision and detectron2 use the same limit.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """Area of boxes [..., 4] in square pixels, [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(first: Tensor, second: Tensor) -> Tensor:
    """Intersection area of [..., n, 4] and [..., m, 4] -> [..., n, m].

    Leading dimensions broadcast.
    """
    a = first[..., :, None, :]
    b = second[..., None, :, :]
    # In place: for hundreds of objects and 200 000 anchors, allocating memory for each step would
    # cost more than the arithmetic.
    width = torch.minimum(a[..., 2], b[..., 2])
    width = width.sub_(torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = torch.minimum(a[..., 3], b[..., 3])
    height = height.sub_(torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    return width.mul_(height)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of [..., n, 4] and [..., m, 4] -> [..., n, m].

    The IoU of two empty boxes is 0.
    """
    inter = intersection(first, second)
    union = (area(first)[..., :, None] + area(second)[..., None, :]).sub_(inter)
    return inter.div_(union).masked_fill_(~(union > 0), 0.0)


def ioa(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over the area of `boxes`: [..., n, 4] and [..., m, 4] -> [..., n, m].

    An empty box has 0.
    """
    inter = intersection(boxes, others)
    areas = area(boxes)[..., :, None]
    return torch.where(areas > 0, inter / areas, torch.zeros_like(inter))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes [R, 4] to their images; sizes: [R, 2], (height, width) of each box's image."""
    limit = sizes.flip(-1).repeat(1, 2).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Regression deltas from `anchors` to `boxes` (Faster R-CNN, eq. 2).

    boxes, anchors: [n, 4]. Returns (dx, dy, dw, dh) times `weights`, [n, 4].
    """
    size = boxes[:, 2:] - boxes[:, :2]
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + 0.5 * size - anchors[:, :2] - 0.5 * anchor_size) / anchor_size
    return torch.cat([shift, torch.log(size / anchor_size)], dim=1) * boxes.new_tensor(weights)


def decode(deltas: Tensor, anchors: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Boxes from regression deltas, the inverse of `encode`.

    deltas, anchors: [n, ..., 4], broadcast. Returns boxes of the deltas' shape, float32.
    """
    deltas = deltas.float() / deltas.new_tensor(weights, dtype=torch.float32)
    anchors = anchors.float()
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + 0.5 * anchor_size + deltas[..., :2] * anchor_size
    half = 0.5 * anchor_size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - half, centre + half], dim=-1)
