"""Merging of superpixels into segments, by similar binary codes or by clusters of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.superpixels.methods import relabel
from maskseg.superpixels.opencv import opencv, scipy

Ints = NDArray[np.int64]
BLOCK = 2**20  # pairwise distances held in memory at a time
ATTEMPTS = 3  # k-means restarts with different seeds; the most compact result is used


def merge_codes(codes: NDArray[np.bool_], pairs: Ints | None, radius: int = 0) -> Ints:
    """Merge superpixels with similar codes (single linkage); segment of each superpixel, i64 [S].

    Superpixels are linked if their codes differ in at most `radius` bits; segments are the
    connected components, numbered in the order of their first superpixels. radius 0 is the method
    of Ravanbakhsh et al., "CNN-aware Binary Map for General Semantic Segmentation", ICIP 2016.

    codes: bool [S, b]; pairs: superpixels that may be linked, i64 [E, 2]
    (`superpixels.methods.neighbours`), None for all pairs.
    """
    if radius < 0:
        raise ValueError(
            f"radius must not be negative, got {radius}: codes differ in 0 bits or more"
        )
    if pairs is not None:
        similar = (codes[pairs[:, 0]] != codes[pairs[:, 1]]).sum(axis=1) <= radius
        return _connected_components(pairs[similar], len(codes))
    packed, first, code_index = np.unique(
        np.packbits(codes, axis=1), axis=0, return_index=True, return_inverse=True
    )
    component = np.arange(len(packed))
    if radius:
        component = _components_by_distance(codes[first], radius)
    return relabel(component[code_index.ravel()]).astype(np.int64)


def cluster_features(
    features: NDArray[np.float32], count: int, seed: int = 0, iterations: int = 50
) -> Ints:
    """Cluster superpixels by k-means with k-means++ initialization (OpenCV's).

    features: f32 [S, C]; count: the maximum number of clusters; iterations: the maximum; seed: of
    OpenCV's random number generator, which is set for this thread. Returns the cluster of each
    superpixel, i64 [S], numbered in the order of their first superpixels. Superpixels with equal
    features share a cluster, so there are at most as many clusters as distinct features.

    Raises UserError if count or iterations is below 1, or if features are not finite.
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
        return relabel(kind).astype(np.int64)
    cv2 = opencv()
    cv2.setRNGSeed(seed)
    # An epsilon of 0 iterates until no center moves.
    criteria = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, iterations, 0.0)
    _, labels, _ = cv2.kmeans(features, count, None, criteria, ATTEMPTS, cv2.KMEANS_PP_CENTERS)
    # OpenCV refills an empty cluster with any superpixel, even with one of several equal ones;
    # taking the label of the first of equal superpixels undoes that.
    return relabel(labels.ravel()[first][kind]).astype(np.int64)


def merge_labels(labels: NDArray[np.integer], pairs: Ints | None) -> Ints:
    """Merge superpixels with equal labels [S]; segment of each superpixel, i64 [S].

    pairs: superpixels that may be linked, i64 [E, 2]; None merges all superpixels of a label.
    """
    if pairs is None:
        return relabel(labels).astype(np.int64)
    equal = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    return _connected_components(pairs[equal], len(labels))


def _connected_components(pairs: Ints, count: int) -> Ints:
    """Component of each of `count` nodes of a graph with edges `pairs`, i64 [E, 2] -> i64 [count].

    Components are numbered in the order of their first nodes.
    """
    edges = (np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1]))
    graph = scipy("sparse").coo_array(edges, shape=(count, count))
    _, component = scipy("sparse.csgraph").connected_components(graph, directed=False)
    return relabel(component).astype(np.int64)


def _components_by_distance(codes: NDArray[np.bool_], radius: int) -> Ints:
    """Component of each code, bool [n, b] -> i64 [n]; edges connect codes within `radius` bits."""
    component = np.arange(len(codes))
    bits = codes.shape[1]
    signs = np.where(codes, 1, -1).astype(np.float32)
    rows = max(1, BLOCK // max(1, len(codes)))
    for start in range(0, len(codes), rows):
        # The product of two +-1 codes is the number of equal bits minus that of different bits.
        # Earlier blocks have already compared the columns before `start`.
        similarity = signs[start : start + rows] @ signs[start:].T
        a, b = np.nonzero(similarity >= bits - 2 * radius)
        edges = np.stack([component[start + a], component[start + b]], axis=1)
        component = _connected_components(edges, len(codes))[component]
    return component
