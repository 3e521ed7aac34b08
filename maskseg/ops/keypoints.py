"""Conversion between keypoints and cells of a heatmap over the box (Mask R-CNN, section 5).

A point with continuous coordinates belongs to the cell that contains it; a cell stands for its
centre (Heckbert's c = d + 0.5). torchvision and detectron2 do the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskseg.ops.precision import full_precision

# Number of values of the enlarged heatmaps held at once.
_BUDGET = 16_000_000
# Coefficient of Keys' bicubic kernel, as in torch.
_KEYS_A = -0.75


def points_to_cells(points: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cell of each point in the `size` x `size` grid over its box.

    points: f32 [R, P, 3] (x, y, visibility); boxes: f32 [R, 4].
    Returns the cell as row * size + column, i64 [R, P], and whether the point is visible (> 0) and
    inside the box, bool [R, P]. A point on the right or bottom border of the box belongs to the
    last cell.
    """
    low = boxes[:, None, :2]
    high = boxes[:, None, 2:]
    cell = ((points[..., :2] - low) * (size / (high - low))).floor()
    cell = torch.where(points[..., :2] == high, torch.full_like(cell, size - 1), cell)
    valid = ((cell >= 0) & (cell < size)).all(dim=-1) & (points[..., 2] > 0)
    cell = torch.where(valid[..., None], cell, torch.zeros_like(cell)).long()
    return cell[..., 1] * size + cell[..., 0], valid


def locate_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """Location of each heatmap's maximum after bicubic enlargement to the pixels of its box.

    logits: f32 [R, P, S, S]; boxes: f32 [R, 4].
    Returns f32 [R, P, 3]: x, y of the centre of the enlarged map's highest pixel, and its softmax
    score in [0, 1]. As in detectron2, the score divides by the sum over the S x S map.
    """
    count, num_points = logits.shape[:2]
    keypoints = boxes.new_zeros((count, num_points, 3))
    if not count or not num_points:
        return keypoints
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    pixels = sides.ceil().long()  # (width, height) of the enlarged map
    areas = pixels.prod(dim=1)
    order = torch.argsort(areas)
    sorted_areas = areas[order].tolist()
    start = 0
    while start < count:
        stop = _end_of_chunk(sorted_areas, start, num_points)
        rows = order[start:stop]
        keypoints[rows] = _locate(logits[rows], boxes[rows], sides[rows], pixels[rows])
        start = stop
    return keypoints


def _end_of_chunk(areas: list[int], start: int, num_points: int) -> int:
    """End of the chunk from `start` whose enlarged maps fit into the budget; at least one map.

    areas: ascending, so that the last of a chunk is its largest.
    """
    stop = start + 1
    while stop < len(areas) and num_points * areas[stop] * (stop + 1 - start) <= _BUDGET:
        stop += 1
    return stop


@full_precision
def _locate(logits: Tensor, boxes: Tensor, sides: Tensor, pixels: Tensor) -> Tensor:
    """`locate_keypoints` of one chunk; pixels: i64 [R, 2], (width, height) of the enlarged maps."""
    size = logits.shape[2]
    width = int(pixels[:, 0].max())
    height = int(pixels[:, 1].max())
    across = bicubic_weights(size, pixels[:, 0], width)
    down = bicubic_weights(size, pixels[:, 1], height)
    enlarged = torch.einsum("rhs,rpst,rwt->rphw", down, logits, across)
    below = torch.arange(height, device=logits.device)[:, None] >= pixels[:, 1, None, None]
    right = torch.arange(width, device=logits.device) >= pixels[:, 0, None, None]
    enlarged = enlarged.masked_fill((below | right)[:, None], -torch.inf)
    value, place = enlarged.flatten(2).max(dim=2)
    row = torch.div(place, width, rounding_mode="floor")
    column = place % width
    step = sides / pixels  # of the enlarged map, in pixels of the image
    x = (column + 0.5) * step[:, 0, None] + boxes[:, 0, None]
    y = (row + 0.5) * step[:, 1, None] + boxes[:, 1, None]
    score = (value - logits.flatten(2).logsumexp(dim=2)).exp().clamp(max=1.0)
    return torch.stack([x, y, score], dim=2)


def bicubic_weights(size: int, lengths: Tensor, longest: int) -> Tensor:
    """Weights of `size` cells for each pixel of lines enlarged to lengths [R] pixels.

    Keys' kernel with a = -0.75 and repeated borders, as `F.interpolate(mode="bicubic")` with
    half-pixel centres. Returns f32 [R, longest, size]; rows beyond a line's length are undefined.
    """
    device = lengths.device
    place = (torch.arange(longest, device=device) + 0.5) * (size / lengths[:, None]) - 0.5
    first = place.floor()
    taps = first[..., None] + torch.arange(-1, 3, device=device)
    distance = (place[..., None] - taps).abs()
    near = ((_KEYS_A + 2) * distance - (_KEYS_A + 3)) * distance**2 + 1
    far = ((_KEYS_A * distance - 5 * _KEYS_A) * distance + 8 * _KEYS_A) * distance - 4 * _KEYS_A
    weights = torch.where(distance <= 1, near, far)
    index = taps.clamp(0, size - 1).long()
    return torch.zeros((len(lengths), longest, size), device=device).scatter_add_(2, index, weights)
