"""Means over superpixels of maps that are coarser than the image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.precision import full_precision


def cell_weights(pixels: int, cells: int, stride: float, centre: float, like: Tensor) -> Tensor:
    """How much of each cell a pixel is along one axis, f32 [pixels, cells], rows that sum to one: linear between the cells' centres, which lie at
    centre + i * stride in continuous pixels; the outermost cell beyond them."""
    at = (
        (torch.arange(pixels, device=like.device, dtype=torch.float32) + 0.5 - centre) / stride
    ).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells, device=like.device)).abs()).clamp(min=0)


@full_precision
def upsample(
    maps: Tensor, height: int, width: int, stride: tuple[float, float], centre: tuple[float, float]
) -> Tensor:
    """Maps [..., h, w] at the pixels' centres, bilinear, f32 [..., height, width]. stride, centre: of the cells, (down, across), in those pixels."""
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
    """The mean of `upsample(maps, ...)` over each of `count` segments, which is not made for it. maps: [C, h, w]; labels: i64 [H, W], the segment of
    each pixel, -1 for none. -> f32 [count, C], zeros for a segment without pixels.

    A row of pixels is a mixture of two rows of cells, and the sum over a run of pixels is a difference of two sums from the row's beginning. A
    segment is a bag of such sums at the ends of its runs, far fewer than its pixels.
    """
    width = labels.shape[1]
    across = cell_weights(width, maps.shape[2], stride[1], centre[1], maps)
    sums = (
        maps.float().flatten(0, 1) @ F.pad(across.cumsum(dim=0), (0, 0, 1, 0)).T
    )  # [C * h, W + 1], of the pixels before each
    table = sums.view(len(maps), -1).T.contiguous()
    starts = F.pad(labels[:, 1:] != labels[:, :-1], (1, 0), value=True)
    row, start = torch.nonzero(starts, as_tuple=True)
    end = torch.where(start.roll(-1) == 0, width, start.roll(-1))
    number = labels[row, start]
    order = torch.argsort(number, stable=True)[int((number < 0).sum()) :]
    row, start, end, number = row[order], start[order], end[order], number[order]
    at = ((row + 0.5 - centre[0]) / stride[0]).clamp(0, maps.shape[1] - 1)
    above, share = at.long(), at - at.floor()
    below = (above + 1).clamp(max=maps.shape[1] - 1)
    lookups = torch.stack(
        [
            above * (width + 1) + end,
            below * (width + 1) + end,
            above * (width + 1) + start,
            below * (width + 1) + start,
        ],
        dim=1,
    )
    weights = torch.stack([1 - share, share, share - 1, -share], dim=1)
    runs = torch.bincount(number, minlength=count)
    first = 4 * (runs.cumsum(0) - runs)
    total = F.embedding_bag(
        lookups.flatten(), table, first, mode="sum", per_sample_weights=weights.flatten()
    )
    pixels = torch.zeros(count, device=maps.device).index_add(0, number, (end - start).float())
    return total / pixels[:, None].clamp(min=1)
