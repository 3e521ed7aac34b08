"""Which segment proposals of an image are learnt from: things by mask IoU, stuff by purity and segment pursuit (Dai, He, Sun, "Convolutional Feature
Masking for Joint Object and Stuff Segmentation", CVPR 2015), and what is background.

Overlaps follow from how many pixels of each superpixel lie in each region, counted at once, and from the members of the proposals: one product of
matrices. They are sums of whole numbers in float64, so they are exact, and thresholds are met exactly.

Letters: R proposals, S superpixels, G things' masks, T classes of things, K of things and stuff. Labels: things 0..T-1, stuff T..K-1, background K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Overlaps = Callable[[int], Floats]  # a proposal -> its IoU with each of the R proposals
IGNORED = -1
STUFF_RULES = ("pursuit", "random")


@dataclass(frozen=True)
class SegmentTruth:
    """What is known of an image [H, W].

    masks: bool [G, H, W] of things; labels: i64 [G], 0..T-1; crowd: bool [G]; semantic: integer [H, W], the label 0..K-1 of each pixel, -1 where it
    is unlabelled, None where there is no such map.
    """

    masks: Bools
    labels: Ints
    crowd: Bools
    semantic: NDArray[np.integer] | None = None


@dataclass(frozen=True)
class SegmentMatches:
    """How R proposals overlap the truth.

    areas: f64 [R], pixels; thing_ious: f64 [R, G], 0 with crowds; thing_labels: i64 [G]; has_things: whether any thing but crowds has a pixel;
    purity: f64 [R, K - T], see `stuff_purity`; crowd_share: f64 [R], the share of each proposal that lies in crowds.
    """

    areas: Floats
    thing_ious: Floats
    thing_labels: Ints
    has_things: bool
    purity: Floats
    crowd_share: Floats


def mask_overlaps(
    labels: NDArray[np.int32],
    members: Bools,
    regions: NDArray[np.generic],
    num_regions: int | None = None,
) -> Floats:
    """Pixels that proposals and regions share: labels i32 [H, W] (-1 none), members bool [R, S] -> f64 [R, G].

    regions: bool [G, H, W], or a map [H, W] of 0..G-1 whose other numbers count to none; num_regions: G of a map, up to its largest number if not
    given. Raises ValueError for regions of another size than the labels.
    """
    size, flat = members.shape[1], labels.ravel().astype(np.int64) + 1
    if regions.shape[-2:] != labels.shape or regions.ndim != (
        3 if regions.dtype == np.bool_ else 2
    ):
        raise ValueError(
            f"regions are bool [G, h, w] or a map [h, w] of the labels' {labels.shape}, not {regions.dtype} {regions.shape}"
        )
    if regions.ndim == 3:
        count = len(regions)
        region, pixel = np.divmod(np.flatnonzero(regions), max(labels.size, 1))
        pairs = flat[pixel] * count + region
    else:
        region = regions.ravel().astype(np.int64)
        count = int(region.max(initial=-1)) + 1 if num_regions is None else num_regions
        inside = (region >= 0) & (region < count)
        pairs = flat[inside] * count + region[inside]
    covered = np.bincount(pairs, minlength=(size + 1) * count).reshape(size + 1, count)[
        1:
    ]  # row 0 is that of the label -1
    return np.asarray(members.astype(np.float64) @ covered)


def segment_areas(labels: NDArray[np.int32], members: Bools) -> Floats:
    """Pixels of each proposal, f64 [R]."""
    return np.asarray(members @ _pixels(labels, members.shape[1]))


def thing_ious(labels: NDArray[np.int32], members: Bools, areas: Floats, masks: Bools) -> Floats:
    """IoU of each proposal, of `areas` f64 [R], with each mask, bool [G, H, W] -> f64 [R, G]; 0 where neither has a pixel."""
    common = mask_overlaps(labels, members, masks)
    return _iou(common, areas[:, None], np.count_nonzero(masks, axis=(1, 2)))


def stuff_purity(
    labels: NDArray[np.int32],
    members: Bools,
    areas: Floats,
    semantic: NDArray[np.integer],
    num_things: int,
    num_classes: int,
) -> Floats:
    """IoU of each proposal, of `areas` f64 [R], with what its bounding box holds of each class of stuff, T..K-1 in the map `semantic` [H, W].
    -> f64 [R, K - T].

    Stuff is wherever it is, in no instances: only what lies beside a proposal tells whether the proposal is as large as it should be.
    """
    stuff = np.where(semantic >= num_things, semantic.astype(np.int64) - num_things, -1)
    common = mask_overlaps(labels, members, stuff, num_classes - num_things)
    x0, y0, x1, y1 = (
        SegmentMasks.of_image(labels, torch.from_numpy(members)).boxes().numpy().astype(np.int64).T
    )
    held = np.zeros_like(common)
    for kind in np.flatnonzero(np.bincount(stuff.ravel() + 1, minlength=1)[1:]):
        sums = np.zeros(
            (labels.shape[0] + 1, labels.shape[1] + 1), dtype=np.int32
        )  # an image has less than 2**31 pixels
        np.cumsum(np.cumsum(stuff == kind, axis=1, dtype=np.int32), axis=0, out=sums[1:, 1:])
        held[:, kind] = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return _iou(common, areas[:, None], held)


def proposal_overlaps(labels: NDArray[np.int32], members: Bools, areas: Floats) -> Overlaps:
    """IoU of one proposal with all of them, on demand; areas: f64 [R]."""
    table, pixels = members.astype(np.float64), _pixels(labels, members.shape[1])
    return lambda row: _iou(table @ (table[row] * pixels), areas, areas[row])


def pursuit(
    purity: Floats,
    areas: Floats,
    overlaps: Overlaps,
    min_purity: float = 0.6,
    overlap: float = 0.2,
    rng: np.random.Generator | None = None,
) -> Ints:
    """Segment pursuit: few large segments that stand for a class of stuff, in the order in which they are taken, i64 [n].

    purity: f64 [R], of one class of stuff; areas: f64 [R]. Candidates are the proposals of at least `min_purity`. The largest is taken (with `rng`:
    one drawn with probability proportional to its area), the candidates that overlap it at an IoU above `overlap` are dropped, and so on with those
    that are left.

    The paper stops when the remaining candidates are smaller than the mean area of the initial ones. That is read as: when even the largest that is
    left is below this mean. Until then, a draw may take any of those that are left, small ones too.
    """
    left = np.flatnonzero((purity >= min_purity) & (areas > 0))
    least, taken = areas[left].mean() if len(left) else 0.0, list[int]()
    while len(left) and areas[left].max() >= least:
        own = areas[left]
        row = int(left[own.argmax()] if rng is None else rng.choice(left, p=own / own.sum()))
        taken.append(row)
        left = left[(left != row) & (overlaps(row)[left] <= overlap)]
    return np.array(taken, dtype=np.int64)


def match_segments(
    proposals: SegmentProposals, truth: SegmentTruth, num_things: int, num_classes: int
) -> SegmentMatches:
    """All overlaps that labels and draws follow from. Raises ValueError where a map or a label has a class that there is not."""
    labels, members, semantic = proposals.labels, proposals.members, truth.semantic
    if semantic is not None and semantic.max(initial=-1) >= num_classes:
        raise ValueError(
            f"the semantic map has the label {semantic.max()}, there are {num_classes} classes"
        )
    if len(truth.labels) and not (truth.labels.min() >= 0 and truth.labels.max() < num_things):
        raise ValueError(
            f"things have labels {truth.labels.min()}..{truth.labels.max()}, there are {num_things} classes of things"
        )
    areas = segment_areas(labels, members)
    ious = thing_ious(labels, members, areas, truth.masks)
    ious[:, truth.crowd] = 0
    share = np.zeros(len(members))
    if truth.crowd.any():
        crowds = np.where(truth.masks[truth.crowd].any(axis=0), 0, -1)
        share = mask_overlaps(labels, members, crowds, 1)[:, 0] / np.maximum(areas, 1)
    none = np.zeros((len(members), num_classes - num_things))
    purity = (
        none
        if semantic is None
        else stuff_purity(labels, members, areas, semantic, num_things, num_classes)
    )
    return SegmentMatches(
        areas, ious, truth.labels, bool(truth.masks[~truth.crowd].any()), purity, share
    )


def proposal_labels(
    matches: SegmentMatches,
    num_things: int,
    num_classes: int,
    positive_iou: float = 0.5,
    min_purity: float = 0.6,
) -> Ints:
    """The class of the truth that each proposal fits best, i64 [R]: what a perfect classifier would answer.

    Of the thing of the highest IoU where that is at least `positive_iou`; otherwise of the stuff of the highest purity where that is at least
    `min_purity`; otherwise K.
    """
    out = np.full(len(matches.areas), num_classes, dtype=np.int64)
    for score, classes, least in (
        (matches.purity, np.arange(num_things, num_classes), min_purity),
        (matches.thing_ious, matches.thing_labels, positive_iou),
    ):
        if score.shape[1]:
            best = score.argmax(axis=1)
            out = np.where(score[np.arange(len(score)), best] >= least, classes[best], out)
    return out


def with_truth(proposals: SegmentProposals, masks: Bools) -> SegmentProposals:
    """The proposals and, behind them, the masks bool [G, H, W]: members [R + G, S'] over superpixels that are cut where outlines cross them."""
    if not len(masks):
        return proposals
    labels, inside = proposals.labels.ravel(), masks.reshape(len(masks), proposals.labels.size)
    piece = labels.astype(np.int64) + 1
    for byte in np.packbits(
        inside, axis=0
    ):  # a pixel's piece: its superpixel and the set of masks that have it, numbered without gaps
        piece = piece * 256 + byte
        piece = (np.cumsum(np.bincount(piece) > 0) - 1)[piece]
    first = np.unique(piece, return_index=True)[1]
    parents, chosen = labels[first], inside[:, first]
    keep = (parents >= 0) | chosen.any(axis=0)
    number = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    members = np.pad(proposals.members, ((0, 0), (0, 1)))[
        :, parents
    ]  # the last column, False, is that of the label -1
    return SegmentProposals(
        number[piece].reshape(proposals.labels.shape), np.concatenate([members, chosen])[:, keep]
    )


class SegmentSampler:
    """Draws the proposals of an image from which a classifier of segments learns: at most `num_samples`.

    Things: positive for the thing that a proposal overlaps most, from a mask IoU of `positive_iou` on. Stuff: of the proposals with a purity of at
    least `min_purity` for a class, those that `pursuit` takes, anew at each call (stuff_rule "pursuit"), or as many, drawn evenly ("random"); what is
    a positive thing is no stuff. Negatives: best IoU with things in [low, high) of `negative_iou` and purity below `max_negative_purity` for all
    stuff, unless crowds cover more than `crowd_overlap` of the proposal. `low` leaves out what is far from all things; in an image without things it
    is 0, or there would be no negatives. All other proposals are ignored.

    thing_fraction, stuff_fraction: at most these shares of `num_samples` are things and stuff; negatives fill what they leave. append_truth: the
    things' own masks are positives too; they are rows of `with_truth`.
    """

    def __init__(
        self,
        num_things: int,
        num_classes: int,
        num_samples: int = 128,
        thing_fraction: float = 0.25,
        stuff_fraction: float = 0.25,
        positive_iou: float = 0.5,
        negative_iou: tuple[float, float] = (0.1, 0.3),
        min_purity: float = 0.6,
        max_negative_purity: float = 0.3,
        overlap: float = 0.2,
        stuff_rule: str = "pursuit",
        append_truth: bool = True,
        crowd_overlap: float = 0.5,
    ) -> None:
        low, high = negative_iou
        if stuff_rule not in STUFF_RULES:
            raise UserError(
                f"sampler: stuff_rule is one of {', '.join(STUFF_RULES)}, not {stuff_rule}"
            )
        if not (
            num_samples >= 1
            and min(thing_fraction, stuff_fraction) >= 0
            and thing_fraction + stuff_fraction <= 1
        ):
            told = f"{num_samples}, {thing_fraction} and {stuff_fraction}"
            raise UserError(
                f"sampler: num_samples is at least 1, thing_fraction and stuff_fraction at least 0 and together at most 1, not {told}"
            )
        if not (0 <= low <= high <= positive_iou <= 1 and positive_iou > 0):
            raise UserError(
                f"sampler: negative_iou and positive_iou ascend from 0 to 1, the last above 0, not {low}, {high} and {positive_iou}"
            )
        if not (0 <= max_negative_purity <= min_purity <= 1 and min_purity > 0):
            raise UserError(
                f"sampler: max_negative_purity, min_purity ascend from 0 to 1, the last above 0, not {max_negative_purity}, {min_purity}"
            )
        if not (0 <= overlap <= 1 and 0 <= crowd_overlap <= 1):
            raise UserError(
                f"sampler: overlap and crowd_overlap are from 0 to 1, not {overlap} and {crowd_overlap}"
            )
        self.num_things, self.num_classes, self.num_samples = num_things, num_classes, num_samples
        self.thing_fraction, self.stuff_fraction = thing_fraction, stuff_fraction
        self.positive_iou, self.negative_iou, self.crowd_overlap = (
            positive_iou,
            (low, high),
            crowd_overlap,
        )
        self.min_purity, self.max_negative_purity, self.overlap = (
            min_purity,
            max_negative_purity,
            overlap,
        )
        self.stuff_rule, self.append_truth = stuff_rule, append_truth

    def __call__(
        self, proposals: SegmentProposals, truth: SegmentTruth, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """-> rows i64 [n], ascending, and their labels i64 [n] in 0..K, a function of the arguments and the state of `rng`.

        With `append_truth`, rows from R on are those of `with_truth(proposals, truth.masks)`.
        """
        matches = self.match(proposals, truth)
        fitting = self.labels(matches)
        own = ~truth.crowd & truth.masks.any(axis=(1, 2)) & self.append_truth
        labels = np.concatenate([fitting, np.where(own, truth.labels, IGNORED)])
        things = np.flatnonzero((labels >= 0) & (labels < self.num_things))
        things = _drawn(things, int(self.num_samples * self.thing_fraction), rng)
        stuff = _drawn(
            self.stuff(proposals, matches, fitting, rng),
            int(self.num_samples * self.stuff_fraction),
            rng,
        )
        negatives = _drawn(
            np.flatnonzero(labels == self.num_classes),
            self.num_samples - len(things) - len(stuff),
            rng,
        )
        rows = np.sort(np.concatenate([things, stuff, negatives]))
        return rows, labels[rows]

    def match(self, proposals: SegmentProposals, truth: SegmentTruth) -> SegmentMatches:
        """How the proposals overlap the truth."""
        return match_segments(proposals, truth, self.num_things, self.num_classes)

    def labels(self, matches: SegmentMatches) -> Ints:
        """What each proposal may be drawn as, i64 [R]: 0..K, or IGNORED."""
        labels = proposal_labels(
            matches, self.num_things, self.num_classes, self.positive_iou, self.min_purity
        )
        low, high = self.negative_iou
        best = matches.thing_ious.max(axis=1, initial=0)
        negative = (
            (best >= (low if matches.has_things else 0)) & (best < high) & (matches.areas > 0)
        )
        negative &= (matches.purity.max(axis=1, initial=0) < self.max_negative_purity) & (
            matches.crowd_share <= self.crowd_overlap
        )
        return np.where((labels == self.num_classes) & ~negative, IGNORED, labels)

    def stuff(
        self,
        proposals: SegmentProposals,
        matches: SegmentMatches,
        labels: Ints,
        rng: np.random.Generator | None = None,
    ) -> Ints:
        """The positives of all classes of stuff, class by class, i64 [n]; labels: what `labels` says of the matches.

        Without `rng` pursuit takes the largest, whatever the rule: always the same ones, for classifiers that are fitted once (SVM).
        """
        present = np.unique(labels[(labels >= self.num_things) & (labels < self.num_classes)])
        if not len(present):
            return np.zeros(0, dtype=np.int64)
        overlaps, out = (
            proposal_overlaps(proposals.labels, proposals.members, matches.areas),
            list[Ints](),
        )
        for label in present.tolist():
            candidates = np.flatnonzero(labels == label)
            purity = np.where(labels == label, matches.purity[:, label - self.num_things], 0)
            taken = pursuit(purity, matches.areas, overlaps, self.min_purity, self.overlap, rng)
            out.append(
                taken
                if rng is None or self.stuff_rule == "pursuit"
                else rng.choice(candidates, len(taken), replace=False)
            )
        return np.concatenate(out)


def _drawn(rows: Ints, number: int, rng: np.random.Generator) -> Ints:
    """At most `number` of the rows, drawn evenly."""
    return rows if len(rows) <= number else rng.choice(rows, number, replace=False)


def _pixels(labels: NDArray[np.int32], size: int) -> Floats:
    """Pixels of each superpixel, f64 [size]."""
    return np.bincount(labels.ravel() + 1, minlength=size + 1)[1:].astype(np.float64)


def _iou(common: Floats, first: Floats, second: NDArray[np.number]) -> Floats:
    """Of shared pixels and areas; 0 where there are no pixels at all."""
    return np.asarray(common / np.maximum(first + second - common, 1))
