"""Means over superpixels of maps that are coarser than the image."""

from __future__ import annotations

import torch
from torch import Tensor

from maskseg.ops.precision import full_precision


def cell_weights(pixels: int, cells: int, stride: float, centre: float, like: Tensor) -> Tensor:
    """How much of each cell a pixel is along one axis, f32 [pixels, cells], rows that sum to one: linear between the cells' centres, which lie at
    centre + i * stride in continuous pixels; the outermost cell beyond them."""
    at = ((torch.arange(pixels, device=like.device, dtype=torch.float32) + 0.5 - centre) / stride).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells, device=like.device)).abs()).clamp(min=0)


@full_precision
def upsample(maps: Tensor, height: int, width: int, stride: tuple[float, float], centre: tuple[float, float]) -> Tensor:
    """Maps [..., h, w] at the pixels' centres, bilinear, f32 [..., height, width]. stride, centre: of the cells, (down, across), in those pixels."""
    down = cell_weights(height, maps.shape[-2], stride[0], centre[0], maps)
    across = cell_weights(width, maps.shape[-1], stride[1], centre[1], maps)
    return down @ (maps.float() @ across.T)


@full_precision
def segment_means(values: Tensor, numbers: Tensor, count: int) -> Tensor:
    """values: f32 [C, P]; numbers: i64 [P], which of `count` segments each pixel is in, -1 for none -> the mean of each segment, f32 [count, C]
    (zeros for one without pixels)."""
    sums = values.new_zeros(count + 1, len(values)).index_add(0, numbers + 1, values.T)[1:]
    return sums / torch.bincount(numbers + 1, minlength=count + 1)[1:, None].clamp(min=1)
