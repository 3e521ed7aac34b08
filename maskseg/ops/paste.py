"""Resampling of S x S grids that live in a box's frame: into the image (pasting) and into other boxes."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
import torch
from torch import Tensor

from maskseg.ops import rle
from maskseg.ops.paste_rle import outlines
from maskseg.ops.precision import full_precision


def kernel(distance: Tensor, interpolation: str) -> Tensor:
    """The interpolation kernel at a distance in samples: `bilinear` (triangle) or `bicubic` (Keys, a = -0.75, as torch's)."""
    d = distance.abs()
    if interpolation == "bilinear":
        return (1 - d).clamp(min=0)
    if interpolation == "bicubic":
        a = -0.75
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    raise ValueError(f"interpolation must be bilinear or bicubic, not {interpolation!r}")


@full_precision
def resample(grids: Tensor, u: Tensor, v: Tensor, interpolation: str = "bilinear") -> Tensor:
    """Values of grids [n, S, S] at columns u [n, w] and rows v [n, h], in units of samples (sample 0 is at 0); zero outside. -> [n, h, w].

    A separable kernel makes the resampling two matrix products.
    """
    index = torch.arange(grids.shape[-1], device=grids.device, dtype=grids.dtype)
    rows = kernel(v[..., None] - index, interpolation)
    columns = kernel(u[..., None] - index, interpolation)
    return rows @ grids @ columns.transpose(-1, -2)


def paste_crop(
    grid: Tensor, box: Tensor, height: int, width: int, rule: str, interpolation: str
) -> tuple[Tensor, int, int]:
    """One soft mask at the pixels of its box. grid: [S, S]; box: [4]. -> values [h, w], left, top; [0, 0] where the box is outside.

    rule `continuous`: pixel i is sampled at i + 0.5 in the box's continuous frame (detectron2's `paste_masks_in_image`).
    rule `torchvision`: the grid gets a border of zeros, the box grows with it and is cut to whole pixels, its last pixel included
    (torchvision's `paste_masks_in_image`).
    """
    size = grid.shape[-1]
    if rule == "torchvision":
        grid = torch.nn.functional.pad(grid, (1, 1, 1, 1))
        scale = (size + 2) / size
        half = (box[2:] - box[:2]) * 0.5 * scale
        centre = (box[2:] + box[:2]) * 0.5
        x0, y0 = (int(c) for c in (centre - half).tolist())
        x1, y1 = (int(c) for c in (centre + half).tolist())
        w, h = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
        start_x, start_y, step_x, step_y = float(x0), float(y0), (size + 2) / w, (size + 2) / h
        x1, y1, size = x0 + w, y0 + h, size + 2
    elif rule == "continuous":
        start_x, start_y, end_x, end_y = box.tolist()
        step_x, step_y = size / max(end_x - start_x, 1e-6), size / max(end_y - start_y, 1e-6)
        reach = (
            0.5 if interpolation == "bilinear" else 1.5
        )  # the kernel leads values so many samples beyond the box
        x0, y0 = floor(start_x - reach / step_x), floor(start_y - reach / step_y)
        x1, y1 = ceil(end_x + reach / step_x), ceil(end_y + reach / step_y)
    else:
        raise ValueError(f"paste rule must be continuous or torchvision, not {rule!r}")
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if right <= left or bottom <= top:
        return grid.new_zeros((0, 0)), 0, 0
    u = (
        torch.arange(left, right, device=grid.device, dtype=grid.dtype) + 0.5 - start_x
    ) * step_x - 0.5
    v = (
        torch.arange(top, bottom, device=grid.device, dtype=grid.dtype) + 0.5 - start_y
    ) * step_y - 0.5
    if rule == "torchvision":
        u, v = u.clamp(0, size - 1), v.clamp(0, size - 1)
    return resample(grid[None], u[None], v[None], interpolation)[0], left, top


def paste_counts(
    grids: Tensor, boxes: Tensor, frames: Tensor, rule: str, interpolation: str, threshold: float
) -> tuple[rle.Ints, rle.Ints]:
    """Soft masks on the CPU -> run lengths of the pixels that are at least `threshold`. grids: [n, S, S]; boxes: [n, 4]; frames: i64 [n, 2]
    (height, width); rule and interpolation as in `paste_crop`.

    -> COCO's run lengths of all masks, one mask after the other, and how many each mask has, i64 [n].
    """
    if interpolation == "bilinear":
        return outlines(
            grids.float().numpy(), boxes.float().numpy(), frames.numpy(), rule, threshold
        )
    threads, counts = torch.get_num_threads(), [np.zeros(0, dtype=np.int64)]
    torch.set_num_threads(
        1
    )  # the crops are small: threads would wait for each other, 100 times longer on a busy machine
    try:
        for grid, box, (height, width) in zip(grids.float(), boxes, frames.tolist(), strict=True):
            values, left, top = paste_crop(grid, box, height, width, rule, interpolation)
            counts.append(
                rle.counts_from_crop((values >= threshold).numpy(), left, top, height, width)
            )
    finally:
        torch.set_num_threads(threads)
    return np.concatenate(counts), np.array([len(c) for c in counts[1:]], dtype=np.int64)
