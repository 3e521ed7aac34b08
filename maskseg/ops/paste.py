"""Resampling of S x S grids over boxes: pasting into the image, and cropping by other boxes."""

from __future__ import annotations

from math import ceil, floor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskseg.ops import rle
from maskseg.ops.paste_rle import paste_bilinear_counts
from maskseg.ops.precision import full_precision

# Coefficient of Keys' bicubic kernel, as in torch.
_KEYS_A = -0.75


def kernel(distance: Tensor, interpolation: str) -> Tensor:
    """Interpolation kernel at a distance in samples.

    interpolation: `bilinear` (triangle) or `bicubic` (Keys, a = -0.75).
    Raises ValueError for another interpolation.
    """
    d = distance.abs()
    if interpolation == "bilinear":
        return (1 - d).clamp(min=0)
    if interpolation == "bicubic":
        near = ((_KEYS_A + 2) * d - (_KEYS_A + 3)) * d * d + 1
        far = ((_KEYS_A * d - 5 * _KEYS_A) * d + 8 * _KEYS_A) * d - 4 * _KEYS_A
        return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    raise ValueError(f"interpolation must be bilinear or bicubic, not {interpolation!r}")


@full_precision
def resample(grids: Tensor, u: Tensor, v: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Values of grids [n, S, S] at columns u [n, w] and rows v [n, h], [n, h, w].

    u, v: in samples (sample 0 is at 0); values outside the grid are zero. The kernel is separable,
    so the resampling is two matrix products.
    """
    index = torch.arange(grids.shape[-1], device=grids.device, dtype=grids.dtype)
    rows = kernel(v[..., None] - index, interpolation)
    columns = kernel(u[..., None] - index, interpolation)
    return rows @ grids @ columns.transpose(-1, -2)


class _Axis(NamedTuple):
    """One axis of a pasted mask: pixels low to high (exclusive); pixel i is at sample
    (i + 0.5 - start) * step - 0.5 of the grid."""

    low: int
    high: int
    start: float
    step: float

    def samples(self, first: int, stop: int, like: Tensor) -> Tensor:
        """Position of the pixels first to stop (exclusive) in the grid, in samples."""
        pixels = torch.arange(first, stop, device=like.device, dtype=like.dtype)
        return (pixels + 0.5 - self.start) * self.step - 0.5


def paste_crop(
    grid: Tensor, box: Tensor, height: int, width: int, mode: str, interpolation: str
) -> tuple[Tensor, int, int]:
    """Resample one mask grid to the pixels of its box.

    grid: [S, S]; box: [4]; height, width: size of the image.
    mode `continuous`: pixel i is sampled at i + 0.5 in the box's continuous frame (detectron2's
    `paste_masks_in_image`).
    mode `torchvision`: the grid gets a border of zeros, the box grows with it and is rounded to
    whole pixels, including its last pixel (torchvision's `paste_masks_in_image`).
    Returns values [h, w], left and top; [0, 0] if the box is outside the image.
    Raises ValueError for another mode.
    """
    if mode == "torchvision":
        x, y = _torchvision_axes(box, grid.shape[-1])
        grid = torch.nn.functional.pad(grid, (1, 1, 1, 1))
    elif mode == "continuous":
        start_x, start_y, end_x, end_y = box.tolist()
        x = _continuous_axis(start_x, end_x, grid.shape[-1], interpolation)
        y = _continuous_axis(start_y, end_y, grid.shape[-1], interpolation)
    else:
        raise ValueError(f"paste mode must be continuous or torchvision, not {mode!r}")
    left = max(x.low, 0)
    top = max(y.low, 0)
    right = min(x.high, width)
    bottom = min(y.high, height)
    if right <= left or bottom <= top:
        return grid.new_zeros((0, 0)), 0, 0
    u = x.samples(left, right, grid)
    v = y.samples(top, bottom, grid)
    if mode == "torchvision":
        last = grid.shape[-1] - 1
        u = u.clamp(0, last)
        v = v.clamp(0, last)
    return resample(grid[None], u[None], v[None], interpolation)[0], left, top


def _torchvision_axes(box: Tensor, size: int) -> tuple[_Axis, _Axis]:
    """Both axes of `paste_crop` in the mode `torchvision`; size: of the grid without border."""
    scale = (size + 2) / size
    half = (box[2:] - box[:2]) * 0.5 * scale
    centre = (box[2:] + box[:2]) * 0.5
    axes = []
    for low, last in zip((centre - half).tolist(), (centre + half).tolist(), strict=True):
        first = int(low)
        length = max(int(last) - first + 1, 1)
        axes.append(_Axis(first, first + length, float(first), (size + 2) / length))
    x, y = axes
    return x, y


def _continuous_axis(start: float, end: float, size: int, interpolation: str) -> _Axis:
    """One axis of `paste_crop` in the mode `continuous`."""
    step = size / max(end - start, 1e-6)
    # The kernel has nonzero values up to this many samples beyond the box.
    reach = 0.5 if interpolation == "bilinear" else 1.5
    return _Axis(floor(start - reach / step), ceil(end + reach / step), start, step)


def paste_counts(
    grids: Tensor, boxes: Tensor, frames: Tensor, mode: str, interpolation: str, threshold: float
) -> tuple[rle.Ints, rle.Ints]:
    """Run lengths of the pixels whose resampled value is at least `threshold`.

    grids: [n, S, S]; boxes: [n, 4]; frames: i64 [n, 2] (height, width), all on the CPU; mode and
    interpolation as in `paste_crop`.
    Returns COCO's run lengths of all masks, concatenated, and the number of runs of each mask,
    i64 [n].
    """
    if interpolation == "bilinear":
        return paste_bilinear_counts(
            grids.float().numpy(), boxes.float().numpy(), frames.numpy(), mode, threshold
        )
    threads = torch.get_num_threads()
    counts = [np.zeros(0, dtype=np.int64)]
    # The crops are small: on a busy machine, synchronizing threads would take 100 times longer.
    torch.set_num_threads(1)
    try:
        for grid, box, (height, width) in zip(grids.float(), boxes, frames.tolist(), strict=True):
            values, left, top = paste_crop(grid, box, height, width, mode, interpolation)
            inside = (values >= threshold).numpy()
            counts.append(rle.counts_from_crop(inside, left, top, height, width))
    finally:
        torch.set_num_threads(threads)
    return np.concatenate(counts), np.array([len(c) for c in counts[1:]], dtype=np.int64)
