"""Merging against flood fill over an explicit graph; k-means on data with a unique answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.superpixels.opencv import opencv
from maskseg.variants.hash import merging
from maskseg.variants.hash.merging import Ints, cluster_features, merge_codes, merge_labels


def filled(links: list[tuple[int, int]], count: int) -> list[int]:
    """Segments by flood fill of the graph from each unvisited node."""
    segment = [-1] * count
    for start in range(count):
        if segment[start] >= 0:
            continue
        stack, number = [start], max(segment) + 1
        while stack:
            node = stack.pop()
            if segment[node] < 0:
                segment[node] = number
                stack += [b for a, b in links if a == node] + [a for a, b in links if b == node]
    return segment


def random_pairs(count: int, number: int, rng: np.random.Generator) -> Ints:
    every = np.array(list(itertools.combinations(range(count), 2)), dtype=np.int64).reshape(-1, 2)
    return every[np.sort(rng.choice(len(every), min(number, len(every)), replace=False))]


def test_merge_literals() -> None:
    codes = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=bool)
    assert merge_codes(codes, None).tolist() == [0, 1, 2, 3, 0]
    assert merge_codes(codes, None, 1).tolist() == [0, 0, 0, 0, 0]  # 000 - 001 - 011 - 111
    assert merge_codes(codes[[0, 1, 3]], None, 1).tolist() == [0, 1, 1]
    pairs = np.array([[0, 1], [1, 4], [2, 3]])
    assert merge_codes(codes, pairs).tolist() == [0, 1, 2, 3, 4]
    assert merge_codes(codes, pairs, 1).tolist() == [0, 1, 2, 2, 3]
    assert merge_codes(codes, pairs, 3).tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("bits", [1, 3, 8, 9, 32])
@pytest.mark.parametrize("radius", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("block", [1, 2**20])
def test_merge_by_brute_force(
    bits: int, radius: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "BLOCK", block)
    rng = np.random.default_rng(bits * 100 + radius)
    for count in (1, 2, 30):
        seeds = rng.random((6, bits)) < 0.5
        codes = seeds[rng.integers(0, 6, count)] ^ (rng.random((count, bits)) < 0.06)
        for pairs in (None, random_pairs(count, 40, rng)):
            links = (
                list(itertools.combinations(range(count), 2))
                if pairs is None
                else [(a, b) for a, b in pairs.tolist()]
            )
            near = [(a, b) for a, b in links if int((codes[a] != codes[b]).sum()) <= radius]
            result = merge_codes(codes, pairs, radius)
            assert result.dtype == np.int64
            assert result.tolist() == filled(near, count)


def test_merge_of_few() -> None:
    none = np.zeros((0, 2), dtype=np.int64)
    for radius in (0, 1):
        assert merge_codes(np.zeros((0, 4), dtype=bool), None, radius).tolist() == []
        assert merge_codes(np.zeros((0, 4), dtype=bool), none, radius).tolist() == []
        assert merge_codes(np.zeros((1, 4), dtype=bool), none, radius).tolist() == [0]
        assert merge_codes(np.zeros((3, 4), dtype=bool), none, radius).tolist() == [0, 1, 2]
        assert merge_codes(np.zeros((3, 0), dtype=bool), None, radius).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="radius must not be negative, got -1"):
        merge_codes(np.zeros((3, 4), dtype=bool), None, -1)


def test_merge_labels_literals() -> None:
    labels = np.array([5, 2, 5, 2, 5])
    assert merge_labels(labels, None).tolist() == [0, 1, 0, 1, 0]
    assert merge_labels(labels, np.array([[0, 1], [1, 2], [1, 3], [2, 4]])).tolist() == [
        0,
        1,
        2,
        1,
        2,
    ]
    assert merge_labels(labels, np.zeros((0, 2), dtype=np.int64)).tolist() == [0, 1, 2, 3, 4]
    assert merge_labels(labels[:0], None).tolist() == []


def test_merge_labels_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 10, 60):
        labels, pairs = rng.integers(0, 4, count), random_pairs(count, 2 * count, rng)
        near = [(a, b) for a, b in pairs.tolist() if labels[a] == labels[b]]
        assert merge_labels(labels, pairs).tolist() == filled(near, count)
        assert (
            merge_labels(labels, None).tolist()
            == merge_codes(np.eye(4, dtype=bool)[labels], None).tolist()
        )


def clouds(rng: np.random.Generator) -> tuple[NDArray[np.float32], Ints]:
    """90 points around 5 distant centers, and the center of each, numbered by first appearance."""
    owner = np.concatenate([np.arange(5), rng.integers(0, 5, 85)])
    return (10 * np.eye(5)[owner] + 0.1 * rng.normal(size=(90, 5))).astype(np.float32), owner


@pytest.mark.parametrize("seed", range(5))
def test_cluster_finds_clouds(seed: int) -> None:
    features, owner = clouds(np.random.default_rng(seed))
    result = cluster_features(features, 5, seed)
    assert result.dtype == np.int64
    assert result.tolist() == owner.tolist()


def test_cluster_depends_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 8)).astype(np.float32)
    expected = cluster_features(features, 20, 3)
    opencv().setRNGSeed(99)
    assert np.array_equal(cluster_features(features, 20, 3), expected)
    assert np.array_equal(cluster_features(np.asfortranarray(features), 20, 3), expected)
    assert not np.array_equal(cluster_features(features, 20, 4), expected)


def inertia(features: NDArray[np.float32], labels: Ints) -> float:
    """Sum of squared distances to the cluster means: the objective of k-means."""
    return float(
        sum(
            ((features[labels == k] - features[labels == k].mean(axis=0)) ** 2).sum()
            for k in range(labels.max() + 1)
        )
    )


def test_cluster_converges() -> None:
    features = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    result = cluster_features(features, 6)
    means = np.stack([features[result == k].mean(axis=0) for k in range(6)])
    nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == result).all()  # no point is closer to another mean
    assert inertia(features, result) < inertia(
        features, cluster_features(features, 6, iterations=1)
    )


def test_cluster_of_few_and_of_equal_features() -> None:
    features = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for count in (4, 5, 100):
        assert cluster_features(features, count).tolist() == [0, 1, 2, 3]
    assert cluster_features(features, 1).tolist() == [0, 0, 0, 0]
    assert cluster_features(features[:1], 3).tolist() == [0]
    assert cluster_features(features[:0], 3).tolist() == []
    assert cluster_features(np.ones((50, 3), dtype=np.float32), 8).tolist() == [0] * 50
    assert cluster_features(features[[2, 0, 0, 2, 1, 0]], 3).tolist() == [0, 1, 1, 0, 2, 1]


def test_equal_features_share_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if OpenCV assigns one of several equal rows to an empty cluster at the end."""
    features = np.array([[0.0], [9.0], [0.0], [5.0], [9.0], [0.0]], dtype=np.float32)
    split = np.array([[1], [0], [0], [0], [0], [1]])
    monkeypatch.setattr(opencv(), "kmeans", lambda *_: (0.0, split, None))
    assert cluster_features(features, 2).tolist() == [0, 1, 0, 1, 1, 0]


def test_cluster_arguments() -> None:
    with pytest.raises(UserError, match="count and iterations must be at least 1"):
        cluster_features(np.zeros((3, 2), dtype=np.float32), 0)
    with pytest.raises(UserError, match="not finite"):
        cluster_features(np.array([[0.0], [np.nan]], dtype=np.float32), 1)
