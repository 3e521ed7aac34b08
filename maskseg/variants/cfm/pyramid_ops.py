"""Spatial pyramid pooling of regions (He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks", ECCV 2014), and wide layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MANY, LONG = (
    256,
    1024,
)  # rows and inputs from which on a convolution costs less than a product of matrices
FEWEST_CELLS = 28  # of such a convolution's window: with fewer it takes up to ten times as long
CHANNELS = 32  # of such a convolution


def pooled_pyramid(bins: Tensor, sides: Sequence[int]) -> list[Tensor]:
    """[R, C, S, S] -> the largest bin of each of side x side equal squares, [R, C, side, side] for each of `sides`, which divide S; channels_last."""
    found = {bins.shape[2]: bins}
    for side in sorted(
        sides, reverse=True
    ):  # each from the smallest that there is and that it divides
        larger = min(known for known in found if known % side == 0)
        found[side] = _largest(found[larger], larger // side)
    return [found[side] for side in sides]


def _largest(bins: Tensor, step: int) -> Tensor:
    """Max pooling with kernel and stride `step`, which torch's own does several times slower where the channels of a bin lie side by side."""
    cells = bins.permute(0, 2, 3, 1)
    for dim in (1, 2):
        first, *others = (
            cells[:, i::step] if dim == 1 else cells[:, :, i::step] for i in range(step)
        )
        for other in others:
            first = torch.maximum(first, other)
        cells = first
    return cells.permute(0, 3, 1, 2)


def flattened(parts: Sequence[Tensor]) -> Tensor:
    """Parts [R, C, side, side], each flattened and one behind the other: [R, inputs]."""
    if torch.is_grad_enabled():
        return torch.cat([part.flatten(1) for part in parts], dim=1)
    lengths = [part.shape[1:].numel() for part in parts]
    out = parts[0].new_empty((len(parts[0]), sum(lengths)))
    for part, own in zip(parts, torch.split(out, lengths, dim=1), strict=True):
        own.view(part.shape).copy_(
            part
        )  # once, where flattening what is channels_last and joining it would copy twice
    return out


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, [R, inputs] -> [R, width], fast on a CPU for many rows and thousands of inputs.

    The same sum as a convolution whose window is all of an image, as which the inputs are read where they lie: oneDNN's kernels are two to three
    times as fast as BLAS' on processors that are not Intel's.
    """
    rows, inputs = x.shape
    plain = (
        x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )
    if rows < MANY or inputs < LONG or inputs % CHANNELS or not plain:
        return F.linear(x, weight, bias)
    image, window = (t.reshape(len(t), -1, 1, CHANNELS).permute(0, 3, 1, 2) for t in (x, weight))
    return F.conv2d(image, window, bias).flatten(1)
