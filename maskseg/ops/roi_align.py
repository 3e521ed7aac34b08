"""RoIAlign over the levels of a feature pyramid.

Each bin of a region is a weighted sum of pixels. Where the channels of a pixel lie side by side (channels_last), that sum is what
`embedding_bag` does: the map is the table, a pixel is a row, a bin is a bag. The gradient is the same the other way round: a pixel is a bag of bins.
On a CPU this is several times faster than torchvision's kernel; on other devices torchvision's own is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from maskseg.ops import boxes as box_ops

TABLE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
)  # that embedding_bag has a fast kernel for
MOST_POINTS = (
    2**26
)  # sample points in one direction of all bins together; no sensible box comes near
AtCells = Callable[[int, Tensor, Tensor], Tensor]
PIECE = 2**22  # pixels that are looked at in one go, kept or not: bounds the memory


def assign_levels(
    boxes: Tensor,
    lowest: int,
    highest: int,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Tensor:
    """The pyramid level of each box (FPN, eq. 1): a box of `canonical_size` goes to `canonical_level`. [R, 4] -> i64 [R], `lowest`..`highest`.

    torchvision adds 1e-6 to the logarithm, detectron2 1e-8 to the ratio: boxes of exactly canonical size go up, here too.
    """
    level = torch.floor(
        canonical_level
        + torch.log2(box_ops.area(boxes).clamp(min=1e-12).sqrt() / canonical_size)
        + 1e-6
    )
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
    """RoIAlign (Mask R-CNN, section 3) of each box on its level, with torchvision's rules at the border and for boxes that are empty.

    features: L maps [N, C, H_l, W_l]; boxes: f32 [R, 4] in pixels; level: i64 [R] in 0..L-1. -> [R, C, size, size] of the features' type, on a CPU
    channels_last (and fastest where the features are). A sample point whose place is not a number, with which torchvision's kernel crashes, gives 0.
    """
    if features[0].device.type == "cpu":
        found = _all_lookups(
            features, strides, boxes, image_index, level, size, sampling_ratio, aligned
        )
        if found is not None:
            return _summed(features, *found[:3], size)
    return by_torchvision(
        features, strides, boxes, image_index, level, size, sampling_ratio, aligned
    )


def by_torchvision(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """`roi_align_levels` with torchvision's kernel, put together as in its MultiScaleRoIAlign: what other devices than a CPU take."""
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
    masks: AtCells,
    size: int,
    sampling_ratio: int,
    aligned: bool,
    whole: Tensor | None = None,
) -> list[Tensor]:
    """RoIAlign of the maps times a mask of each region's own: roi_align(feature * mask[r]) for box r, without R products.

    masks: level, regions i64 [T] on it and cells i64 [T] of their maps, row by row -> the masks there, f32 [T]; asked for the cells that are looked
    up alone, a small part of them, whose weights they become a factor of. All is on the CPU. Other arguments as in `roi_align_levels`.
    -> [R, C, size, size]. whole: i64 [n], ascending: regions of which behind it what `roi_align_levels` gives is wanted too, [n, C, size, size], for
    which the cells are not looked for again. Raises ValueError for boxes with too many sample points.
    """
    found = _all_lookups(
        features, strides, boxes, image_index, level, size, sampling_ratio, aligned
    )
    if found is None:
        raise ValueError("boxes are too large for their map")
    lookups, order, counts, first = found
    weights = []
    for i, (part, rows) in enumerate(
        zip(lookups.split(counts), torch.split(order, counts), strict=True)
    ):
        region = rows.repeat_interleave(part.sizes.sum(dim=1))
        weights.append(part.weights * masks(i, region, part.pixels - first[region]))
    out = [_summed(features, replace(lookups, weights=torch.cat(weights)), order, counts, size)]
    if whole is not None and features[0].device.type == "cpu":
        out.append(_summed(features, *_of_regions(lookups, order, counts, whole), size))
    elif whole is not None:
        out.append(
            by_torchvision(
                features,
                strides,
                boxes[whole],
                image_index[whole],
                level[whole],
                size,
                sampling_ratio,
                aligned,
            )
        )
    return out


