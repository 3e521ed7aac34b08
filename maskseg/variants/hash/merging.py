"""Superpixels -> segments: those of like binary codes, or of one cluster of features, become one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.superpixels.methods import renumbered
from maskseg.superpixels.opencv import opencv, scipy

Ints = NDArray[np.int64]
BLOCK = 2**20  # distances that are held at a time
ATTEMPTS = 3  # of k-means, each with seeds of its own; the tightest counts


def merge(codes: NDArray[np.bool_], pairs: Ints | None, radius: int = 0) -> Ints:
    """Which segment each superpixel belongs to, i64 [S], numbered as their first superpixels are (Ravanbakhsh et al., "CNN-aware Binary Map for
    General Semantic Segmentation", 2016, for radius 0).

    codes: bool [S, b]. Single linkage: superpixels whose codes differ in at most `radius` bits belong together, and whatever is linked through
    others. pairs: i64 [E, 2], which may be linked (`superpixels.neighbours`); None: all.
    """
    if radius < 0:
        raise ValueError(f"codes differ in 0 bits or more, a radius of {radius} merges nothing")
    if pairs is not None:
        near = (codes[pairs[:, 0]] != codes[pairs[:, 1]]).sum(axis=1) <= radius
        return _linked(pairs[near], len(codes))
    packed, first, kind = np.unique(
        np.packbits(codes, axis=1), axis=0, return_index=True, return_inverse=True
    )
    of_kind = _linked_by_distance(codes[first], radius) if radius else np.arange(len(packed))
    return renumbered(of_kind[kind.ravel()]).astype(np.int64)


def cluster(features: NDArray[np.float32], count: int, seed: int = 0, iterations: int = 50) -> Ints:
    """k-means with k-means++ seeds (OpenCV's): which of at most `count` clusters each superpixel is in, i64 [S], numbered as their first ones are.

    features: f32 [S, C]. Superpixels with equal features share a cluster, so that there are no more clusters than distinct features. iterations:
    at most; seed: of the draws (that of OpenCV's own generator, for this thread). Raises UserError for a count below 1 and for features that are
    not finite.
    """
    if count < 1 or iterations < 1:
        raise UserError(
            f"k-means: count and iterations must be at least 1, not {count} and {iterations}"
        )
    if not np.isfinite(features).all():
        raise UserError("k-means: the features of the superpixels are not finite")
    distinct, first, kind = np.unique(features, axis=0, return_index=True, return_inverse=True)
    kind = kind.ravel()
    if count >= len(distinct):
        return renumbered(kind).astype(np.int64)
    cv2 = opencv()
    cv2.setRNGSeed(seed)
    until = (
        cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS,
        iterations,
        0.0,
    )  # 0: until no centre moves
    labels = cv2.kmeans(features, count, None, until, ATTEMPTS, cv2.KMEANS_PP_CENTERS)[1].ravel()
    # A cluster that has run empty is given any superpixel, also one of several that are equal.
    return renumbered(labels[first][kind]).astype(np.int64)


def merge_labels(labels: NDArray[np.integer], pairs: Ints | None) -> Ints:
    """Superpixels with equal labels [S] -> segments i64 [S] as `merge` gives: those linked through `pairs` i64 [E, 2]; None: all of a label."""
    if pairs is None:
        return renumbered(labels).astype(np.int64)
    return _linked(pairs[labels[pairs[:, 0]] == labels[pairs[:, 1]]], len(labels))


def _linked(pairs: Ints, count: int) -> Ints:
    """Connected components of a graph of `count` nodes, i64 [count], numbered as their first nodes are; pairs: i64 [E, 2]."""
    edges = (np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1]))
    graph = scipy("sparse").coo_array(edges, shape=(count, count))
    return renumbered(
        scipy("sparse.csgraph").connected_components(graph, directed=False)[1]
    ).astype(np.int64)


def _linked_by_distance(codes: NDArray[np.bool_], radius: int) -> Ints:
    """As `_linked`, of the codes bool [n, b] that differ in at most `radius` bits."""
    number, bits = np.arange(len(codes)), codes.shape[1]
    signs = np.where(codes, 1, -1).astype(np.float32)
    rows = max(1, BLOCK // max(1, len(codes)))
    for start in range(0, len(codes), rows):
        # The product of two codes of 1 and -1 is the bits that agree minus those that differ. Earlier rows have seen these.
        a, b = np.nonzero(signs[start : start + rows] @ signs[start:].T >= bits - 2 * radius)
        number = _linked(np.stack([number[start + a], number[start + b]], axis=1), len(codes))[
            number
        ]
    return number
