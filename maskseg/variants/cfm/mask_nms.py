"""Non-maximum suppression of segments by mask IoU, and pasting of segments into a label map."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maskseg.masks.superpixel import SegmentMasks, superpixel_areas
from maskseg.ops.nms import top_per_group
from maskseg.structures import Regions

MAX_CANDIDATES = 300  # per class and image, by score; the others are dropped
MAX_EXACT_FLOAT32 = 2**24  # integers up to here are exact in float32


def nms_by_mask_iou(detections: Regions, threshold: float) -> Tensor:
    """Suppress segments that overlap a better one of the same class by more than `threshold`.

    detections: with labels and masks of superpixels. -> rows i64 [n], by image and descending
    score.
    """
    labels = detections.labels
    masks = detections.masks
    assert labels is not None
    assert isinstance(masks, SegmentMasks)
    num_labels = int(labels.max()) + 1 if len(detections) else 1
    order = torch.argsort(detections.scores, descending=True, stable=True).cpu()
    group = detections.image_index.cpu() * num_labels + labels.cpu()
    order = order[torch.argsort(group[order], stable=True)]
    lengths = torch.unique_consecutive(group[order], return_counts=True)[1].tolist()
    areas_of_maps = [
        superpixel_areas(label_map, masks.members.shape[1]) for label_map in masks.maps
    ]
    kept_rows = [torch.zeros(0, dtype=torch.int64)]
    for rows_of_group in torch.split(order, lengths):
        candidates = rows_of_group[:MAX_CANDIDATES]
        areas = areas_of_maps[int(masks.map_index[candidates[0]])]
        iou = _superpixel_iou(masks.members[candidates], areas)
        kept_rows.append(candidates[_suppress(iou, threshold)])
    rows = torch.cat(kept_rows).to(detections.scores.device)
    return rows[top_per_group(detections.scores[rows], detections.image_index[rows], len(rows))]


def _superpixel_iou(members: Tensor, superpixel_pixels: Tensor) -> Tensor:
    """Compute the pairwise IoU of masks of one label map, equal to `SegmentMasks.iou`.

    Works on the pixel counts of the superpixels, so that the label map, which all classes share, is
    read only once.

    members: bool [n, S]; superpixel_pixels: f64 [S]. -> f32 [n, n].
    """
    is_exact = bool(superpixel_pixels.sum() <= MAX_EXACT_FLOAT32)
    table = members.to(torch.float32 if is_exact else torch.float64)
    with torch.autocast("cpu", enabled=False):
        common = ((table * superpixel_pixels.to(table.dtype)) @ table.T).double()
    areas = common.diagonal()
    return (common / (areas[:, None] + areas - common).clamp(min=1)).float()


def _suppress(iou: Tensor, threshold: float) -> Tensor:
    """Greedy suppression within a group by descending score.

    iou: f32 [n, n]. -> i64, the rows that no better kept row overlaps by more than `threshold`.
    """
    overlaps = (iou > threshold).numpy()
    keep = np.ones(len(overlaps), dtype=bool)
    for i in np.flatnonzero(np.triu(overlaps, 1).any(axis=1)):
        if keep[i]:
            keep[i + 1 :] &= ~overlaps[i, i + 1 :]
    return torch.from_numpy(np.flatnonzero(keep))


def paste_labels(segments: Regions, sizes: Tensor, height: int, width: int) -> Tensor:
    """Paste segments into one label map per image, the best-scoring segment on top.

    segments: with labels and masks of superpixels; all segments of an image share one map.
    sizes: i64 [N, 2], height and width of the images without padding.
    -> i64 [N, height, width], -1 where there is no segment.
    """
    masks = segments.masks
    assert isinstance(masks, SegmentMasks)
    assert segments.labels is not None
    label_maps = torch.full((len(sizes), height, width), -1, dtype=torch.int64)
    labels = segments.labels.cpu().numpy()
    scores = segments.scores.cpu()
    image_index = segments.image_index.cpu()
    for image, (image_height, image_width) in enumerate(sizes.tolist()):
        rows = torch.nonzero(image_index == image).squeeze(1)
        rows = rows[scores[rows].argsort(descending=True, stable=True)]
        if not len(rows):
            continue
        superpixels = masks.maps[int(masks.map_index[rows[0]])]
        # The last entry is for pixels of no superpixel, which have the number -1.
        label_of_superpixel = np.full(masks.members.shape[1] + 1, -1, dtype=np.int64)
        for row in rows.tolist():
            members = masks.members[row].numpy()
            is_free = label_of_superpixel[:-1] < 0
            label_of_superpixel[:-1][members & is_free] = labels[row]
        pasted = label_of_superpixel[superpixels[:image_height, :image_width]]
        label_maps[image, :image_height, :image_width] = torch.from_numpy(pasted)
    return label_maps
