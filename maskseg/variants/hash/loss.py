"""What fine-tunes a hash layer: codes of one instance or stuff region together, different ones apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.losses import mean_count
from maskseg.variants.hash.codes import expected_hamming


def shares(regions: NDArray[np.int64], superpixels: NDArray[Any], count: int) -> Tensor:
    """Which share of each superpixel lies in each region, f32 [count, T], T the number of regions there are. Both maps [H, W]; -1 is nowhere."""
    there, number = np.unique(regions, return_inverse=True)
    table = np.bincount(
        superpixels.ravel() * len(there) + number.ravel(), minlength=count * len(there)
    ).reshape(count, -1)
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
