"""Masks of the image on the cells of a feature map (Dai, He, Sun, "Convolutional Feature Masking for Joint Object and Stuff Segmentation", CVPR
2015): what share of a cell's pixels a mask has, and whether that makes the cell one of the mask's.

The cells' centres lie at centre + i * stride along both axes, in continuous pixels (`structures.FeatureSpec`). Statistics, of the mask's values:
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


def _axis(
    pixels: int, cells: int, stride: float, centre: float, statistic: str, device: torch.device
) -> _Axis:
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


def project(
    masks: Tensor,
    shape: tuple[int, int],
    stride: float,
    centre: float,
    statistic: str = "mean",
    threshold: float | None = 0.5,
) -> Tensor:
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


@dataclass(frozen=True)
class SuperpixelCells:
    """Which superpixels the cells of a map look at, and with what weight: what projects any set of them, at all cells or at some.

    first: i64 [h * w + 1], where in `number` i64 [n] and `weight` f64 [n] the superpixels of each cell begin; total: f64 [h * w], the weight of all
    its pixels, also of those of no superpixel; shape: (h, w). The pixels are looked at once, sets of superpixels are sums over these lists.
    leader: i64 [h * w], of most cells the superpixel that alone decides whether a set has the cell, -1 of the others.
    """

    first: Tensor
    number: Tensor
    weight: Tensor
    total: Tensor
    shape: tuple[int, int]
    statistic: str
    threshold: float | None
    leader: Tensor

    @classmethod
    def of(
        cls,
        labels: Tensor,
        shape: tuple[int, int],
        stride: float,
        centre: float,
        statistic: str = "mean",
        threshold: float | None = 0.5,
    ) -> SuperpixelCells:
        """labels: i32 [H, W], the superpixel 0..S-1 of each pixel, -1 for none (a pixel of its cell that no mask has); others as in `project`."""
        down = _axis(labels.shape[0], shape[0], stride, centre, statistic, labels.device)
        across = _axis(labels.shape[1], shape[1], stride, centre, statistic, labels.device)
        seen = labels if statistic in ("mean", "max") else labels[down.pixel][:, across.pixel]
        most = int(seen.max()) + 2 if seen.numel() else 1
        ends = torch.ones_like(
            seen, dtype=torch.bool
        )  # of runs of pixels of one row, cell and superpixel
        ends[:, :-1] = (seen[:, 1:] != seen[:, :-1]) | (across.cell[1:] != across.cell[:-1])
        row, last = torch.nonzero(ends, as_tuple=True)
        reach = F.pad(across.weight.cumsum(0), (1, 0))
        before = F.pad(torch.where(last[:-1] + 1 < seen.shape[1], last[:-1] + 1, 0), (1, 0))[
            : len(last)
        ]
        weight = down.weight[row] * (reach[last + 1] - reach[before])
        key, order = (
            (down.cell[row] * shape[1] + across.cell[last]) * most + seen[row, last] + 1
        ).sort()
        key, weight = _summed(
            key, weight[order]
        )  # a dense table of cells and superpixels would take ten times as long
        known = torch.nonzero(key % most).squeeze(1)
        key, weight = key[known], weight[known]
        first = F.pad(torch.bincount(key // most, minlength=shape[0] * shape[1]).cumsum(0), (1, 0))
        total, number = (down.total[:, None] * across.total).flatten(), key % most - 1
        leader = _leaders(key // most, number, weight, total, statistic, threshold)
        return cls(first, number, weight, total, shape, statistic, threshold, leader)

    def maps(self, members: Tensor) -> Tensor:
        """Of masks, bool [R, S], the superpixels of each: f32 [R, h, w]."""
        found = []
        for part in torch.split(members, max(1, BLOCK // max(len(self.total), 1))):
            sums = F.embedding_bag(
                self.number,
                part.T.contiguous().double(),
                self.first,
                mode="sum",
                per_sample_weights=self.weight,
                include_last_offset=True,
            )
            found.append(self._values(sums, self.total[:, None]).T)
        return torch.cat(found).view(len(members), *self.shape)

    def at(self, members: Tensor, mask: Tensor, cell: Tensor) -> Tensor:
        """The values of `maps` at T places, f32 [T], without the rest; mask: i64 [T] in 0..R-1; cell: i64 [T], row by row."""
        leader, flat = self.leader.index_select(0, cell), members.flatten()
        out = (
            flat.index_select(0, mask * members.shape[1] + leader.clamp(min=0)).float()
            if flat.numel()
            else flat.new_zeros(len(cell)).float()
        )
        rest = torch.nonzero(leader < 0).squeeze(1)
        return out.index_copy_(
            0,
            rest,
            self._summed_at(
                flat, members.shape[1], mask.index_select(0, rest), cell.index_select(0, rest)
            ),
        )

    def _summed_at(self, flat: Tensor, most: int, mask: Tensor, cell: Tensor) -> Tensor:
        """`at`, by all superpixels of each cell; flat: bool [R * most], members one mask behind the other."""
        each = (self.first[1:] - self.first[:-1])[cell]
        place = torch.arange(len(cell), device=cell.device).repeat_interleave(each)
        entry = torch.arange(len(place), device=cell.device) + (
            self.first[cell] - (each.cumsum(0) - each)
        ).index_select(0, place)
        there = flat.index_select(
            0, mask.index_select(0, place) * most + self.number.index_select(0, entry)
        )
        sums = self.total.new_zeros(len(cell)).index_add_(
            0, place, self.weight.index_select(0, entry) * there
        )
        return self._values(sums, self.total[cell])

    def _values(self, sums: Tensor, total: Tensor) -> Tensor:
        return _cut(
            (sums > 0).double() if self.statistic == "max" else _quotient(sums, total),
            self.threshold,
        )


def _leaders(
    cell: Tensor,
    number: Tensor,
    weight: Tensor,
    total: Tensor,
    statistic: str,
    threshold: float | None,
) -> Tensor:
    """i64 [h * w]: of each cell the superpixel that makes the value of every set which has it 1, and that of every other set 0; -1 where none does.

    cell, number: i64 [n], pairs; weight: f64 [n]; total: f64 [h * w].
    """
    most = torch.zeros_like(total).scatter_reduce_(0, cell, weight, "amax")
    if statistic == "max":
        alone = (torch.bincount(cell, minlength=len(total)) == 1) & (
            threshold is None or 0 <= threshold < 1
        )
    elif threshold is None:
        alone = most == total
    else:  # quotients rise with what is added up: no other sum is between these two
        alone = (_quotient(most, total) > threshold) & (_quotient(total - most, total) <= threshold)
    first = torch.nonzero((weight == most[cell]) & alone[cell]).squeeze(1)
    return torch.full((len(total),), -1, device=cell.device).index_copy_(
        0, cell[first], number[first]
    )


def _summed(key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of equal keys, i64 [n], as one each, with the sum of their weights, f64 [n]."""
    if not len(key):
        return key, weight
    ends = torch.cat(
        [
            torch.nonzero(key[1:] != key[:-1]).squeeze(1),
            torch.tensor([len(key) - 1], device=key.device),
        ]
    )
    sums = weight.cumsum(0)[ends]  # exact, as all sums here are, and so are their differences
    return key[ends], sums - F.pad(sums[:-1], (1, 0))


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

    labels: i32 [H, W], the superpixel 0..S-1 of each pixel, -1 for none; members: bool [R, S], the superpixels of each mask; stride: at least 1.
    -> f32 [R, h, w].
    """
    return SuperpixelCells.of(labels, shape, stride, centre, statistic, threshold).maps(members)


def _quotient(sums: Tensor, total: Tensor) -> Tensor:
    """0 for cells without pixels."""
    return sums / torch.where(total > 0, total, 1.0)


def _cut(values: Tensor, threshold: float | None) -> Tensor:
    """f64 -> f32: 1 where the value exceeds the threshold, else 0; without one, the value."""
    return (values if threshold is None else values > threshold).float()
