"""Which of overlapping segments stay, and how those that stay become one map."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskseg.masks.superpixel import SegmentMasks, superpixel_areas
from maskseg.ops.nms import top_per_group
from maskseg.structures import Regions

MOST = 300  # candidates of a class in an image, the best, of which some may stay
EXACT = 2**24  # whole numbers up to here are exact as float32


def nms_of_masks(found: Regions, threshold: float) -> Tensor:
    """Non-maximum suppression by mask IoU within a class: rows, by image and descending score, i64 [n].

    found: with labels, and masks of superpixels.
    """
    assert found.labels is not None
    order = torch.argsort(found.scores, descending=True, stable=True).cpu()
    group = (
        found.image_index.cpu() * (int(found.labels.max()) + 1 if len(found) else 1)
        + found.labels.cpu()
    )
    order = order[torch.argsort(group[order], stable=True)]
    lengths = torch.unique_consecutive(group[order], return_counts=True)[1].tolist()
    assert isinstance(found.masks, SegmentMasks)
    sizes = [superpixel_areas(labels, found.masks.members.shape[1]) for labels in found.masks.maps]
    kept = []
    for rows in torch.split(order, lengths):
        best = rows[:MOST]
        kept.append(
            best[
                _kept(
                    _iou(found.masks.members[best], sizes[int(found.masks.map_index[best[0]])]),
                    threshold,
                )
            ]
        )
    rows = torch.cat([torch.zeros(0, dtype=torch.int64), *kept]).to(found.scores.device)
    return rows[top_per_group(found.scores[rows], found.image_index[rows], len(rows))]


def _iou(members: Tensor, pixels: Tensor) -> Tensor:
    """What `SegmentMasks.iou` gives of masks bool [n, S] of one map among themselves, f32 [n, n], from the pixels of its superpixels, f64 [S]: the
    map, which is the same for all classes, is looked at once."""
    table = members.to(torch.float32 if pixels.sum() <= EXACT else torch.float64)
    with torch.autocast("cpu", enabled=False):
        common = ((table * pixels.to(table.dtype)) @ table.T).double()
    areas = common.diagonal()
    return (common / (areas[:, None] + areas - common).clamp(min=1)).float()


def _kept(iou: Tensor, threshold: float) -> Tensor:
    """Rows [n] of a group by descending score that no better one which stays overlaps by more; iou: f32 [n, n]."""
    over = (iou > threshold).numpy()
    free = np.ones(len(over), dtype=bool)
    for i in np.flatnonzero(np.triu(over, 1).any(axis=1)):
        if free[i]:
            free[i + 1 :] &= ~over[i, i + 1 :]
    return torch.from_numpy(np.flatnonzero(free))


def pasted(found: Regions, sizes: Tensor, height: int, width: int) -> Tensor:
    """One map of labels an image, i64 [N, height, width]: segments in order of score, each where no better one is; -1 where there is none.

    found: with labels, and masks of superpixels, image i of the batch having map i; sizes: i64 [N, 2], of the images without padding.
    """
    assert isinstance(found.masks, SegmentMasks)
    assert found.labels is not None
    out = torch.full((len(sizes), height, width), -1, dtype=torch.int64)
    labels, scores = found.labels.cpu().numpy(), found.scores.cpu()
    for image, (tall, wide) in enumerate(sizes.tolist()):
        rows = torch.nonzero(found.image_index.cpu() == image).squeeze(1)
        rows = rows[scores[rows].argsort(descending=True, stable=True)]
        if not len(rows):
            continue
        superpixels = found.masks.maps[int(found.masks.map_index[rows[0]])]
        of = np.full(
            found.masks.members.shape[1] + 1, -1, dtype=np.int64
        )  # the last one: pixels of no superpixel
        for row in rows.tolist():
            own = found.masks.members[row].numpy()
            of[:-1][own & (of[:-1] < 0)] = labels[row]
        out[image, :tall, :wide] = torch.from_numpy(of[superpixels[:tall, :wide]])
    return out
