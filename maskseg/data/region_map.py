"""The regions of the ground truth: the objects of an image and the connected parts of its stuff."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.structures import Batch
from maskseg.superpixels.methods import label_components

MIN_STUFF_PIXELS = 25  # smaller connected parts of stuff are no segments of the ground truth


def region_map(batch: Batch, index: int, split_stuff: int | None = None) -> NDArray[np.int64]:
    """Number the region that each pixel of an image belongs to, i64 [H, W] without padding.

    A region is an object, or all stuff of one class. Pixels without a region are -1: crowds, and,
    in data without semantic maps, everything outside the objects.

    split_stuff: if given, each connected part of stuff is a region, and parts with fewer pixels
    than this have none.
    """
    height, width = (int(side) for side in batch.sizes[index])
    regions = np.full((height, width), -1, dtype=np.int64)
    targets = batch.targets
    rows = torch.zeros(0, dtype=torch.int64)
    if targets is not None:
        rows = torch.nonzero(targets.image_index.cpu() == index).squeeze(1)
    if batch.semantic is not None:
        stuff = batch.semantic[index, :height, :width].cpu().numpy()
        regions = np.where(stuff < 0, -1, stuff.astype(np.int64) + len(rows))
    if targets is not None and targets.masks is not None:
        iscrowd = targets.iscrowd.cpu()[rows].tolist()
        for number, mask in enumerate(targets.masks[rows].to_bitmaps()):
            regions[mask] = -1 if iscrowd[number] else number
    return regions if split_stuff is None else _split_stuff(regions, len(rows), split_stuff)


def _split_stuff(
    regions: NDArray[np.int64], first_stuff: int, min_pixels: int
) -> NDArray[np.int64]:
    """Renumber the regions from `first_stuff` on by connected component; drop small components."""
    is_stuff = regions >= first_stuff
    components = label_components(np.where(is_stuff, regions, -1).astype(np.int32))
    large = np.bincount(components.ravel()) >= min_pixels
    numbers = np.where(large[components], components + first_stuff, -1)
    return np.where(is_stuff, numbers, regions)
