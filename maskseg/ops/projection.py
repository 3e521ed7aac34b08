"""Masks of the image on the cells of a feature map (Dai, He, Sun, "Convolutional Feature Masking for Joint Object and Stuff Segmentation", CVPR
2015): what share of a cell's pixels a mask has, and whether that makes the cell one of the mask's.

The cells' centres lie at centre + i * stride along both axes, in continuous pixels (`interfaces.Level`). Statistics, of the mask's values:
mean: of the cell's pixels, those that are nearer to its centre than to another's; max: the largest of the same pixels'; nearest: that of the pixel
in which the centre lies, or of the one next to it where the image ends before; area: bilinear down-scaling with antialiasing, where a pixel's weight
falls from the centre to nothing at the centres next to it. A threshold makes a cell 1 where the statistic exceeds it, 0 elsewhere.
A cell that is the nearest to no pixel (a map goes on where the image ends) is 0.

All is computed as float64: counts, and weights that are multiples of a power of two, then add up exactly in any order, and a quotient of counts
is compared with a threshold like 0.57 as the fraction it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STATISTICS = ("mean", "max", "nearest", "area")
BLOCK = 2**21  # values that are worked on together: 16 MB as float64


def cell_of_pixels(pixels: int, cells: int, stride: float, centre: float) -> Tensor:
    """The cell whose centre is nearest to each pixel's along one axis, the lower of two; the outermost cell beyond the centres. -> i64 [pixels]."""
    at = (torch.arange(pixels, dtype=torch.float64) + 0.5 - centre) / stride
    return (at - 0.5).ceil().clamp(0, cells - 1).long()


@dataclass(frozen=True)
class _Axis:
    """Along one axis, the pixels that cells look at: pairs of a pixel and a cell, i64 [n], with weights, f64 [n]; total: their sum for each cell,
    f64 [cells]."""

    pixel: Tensor
    cell: Tensor
    weight: Tensor
    total: Tensor


def _axis(pixels: int, cells: int, stride: float, centre: float, statistic: str, device: torch.device) -> _Axis:
    nearest = cell_of_pixels(pixels, cells, stride, centre)
    seen = torch.bincount(nearest, minlength=cells) > 0
    centres = centre + stride * torch.arange(cells, dtype=torch.float64)
    if statistic in ("mean", "max"):
        pixel, cell = torch.arange(pixels), nearest
        weight = torch.ones(pixels, dtype=torch.float64)
    elif statistic == "nearest":
        cell = torch.nonzero(seen).squeeze(1)
        pixel = centres[cell].floor().clamp(0, pixels - 1).long()
        weight = torch.ones(len(cell), dtype=torch.float64)
    elif statistic == "area":
        # In pixels, not as a share of the stride: no rounding for a stride of 3 either.
        distance = (torch.arange(pixels, dtype=torch.float64)[:, None] + 0.5 - centres).abs()
        weights = (stride - distance).clamp(min=0) * seen
        pixel, cell = torch.nonzero(weights, as_tuple=True)
        weight = weights[pixel, cell]
    else:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, not {statistic!r}")
    total = torch.zeros(cells, dtype=torch.float64).index_add_(0, cell, weight)
    return _Axis(pixel.to(device), cell.to(device), weight.to(device), total.to(device))


def project(masks: Tensor, shape: tuple[int, int], stride: float, centre: float, statistic: str = "mean", threshold: float | None = 0.5) -> Tensor:
    """Bitmaps on the cells of a map of `shape` (h, w). masks: bool or float in [0, 1], [R, H, W]; stride: at least 1. -> f32 [R, h, w]."""
    height, width = masks.shape[1:]
    down = _axis(height, shape[0], stride, centre, statistic, masks.device)
    across = _axis(width, shape[1], stride, centre, statistic, masks.device)
    found = []
    for part in torch.split(masks, max(1, BLOCK // max(height * width, 1))):
        values = _along(_along(part, 1, down, statistic), 2, across, statistic)
        if statistic != "max":
            values = _quotient(values, down.total[:, None] * across.total)
        found.append(_cut(values, threshold))
    return torch.cat(found)


def _along(values: Tensor, dim: int, axis: _Axis, statistic: str) -> Tensor:
    """values [R, ., .] with the pixels of one axis, `dim` 1 or 2, gathered in cells: their weighted sum or their maximum, f64 [R, ., .]."""
    column = (-1, 1) if dim == 1 else (-1,)
    picked = values.index_select(dim, axis.pixel).double() * axis.weight.view(column)
    size = list(picked.shape)
    size[dim] = len(axis.total)
    out = picked.new_zeros(size)
    if statistic == "max":
        return out.scatter_reduce_(dim, axis.cell.view(column).expand_as(picked), picked, "amax")
    return out.index_add_(dim, axis.cell, picked)


def project_superpixels(
    labels: Tensor,
    members: Tensor,
    shape: tuple[int, int],
    stride: float,
    centre: float,
    statistic: str = "mean",
    threshold: float | None = 0.5,
) -> Tensor:
    """Sets of superpixels on the cells of a map of `shape` (h, w): exactly what `project` gives of their bitmaps, which are not made.

    labels: i32 [H, W], the superpixel 0..S-1 of each pixel, -1 for none (a pixel of its cell that no mask has); members: bool [R, S], the
    superpixels of each mask; stride: at least 1. -> f32 [R, h, w].

    The pixels of each superpixel in each cell are counted once; the masks' sums are the product of `members` and these counts.
    """
    down = _axis(labels.shape[0], shape[0], stride, centre, statistic, labels.device)
    across = _axis(labels.shape[1], shape[1], stride, centre, statistic, labels.device)
    cells, known = shape[0] * shape[1], members.shape[1]
    cell = down.cell[:, None] * shape[1] + across.cell
    number = labels[down.pixel][:, across.pixel].long() + 1  # -1 falls into a column that is left out
    weight = down.weight[:, None] * across.weight
    counts = weight.new_zeros(cells * (known + 1)).index_add_(0, (cell * (known + 1) + number).flatten(), weight.flatten())
    # A cell has pixels of a few superpixels only: as a product with a dense table this would take ten times as long.
    counts = counts.view(cells, known + 1)[:, 1:]
    row, column = torch.nonzero(counts, as_tuple=True)
    first = torch.searchsorted(row, torch.arange(cells, device=row.device))
    total = (down.total[:, None] * across.total).flatten()
    found = []
    for part in torch.split(members, max(1, BLOCK // max(cells, 1))):
        sums = F.embedding_bag(column, part.T.contiguous().double(), first, mode="sum", per_sample_weights=counts[row, column])
        values = (sums > 0).double() if statistic == "max" else _quotient(sums, total[:, None])
        found.append(_cut(values, threshold).T)
    return torch.cat(found).view(len(members), *shape)


def _quotient(sums: Tensor, total: Tensor) -> Tensor:
    """0 for cells without pixels."""
    return sums / torch.where(total > 0, total, 1.0)


def _cut(values: Tensor, threshold: float | None) -> Tensor:
    """f64 -> f32: 1 where the value exceeds the threshold, else 0; without one, the value."""
    return (values if threshold is None else values > threshold).float()