def _of_regions(
    lookups: _Lookups, order: Tensor, counts: list[int], rows: Tensor
) -> tuple[_Lookups, Tensor, list[int]]:
    """Those of some regions, i64 [n] ascending, numbered anew."""
    number = torch.full((len(order),), -1).index_copy_(0, rows, torch.arange(len(rows)))[order]
    here = number >= 0
    entries = here.repeat_interleave(lookups.sizes.sum(dim=1))
    kept = _Lookups(lookups.sizes[here], lookups.pixels[entries], lookups.weights[entries])
    return kept, number[here], [int(part.sum()) for part in torch.split(here, counts)]


def _all_lookups(
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    image_index: Tensor,
    level: Tensor,
    size: int,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[_Lookups, Tensor, list[int], Tensor] | None:
    """-> lookups, the regions level by level i64 [R], how many are on each, and the first pixel of each region's image on its level's map i64 [R],
    all on the CPU; None for boxes with too many sample points."""
    level, image = level.cpu(), image_index.cpu()
    order = torch.argsort(level, stable=True)
    counts = torch.bincount(level, minlength=len(features)).tolist()
    of_level = torch.tensor(
        [
            (*feature.shape[2:], 1.0 / stride)
            for feature, stride in zip(features, strides, strict=True)
        ],
        dtype=torch.float32,
    )
    height, width, scale = of_level[level[order]].unbind(1)
    cells = boxes.detach().cpu().float()[order] * scale[:, None] - (0.5 if aligned else 0.0)
    lookups = _lookups(cells, image[order], height, width, size, sampling_ratio, aligned)
    return (
        None
        if lookups is None
        else (lookups, order, counts, image * (height * width).long()[order.argsort()])
    )


def _summed(
    features: list[Tensor], lookups: _Lookups, order: Tensor, counts: list[int], size: int
) -> Tensor:
    """[R, C, size, size] on the features' device, as sums of pixels."""
    device, channels = features[0].device, features[0].shape[1]
    lookups = _Lookups(*(getattr(lookups, f.name).to(device) for f in fields(_Lookups)))
    kept = features[0].dtype if features[0].dtype in TABLE_DTYPES else torch.float32
    tables = [
        feature.to(kept).permute(0, 2, 3, 1).reshape(-1, channels).contiguous()
        for feature in features
    ]
    sums = cast(Tensor, _LookUp.apply(lookups, order.to(device), counts, *tables))
    return sums.view(len(order), size, size, channels).permute(0, 3, 1, 2).to(features[0].dtype)


@dataclass(frozen=True)
class _Lookups:
    """Which pixels of its level each bin is the sum of: R regions of S*S bins, level by level, T pixels in all, bin by bin."""

    sizes: Tensor  # i32 [R, S*S], how many pixels a bin has
    pixels: Tensor  # i32 [T], rows of the level's table [N*H*W, C]
    weights: Tensor  # f32 [T]

    def split(self, counts: list[int]) -> list[_Lookups]:
        """Those of each level, on which are `counts` regions."""
        sizes = torch.split(self.sizes, counts)
        lengths = [int(part.sum()) for part in sizes]
        return [
            _Lookups(*level)
            for level in zip(
                sizes,
                torch.split(self.pixels, lengths),
                torch.split(self.weights, lengths),
                strict=True,
            )
        ]


def _lookups(
    boxes: Tensor,
    image_index: Tensor,
    height: Tensor,
    width: Tensor,
    size: int,
    ratio: int,
    aligned: bool,
) -> _Lookups | None:
    """The pixels and weights of every bin. boxes: f32 [R, 4] in cells of their map, which is f32 [R] height x width cells large.

    None: too many sample points (torchvision's kernel, one box at a time, may still have the memory, or says so).

    The bilinear weights of a point are a product of one in x and one in y, and so are the sums over the points of a bin. Neighbouring points share
    pixels, whose weights are added up beforehand for each direction: about half of the 4 ratio^2 lookups of a bin are left.
    """
    across = _one_direction(boxes[:, 0], boxes[:, 2], width, size, ratio, aligned)
    down = _one_direction(boxes[:, 1], boxes[:, 3], height, size, ratio, aligned)
    if across is None or down is None:
        return None
    (all_x, all_weight_x), (all_y, all_weight_y) = across, down
    first = image_index.int() * (height * width).int()
    all_y = all_y * width.int()[:, None, None] + first[:, None, None]
    each = max(1, PIECE // (size * size * all_x.shape[2] * all_y.shape[2]))
    sizes, pixels, weights = [], [], []
    for piece in range(0, max(len(boxes), 1), each):
        p = slice(piece, piece + each)
        x, weight_x = _trimmed(all_x[p], all_weight_x[p])
        y, weight_y = _trimmed(all_y[p], all_weight_y[p])
        read_x, read_y = weight_x != 0, weight_y != 0
        # [R, bins in y, bins in x, pixels in y, pixels in x]
        kept = (
            (read_y[:, :, None, :, None] & read_x[:, None, :, None, :])
            .flatten()
            .nonzero()
            .squeeze(1)
        )
        sizes.append(
            (
                read_y.sum(2, dtype=torch.int32)[:, :, None]
                * read_x.sum(2, dtype=torch.int32)[:, None]
            ).flatten(1)
        )
        pixels.append(
            (y[:, :, None, :, None] + x[:, None, :, None, :]).flatten().index_select(0, kept)
        )
        weights.append(
            (weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :])
            .flatten()
            .index_select(0, kept)
        )
    return _Lookups(torch.cat(sizes), torch.cat(pixels), torch.cat(weights))


def _one_direction(
    start: Tensor, end: Tensor, cells: Tensor, size: int, ratio: int, aligned: bool
) -> tuple[Tensor, Tensor] | None:
    """The cells that the bins of each region read in one direction, and with what weights. start, end: f32 [R], of the regions, in cells, of which
    there are f32 `cells` [R].

    -> i32 and f32 [R, size, E]: each cell once, the rest filled up with weights of 0. None: too many sample points. The operations on places are
    torchvision's in its kernel's order, for a place a rounding beyond -1 or `cells` gives 0 where its neighbour gives a pixel.
    """
    length = end - start
    if not aligned:
        length = length.clamp(min=1.0)
    grid = (
        torch.full_like(length, ratio)
        if ratio > 0
        else torch.ceil(length / size).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0)
    )
    points = int(grid.max()) if len(grid) else 0
    if 2 * points * size * len(grid) > MOST_POINTS:
        return None
    start, length, grid, cells = (t[:, None, None] for t in (start, length / size, grid, cells))
    last = (cells - 1.0).clamp(min=0.0)
    point = torch.arange(points) + 0.5
    place = (
        start + torch.arange(size, dtype=torch.float32)[:, None] * length + point * length / grid
    )
    inside = (place >= -1.0) & (place <= cells) & (point < grid) & (cells > 0.0)
    place = torch.minimum(torch.where(inside, place, 0.0).clamp(min=0.0), last)
    low = place.floor()
    share = inside / grid.clamp(min=1.0)
    weight = torch.cat([share * (1.0 - (place - low)), share * (place - low)], dim=2)
    # Beyond the last cell is no other: it is read with a weight of 0.
    return _merged(torch.cat([low, torch.minimum(low + 1.0, last)], dim=2).int(), weight)


