"""Segment proposals from pixels: hierarchies of superpixels, of which each node is a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.superpixels.methods import Felzenszwalb, Image, Labels
from maskseg.superpixels.opencv import opencv
from maskseg.values import (
    BlurSigma,
    Fraction,
    Length,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    check_arguments,
)
from maskseg.variants.cfm.grouping import (
    TERMS,
    Forest,
    Ints,
    RegionSet,
    build_hierarchies,
    sum_pairs,
)

Bools = NDArray[np.bool_]
# Names of OpenCV's conversions from RGB; those to 8 bits use the full range 0..255.
COLOR_SPACES = {"rgb": None, "lab": "COLOR_RGB2LAB", "hsv": "COLOR_RGB2HSV_FULL"}
COLOR_BINS = 25  # per channel
# Texture histograms: bins of the gradient's direction, and limits of the bins of its magnitude in
# gray levels per pixel.
DIRECTIONS = 8
SLOPES = (1.0, 3.0, 8.0, 20.0)
BLOCK = 128  # proposals per block that are compared with those of similar area


class HierarchicalGrouping:
    """Group superpixels into hierarchies, of which every node is a proposal.

    As in selective search (Uijlings et al., "Selective Search for Object Recognition", IJCV 2013),
    but with masks: all hierarchies share one map of superpixels.

    The superpixels are the graph segments (`Felzenszwalb`) of the first color space at the first
    scale. There is one hierarchy per color space, scale and similarity. Those of the first scale
    grow from the superpixels. Those of the other scales grow from coarser graph segments in their
    color space; each superpixel is assigned to the segment that has most of its pixels.

    A proposal's score is the sum of 1 / rank over the hierarchies that contain it, where the root
    has rank 1. Large segments, and segments of several hierarchies, come first. (The paper
    multiplies ranks by random numbers; here, nothing is random.)

    color_spaces: of rgb, lab, hsv.
    scales: ascending, `Felzenszwalb`'s scale parameter.
    similarities: terms of color, texture, size, fill, border (`grouping.TERMS`), joined by +.
    sigma: of the blur before the graph segmentation, in pixels.
    superpixel_area: smallest area of a superpixel as a share of the image; there are at most
        1 / superpixel_area superpixels.
    min_area: smallest area of a proposal as a share of the image.
    max_iou: of two proposals that overlap by a higher IoU, the better one is kept.
    max_proposals: at most this many proposals, the best.

    Raises UserError for arguments out of range.
    """

    def __init__(
        self,
        color_spaces: Sequence[str] = ("lab", "hsv"),
        scales: Annotated[Sequence[PositiveFloat], Length(1)] = (40.0, 400.0),
        similarities: Sequence[str] = ("color+texture+size+fill+border", "color"),
        sigma: BlurSigma = 0.5,
        superpixel_area: PositiveFraction = 4e-4,
        min_area: Fraction = 5e-4,
        max_iou: PositiveFraction = 0.95,
        max_proposals: PositiveInt = 2000,
    ) -> None:
        self.color_spaces = _check_names("color_spaces", color_spaces, COLOR_SPACES)
        self.terms = [_check_names("similarities", s.split("+"), TERMS) for s in similarities]
        self.scales = list(scales)
        check_arguments(
            HierarchicalGrouping.__init__,
            "proposals",
            scales=self.scales,
            sigma=sigma,
            superpixel_area=superpixel_area,
            min_area=min_area,
            max_iou=max_iou,
            max_proposals=max_proposals,
        )
        if not self.terms or self.scales != sorted(set(self.scales)):
            raise UserError(
                "proposals: similarities must not be empty, and scales must ascend, not"
                f" {self.scales}"
            )
        self.sigma = sigma
        self.superpixel_area = superpixel_area
        self.min_area = min_area
        self.max_iou = max_iou
        self.max_proposals = max_proposals

    def __call__(self, image: Image) -> SegmentProposals:
        """Compute the proposals of an image, at least one: the whole image.

        image: uint8 RGB [H, W, 3]; raises ValueError for another array.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(
                f"proposals need uint8 RGB [H, W, 3], not {image.dtype} {list(image.shape)}"
            )
        image = np.ascontiguousarray(image)
        min_pixels = math.ceil(self.superpixel_area * image.shape[0] * image.shape[1])
        fine, *coarse = (Felzenszwalb(self.sigma, scale, min_pixels) for scale in self.scales)
        spaces = [convert_color(image, name) for name in self.color_spaces]
        labels = fine(spaces[0])
        count = int(labels.max()) + 1
        textures = texture_histograms(opencv().cvtColor(image, opencv().COLOR_RGB2GRAY), labels)
        # For each hierarchy: the leaf of each superpixel, and the leaves.
        groups: list[Ints] = []
        leaves: list[RegionSet] = []
        for space in spaces:
            superpixels = describe_superpixels(space, textures, labels)
            partitions = [np.arange(count)]
            partitions += [majority_segments(labels, segments(space)) for segments in coarse]
            for partition in partitions:
                groups += [partition] * len(self.terms)
                leaves += [superpixels.merge(partition)] * len(self.terms)
        terms = self.terms * (len(leaves) // len(self.terms))
        forest = build_hierarchies(leaves, terms, labels.size)
        return SegmentProposals(labels, self._rank(forest, groups, superpixels.sizes))

    def _rank(self, forest: Forest, groups: Sequence[Ints], sizes: NDArray[np.float64]) -> Bools:
        """Return the nodes of all trees as sets of superpixels, the best first.

        Duplicates and nodes that are too small are dropped.

        groups: for each tree, the leaf of each superpixel, i64 [S]; sizes: f64 [S], of the
        superpixels. -> bool [R, S].
        """
        bits = np.zeros((len(forest.sizes), (len(sizes) + 7) // 8), dtype=np.uint8)
        row = 0
        for group in groups:
            leaves = np.arange(int(group.max()) + 1)[:, None] == group
            bits[row : row + len(leaves)] = np.packbits(leaves, axis=1)
            row += len(leaves)
        forest.fill_bits(bits)
        large = np.flatnonzero(forest.sizes >= self.min_area * sizes.sum())
        bits, first, inverse = np.unique(
            bits[large], axis=0, return_index=True, return_inverse=True
        )
        score = np.bincount(inverse.ravel(), 1 / forest.ranks()[large])
        order = np.lexsort((first, -forest.sizes[large][first], -score))
        members = np.unpackbits(bits[order], axis=1, count=len(sizes)).astype(bool)
        kept = suppress_duplicates(members, sizes, self.max_iou)
        return members[kept[: self.max_proposals]]


def _check_names(key: str, names: Sequence[str], table: Mapping[str, object]) -> list[str]:
    """Return the names as a list.

    Raises UserError if there are none, or for duplicates or names that are not in the table.
    """
    if not names or len(set(names)) < len(names) or not set(names) <= set(table):
        raise UserError(
            f"proposals: {key} must be some of {', '.join(table)}, without duplicates, not"
            f" {', '.join(names) or 'none'}"
        )
    return list(names)


def convert_color(image: Image, name: str) -> Image:
    """Convert RGB [H, W, 3] to a color space of COLOR_SPACES, each channel 0..255."""
    code = COLOR_SPACES[name]
    return np.asarray(opencv().cvtColor(image, getattr(opencv(), code)) if code else image)


def majority_segments(fine: Labels, coarse: Labels) -> Ints:
    """Assign each superpixel of `fine` to the segment of `coarse` that has most of its pixels.

    fine, coarse: [H, W]. -> i64 [S], renumbered to 0..m-1 without gaps.
    """
    count = int(fine.max()) + 1
    segments = int(coarse.max()) + 1
    table = np.bincount(
        fine.ravel().astype(np.int64) * segments + coarse.ravel(), minlength=count * segments
    )
    return np.unique(table.reshape(count, segments).argmax(axis=1), return_inverse=True)[1]


def describe_superpixels(image: Image, textures: NDArray[np.float32], labels: Labels) -> RegionSet:
    """Compute the features of superpixels.

    image: [H, W, 3] in a color space; textures: of `texture_histograms`; labels: [H, W].
    """
    flat = labels.ravel().astype(np.int64)
    count = int(labels.max()) + 1
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    neighbors = [(labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])]
    touching = [np.stack([a[a != b], b[a != b]], axis=1) for a, b in neighbors]
    pairs = np.concatenate(touching).astype(np.int64)
    outlines = np.bincount(pairs.ravel(), minlength=count) + np.bincount(border, minlength=count)
    pairs, lengths = sum_pairs(np.sort(pairs, axis=1), np.ones(len(pairs)), count)
    bins = image.reshape(-1, 3).astype(np.int64) * COLOR_BINS >> 8
    colors = _histograms(flat[:, None], bins + np.arange(3) * COLOR_BINS, count, 3 * COLOR_BINS)
    sizes = np.bincount(flat, minlength=count).astype(np.float64)
    return RegionSet(
        sizes,
        outlines.astype(np.float64),
        _bounding_extents(labels, count),
        colors,
        textures,
        pairs,
        lengths,
    )


def texture_histograms(gray: NDArray[np.uint8], labels: Labels) -> NDArray[np.float32]:
    """Compute a histogram of the gradients of each superpixel.

    Bins are direction x magnitude, and one bin for the faintest gradients of any direction.

    gray, labels: [H, W]. -> f32 [S, bins].
    """
    cv2 = opencv()
    smooth = cv2.GaussianBlur(gray.astype(np.float32), (0, 0), 1.0)
    dx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    dy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    length, angle = cv2.cartToPolar(dx, dy)
    direction = (angle * (DIRECTIONS / (2 * np.pi)) + 0.5).astype(np.int64) % DIRECTIONS
    slope = np.digitize(length, SLOPES)
    bins = np.where(slope > 0, (slope - 1) * DIRECTIONS + direction + 1, 0)
    return _histograms(
        labels.ravel().astype(np.int64),
        bins.ravel(),
        int(labels.max()) + 1,
        len(SLOPES) * DIRECTIONS + 1,
    )


def _histograms(rows: Ints, bins: Ints, count: int, num_bins: int) -> NDArray[np.float32]:
    """Compute histograms with sum 1, f32 [count, num_bins], of pixels with these rows and bins."""
    flat = np.bincount((rows * num_bins + bins).ravel(), minlength=count * num_bins)
    table = flat.reshape(count, num_bins).astype(np.float32)
    return np.asarray(table / table.sum(axis=1, keepdims=True))


def _bounding_extents(labels: Labels, count: int) -> NDArray[np.float64]:
    """Compute x0, y0, -x1, -y1 of each superpixel, f64 [S, 4]."""
    out = np.empty((count, 4))
    for column, lines in ((0, labels.T), (1, labels)):
        flat = lines.ravel()
        line = np.repeat(np.arange(lines.shape[0]), lines.shape[1])
        # Of several assignments to one element, the last one counts.
        out[flat[::-1], column] = line[::-1]
        out[flat, column + 2] = -1 - line
    return out


def suppress_duplicates(members: Bools, sizes: NDArray[np.float64], max_iou: float) -> Ints:
    """Greedily drop segments that overlap a kept segment before them by more than `max_iou`.

    members: bool [R, S]; sizes: f64 [S], of the superpixels. -> kept rows, ascending, i64.
    """
    areas = members @ sizes
    order = np.argsort(areas, kind="stable")
    rows = members[order]
    areas = areas[order]
    weights = sizes.astype(np.float32)
    # Beyond these rows, the ratio of the areas alone keeps the IoU below the limit.
    last = np.searchsorted(areas, areas / max_iou, side="right")
    overlapping = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(rows), BLOCK):
        block = slice(start, min(start + BLOCK, len(rows)))
        reach = slice(start, int(last[block.stop - 1]))
        common = ((rows[block] * weights) @ rows[reach].T.astype(np.float32)).astype(np.float64)
        similar = np.argwhere(common > max_iou * (areas[block, None] + areas[reach] - common))
        overlapping.append(order[similar[similar[:, 0] < similar[:, 1]] + start])
    keep = np.ones(len(rows), dtype=bool)
    pairs = np.sort(np.concatenate(overlapping), axis=1)
    for better, worse in pairs[np.argsort(pairs[:, 0], kind="stable")].tolist():
        keep[worse] &= not keep[better]
    return np.flatnonzero(keep)


def best_ious(proposals: SegmentProposals, ground_truth: Bools) -> NDArray[np.float64]:
    """Compute the IoU of each ground-truth mask with its best proposal.

    ground_truth: bool [G, H, W]. -> f64 [G], 0 for an empty mask.
    """
    count = proposals.members.shape[1]
    covered = [np.bincount(proposals.labels[mask], minlength=count) for mask in ground_truth]
    table = np.array(covered, dtype=np.float64).reshape(-1, count)
    common = table @ proposals.members.T
    union = table.sum(axis=1)[:, None] + proposals.areas() - common
    return np.asarray((common / union).max(axis=1))
