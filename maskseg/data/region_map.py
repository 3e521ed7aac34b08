"""The regions of the ground truth: objects of a batch's image and connected pieces of stuff."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.masks.base import rle_to_bitmaps
from maskseg.structures import Batch
from maskseg.superpixels.methods import connected

MIN_STUFF = 25  # pixels of the smallest piece of stuff that counts as a segment of the truth


def region_map(batch: Batch, index: int, split_stuff: int | None = None) -> NDArray[np.int64]:
    """Which region each pixel of an image (without its padding) belongs to, i64 [H, W]: an instance, or all of the image's stuff of one class;
    -1 where the truth does not say (crowds, and what is no instance where there is no semantic map).

    split_stuff: each connected piece of stuff is a region of its own, and those of fewer pixels than this are none.
    """
    height, width = (int(side) for side in batch.sizes[index])
    regions = np.full((height, width), -1, dtype=np.int64)
    targets = batch.targets
    rows = (
        torch.zeros(0, dtype=torch.int64)
        if targets is None
        else torch.nonzero(targets.image_index.cpu() == index).squeeze(1)
    )
    if batch.semantic is not None:
        stuff = batch.semantic[index, :height, :width].cpu().numpy()
        regions = np.where(stuff < 0, -1, stuff.astype(np.int64) + len(rows))
    if targets is not None and targets.masks is not None:
        crowd = targets.crowd.cpu()[rows].tolist()
        for number, mask in enumerate(rle_to_bitmaps(targets.masks[rows].to_rle())):
            regions[mask] = -1 if crowd[number] else number
    return regions if split_stuff is None else _split(regions, len(rows), split_stuff)


def _split(regions: NDArray[np.int64], first: int, least: int) -> NDArray[np.int64]:
    """Pieces of the regions from number `first` on become regions of their own."""
    stuff = regions >= first
    pieces = connected(np.where(stuff, regions, -1).astype(np.int32))
    large = np.bincount(pieces.ravel()) >= least
    return np.where(stuff, np.where(large[pieces], pieces + first, -1), regions)