def _trimmed(cell: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """i32 and f32 [R, S, E] without the last of E that none of these regions uses."""
    used = weight.sum((0, 1)).nonzero()
    most = int(used[-1]) + 1 if len(used) else 0
    return cell[..., :most], weight[..., :most]


def _merged(cell: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Adds up the weights of equal cells of a bin. i32 and f32 [r, S, E] -> the same, with an E as small as the bin with the most cells needs."""
    if weight.numel() == 0:
        return cell.new_zeros((*cell.shape[:2], 1)), weight.new_zeros((*cell.shape[:2], 1))
    cell, order = cell.sort(dim=2, stable=True)
    slot = F.pad((cell[..., 1:] != cell[..., :-1]).cumsum(2), (1, 0))
    most = int(slot[..., -1].max()) + 1
    merged = weight.new_zeros((*cell.shape[:2], most)).scatter_add_(
        2, slot, weight.gather(2, order)
    )
    return cell.new_zeros(merged.shape).scatter_(2, slot, cell), merged


class _LookUp(torch.autograd.Function):
    """Sums of table rows: L tables [N*H_l*W_l, C] -> [R, S*S, C]. Its gradient has no gradient, as in torchvision.

    order: i64 [R], the regions level by level, as the lookups are, on each level rising; counts: how many are on each. Every sum has a fixed order,
    whatever the threads: the same input gives the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, lookups: _Lookups, order: Tensor, counts: list[int], *tables: Tensor
    ) -> Tensor:
        ctx.lookups, ctx.order, ctx.counts, ctx.lengths = (
            lookups,
            order,
            counts,
            [len(table) for table in tables],
        )
        levels, rows = lookups.split(counts), torch.split(order, counts)
        # The level with the most regions writes to where the regions belong, the others' bins empty there; only the others' sums are copied.
        most = counts.index(max(counts))
        sizes = torch.zeros_like(lookups.sizes).index_copy_(0, rows[most], levels[most].sizes)
        out = _weighted_sums(tables[most], levels[most].pixels, levels[most].weights, sizes).view(
            *sizes.shape, tables[0].shape[1]
        )
        for i, (level, table) in enumerate(zip(levels, tables, strict=True)):
            if i != most and counts[i]:
                out[rows[i]] = _weighted_sums(table, level.pixels, level.weights, level.sizes).view(
                    -1, *out.shape[1:]
                )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lookups, lengths = ctx.lookups, ctx.lengths
        _, bins, channels = grad.shape
        # All levels as one table: one sort costs less than one for each.
        first = [sum(lengths[:i]) for i in range(len(lengths))]
        pixels = torch.cat(
            [
                level.pixels + start
                for level, start in zip(lookups.split(ctx.counts), first, strict=True)
            ]
        )
        pixels, by_pixel = pixels.sort(stable=True)
        bin_ = (ctx.order[:, None] * bins + torch.arange(bins, device=grad.device)).flatten().int()
        bin_ = bin_.repeat_interleave(
            lookups.sizes.flatten(), output_size=len(pixels)
        ).index_select(0, by_pixel)
        sizes = torch.bincount(pixels, minlength=sum(lengths))
        grads = _weighted_sums(
            grad.reshape(-1, channels).contiguous(),
            bin_,
            lookups.weights.index_select(0, by_pixel),
            sizes,
        )
        return None, None, None, *torch.split(grads, lengths)


def _weighted_sums(table: Tensor, rows: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """[V, C], i32 [T], f32 [T] and how many of those each of the B sums takes -> [B, C] of the table's type, summed in float32."""
    ends = F.pad(sizes.flatten().cumsum(0, dtype=torch.int32), (1, 0))
    if len(rows) == 0:
        return table.new_zeros((sizes.numel(), table.shape[1]))
    if table.dtype != torch.float32:
        # The weights have to have the table's type. What that rounds off is a second weight of the same row, which is at hand: costs little.
        rounded = weights.to(table.dtype)
        rest = (weights - rounded.float()).to(table.dtype)
        rows, weights, ends = (
            rows.repeat_interleave(2),
            torch.stack([rounded, rest], dim=1).flatten(),
            ends * 2,
        )
    return F.embedding_bag(
        rows, table, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
