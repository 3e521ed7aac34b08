"""RoIAlign over the levels of a feature pyramid.

Each bin of a region is a weighted sum of pixels. If the channels of a pixel are adjacent in memory
(channels_last), `embedding_bag` computes that sum: the map is the table, a pixel is a row, a bin is
a bag. The gradient is the transposed sum: a pixel is a bag of bins. On a CPU this is several times
faster than torchvision's kernel; other devices use torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from maskseg.ops import boxes as box_ops

# Data types for which embedding_bag has a fast kernel.
TABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Limit of the sample points of all bins in one direction; no sensible boxes come near it.
MAX_SAMPLE_POINTS = 2**26
# Number of candidate pixels examined at a time, which bounds the memory.
BLOCK = 2**22

# (level, regions i64 [T], cells i64 [T]) -> values of the regions' masks there, f32 [T].
MaskAtCells = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BinGrid:
    """How RoIAlign divides and samples a region.

    size: bins per side; sampling_ratio: sample points per side of a bin, 0 for one per cell of the
    map; aligned: shift by half a cell, so that cell i has its centre at i + 0.5.
    """

    size: int
    sampling_ratio: int
    aligned: bool


def assign_levels(
    boxes: Tensor,
    lowest: int,
    highest: int,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Tensor:
    """Pyramid level of each box (FPN, eq. 1), i64 [R] in `lowest`..`highest`.

    A box [R, 4] of `canonical_size` is assigned to `canonical_level`. Boxes of exactly a power of
    two times that size go to the upper level: torchvision adds 1e-6 to the logarithm for this,
    detectron2 1e-8 to the ratio.
    """
    size = box_ops.area(boxes).clamp(min=1e-12).sqrt()
    level = torch.floor(canonical_level + torch.log2(size / canonical_size) + 1e-6)
    return level.clamp(lowest, highest).to(torch.int64)


def roi_align_levels(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign (Mask R-CNN, section 3) of each box on its level.

    At the border and for empty boxes it follows torchvision. A sample point with a NaN coordinate,
    which crashes torchvision's kernel, gives 0.

    features: L maps [N, C, H_l, W_l]; boxes: f32 [R, 4] in pixels; level: i64 [R] in 0..L-1.
    Returns [R, C, size, size] of the features' dtype, on a CPU channels_last. Features in
    channels_last are the fastest.
    """
    if features[0].device.type == "cpu":
        grid = BinGrid(size, sampling_ratio, aligned)
        result = _find_lookups(features, strides, boxes, image_index, level, grid)
        if result is not None:
            lookups, _ = result
            return _sum_pixels(features, lookups, size)
    return roi_align_levels_torchvision(
        features, strides, boxes, image_index, level, size, sampling_ratio, aligned
    )


