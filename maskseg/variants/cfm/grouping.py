"""Regions that grow together until one is left: hierarchies of an image's segments, many of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Histograms = NDArray[np.float32]


@dataclass(frozen=True)
class Pieces:
    """n regions that share no pixel, and what the similarity of two neighbours is made of.

    sizes: f64 [n] pixels; outlines: f64 [n], sides of pixels around each, those at the image's edge too;
    extents: f64 [n, 4], x0, y0, -x1, -y1 in pixels, so that the box around two regions is the minimum; colors, textures: f32 [n, bins], histograms
    that sum to 1; pairs: i64 [E, 2], the regions a < b that touch; lengths: f64 [E], the sides of pixels that they share.
    """

    sizes: Floats
    outlines: Floats
    extents: Floats
    colors: Histograms
    textures: Histograms
    pairs: Ints
    lengths: Floats

    def merged(self, region: Ints) -> Pieces:
        """The pieces of each number of region [n], 0..m-1, each used, as one."""
        count = int(region.max()) + 1
        order = np.argsort(region, kind="stable")
        starts = np.searchsorted(region[order], np.arange(count))
        sizes = _sums(region, self.sizes, count)
        share = (self.sizes / sizes[region])[order, None].astype(np.float32)
        ends = region[self.pairs]
        inside = ends[:, 0] == ends[:, 1]
        pairs, lengths = summed(np.sort(ends[~inside], axis=1), self.lengths[~inside], count)
        return Pieces(
            sizes,
            _sums(region, self.outlines, count)
            - 2 * _sums(ends[inside, 0], self.lengths[inside], count),
            np.minimum.reduceat(self.extents[order], starts),
            np.add.reduceat(self.colors[order] * share, starts),
            np.add.reduceat(self.textures[order] * share, starts),
            pairs,
            lengths,
        )


def summed(pairs: Ints, values: Floats, count: int) -> tuple[Ints, Floats]:
    """Each pair of numbers below `count` once, ascending, and the sum of its values. [E, 2], [E] -> [F, 2], [F]."""
    keys, which = np.unique(pairs[:, 0] * count + pairs[:, 1], return_inverse=True)
    return np.stack(np.divmod(keys, count), axis=1), _sums(which, values, len(keys))


def _sums(which: Ints, values: Floats, count: int) -> Floats:
    return np.bincount(which, values, count).astype(np.float64, copy=False)


@dataclass(frozen=True)
class Forest:
    """The trees that regions have grown into: the first nodes are what they started from, children come before their parents.

    children: i64 [N, 2], -1 for a node to start from; rounds: i64 [N], when each came to be, 0 for those; trees: i64 [N]; sizes: f64 [N] pixels.
    """

    children: Ints
    rounds: Ints
    trees: Ints
    sizes: Floats

    def fill(self, rows: NDArray[np.uint8]) -> None:
        """Of packed bits [N, bytes], those of the nodes to start from are given: each other node gets what its two children have."""
        for number in range(1, int(self.rounds.max()) + 1):
            nodes = np.flatnonzero(self.rounds == number)
            rows[nodes] = rows[self.children[nodes, 0]] | rows[self.children[nodes, 1]]

    def places(self) -> Ints:
        """The place of each node in its tree, from 1, the root, backwards in the order in which they came to be. i64 [N]."""
        order = np.lexsort((-np.arange(len(self.trees)), -self.rounds, self.trees))
        first = np.searchsorted(self.trees[order], self.trees[order])
        places = np.empty(len(order), dtype=np.int64)
        places[order] = np.arange(len(order)) - first + 1
        return places


def grow(pieces: Sequence[Pieces], terms: Sequence[Sequence[str]], pixels: int) -> Forest:
    """A tree for each of the pieces, all connected: the most similar neighbours become one until one is left, as in selective search (Uijlings et
    al., "Selective Search for Object Recognition", IJCV 2013, section 3).

    terms: for each tree, what its similarity is the sum of (keys of TERMS); pixels: of the image. The paper merges the most similar pair of all;
    here all pairs merge at once of which each is the other's most similar neighbour, in all trees together. Where a union is never more similar to
    a third region than its parts were, that gives the same trees; else like ones, in far fewer steps.
    """
    counts = [len(p.sizes) for p in pieces]
    total = 2 * sum(counts) - len(counts)
    nodes = _Nodes(pieces, total, pixels)
    trees = np.repeat(np.arange(len(pieces)), counts)
    trees = np.concatenate([trees, np.empty(total - len(trees), dtype=np.int64)])
    weights = np.array([[float(term in own) for term in TERMS] for own in terms])
    offsets = np.cumsum([0, *counts[:-1]])
    pairs = np.concatenate([p.pairs + offset for p, offset in zip(pieces, offsets, strict=True)])
    lengths = np.concatenate([p.lengths for p in pieces])
    score = nodes.similarity(pairs, lengths, weights[trees[pairs[:, 0]]])
    children, rounds = np.full((total, 2), -1), np.zeros(total, dtype=np.int64)
    top, number = sum(counts), 0
    while len(pairs):
        chosen = mutual_best(pairs, score, top)
        one, other = pairs[chosen].T
        new, number = np.arange(top, top + len(chosen)), number + 1
        children[new], rounds[new], trees[new] = pairs[chosen], number, trees[one]
        nodes.join(new, one, other, lengths[chosen])
        now = np.arange(total)
        now[one], now[other] = new, new
        pairs = np.sort(now[pairs], axis=1)
        old = pairs[:, 1] < top  # nothing has changed for these
        touched = ~old & (pairs[:, 0] != pairs[:, 1])
        fresh, shared = summed(pairs[touched], lengths[touched], total)
        score = np.concatenate(
            [score[old], nodes.similarity(fresh, shared, weights[trees[fresh[:, 0]]])]
        )
        pairs, lengths = np.concatenate([pairs[old], fresh]), np.concatenate([lengths[old], shared])
        top += len(new)
    return Forest(children, rounds, trees, nodes.sizes)


def mutual_best(pairs: Ints, score: Floats, count: int) -> Ints:
    """The pairs whose score is the highest of both ends, as indices; of equal ones the first. pairs [E, 2] of numbers below `count`, [E] -> i64."""
    best = np.full(count, -np.inf)
    first = np.full(count, len(pairs))
    for end in pairs.T:
        np.maximum.at(best, end, score)
    chosen = np.flatnonzero((score == best[pairs[:, 0]]) & (score == best[pairs[:, 1]]))
    for end in pairs[chosen].T:
        np.minimum.at(first, end, chosen)
    return np.asarray(chosen[(first[pairs[chosen]] == chosen[:, None]).all(axis=1)])


class _Nodes:
    """The pieces of all trees as rows, with room for their unions."""

    def __init__(self, pieces: Sequence[Pieces], total: int, pixels: int) -> None:
        def rows(*parts: NDArray[Any]) -> NDArray[Any]:
            known = np.concatenate(parts)
            return np.concatenate(
                [known, np.zeros((total - len(known), *known.shape[1:]), dtype=known.dtype)]
            )

        self.pixels = pixels
        self.sizes = rows(*(p.sizes for p in pieces))
        self.outlines = rows(*(p.outlines for p in pieces))
        self.extents = rows(*(p.extents for p in pieces))
        self.colors = rows(*(p.colors for p in pieces))
        self.textures = rows(*(p.textures for p in pieces))

    def join(self, new: Ints, one: Ints, other: Ints, lengths: Floats) -> None:
        """Rows new [m] become the unions of rows one and other, which share borders of lengths [m]."""
        self.sizes[new] = self.sizes[one] + self.sizes[other]
        self.outlines[new] = self.outlines[one] + self.outlines[other] - 2 * lengths
        self.extents[new] = np.minimum(self.extents[one], self.extents[other])
        share = (self.sizes[one] / self.sizes[new]).astype(np.float32)[:, None]
        for histograms in (self.colors, self.textures):
            histograms[new] = share * histograms[one] + (1 - share) * histograms[other]

    def similarity(self, pairs: Ints, lengths: Floats, weights: Floats) -> Floats:
        """The sum of the terms of each pair [E, 2], by weights [E, terms]. -> f64 [E]."""
        score = np.zeros(len(pairs))
        for term, weight in zip(TERMS.values(), weights.T, strict=True):
            used = np.flatnonzero(weight)
            score[used] += weight[used] * term(self, pairs[used, 0], pairs[used, 1], lengths[used])
        return score


def _color(n: _Nodes, a: Ints, b: Ints, _: Floats) -> Floats:
    return np.asarray(np.minimum(n.colors[a], n.colors[b]).sum(axis=1), dtype=np.float64)


def _texture(n: _Nodes, a: Ints, b: Ints, _: Floats) -> Floats:
    return np.asarray(np.minimum(n.textures[a], n.textures[b]).sum(axis=1), dtype=np.float64)


def _size(n: _Nodes, a: Ints, b: Ints, _: Floats) -> Floats:
    return np.asarray(1 - (n.sizes[a] + n.sizes[b]) / n.pixels)


def _fill(n: _Nodes, a: Ints, b: Ints, _: Floats) -> Floats:
    x0, y0, x1, y1 = np.minimum(n.extents[a], n.extents[b]).T
    return np.asarray(1 - ((x0 + x1) * (y0 + y1) - n.sizes[a] - n.sizes[b]) / n.pixels)


def _border(n: _Nodes, a: Ints, b: Ints, lengths: Floats) -> Floats:
    return np.asarray(lengths / np.minimum(n.outlines[a], n.outlines[b]))


# Each from 0 to 1. The first four are the paper's: intersections of the histograms, small regions first, no holes in the box around both. Border:
# the share of the shorter outline that both have in common, so that what lies within a region joins it before what only touches it.
TERMS: dict[str, Callable[[_Nodes, Ints, Ints, Floats], Floats]] = {
    "color": _color,
    "texture": _texture,
    "size": _size,
    "fill": _fill,
    "border": _border,
}
