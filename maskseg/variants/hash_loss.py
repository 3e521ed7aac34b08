"""What fine-tunes a hash layer: codes of one instance or stuff region together, different ones apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from maskseg.bottomup.superpixels import connected
from maskseg.masks import rle_to_bitmaps
from maskseg.ops.codes import expected_hamming
from maskseg.ops.losses import mean_count
from maskseg.structures import Batch

MIN_STUFF = 25  # pixels of the smallest piece of stuff that counts as a segment of the truth


def region_map(batch: Batch, index: int, split_stuff: int | None = None) -> NDArray[np.int64]:
    """Which region each pixel of an image (without its padding) belongs to, i64 [H, W]: an instance, or all of the image's stuff of one class;
    -1 where the truth does not say (crowds, and what is no instance where there is no semantic map).

    split_stuff: each connected piece of stuff is a region of its own, and those of fewer pixels than this are none.
    """
    height, width = (int(side) for side in batch.sizes[index])
    regions = np.full((height, width), -1, dtype=np.int64)
    targets = batch.targets
    rows = torch.zeros(0, dtype=torch.int64) if targets is None else torch.nonzero(targets.image_index.cpu() == index).squeeze(1)
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


def shares(regions: NDArray[np.int64], superpixels: NDArray[Any], count: int) -> Tensor:
    """Which share of each superpixel lies in each region, f32 [count, T], T the number of regions there are. Both maps [H, W]; -1 is nowhere."""
    there, number = np.unique(regions, return_inverse=True)
    table = np.bincount(superpixels.ravel() * len(there) + number.ravel(), minlength=count * len(there)).reshape(count, -1)
    areas = table.sum(axis=1, keepdims=True).clip(1)
    return torch.from_numpy((table[:, there >= 0] / areas).astype(np.float32))


def agreement(share: Tensor, pairs: Tensor) -> Tensor:
    """For each pair [E, 2] of superpixels, the chance that a pixel of one and a pixel of the other lie in the same region, and in different ones,
    f32 [E, 2]. What lies in no region counts for neither."""
    first, second = share[pairs[:, 0]], share[pairs[:, 1]]
    same = (first * second).sum(dim=1)
    return torch.stack([same, first.sum(dim=1) * second.sum(dim=1) - same], dim=1).clamp(min=0)


def contrast(codes: Tensor, pairs: Tensor, weights: Tensor, margin: float) -> dict[str, Tensor]:
    """codes: f32 [S, b] in [0, 1]; pairs: i64 [E, 2]; weights: f32 [E, 2] (`agreement`) -> two terms, means over the pairs as they weigh (Hadsell et
    al., "Dimensionality Reduction by Learning an Invariant Mapping", eq. 4, linear, with the expected Hamming distance):

    `hash_together`: the distance of those in one region; `hash_apart`: how much that of those in different regions is below `margin` bits.
    """
    distance = expected_hamming(codes[pairs[:, 0]], codes[pairs[:, 1]])
    same, different = weights.to(codes).T
    together, apart = (same * distance).sum(), (different * F.relu(margin - distance)).sum()
    return {
        "hash_together": together / mean_count(round(float(same.sum())), codes),
        "hash_apart": apart / mean_count(round(float(different.sum())), codes),
    }
