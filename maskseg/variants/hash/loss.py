"""Contrastive loss that fine-tunes a hash layer.

It pulls the codes of superpixels of the same instance or stuff region together, and pushes those of
different regions apart.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.losses import mean_count
from maskseg.variants.hash.codes import expected_hamming


def region_shares(
    regions: NDArray[np.int64], superpixels: NDArray[np.integer], count: int
) -> Tensor:
    """Share of each superpixel's area in each region, f32 [count, T] for T regions.

    regions, superpixels: label maps [H, W]; region -1 is unlabeled.
    """
    region_ids, region_index = np.unique(regions, return_inverse=True)
    pair_index = superpixels.ravel() * len(region_ids) + region_index.ravel()
    pixels = np.bincount(pair_index, minlength=count * len(region_ids)).reshape(count, -1)
    areas = pixels.sum(axis=1, keepdims=True).clip(1)
    return torch.from_numpy((pixels[:, region_ids >= 0] / areas).astype(np.float32))


def pair_agreement(share: Tensor, pairs: Tensor) -> Tensor:
    """Probability that two superpixels lie in the same region, and in different ones, f32 [E, 2].

    The probability is over one random pixel of each superpixel of a pair; unlabeled pixels count
    for neither. share: `region_shares`, f32 [S, T]; pairs: i64 [E, 2].
    """
    first = share[pairs[:, 0]]
    second = share[pairs[:, 1]]
    same = (first * second).sum(dim=1)
    different = first.sum(dim=1) * second.sum(dim=1) - same
    return torch.stack([same, different], dim=1).clamp(min=0)


def contrastive_loss(
    codes: Tensor, pairs: Tensor, weights: Tensor, margin: float
) -> dict[str, Tensor]:
    """Two loss terms, weighted means over the pairs.

    Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006, eq. 4,
    in a linear form with the expected Hamming distance.

    * `hash_together`: distance of pairs in the same region;
    * `hash_apart`: how far the distance of pairs in different regions is below `margin` bits.

    codes: f32 [S, b] in [0, 1]; pairs: i64 [E, 2]; weights: `pair_agreement`, f32 [E, 2].
    """
    distance = expected_hamming(codes[pairs[:, 0]], codes[pairs[:, 1]])
    same, different = weights.to(codes).T
    together = (same * distance).sum()
    apart = (different * F.relu(margin - distance)).sum()
    return {
        "hash_together": together / mean_count(round(float(same.sum())), codes),
        "hash_apart": apart / mean_count(round(float(different.sum())), codes),
    }
