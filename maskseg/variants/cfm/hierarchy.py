"""Segment proposals from pixels: hierarchies of superpixels, each node a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.superpixels.methods import GraphSegments, Image, Labels
from maskseg.superpixels.opencv import opencv
from maskseg.variants.cfm.grouping import TERMS, Forest, Ints, Pieces, grow, summed

Bools = NDArray[np.bool_]
COLOR_SPACES = {"rgb": None, "lab": "COLOR_RGB2LAB", "hsv": "COLOR_RGB2HSV_FULL"}
COLOR_BINS = 25  # a channel
DIRECTIONS, SLOPES = (
    8,
    (1.0, 3.0, 8.0, 20.0),
)  # of the texture: bins of the gradient's direction and of its length, grey levels a pixel
BLOCK = 128  # proposals that are compared with those of like area at a time


class HierarchicalGrouping:
    """Superpixels grouped into hierarchies of which every node is a proposal, as in selective search (Uijlings et al., "Selective Search for Object
    Recognition", IJCV 2013), but with masks: all hierarchies stand on one map of superpixels.

    The superpixels are graph segments (`GraphSegments`) in the first of `color_spaces` at the first of `scales` (its k). Hierarchies: for each
    colour space, scale and similarity one. That of the first scale grows from the superpixels; those of further scales grow from coarser graph
    segments in their colour space, each superpixel counting to the one that has most of it.

    color_spaces: of rgb, lab, hsv; scales: ascending; similarities: terms of color, texture, size, fill, border (`grouping.TERMS`), joined by +;
    sigma: of the blur before graph segments, in pixels; superpixel_area, min_area: the least area of a superpixel and of a proposal, as a share of
    the image (so that there are at most 1 / superpixel_area superpixels); max_iou: of two proposals that overlap more the better one stays;
    max_proposals: at most so many, the best.

    A proposal's score is the sum of 1 / its place over the hierarchies that it is a node of, the root having place 1: large segments come first,
    and what is found in several ways. (The paper multiplies places by random numbers; here nothing is drawn.)
    """

    def __init__(
        self,
        color_spaces: Sequence[str] = ("lab", "hsv"),
        scales: Sequence[float] = (40.0, 400.0),
        similarities: Sequence[str] = ("color+texture+size+fill+border", "color"),
        sigma: float = 0.5,
        superpixel_area: float = 4e-4,
        min_area: float = 5e-4,
        max_iou: float = 0.95,
        max_proposals: int = 2000,
    ) -> None:
        self.color_spaces = _known("color_spaces", color_spaces, COLOR_SPACES)
        self.terms = [_known("similarities", s.split("+"), TERMS) for s in similarities]
        self.scales = list(scales)
        if (
            not self.scales
            or not self.terms
            or self.scales[0] <= 0
            or self.scales != sorted(set(self.scales))
        ):
            raise UserError(
                f"proposals: similarities must not be empty, scales must be above 0 and ascend, not {self.scales}"
            )
        if not (
            sigma >= 0
            and 0 < superpixel_area <= 1
            and 0 <= min_area <= 1
            and 0 < max_iou <= 1
            and max_proposals >= 1
        ):
            raise UserError(
                "proposals: sigma is at least 0, superpixel_area and max_iou are above 0 and at most 1, min_area is from 0 to 1, max_proposals"
                f" at least 1, not {sigma}, {superpixel_area}, {max_iou}, {min_area} and {max_proposals}"
            )
        self.sigma, self.superpixel_area, self.min_area = sigma, superpixel_area, min_area
        self.max_iou, self.max_proposals = max_iou, max_proposals

    def __call__(self, image: Image) -> SegmentProposals:
        """uint8 RGB [H, W, 3] -> at least one proposal, the whole image. Raises ValueError for another array."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(
                f"proposals are of uint8 RGB [H, W, 3], not of {image.dtype} {list(image.shape)}"
            )
        image = np.ascontiguousarray(image)
        least = math.ceil(self.superpixel_area * image.shape[0] * image.shape[1])
        fine, *coarse = (GraphSegments(self.sigma, k, least) for k in self.scales)
        spaces = [in_space(image, name) for name in self.color_spaces]
        labels = fine(spaces[0])
        count = int(labels.max()) + 1
        textures = texture_histograms(opencv().cvtColor(image, opencv().COLOR_RGB2GRAY), labels)
        starts, pieces = (
            list[Ints](),
            list[Pieces](),
        )  # of each hierarchy: the piece of each superpixel; the pieces
        for space in spaces:
            atoms = describe(space, textures, labels)
            for regions in (
                np.arange(count),
                *(majority(labels, segments(space)) for segments in coarse),
            ):
                starts += [regions] * len(self.terms)
                pieces += [atoms.merged(regions)] * len(self.terms)
        forest = grow(pieces, self.terms * (len(pieces) // len(self.terms)), labels.size)
        return SegmentProposals(labels, self._ranked(forest, starts, atoms.sizes))

    def _ranked(self, forest: Forest, starts: Sequence[Ints], sizes: NDArray[np.float64]) -> Bools:
        """The nodes of all trees as members [R, S], the best first, none twice, none too small; sizes: f64 [S], of the superpixels."""
        bits = np.zeros((len(forest.sizes), (len(sizes) + 7) // 8), dtype=np.uint8)
        row = 0
        for regions in starts:
            leaves = np.arange(int(regions.max()) + 1)[:, None] == regions
            bits[row : row + len(leaves)] = np.packbits(leaves, axis=1)
            row += len(leaves)
        forest.fill(bits)
        large = np.flatnonzero(forest.sizes >= self.min_area * sizes.sum())
        bits, first, which = np.unique(bits[large], axis=0, return_index=True, return_inverse=True)
        score = np.bincount(which.ravel(), 1 / forest.places()[large])
        order = np.lexsort((first, -forest.sizes[large][first], -score))
        members = np.unpackbits(bits[order], axis=1, count=len(sizes)).astype(bool)
        return members[distinct(members, sizes, self.max_iou)[: self.max_proposals]]


def _known(key: str, names: Sequence[str], table: Mapping[str, object]) -> list[str]:
    """The names as a list. Raises UserError where there is none, one twice or one that is not in the table."""
    if not names or len(set(names)) < len(names) or not set(names) <= set(table):
        raise UserError(
            f"proposals: {key} are some of {', '.join(table)}, each once, not {', '.join(names) or 'none'}"
        )
    return list(names)


def in_space(image: Image, name: str) -> Image:
    """RGB [H, W, 3] in a colour space of COLOR_SPACES, each channel 0..255."""
    code = COLOR_SPACES[name]
    return np.asarray(opencv().cvtColor(image, getattr(opencv(), code)) if code else image)


def majority(fine: Labels, coarse: Labels) -> Ints:
    """The segment of `coarse` that has most of each superpixel of `fine`, numbered 0..m-1 without gaps. [H, W], [H, W] -> i64 [S]."""
    count, segments = int(fine.max()) + 1, int(coarse.max()) + 1
    table = np.bincount(
        fine.ravel().astype(np.int64) * segments + coarse.ravel(), minlength=count * segments
    )
    return np.unique(table.reshape(count, segments).argmax(axis=1), return_inverse=True)[1]


def describe(image: Image, textures: NDArray[np.float32], labels: Labels) -> Pieces:
    """The superpixels of labels [H, W] as pieces; image: [H, W, 3] in a colour space; textures: `texture_histograms`."""
    flat, count = labels.ravel().astype(np.int64), int(labels.max()) + 1
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    sides = [(labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])]
    pairs = np.concatenate([np.stack([a[a != b], b[a != b]], axis=1) for a, b in sides]).astype(
        np.int64
    )
    outlines = np.bincount(pairs.ravel(), minlength=count) + np.bincount(edge, minlength=count)
    pairs, lengths = summed(np.sort(pairs, axis=1), np.ones(len(pairs)), count)
    bins = image.reshape(-1, 3).astype(np.int64) * COLOR_BINS >> 8
    colors = _histograms(flat[:, None], bins + np.arange(3) * COLOR_BINS, count, 3 * COLOR_BINS)
    sizes = np.bincount(flat, minlength=count).astype(np.float64)
    return Pieces(
        sizes,
        outlines.astype(np.float64),
        _extents(labels, count),
        colors,
        textures,
        pairs,
        lengths,
    )


def texture_histograms(grey: NDArray[np.uint8], labels: Labels) -> NDArray[np.float32]:
    """How often which gradient is met in each superpixel: its direction and length, one bin for the faintest. [H, W] each -> [S, bins]."""
    cv2 = opencv()
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    dx, dy = (cv2.Sobel(smooth, cv2.CV_32F, x, 1 - x, ksize=3, scale=1 / 8) for x in (1, 0))
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
    """f32 [count, num_bins] with sum 1, of pixels in `rows` that fall into `bins`."""
    table = (
        np.bincount((rows * num_bins + bins).ravel(), minlength=count * num_bins)
        .reshape(count, num_bins)
        .astype(np.float32)
    )
    return np.asarray(table / table.sum(axis=1, keepdims=True))


def _extents(labels: Labels, count: int) -> NDArray[np.float64]:
    """x0, y0, -x1, -y1 of each superpixel, f64 [S, 4]."""
    out = np.empty((count, 4))
    for column, lines in ((0, labels.T), (1, labels)):
        flat, line = lines.ravel(), np.repeat(np.arange(lines.shape[0]), lines.shape[1])
        out[flat[::-1], column] = line[::-1]  # of several values for one place, the last stays
        out[flat, column + 2] = -1 - line
    return out


def distinct(members: Bools, sizes: NDArray[np.float64], max_iou: float) -> Ints:
    """The segments [R, S] that overlap none of those kept before them by more than max_iou, as ascending indices; sizes [S], of the superpixels."""
    areas = members @ sizes
    order = np.argsort(areas, kind="stable")
    rows, areas, weights = members[order], areas[order], sizes.astype(np.float32)
    last = np.searchsorted(
        areas, areas / max_iou, side="right"
    )  # beyond, the areas alone keep the IoU below
    found = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(rows), BLOCK):
        block = slice(start, min(start + BLOCK, len(rows)))
        reach = slice(start, int(last[block.stop - 1]))
        common = ((rows[block] * weights) @ rows[reach].T.astype(np.float32)).astype(np.float64)
        alike = np.argwhere(common > max_iou * (areas[block, None] + areas[reach] - common))
        found.append(order[alike[alike[:, 0] < alike[:, 1]] + start])
    keep = np.ones(len(rows), dtype=bool)
    pairs = np.sort(np.concatenate(found), axis=1)
    for better, worse in pairs[np.argsort(pairs[:, 0], kind="stable")].tolist():
        keep[worse] &= not keep[better]
    return np.flatnonzero(keep)


def best_ious(proposals: SegmentProposals, truths: Bools) -> NDArray[np.float64]:
    """The IoU of each true mask, bool [G, H, W], with the proposal that fits it best, f64 [G]; 0 for an empty mask."""
    count = proposals.members.shape[1]
    covered = [np.bincount(proposals.labels[truth], minlength=count) for truth in truths]
    table = np.array(covered, dtype=np.float64).reshape(-1, count)
    common = table @ proposals.members.T
    union = table.sum(axis=1)[:, None] + proposals.areas() - common
    return np.asarray((common / union).max(axis=1))


def recall(
    proposals: SegmentProposals, truths: Bools, thresholds: Sequence[float] = (0.5, 0.7)
) -> list[float]:
    """The share of the true masks, bool [G, H, W], that a proposal meets with at least each IoU; 1 where there is no mask."""
    best = best_ious(proposals, truths)
    return [float((best >= threshold).mean()) if len(best) else 1.0 for threshold in thresholds]
