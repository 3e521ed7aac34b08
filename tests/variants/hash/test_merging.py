"""Merging against flood fill over an explicit graph; k-means on what has one answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.superpixels.opencv import opencv
from maskseg.variants.hash import merging
from maskseg.variants.hash.merging import Ints, cluster, merge, merge_labels


def filled(links: list[tuple[int, int]], count: int) -> list[int]:
    """Segments by walking the graph from each node that none has reached."""
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
    assert merge(codes, None).tolist() == [0, 1, 2, 3, 0]
    assert merge(codes, None, 1).tolist() == [0, 0, 0, 0, 0]  # 000 - 001 - 011 - 111
    assert merge(codes[[0, 1, 3]], None, 1).tolist() == [0, 1, 1]
    pairs = np.array([[0, 1], [1, 4], [2, 3]])
    assert merge(codes, pairs).tolist() == [0, 1, 2, 3, 4]
    assert merge(codes, pairs, 1).tolist() == [0, 1, 2, 2, 3]
    assert merge(codes, pairs, 3).tolist() == [0, 0, 1, 1, 0]


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
            found = merge(codes, pairs, radius)
            assert found.dtype == np.int64
            assert found.tolist() == filled(near, count)


def test_merge_of_little() -> None:
    none = np.zeros((0, 2), dtype=np.int64)
    for radius in (0, 1):
        assert merge(np.zeros((0, 4), dtype=bool), None, radius).tolist() == []
        assert merge(np.zeros((0, 4), dtype=bool), none, radius).tolist() == []
        assert merge(np.zeros((1, 4), dtype=bool), none, radius).tolist() == [0]
        assert merge(np.zeros((3, 4), dtype=bool), none, radius).tolist() == [0, 1, 2]
        assert merge(np.zeros((3, 0), dtype=bool), None, radius).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="radius of -1"):
        merge(np.zeros((3, 4), dtype=bool), None, -1)


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
            == merge(np.eye(4, dtype=bool)[labels], None).tolist()
        )


def clouds(rng: np.random.Generator) -> tuple[NDArray[np.float32], Ints]:
    """90 points around 5 far centres, and whose each is, numbered by first appearance."""
    owner = np.concatenate([np.arange(5), rng.integers(0, 5, 85)])
    return (10 * np.eye(5)[owner] + 0.1 * rng.normal(size=(90, 5))).astype(np.float32), owner


@pytest.mark.parametrize("seed", range(5))
def test_cluster_finds_clouds(seed: int) -> None:
    features, owner = clouds(np.random.default_rng(seed))
    found = cluster(features, 5, seed)
    assert found.dtype == np.int64
    assert found.tolist() == owner.tolist()


def test_cluster_hangs_on_the_seed_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 8)).astype(np.float32)
    wanted = cluster(features, 20, 3)
    opencv().setRNGSeed(99)
    assert np.array_equal(cluster(features, 20, 3), wanted)
    assert np.array_equal(cluster(np.asfortranarray(features), 20, 3), wanted)
    assert not np.array_equal(cluster(features, 20, 4), wanted)


def spread(features: NDArray[np.float32], labels: Ints) -> float:
    """The squared distances to the clusters' means, summed: what k-means makes small."""
    return float(
        sum(
            ((features[labels == k] - features[labels == k].mean(axis=0)) ** 2).sum()
            for k in range(labels.max() + 1)
        )
    )


def test_cluster_settles() -> None:
    features = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    found = cluster(features, 6)
    means = np.stack([features[found == k].mean(axis=0) for k in range(6)])
    nearest = ((features[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == found).all()  # no point is nearer to another mean
    assert spread(features, found) < spread(features, cluster(features, 6, iterations=1))


def test_cluster_of_few_and_of_equal_features() -> None:
    features = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for count in (4, 5, 100):
        assert cluster(features, count).tolist() == [0, 1, 2, 3]
    assert cluster(features, 1).tolist() == [0, 0, 0, 0]
    assert cluster(features[:1], 3).tolist() == [0]
    assert cluster(features[:0], 3).tolist() == []
    assert cluster(np.ones((50, 3), dtype=np.float32), 8).tolist() == [0] * 50
    assert cluster(features[[2, 0, 0, 2, 1, 0]], 3).tolist() == [0, 1, 1, 0, 2, 1]


def test_equal_features_share_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where OpenCV gives an empty cluster one of several equal rows in its last iteration."""
    features = np.array([[0.0], [9.0], [0.0], [5.0], [9.0], [0.0]], dtype=np.float32)
    split = np.array([[1], [0], [0], [0], [0], [1]])
    monkeypatch.setattr(opencv(), "kmeans", lambda *_: (0.0, split, None))
    assert cluster(features, 2).tolist() == [0, 1, 0, 1, 1, 0]


def test_cluster_arguments() -> None:
    with pytest.raises(UserError, match="count and iterations must be at least 1"):
        cluster(np.zeros((3, 2), dtype=np.float32), 0)
    with pytest.raises(UserError, match="not finite"):
        cluster(np.array([[0.0], [np.nan]], dtype=np.float32), 1)
