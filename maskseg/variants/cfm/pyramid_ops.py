"""Spatial pyramid pooling, and linear layers with thousands of inputs.

Source: He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
ECCV 2014.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# From this many rows and inputs on, a convolution on a CPU is faster than a matrix product.
MIN_ROWS = 256
MIN_INPUTS = 1024
# Cells of the convolution's window: with fewer, it takes up to ten times as long.
MIN_WINDOW_CELLS = 28
# Channels of the convolution as which `wide_linear` runs.
WINDOW_CHANNELS = 32


def pool_pyramid(bins: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """Max-pool bins to coarser grids.

    bins: [R, C, S, S]; sides: divisors of S. -> for each side, [R, C, side, side], channels_last.
    """
    pooled = {bins.shape[2]: bins}
    # Pool each level from the coarsest finished level that it divides.
    for side in sorted(sides, reverse=True):
        finer_side = min(known for known in pooled if known % side == 0)
        pooled[side] = _max_pool(pooled[finer_side], finer_side // side)
    return [pooled[side] for side in sides]


def _max_pool(bins: Tensor, step: int) -> Tensor:
    """Max pooling with kernel and stride `step`.

    torch's own max pooling is several times slower for channels_last bins.
    """
    cells = bins.permute(0, 2, 3, 1)
    for dim in (1, 2):
        if dim == 1:
            slices = [cells[:, i::step] for i in range(step)]
        else:
            slices = [cells[:, :, i::step] for i in range(step)]
        largest = slices[0]
        for other in slices[1:]:
            largest = torch.maximum(largest, other)
        cells = largest
    return cells.permute(0, 3, 1, 2)


def flatten_parts(parts: Sequence[Tensor]) -> Tensor:
    """Flatten parts [R, C, side, side] and concatenate them: [R, inputs]."""
    if torch.is_grad_enabled():
        return torch.cat([part.flatten(1) for part in parts], dim=1)
    # Copies once, where flattening channels_last parts and joining them would copy twice.
    lengths = [part.shape[1:].numel() for part in parts]
    out = parts[0].new_empty((len(parts[0]), sum(lengths)))
    for part, columns in zip(parts, torch.split(out, lengths, dim=1), strict=True):
        columns.view(part.shape).copy_(part)
    return out


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute F.linear, [R, inputs] -> [R, width], fast on a CPU for many rows and inputs.

    Runs as a convolution whose window covers its whole image, and reads the inputs in place:
    oneDNN's kernels are two to three times as fast as BLAS on processors that are not Intel's.
    """
    rows, inputs = x.shape
    is_plain_cpu = (
        x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )
    if rows < MIN_ROWS or inputs < MIN_INPUTS or inputs % WINDOW_CHANNELS or not is_plain_cpu:
        return F.linear(x, weight, bias)
    image = _as_image(x)
    window = _as_image(weight)
    return F.conv2d(image, window, bias).flatten(1)


def _as_image(rows: Tensor) -> Tensor:
    """View rows [n, inputs] as channels_last images [n, WINDOW_CHANNELS, ., 1]."""
    return rows.reshape(len(rows), -1, 1, WINDOW_CHANNELS).permute(0, 3, 1, 2)
