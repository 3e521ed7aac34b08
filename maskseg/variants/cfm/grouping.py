"""Hierarchical grouping: adjacent regions of an image are merged until one is left.

Many hierarchies are built at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Histograms = NDArray[np.float32]
Scalar = TypeVar("Scalar", np.float32, np.float64)


@dataclass(frozen=True)
class RegionSet:
    """n disjoint regions, and the features that the similarity of two neighbors is made of.

    sizes: f64 [n], pixels.
    outlines: f64 [n], pixel sides around each region, including those at the image border.
    extents: f64 [n, 4], x0, y0, -x1, -y1 in pixels, so that the bounding box of two regions is the
        element-wise minimum.
    colors, textures: f32 [n, bins], histograms with sum 1.
    pairs: i64 [E, 2], pairs a < b of regions that touch.
    lengths: f64 [E], pixel sides that the two regions of a pair share.
    """

    sizes: Floats
    outlines: Floats
    extents: Floats
    colors: Histograms
    textures: Histograms
    pairs: Ints
    lengths: Floats

    def merge(self, group: Ints) -> RegionSet:
        """Merge the regions of each group. group: i64 [n] in 0..m-1, each number used."""
        count = int(group.max()) + 1
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(count))
        sizes = _sum_by_group(group, self.sizes, count)
        share = (self.sizes / sizes[group])[order, None].astype(np.float32)
        ends = group[self.pairs]
        inside = ends[:, 0] == ends[:, 1]
        pairs, lengths = sum_pairs(np.sort(ends[~inside], axis=1), self.lengths[~inside], count)
        # A border between two merged regions counts in the outline of both of them.
        inner_borders = _sum_by_group(ends[inside, 0], self.lengths[inside], count)
        return RegionSet(
            sizes,
            _sum_by_group(group, self.outlines, count) - 2 * inner_borders,
            np.minimum.reduceat(self.extents[order], starts),
            np.add.reduceat(self.colors[order] * share, starts),
            np.add.reduceat(self.textures[order] * share, starts),
            pairs,
            lengths,
        )


def sum_pairs(pairs: Ints, values: Floats, count: int) -> tuple[Ints, Floats]:
    """Merge equal pairs of numbers below `count` and sum their values.

    pairs: i64 [E, 2]; values: f64 [E]. -> i64 [F, 2], ascending, and f64 [F].
    """
    keys, inverse = np.unique(pairs[:, 0] * count + pairs[:, 1], return_inverse=True)
    return np.stack(np.divmod(keys, count), axis=1), _sum_by_group(inverse, values, len(keys))


def _sum_by_group(group: Ints, values: Floats, count: int) -> Floats:
    return np.bincount(group, values, count).astype(np.float64, copy=False)


@dataclass(frozen=True)
class Forest:
    """Binary trees of merged regions. The first nodes are the leaves; children precede parents.

    children: i64 [N, 2], -1 for leaves.
    rounds: i64 [N], the round of merging in which a node was created, 0 for leaves.
    trees: i64 [N], the number of each node's tree.
    sizes: f64 [N], pixels.
    """

    children: Ints
    rounds: Ints
    trees: Ints
    sizes: Floats

    def fill_bits(self, rows: NDArray[np.uint8]) -> None:
        """Set the bits of each inner node to the union of its children's, in place.

        rows: packed bits [N, bytes], given for the leaves.
        """
        for number in range(1, int(self.rounds.max()) + 1):
            nodes = np.flatnonzero(self.rounds == number)
            rows[nodes] = rows[self.children[nodes, 0]] | rows[self.children[nodes, 1]]

    def ranks(self) -> Ints:
        """Return the rank of each node in its tree, i64 [N].

        The root has rank 1; the others follow in reverse order of their creation.
        """
        order = np.lexsort((-np.arange(len(self.trees)), -self.rounds, self.trees))
        first = np.searchsorted(self.trees[order], self.trees[order])
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order)) - first + 1
        return ranks


def build_hierarchies(
    region_sets: Sequence[RegionSet], terms: Sequence[Sequence[str]], pixels: int
) -> Forest:
    """Build a tree for each region set by merging the most similar neighbors until one is left.

    As in selective search (Uijlings et al., "Selective Search for Object Recognition", IJCV 2013,
    section 3). The paper merges the most similar pair of all; here, all pairs of mutually most
    similar neighbors are merged at once, in all trees. Where a union is never more similar to a
    third region than its parts were, this gives the same trees; otherwise similar ones, in far
    fewer steps.

    region_sets: each connected.
    terms: for each tree, the terms of its similarity, which are summed (keys of TERMS).
    pixels: of the image.
    """
    counts = [len(regions.sizes) for regions in region_sets]
    num_leaves = sum(counts)
    total = 2 * num_leaves - len(counts)
    nodes = _NodeTable(region_sets, total, pixels)
    leaf_trees = np.repeat(np.arange(len(region_sets)), counts)
    trees = np.concatenate([leaf_trees, np.empty(total - num_leaves, dtype=np.int64)])
    weights = _term_weights(terms)
    offsets = np.cumsum([0, *counts[:-1]])
    pairs = np.concatenate(
        [regions.pairs + offset for regions, offset in zip(region_sets, offsets, strict=True)]
    )
    lengths = np.concatenate([regions.lengths for regions in region_sets])
    score = nodes.similarity(pairs, lengths, weights[trees[pairs[:, 0]]])
    children = np.full((total, 2), -1)
    rounds = np.zeros(total, dtype=np.int64)
    next_node = num_leaves
    number = 0
    while len(pairs):
        number += 1
        chosen = mutual_nearest(pairs, score, next_node)
        first, second = pairs[chosen].T
        new = np.arange(next_node, next_node + len(chosen))
        children[new] = pairs[chosen]
        rounds[new] = number
        trees[new] = trees[first]
        nodes.merge(new, first, second, lengths[chosen])

        # Rename the ends of all pairs, then merge the pairs that have become equal.
        current = np.arange(total)
        current[first] = new
        current[second] = new
        pairs = np.sort(current[pairs], axis=1)
        unchanged = pairs[:, 1] < next_node
        touched = ~unchanged & (pairs[:, 0] != pairs[:, 1])
        new_pairs, new_lengths = sum_pairs(pairs[touched], lengths[touched], total)
        new_score = nodes.similarity(new_pairs, new_lengths, weights[trees[new_pairs[:, 0]]])
        score = np.concatenate([score[unchanged], new_score])
        pairs = np.concatenate([pairs[unchanged], new_pairs])
        lengths = np.concatenate([lengths[unchanged], new_lengths])
        next_node += len(new)
    return Forest(children, rounds, trees, nodes.sizes)


def _term_weights(terms: Sequence[Sequence[str]]) -> Floats:
    """1 for each term that a tree uses, else 0: f64 [trees, terms]."""
    weights = np.zeros((len(terms), len(TERMS)))
    for row, terms_of_tree in zip(weights, terms, strict=True):
        row[:] = [term in terms_of_tree for term in TERMS]
    return weights


def mutual_nearest(pairs: Ints, score: Floats, count: int) -> Ints:
    """Return the pairs whose score is the highest of both ends, as indices, i64.

    Of pairs with equal scores that share an end, the first one.

    pairs: i64 [E, 2], numbers below `count`; score: f64 [E].
    """
    best = np.full(count, -np.inf)
    first = np.full(count, len(pairs))
    for end in pairs.T:
        np.maximum.at(best, end, score)
    chosen = np.flatnonzero((score == best[pairs[:, 0]]) & (score == best[pairs[:, 1]]))
    for end in pairs[chosen].T:
        np.minimum.at(first, end, chosen)
    return np.asarray(chosen[(first[pairs[chosen]] == chosen[:, None]).all(axis=1)])


class _NodeTable:
    """The regions of all trees as rows, with room for their unions."""

    def __init__(self, region_sets: Sequence[RegionSet], total: int, pixels: int) -> None:
        self.pixels = pixels
        self.sizes = _pad_rows([regions.sizes for regions in region_sets], total)
        self.outlines = _pad_rows([regions.outlines for regions in region_sets], total)
        self.extents = _pad_rows([regions.extents for regions in region_sets], total)
        self.colors = _pad_rows([regions.colors for regions in region_sets], total)
        self.textures = _pad_rows([regions.textures for regions in region_sets], total)

    def merge(self, new: Ints, first: Ints, second: Ints, lengths: Floats) -> None:
        """Set rows `new` [m] to the unions of rows `first` and `second`.

        lengths: f64 [m], of the borders that the two regions share.
        """
        self.sizes[new] = self.sizes[first] + self.sizes[second]
        self.outlines[new] = self.outlines[first] + self.outlines[second] - 2 * lengths
        self.extents[new] = np.minimum(self.extents[first], self.extents[second])
        share = (self.sizes[first] / self.sizes[new]).astype(np.float32)[:, None]
        for histograms in (self.colors, self.textures):
            histograms[new] = share * histograms[first] + (1 - share) * histograms[second]

    def similarity(self, pairs: Ints, lengths: Floats, weights: Floats) -> Floats:
        """Sum the weighted terms of each pair: f64 [E].

        pairs: i64 [E, 2]; lengths: f64 [E]; weights: f64 [E, terms].
        """
        score = np.zeros(len(pairs))
        for term, weight in zip(TERMS.values(), weights.T, strict=True):
            used = np.flatnonzero(weight)
            score[used] += weight[used] * term(self, pairs[used, 0], pairs[used, 1], lengths[used])
        return score


def _pad_rows(parts: Sequence[NDArray[Scalar]], total: int) -> NDArray[Scalar]:
    """Concatenate rows and append zeros, up to `total` rows."""
    rows: NDArray[Scalar] = np.concatenate(parts)
    zeros = np.zeros((total - len(rows), *rows.shape[1:]), dtype=rows.dtype)
    return np.concatenate([rows, zeros])


def _color(nodes: _NodeTable, a: Ints, b: Ints, _: Floats) -> Floats:
    common = np.minimum(nodes.colors[a], nodes.colors[b])
    return np.asarray(common.sum(axis=1), dtype=np.float64)


def _texture(nodes: _NodeTable, a: Ints, b: Ints, _: Floats) -> Floats:
    common = np.minimum(nodes.textures[a], nodes.textures[b])
    return np.asarray(common.sum(axis=1), dtype=np.float64)


def _size(nodes: _NodeTable, a: Ints, b: Ints, _: Floats) -> Floats:
    return np.asarray(1 - (nodes.sizes[a] + nodes.sizes[b]) / nodes.pixels)


def _fill(nodes: _NodeTable, a: Ints, b: Ints, _: Floats) -> Floats:
    x0, y0, x1, y1 = np.minimum(nodes.extents[a], nodes.extents[b]).T
    box_area = (x0 + x1) * (y0 + y1)
    return np.asarray(1 - (box_area - nodes.sizes[a] - nodes.sizes[b]) / nodes.pixels)


def _border(nodes: _NodeTable, a: Ints, b: Ints, lengths: Floats) -> Floats:
    return np.asarray(lengths / np.minimum(nodes.outlines[a], nodes.outlines[b]))


# Each term is in [0, 1]. The first four are the paper's: histogram intersections of color and
# texture, small regions first, and no holes in the bounding box of both. Border: the share of the
# shorter outline that both have in common, so that a region inside another joins it before a region
# that only touches it.
TERMS: dict[str, Callable[[_NodeTable, Ints, Ints, Floats], Floats]] = {
    "color": _color,
    "texture": _texture,
    "size": _size,
    "fill": _fill,
    "border": _border,
}
