"""Upsampling of feature maps to pixels, and their means over superpixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.precision import full_precision


def cell_weights(pixels: int, cells: int, stride: float, centre: float, like: Tensor) -> Tensor:
    """Linear interpolation weights along one axis, f32 [pixels, cells]; rows sum to 1.

    The centre of cell i is at centre + i * stride in continuous pixels. Beyond the outermost
    centres, the outermost cell has weight 1. like: a tensor on the device of the result.
    """
    pixel = torch.arange(pixels, device=like.device, dtype=torch.float32)
    position = ((pixel + 0.5 - centre) / stride).clamp(0, cells - 1)
    distance = (position[:, None] - torch.arange(cells, device=like.device)).abs()
    return (1 - distance).clamp(min=0)


@full_precision
def upsample(
    maps: Tensor, height: int, width: int, stride: tuple[float, float], centre: tuple[float, float]
) -> Tensor:
    """Bilinear upsampling of maps [..., h, w] to the pixels' centres, f32 [..., height, width].

    stride, centre: (vertical, horizontal) of the cells, in those pixels.
    """
    down = cell_weights(height, maps.shape[-2], stride[0], centre[0], maps)
    across = cell_weights(width, maps.shape[-1], stride[1], centre[1], maps)
    return down @ (maps.float() @ across.T)


@full_precision
def segment_means(
    maps: Tensor,
    labels: Tensor,
    count: int,
    stride: tuple[float, float],
    centre: tuple[float, float],
) -> Tensor:
    """Mean of `upsample(maps, ...)` over each of `count` segments, without the upsampling.

    A row of pixels is a mixture of two rows of cells, and the sum over a run of pixels is the
    difference of two cumulative sums. A segment is a bag of such sums at the ends of its runs,
    which are far fewer than its pixels.

    maps: [C, h, w]; labels: i64 [H, W], the segment of each pixel, -1 for none; stride, centre: as
    in `upsample`. Returns f32 [count, C], zeros for a segment without pixels.
    """
    width = labels.shape[1]
    across = cell_weights(width, maps.shape[2], stride[1], centre[1], maps)
    # [C * h, W + 1], sums over the pixels before each.
    sums = maps.float().flatten(0, 1) @ F.pad(across.cumsum(dim=0), (0, 0, 1, 0)).T
    table = sums.view(len(maps), -1).T.contiguous()
    starts = F.pad(labels[:, 1:] != labels[:, :-1], (1, 0), value=True)
    row, start = torch.nonzero(starts, as_tuple=True)
    end = torch.where(start.roll(-1) == 0, width, start.roll(-1))
    segment = labels[row, start]
    order = torch.argsort(segment, stable=True)[int((segment < 0).sum()) :]
    row = row[order]
    start = start[order]
    end = end[order]
    segment = segment[order]
    position = ((row + 0.5 - centre[0]) / stride[0]).clamp(0, maps.shape[1] - 1)
    above = position.long()
    share = position - position.floor()
    below = (above + 1).clamp(max=maps.shape[1] - 1)
    above_row = above * (width + 1)
    below_row = below * (width + 1)
    lookups = torch.stack(
        [above_row + end, below_row + end, above_row + start, below_row + start], dim=1
    )
    weights = torch.stack([1 - share, share, share - 1, -share], dim=1)
    num_runs = torch.bincount(segment, minlength=count)
    first = 4 * (num_runs.cumsum(0) - num_runs)
    total = F.embedding_bag(
        lookups.flatten(), table, first, mode="sum", per_sample_weights=weights.flatten()
    )
    pixels = torch.zeros(count, device=maps.device).index_add(0, segment, (end - start).float())
    return total / pixels[:, None].clamp(min=1)
