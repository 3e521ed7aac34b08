"""Projection of image masks to the cells of a feature map.

For each cell, a statistic of the mask over the cell's pixels decides whether the mask has the cell.
Source: Dai, He, Sun, "Convolutional Feature Masking for Joint Object and Stuff Segmentation",
CVPR 2015, section 3.

Cell centers lie at centre + i * stride along both axes, in continuous pixels
(`structures.FeatureSpec`). The statistics of a mask's values are

- mean: over the cell's pixels, i.e. those that are nearer to its center than to another;
- max: the maximum over the same pixels;
- nearest: the value of the pixel that contains the center, or of the border pixel next to it where
  the image ends before;
- area: bilinear down-scaling with antialiasing; a pixel's weight falls linearly from the center to
  zero at the neighboring centers.

With a threshold, a cell is 1 where its statistic exceeds the threshold, else 0. A cell that is
nearest to no pixel (the map may extend beyond the image) is 0.

Everything is computed in float64. Counts, and weights that are multiples of a power of two, then
add up exactly in any order, and a quotient of counts is compared with a threshold such as 0.57
without a rounding error of the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STATISTICS = ("mean", "max", "nearest", "area")
BLOCK = 2**21  # values per block: 16 MB as float64


def nearest_cells(pixels: int, cells: int, stride: float, centre: float) -> Tensor:
    """Return the cell whose center is nearest to each pixel along one axis: i64 [pixels].

    Of two cells at the same distance, the lower one; beyond the centers, the outermost cell.
    """
    position = (torch.arange(pixels, dtype=torch.float64) + 0.5 - centre) / stride
    return (position - 0.5).ceil().clamp(0, cells - 1).long()


@dataclass(frozen=True)
class _AxisWeights:
    """The weights with which cells see pixels along one axis, as a sparse list of n pairs.

    pixel, cell: i64 [n]; weight: f64 [n]; total: f64 [cells], the sum of each cell's weights.
    """

    pixel: Tensor
    cell: Tensor
    weight: Tensor
    total: Tensor


def _axis_weights(
    pixels: int, cells: int, stride: float, centre: float, statistic: str, device: torch.device
) -> _AxisWeights:
    nearest = nearest_cells(pixels, cells, stride, centre)
    has_pixels = torch.bincount(nearest, minlength=cells) > 0
    centres = centre + stride * torch.arange(cells, dtype=torch.float64)
    if statistic in ("mean", "max"):
        pixel = torch.arange(pixels)
        cell = nearest
        weight = torch.ones(pixels, dtype=torch.float64)
    elif statistic == "nearest":
        cell = torch.nonzero(has_pixels).squeeze(1)
        pixel = centres[cell].floor().clamp(0, pixels - 1).long()
        weight = torch.ones(len(cell), dtype=torch.float64)
    elif statistic == "area":
        # In pixels, not as a share of the stride: exact for strides such as 3, too.
        distance = (torch.arange(pixels, dtype=torch.float64)[:, None] + 0.5 - centres).abs()
        weights = (stride - distance).clamp(min=0) * has_pixels
        pixel, cell = torch.nonzero(weights, as_tuple=True)
        weight = weights[pixel, cell]
    else:
        raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, not {statistic!r}")
    total = torch.zeros(cells, dtype=torch.float64).index_add_(0, cell, weight)
    return _AxisWeights(pixel.to(device), cell.to(device), weight.to(device), total.to(device))


def project(
    masks: Tensor,
    shape: tuple[int, int],
    stride: float,
    centre: float,
    statistic: str = "mean",
    threshold: float | None = 0.5,
) -> Tensor:
    """Project bitmaps to the cells of a map of `shape` (h, w).

    masks: bool or float in [0, 1], [R, H, W]; stride: at least 1. -> f32 [R, h, w].
    """
    height, width = masks.shape[1:]
    y_axis = _axis_weights(height, shape[0], stride, centre, statistic, masks.device)
    x_axis = _axis_weights(width, shape[1], stride, centre, statistic, masks.device)
    projected = []
    for part in torch.split(masks, max(1, BLOCK // max(height * width, 1))):
        values = _reduce_axis(part, 1, y_axis, statistic)
        values = _reduce_axis(values, 2, x_axis, statistic)
        if statistic != "max":
            values = _safe_divide(values, y_axis.total[:, None] * x_axis.total)
        projected.append(_apply_threshold(values, threshold))
    return torch.cat(projected)


def _reduce_axis(values: Tensor, dim: int, axis: _AxisWeights, statistic: str) -> Tensor:
    """Reduce the pixels of one axis to cells by a weighted sum or, for "max", a maximum.

    values: [R, ., .]; dim: 1 or 2. -> f64 [R, ., .].
    """
    broadcast = (-1, 1) if dim == 1 else (-1,)
    weighted = values.index_select(dim, axis.pixel).double() * axis.weight.view(broadcast)
    size = list(weighted.shape)
    size[dim] = len(axis.total)
    out = weighted.new_zeros(size)
    if statistic == "max":
        cell = axis.cell.view(broadcast).expand_as(weighted)
        return out.scatter_reduce_(dim, cell, weighted, "amax")
    return out.index_add_(dim, axis.cell, weighted)


@dataclass(frozen=True)
class SuperpixelCells:
    """The weights with which the cells of a map see superpixels, as sparse lists.

    Projects any set of superpixels, at all cells or only at some. The pixels are read once; sets of
    superpixels are then sums over these lists.

    first: i64 [h * w + 1], the start of each cell's entries in `number` and `weight`.
    number: i64 [n], superpixels; weight: f64 [n].
    total: f64 [h * w], the weight of all pixels of a cell, also of those of no superpixel.
    shape: (h, w).
    statistic, threshold: as in `project`.
    leader: i64 [h * w], the superpixel that alone decides whether a set has the cell; -1 for cells
        without one. Most cells have one.
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
    def from_labels(
        cls,
        labels: Tensor,
        shape: tuple[int, int],
        stride: float,
        centre: float,
        statistic: str = "mean",
        threshold: float | None = 0.5,
    ) -> SuperpixelCells:
        """Build the lists from a label map.

        labels: i32 [H, W], the superpixel 0..S-1 of each pixel; -1 for a pixel that is in no mask
            but counts as a pixel of its cell. Other arguments as in `project`.
        """
        device = labels.device
        y_axis = _axis_weights(labels.shape[0], shape[0], stride, centre, statistic, device)
        x_axis = _axis_weights(labels.shape[1], shape[1], stride, centre, statistic, device)
        seen = labels if statistic in ("mean", "max") else labels[y_axis.pixel][:, x_axis.pixel]
        # Runs of pixels of one row, cell and superpixel. A dense table of cells and superpixels
        # would take ten times as long.
        ends = torch.ones_like(seen, dtype=torch.bool)
        ends[:, :-1] = (seen[:, 1:] != seen[:, :-1]) | (x_axis.cell[1:] != x_axis.cell[:-1])
        row, last = torch.nonzero(ends, as_tuple=True)
        cumulative = F.pad(x_axis.weight.cumsum(0), (1, 0))
        run_starts = F.pad(torch.where(last[:-1] + 1 < seen.shape[1], last[:-1] + 1, 0), (1, 0))
        run_starts = run_starts[: len(last)]
        weight = y_axis.weight[row] * (cumulative[last + 1] - cumulative[run_starts])

        # Keys order the runs by cell, then by superpixel; remainder 0 stands for the label -1.
        num_labels = int(seen.max()) + 2 if seen.numel() else 1
        cell = y_axis.cell[row] * shape[1] + x_axis.cell[last]
        key, order = (cell * num_labels + seen[row, last] + 1).sort()
        key, weight = _sum_runs(key, weight[order])
        labeled = torch.nonzero(key % num_labels).squeeze(1)
        key = key[labeled]
        weight = weight[labeled]
        cell = key // num_labels
        number = key % num_labels - 1
        first = F.pad(torch.bincount(cell, minlength=shape[0] * shape[1]).cumsum(0), (1, 0))
        total = (y_axis.total[:, None] * x_axis.total).flatten()
        leader = _deciding_superpixels(cell, number, weight, total, statistic, threshold)
        return cls(first, number, weight, total, shape, statistic, threshold, leader)

    def project(self, members: Tensor) -> Tensor:
        """Project masks, given as sets of superpixels bool [R, S]: f32 [R, h, w]."""
        projected = []
        for part in torch.split(members, max(1, BLOCK // max(len(self.total), 1))):
            sums = F.embedding_bag(
                self.number,
                part.T.contiguous().double(),
                self.first,
                mode="sum",
                per_sample_weights=self.weight,
                include_last_offset=True,
            )
            projected.append(self._finish(sums, self.total[:, None]).T)
        return torch.cat(projected).view(len(members), *self.shape)

    def project_at(self, members: Tensor, mask: Tensor, cell: Tensor) -> Tensor:
        """Compute the values of `project` at T places only: f32 [T].

        members: bool [R, S]; mask: i64 [T] in 0..R-1; cell: i64 [T], row-major.
        """
        leader = self.leader.index_select(0, cell)
        num_superpixels = members.shape[1]
        flat = members.flatten()
        if flat.numel():
            index = mask * num_superpixels + leader.clamp(min=0)
            values = flat.index_select(0, index).float()
        else:
            values = flat.new_zeros(len(cell)).float()
        # Cells without a deciding superpixel need the sum over all their superpixels.
        rest = torch.nonzero(leader < 0).squeeze(1)
        rest_mask = mask.index_select(0, rest)
        rest_cell = cell.index_select(0, rest)
        rest_values = self._values_by_sums(flat, num_superpixels, rest_mask, rest_cell)
        return values.index_copy_(0, rest, rest_values)

    def _values_by_sums(
        self, flat_members: Tensor, num_superpixels: int, mask: Tensor, cell: Tensor
    ) -> Tensor:
        """Compute `project_at` from all superpixels of each cell.

        flat_members: bool [R * num_superpixels].
        """
        counts = (self.first[1:] - self.first[:-1])[cell]
        place = torch.arange(len(cell), device=cell.device).repeat_interleave(counts)
        offsets = self.first[cell] - (counts.cumsum(0) - counts)
        entry = torch.arange(len(place), device=cell.device) + offsets.index_select(0, place)
        index = mask.index_select(0, place) * num_superpixels + self.number.index_select(0, entry)
        is_member = flat_members.index_select(0, index)
        sums = self.total.new_zeros(len(cell)).index_add_(
            0, place, self.weight.index_select(0, entry) * is_member
        )
        return self._finish(sums, self.total[cell])

    def _finish(self, sums: Tensor, total: Tensor) -> Tensor:
        """Convert sums of weights to the statistic and apply the threshold."""
        values = (sums > 0).double() if self.statistic == "max" else _safe_divide(sums, total)
        return _apply_threshold(values, self.threshold)


def _deciding_superpixels(
    cell: Tensor,
    number: Tensor,
    weight: Tensor,
    total: Tensor,
    statistic: str,
    threshold: float | None,
) -> Tensor:
    """Find the superpixel of each cell that alone decides the cell's value.

    Every set with this superpixel has the value 1 at the cell, every other set 0.

    cell, number: i64 [n], pairs; weight: f64 [n]; total: f64 [h * w]. -> i64 [h * w], -1 for cells
    without such a superpixel.
    """
    largest = torch.zeros_like(total).scatter_reduce_(0, cell, weight, "amax")
    if statistic == "max":
        is_decided = (torch.bincount(cell, minlength=len(total)) == 1) & (
            threshold is None or 0 <= threshold < 1
        )
    elif threshold is None:
        is_decided = largest == total
    else:
        # Quotients grow with each added superpixel: all other sets lie outside these two.
        is_decided = (_safe_divide(largest, total) > threshold) & (
            _safe_divide(total - largest, total) <= threshold
        )
    entry = torch.nonzero((weight == largest[cell]) & is_decided[cell]).squeeze(1)
    leader = torch.full((len(total),), -1, device=cell.device)
    return leader.index_copy_(0, cell[entry], number[entry])


def _sum_runs(key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Merge runs of equal keys, i64 [n], and sum their weights, f64 [n]."""
    if not len(key):
        return key, weight
    inner_ends = torch.nonzero(key[1:] != key[:-1]).squeeze(1)
    ends = torch.cat([inner_ends, torch.tensor([len(key) - 1], device=key.device)])
    # Differences of cumulative sums are exact, as all sums in this file.
    sums = weight.cumsum(0)[ends]
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
    """Project sets of superpixels to the cells of a map of `shape` (h, w).

    Equal to `project` of their bitmaps, which are never built.

    labels: i32 [H, W], the superpixel 0..S-1 of each pixel, -1 for none; members: bool [R, S], the
    superpixels of each mask; stride: at least 1. -> f32 [R, h, w].
    """
    cells = SuperpixelCells.from_labels(labels, shape, stride, centre, statistic, threshold)
    return cells.project(members)


def _safe_divide(sums: Tensor, total: Tensor) -> Tensor:
    """Divide; 0 for cells without pixels."""
    return sums / torch.where(total > 0, total, 1.0)


def _apply_threshold(values: Tensor, threshold: float | None) -> Tensor:
    """Convert f64 to f32: 1 where the value exceeds the threshold, else 0; or the value itself."""
    return (values if threshold is None else values > threshold).float()
