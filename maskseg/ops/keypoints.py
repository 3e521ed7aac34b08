"""Points inside boxes <-> cells of a grid over the box (Mask R-CNN, section 5).

A point with continuous coordinates lies in the cell whose area holds it; a cell stands for its centre (Heckbert's c = d + 0.5). torchvision
and detectron2 do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskseg.ops.precision import full_precision

_BUDGET = 16_000_000  # numbers of the enlarged heatmaps that are held at once


def cells_of(points: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The cell of each point in the `size` x `size` grid over its box.

    points: f32 [R, P, 3] (x, y, visibility); boxes: f32 [R, 4]. -> i64 [R, P], row * size + column, and bool [R, P]: visible (> 0) and in the box.
    A point on the box' right or bottom border lies in the last cell.
    """
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    cell = ((points[..., :2] - low) * (size / (high - low))).floor()
    cell = torch.where(points[..., :2] == high, torch.full_like(cell, size - 1), cell)
    valid = ((cell >= 0) & (cell < size)).all(dim=-1) & (points[..., 2] > 0)
    cell = torch.where(valid[..., None], cell, torch.zeros_like(cell)).long()
    return cell[..., 1] * size + cell[..., 0], valid


def locate(logits: Tensor, boxes: Tensor) -> Tensor:
    """Where each heatmap is highest, after it was enlarged bicubically to the pixels of its box.

    logits: f32 [R, P, S, S]; boxes: f32 [R, 4]. -> f32 [R, P, 3]: x, y at the centre of the enlarged map's best pixel, and its share of the
    softmax (the enlarged map's value over the sum of the S x S map's, as detectron2 scores them), in [0, 1].
    """
    count, points, size = logits.shape[:3]
    found = boxes.new_zeros((count, points, 3))
    if not count or not points:
        return found
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sides.ceil().long()  # (width, height) of the enlarged map
    order = torch.argsort(pixels.prod(dim=1))
    start = 0
    areas = pixels.prod(dim=1)[order].tolist()
    while start < count:
        stop = start + 1
        while (
            stop < count and points * areas[stop] * (stop + 1 - start) <= _BUDGET
        ):  # sorted: the largest last
            stop += 1
        part = order[start:stop]
        found[part] = _locate(logits[part], boxes[part], sides[part], pixels[part], size)
        start = stop
    return found


@full_precision
def _locate(logits: Tensor, boxes: Tensor, sides: Tensor, pixels: Tensor, size: int) -> Tensor:
    width, height = int(pixels[:, 0].max()), int(pixels[:, 1].max())
    across, down = (
        bicubic_weights(size, pixels[:, 0], width),
        bicubic_weights(size, pixels[:, 1], height),
    )
    large = torch.einsum("rhs,rpst,rwt->rphw", down, logits, across)
    outside = (torch.arange(height, device=logits.device)[:, None] >= pixels[:, 1, None, None]) | (
        torch.arange(width, device=logits.device) >= pixels[:, 0, None, None]
    )
    best, place = large.masked_fill(outside[:, None], -torch.inf).flatten(2).max(dim=2)
    row, column = torch.div(place, width, rounding_mode="floor"), place % width
    step = sides / pixels  # of the enlarged map, in pixels of the image
    x = (column + 0.5) * step[:, 0, None] + boxes[:, 0, None]
    y = (row + 0.5) * step[:, 1, None] + boxes[:, 1, None]
    score = (best - logits.flatten(2).logsumexp(dim=2)).exp().clamp(max=1.0)
    return torch.stack([x, y, score], dim=2)


def bicubic_weights(size: int, lengths: Tensor, longest: int) -> Tensor:
    """What each of `size` cells adds to each pixel of a line enlarged to lengths [R] pixels (Keys' kernel, a = -0.75; borders repeat).

    -> f32 [R, longest, size]; rows from a line's own length on mean nothing. The same as `F.interpolate(mode="bicubic")` with half-pixel centres.
    """
    place = (torch.arange(longest, device=lengths.device) + 0.5) * (size / lengths[:, None]) - 0.5
    first = place.floor()
    taps = first[..., None] + torch.arange(-1, 3, device=lengths.device)
    distance = (place[..., None] - taps).abs()
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weights = torch.where(distance <= 1, near, far)
    return torch.zeros((len(lengths), longest, size), device=lengths.device).scatter_add_(
        2, taps.clamp(0, size - 1).long(), weights
    )