def roi_align_levels_torchvision(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """`roi_align_levels` with torchvision's kernel, as in its MultiScaleRoIAlign.

    Used on all devices but the CPU.
    """
    rois = torch.cat([image_index[:, None].to(boxes.dtype), boxes], dim=1)
    out = features[0].new_zeros((len(boxes), features[0].shape[1], size, size))
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        rows = torch.nonzero(level == i).squeeze(1)
        pooled = roi_align(
            feature.float(), rois[rows], (size, size), 1.0 / stride, sampling_ratio, aligned
        )
        out.index_put_((rows,), pooled.to(out.dtype))
    return out


def masked_roi_align(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    masks: MaskAtCells,
    grid: BinGrid,
    unmasked_rows: Tensor | None = None,
) -> list[Tensor]:
    """RoIAlign of the maps times each region's mask: roi_align(feature * mask[r]) for box r.

    The R products are not computed: the mask is evaluated only at the cells that are read, a small
    part of all, and multiplies their weights.

    masks: called with a level, regions i64 [T] on it and cells i64 [T] of their maps in row-major
    order; returns the masks there, f32 [T]; all of it on the CPU. unmasked_rows: i64 [n],
    ascending, regions for which the result without masks is needed too. Other arguments as in
    `roi_align_levels`.
    Returns [R, C, size, size] and, with `unmasked_rows`, [n, C, size, size].
    Raises ValueError if boxes have too many sample points.
    """
    result = _find_lookups(features, strides, boxes, image_index, level, grid)
    if result is None:
        raise ValueError("boxes are too large for their map")
    lookups, first_pixel = result
    weights = []
    for i, part in enumerate(lookups.split()):
        region = part.regions.repeat_interleave(part.sizes.sum(dim=1))
        weights.append(part.weights * masks(i, region, part.pixels - first_pixel[region]))
    masked = replace(lookups, weights=torch.cat(weights))
    out = [_sum_pixels(features, masked, grid.size)]
    if unmasked_rows is None:
        return out
    if features[0].device.type == "cpu":
        # The lookups are reused.
        out.append(_sum_pixels(features, lookups.select(unmasked_rows), grid.size))
    else:
        out.append(
            roi_align_levels_torchvision(
                features,
                strides,
                boxes[unmasked_rows],
                image_index[unmasked_rows],
                level[unmasked_rows],
                grid.size,
                grid.sampling_ratio,
                grid.aligned,
            )
        )
    return out


@dataclass(frozen=True)
class _Lookups:
    """Pixels of which each bin is a sum: R regions of S*S bins, level by level, T pixels in total.

    sizes: i32 [R, S*S], number of pixels of each bin; pixels: i32 [T], bin by bin, rows of the
    level's table [N*H*W, C]; weights: f32 [T]; regions: i64 [R], the region of each row of `sizes`,
    ascending within a level; counts: number of regions on each level.
    """

    sizes: Tensor
    pixels: Tensor
    weights: Tensor
    regions: Tensor
    counts: list[int]

    def to(self, device: torch.device) -> _Lookups:
        """All tensors on `device`."""
        return _Lookups(
            self.sizes.to(device),
            self.pixels.to(device),
            self.weights.to(device),
            self.regions.to(device),
            self.counts,
        )

    def split(self) -> list[_Lookups]:
        """The lookups of each level."""
        sizes = torch.split(self.sizes, self.counts)
        regions = torch.split(self.regions, self.counts)
        lengths = [int(part.sum()) for part in sizes]
        pixels = torch.split(self.pixels, lengths)
        weights = torch.split(self.weights, lengths)
        return [
            _Lookups(sizes[i], pixels[i], weights[i], regions[i], [count])
            for i, count in enumerate(self.counts)
        ]

    def select(self, rows: Tensor) -> _Lookups:
        """The lookups of the regions `rows`, i64 [n] ascending, renumbered 0..n-1."""
        number = torch.full((len(self.regions),), -1)
        number = number.index_copy_(0, rows, torch.arange(len(rows)))[self.regions]
        keep = number >= 0
        entries = keep.repeat_interleave(self.sizes.sum(dim=1))
        return _Lookups(
            self.sizes[keep],
            self.pixels[entries],
            self.weights[entries],
            number[keep],
            [int(part.sum()) for part in torch.split(keep, self.counts)],
        )


def _find_lookups(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    grid: BinGrid,
) -> tuple[_Lookups, Tensor] | None:
    """Find the pixels and weights of every bin.

    Returns the lookups, and the first pixel of each region's image on its level's map, i64 [R], all
    on the CPU; None if there are too many sample points.
    """
    level = level.cpu()
    image = image_index.cpu()
    order = torch.argsort(level, stable=True)
    counts = torch.bincount(level, minlength=len(features)).tolist()
    level_shapes = [
        (*feature.shape[2:], 1.0 / stride)
        for feature, stride in zip(features, strides, strict=True)
    ]
    height, width, scale = torch.tensor(level_shapes, dtype=torch.float32)[level[order]].unbind(1)
    cells = boxes.detach().cpu().float()[order] * scale[:, None] - (0.5 if grid.aligned else 0.0)
    bins = _pixels_of_bins(cells, image[order], height, width, grid)
    if bins is None:
        return None
    sizes, pixels, weights = bins
    first_pixel = image * (height * width).long()[order.argsort()]
    return _Lookups(sizes, pixels, weights, order, counts), first_pixel


def _sum_pixels(features: list[Tensor], lookups: _Lookups, size: int) -> Tensor:
    """Weighted sums of pixels, [R, C, size, size] on the features' device."""
    channels = features[0].shape[1]
    dtype = features[0].dtype if features[0].dtype in TABLE_DTYPES else torch.float32
    tables = [
        feature.to(dtype).permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
        for feature in features
    ]
    sums: Tensor = _TableSums.apply(lookups.to(features[0].device), *tables)
    bins = sums.view(len(lookups.regions), size, size, channels)
    return bins.permute(0, 3, 1, 2).to(features[0].dtype)


def _pixels_of_bins(
    boxes: Tensor, image_index: Tensor, height: Tensor, width: Tensor, grid: BinGrid
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Pixels and weights of every bin.

    The bilinear weights of a point are a product of a weight in x and one in y, and so are their
    sums over the points of a bin. Neighboring points share pixels, whose weights are first added up
    in each direction: about half of the 4 ratio^2 lookups of a bin remain.

    boxes: f32 [R, 4] in cells of their map; height, width: f32 [R], size of that map.
    Returns sizes, pixels and weights as in `_Lookups`; None if there are too many sample points
    (torchvision's kernel, which treats one box at a time, may have enough memory, or raises).
    """
    across = _axis_weights(boxes[:, 0], boxes[:, 2], width, grid)
    down = _axis_weights(boxes[:, 1], boxes[:, 3], height, grid)
    if across is None or down is None:
        return None
    all_x, all_weight_x = across
    all_y, all_weight_y = down
    first = image_index.int() * (height * width).int()
    all_y = all_y * width.int()[:, None, None] + first[:, None, None]
    block = max(1, BLOCK // (grid.size * grid.size * all_x.shape[2] * all_y.shape[2]))
    sizes = []
    pixels = []
    weights = []
    for start in range(0, max(len(boxes), 1), block):
        rows = slice(start, start + block)
        x, weight_x = _trim(all_x[rows], all_weight_x[rows])
        y, weight_y = _trim(all_y[rows], all_weight_y[rows])
        nonzero_x = weight_x != 0
        nonzero_y = weight_y != 0
        # Outer products are [R, bins in y, bins in x, pixels in y, pixels in x].
        nonzero = nonzero_y[:, :, None, :, None] & nonzero_x[:, None, :, None, :]
        kept = nonzero.flatten().nonzero().squeeze(1)
        count_x = nonzero_x.sum(2, dtype=torch.int32)
        count_y = nonzero_y.sum(2, dtype=torch.int32)
        sizes.append((count_y[:, :, None] * count_x[:, None]).flatten(1))
        pixel = y[:, :, None, :, None] + x[:, None, :, None, :]
        pixels.append(pixel.flatten().index_select(0, kept))
        weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        weights.append(weight.flatten().index_select(0, kept))
    return torch.cat(sizes), torch.cat(pixels), torch.cat(weights)


def _axis_weights(
    start: Tensor, end: Tensor, cells: Tensor, grid: BinGrid
) -> tuple[Tensor, Tensor] | None:
    """Cells that the bins of each region read in one direction, and their weights.

    start, end: f32 [R], borders of the regions in cells; cells: f32 [R], number of cells.
    Returns i32 and f32 [R, size, E], each cell once, padded with weights of 0; None if there are
    too many sample points.

    The operations on coordinates are those of torchvision's kernel in the same order: a coordinate
    a rounding error beyond -1 or `cells` gives 0 where its neighbor gives a pixel.
    """
    length = end - start
    if not grid.aligned:
        length = length.clamp(min=1.0)
    if grid.sampling_ratio > 0:
        num_points = torch.full_like(length, grid.sampling_ratio)
    else:
        num_points = torch.ceil(length / grid.size).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
    max_points = int(num_points.max()) if len(num_points) else 0
    if 2 * max_points * grid.size * len(num_points) > MAX_SAMPLE_POINTS:
        return None
    start = start[:, None, None]
    length = (length / grid.size)[:, None, None]
    num_points = num_points[:, None, None]
    cells = cells[:, None, None]
    last = (cells - 1.0).clamp(min=0.0)
    point = torch.arange(max_points) + 0.5
    bins = torch.arange(grid.size, dtype=torch.float32)[:, None]
    place = start + bins * length + point * length / num_points
    inside = (place >= -1.0) & (place <= cells) & (point < num_points) & (cells > 0.0)
    place = torch.minimum(torch.where(inside, place, 0.0).clamp(min=0.0), last)
    low = place.floor()
    share = inside / num_points.clamp(min=1.0)
    weight = torch.cat([share * (1.0 - (place - low)), share * (place - low)], dim=2)
    # There is no cell beyond the last: the last is read again, with a weight of 0.
    cell = torch.cat([low, torch.minimum(low + 1.0, last)], dim=2).int()
    return _merge_equal_cells(cell, weight)


def _trim(cell: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the trailing entries of [R, S, E] that no region uses."""
    used = weight.sum((0, 1)).nonzero()
    length = int(used[-1]) + 1 if len(used) else 0
    return cell[..., :length], weight[..., :length]


def _merge_equal_cells(cell: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the weights of equal cells of a bin.

    cell, weight: i32 and f32 [R, S, E]. Returns the same with the smallest possible E.
    """
    if weight.numel() == 0:
        return cell.new_zeros((*cell.shape[:2], 1)), weight.new_zeros((*cell.shape[:2], 1))
    cell, order = cell.sort(dim=2, stable=True)
    slot = F.pad((cell[..., 1:] != cell[..., :-1]).cumsum(2), (1, 0))
    length = int(slot[..., -1].max()) + 1
    merged = weight.new_zeros((*cell.shape[:2], length))
    merged = merged.scatter_add_(2, slot, weight.gather(2, order))
    return cell.new_zeros(merged.shape).scatter_(2, slot, cell), merged


class _SumsContext(torch.autograd.function.FunctionCtx):
    """What the backward pass needs. lengths: of the tables."""

    lookups: _Lookups
    lengths: list[int]


class _TableSums(torch.autograd.Function):
    """Weighted sums of table rows: L tables [N*H_l*W_l, C] -> [R, S*S, C].

    The gradient cannot be differentiated again, as in torchvision. Each sum has a fixed order,
    whatever the number of threads: equal inputs give equal bits.
    """

    @staticmethod
    def forward(ctx: _SumsContext, lookups: _Lookups, *tables: Tensor) -> Tensor:
        ctx.lookups = lookups
        ctx.lengths = [len(table) for table in tables]
        levels = lookups.split()
        # The level with the most regions writes straight into the output, with empty bins for the
        # other levels; only the sums of the other levels are copied in.
        largest = lookups.counts.index(max(lookups.counts))
        level = levels[largest]
        sizes = torch.zeros_like(lookups.sizes).index_copy_(0, level.regions, level.sizes)
        out = _weighted_sums(tables[largest], level.pixels, level.weights, sizes)
        out = out.view(*sizes.shape, tables[0].shape[1])
        for i, (level, table) in enumerate(zip(levels, tables, strict=True)):
            if i != largest and lookups.counts[i]:
                sums = _weighted_sums(table, level.pixels, level.weights, level.sizes)
                out[level.regions] = sums.view(-1, *out.shape[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _SumsContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        lookups = ctx.lookups
        lengths = ctx.lengths
        _, num_bins, channels = grad.shape
        # All levels as one table: one sort costs less than one per level.
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        levels = zip(lookups.split(), starts, strict=True)
        pixels = torch.cat([level.pixels + start for level, start in levels])
        pixels, by_pixel = pixels.sort(stable=True)
        bins = lookups.regions[:, None] * num_bins + torch.arange(num_bins, device=grad.device)
        bins = bins.flatten().int()
        bins = bins.repeat_interleave(lookups.sizes.flatten(), output_size=len(pixels))
        bins = bins.index_select(0, by_pixel)
        sizes = torch.bincount(pixels, minlength=sum(lengths))
        table = grad.reshape(-1, channels).contiguous()
        grads = _weighted_sums(table, bins, lookups.weights.index_select(0, by_pixel), sizes)
        return None, *torch.split(grads, lengths)


def _weighted_sums(table: Tensor, rows: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Weighted sums of table rows, accumulated in float32, [B, C] of the table's dtype.

    table: [V, C]; rows: i32 [T]; weights: f32 [T]; sizes: B integers, number of rows of each sum.
    """
    ends = F.pad(sizes.flatten().cumsum(0, dtype=torch.int32), (1, 0))
    if len(rows) == 0:
        return table.new_zeros((sizes.numel(), table.shape[1]))
    if table.dtype != torch.float32:
        # The weights must have the table's dtype. Their rounding error becomes a second weight of
        # the same row, which costs little because the row is in the cache.
        rounded = weights.to(table.dtype)
        rest = (weights - rounded.float()).to(table.dtype)
        rows = rows.repeat_interleave(2)
        weights = torch.stack([rounded, rest], dim=1).flatten()
        ends = ends * 2
    return F.embedding_bag(
        rows, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
