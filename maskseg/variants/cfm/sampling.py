"""Selection of the segment proposals of an image that a classifier learns from.

Things are matched by mask IoU, stuff by purity and segment pursuit (Dai, He, Sun, "Convolutional
Feature Masking for Joint Object and Stuff Segmentation", CVPR 2015); the rest may be background.

Overlaps are computed from the number of pixels of each superpixel in each region, which are counted
at once, and the superpixels of the proposals: one matrix product. They are sums of integers in
float64, hence exact, so that comparisons with thresholds are exact, too.

Letters: R proposals, S superpixels, G masks of things, T classes of things, K classes of things and
stuff. Labels: things 0..T-1, stuff T..K-1, background K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.variants.cfm.settings import SamplerSettings

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Overlaps = Callable[[int], Floats]  # a proposal -> its IoU with each of the R proposals
IGNORE_LABEL = -1


@dataclass(frozen=True)
class SegmentGroundTruth:
    """The ground truth of an image [H, W].

    masks: bool [G, H, W], of things.
    labels: i64 [G], 0..T-1.
    iscrowd: bool [G].
    semantic: integer [H, W], the label 0..K-1 of each pixel, -1 where it is unlabeled; None for an
        image without such a map.
    """

    masks: Bools
    labels: Ints
    iscrowd: Bools
    semantic: NDArray[np.integer] | None = None


@dataclass(frozen=True)
class SegmentMatches:
    """Overlaps of R proposals with the ground truth.

    areas: f64 [R], pixels.
    thing_ious: f64 [R, G], 0 for crowds.
    thing_labels: i64 [G].
    has_things: whether any thing except crowds has a pixel.
    purity: f64 [R, K - T], see `stuff_purity`.
    crowd_share: f64 [R], the share of each proposal that lies in crowds.
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
    """Count the pixels that proposals and regions share: f64 [R, G].

    labels: i32 [H, W], the superpixel of each pixel, -1 for none; members: bool [R, S].
    regions: bool [G, H, W], or a map [H, W] of 0..G-1, in which other numbers belong to no region.
    num_regions: G of a map; by default, its largest number + 1.

    Raises ValueError for regions of another size than the labels.
    """
    size = members.shape[1]
    flat = labels.ravel().astype(np.int64) + 1
    num_dims = 3 if regions.dtype == np.bool_ else 2
    if regions.shape[-2:] != labels.shape or regions.ndim != num_dims:
        raise ValueError(
            f"regions must be bool [G, h, w] or a map [h, w], with the labels' {labels.shape}, not"
            f" {regions.dtype} {regions.shape}"
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
    table = np.bincount(pairs, minlength=(size + 1) * count).reshape(size + 1, count)
    # Row 0 counts the pixels of the label -1.
    return np.asarray(members.astype(np.float64) @ table[1:])


def segment_areas(labels: NDArray[np.int32], members: Bools) -> Floats:
    """Count the pixels of each proposal: f64 [R]."""
    return np.asarray(members @ _superpixel_areas(labels, members.shape[1]))


def thing_ious(labels: NDArray[np.int32], members: Bools, areas: Floats, masks: Bools) -> Floats:
    """Compute the IoU of each proposal with each mask: f64 [R, G], 0 where neither has a pixel.

    areas: f64 [R], of the proposals; masks: bool [G, H, W].
    """
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
    """Compute the IoU of each proposal with the stuff inside its bounding box, by class of stuff.

    Stuff has no instances, so its whole region is no target for a proposal: only the stuff beside a
    proposal shows whether the proposal is as large as it should be.

    areas: f64 [R], of the proposals; semantic: [H, W], where labels T..K-1 are stuff.
    -> f64 [R, K - T].
    """
    stuff = np.where(semantic >= num_things, semantic.astype(np.int64) - num_things, -1)
    common = mask_overlaps(labels, members, stuff, num_classes - num_things)
    boxes = SegmentMasks.of_image(labels, torch.from_numpy(members)).boxes()
    x0, y0, x1, y1 = boxes.numpy().astype(np.int64).T
    pixels_in_box = np.zeros_like(common)
    for kind in np.flatnonzero(np.bincount(stuff.ravel() + 1, minlength=1)[1:]):
        # Integral image; int32, because images have fewer than 2**31 pixels.
        sums = np.zeros((labels.shape[0] + 1, labels.shape[1] + 1), dtype=np.int32)
        np.cumsum(np.cumsum(stuff == kind, axis=1, dtype=np.int32), axis=0, out=sums[1:, 1:])
        pixels_in_box[:, kind] = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return _iou(common, areas[:, None], pixels_in_box)


def proposal_overlaps(labels: NDArray[np.int32], members: Bools, areas: Floats) -> Overlaps:
    """Return a function that computes the IoU of one proposal with all. areas: f64 [R]."""
    table = members.astype(np.float64)
    pixels = _superpixel_areas(labels, members.shape[1])
    return lambda row: _iou(table @ (table[row] * pixels), areas, areas[row])


def segment_pursuit(
    purity: Floats,
    areas: Floats,
    overlaps: Overlaps,
    min_purity: float = 0.6,
    overlap: float = 0.2,
    rng: np.random.Generator | None = None,
) -> Ints:
    """Select a few large segments that represent a class of stuff.

    Candidates are the proposals of at least `min_purity`. The largest is selected (with `rng`: one
    drawn with probability proportional to its area), the candidates that overlap it by an IoU above
    `overlap` are dropped, and so on with the remaining ones.

    The paper stops when the remaining candidates are smaller than the mean area of the initial
    ones. This is read as: when even the largest remaining one is below this mean. Until then, any
    remaining candidate may be drawn, including small ones.

    purity: f64 [R], of one class of stuff; areas: f64 [R]. -> i64 [n], in the order of selection.
    """
    candidates = np.flatnonzero((purity >= min_purity) & (areas > 0))
    min_area = areas[candidates].mean() if len(candidates) else 0.0
    selected: list[int] = []
    while len(candidates) and areas[candidates].max() >= min_area:
        candidate_areas = areas[candidates]
        if rng is None:
            row = int(candidates[candidate_areas.argmax()])
        else:
            row = int(rng.choice(candidates, p=candidate_areas / candidate_areas.sum()))
        selected.append(row)
        candidates = candidates[(candidates != row) & (overlaps(row)[candidates] <= overlap)]
    return np.array(selected, dtype=np.int64)


def match_segments(
    proposals: SegmentProposals, truth: SegmentGroundTruth, num_things: int, num_classes: int
) -> SegmentMatches:
    """Compute all overlaps that labels and sampling depend on.

    Raises ValueError for a label of the ground truth that is out of range.
    """
    labels = proposals.labels
    members = proposals.members
    semantic = truth.semantic
    if semantic is not None and semantic.max(initial=-1) >= num_classes:
        raise ValueError(
            f"the semantic map has the label {semantic.max()}, there are {num_classes} classes"
        )
    if len(truth.labels) and not (truth.labels.min() >= 0 and truth.labels.max() < num_things):
        raise ValueError(
            f"things have labels {truth.labels.min()}..{truth.labels.max()}, there are"
            f" {num_things} classes of things"
        )
    areas = segment_areas(labels, members)
    ious = thing_ious(labels, members, areas, truth.masks)
    ious[:, truth.iscrowd] = 0
    crowd_share = np.zeros(len(members))
    if truth.iscrowd.any():
        crowds = np.where(truth.masks[truth.iscrowd].any(axis=0), 0, -1)
        crowd_share = mask_overlaps(labels, members, crowds, 1)[:, 0] / np.maximum(areas, 1)
    if semantic is None:
        purity = np.zeros((len(members), num_classes - num_things))
    else:
        purity = stuff_purity(labels, members, areas, semantic, num_things, num_classes)
    has_things = bool(truth.masks[~truth.iscrowd].any())
    return SegmentMatches(areas, ious, truth.labels, has_things, purity, crowd_share)


def assign_proposal_labels(
    matches: SegmentMatches,
    num_things: int,
    num_classes: int,
    positive_iou: float = 0.5,
    min_purity: float = 0.6,
) -> Ints:
    """Assign each proposal the class that it matches best: the answer of a perfect classifier.

    The class of the thing with the highest IoU, if that is at least `positive_iou`; otherwise the
    stuff with the highest purity, if that is at least `min_purity`; otherwise background K.
    -> i64 [R].
    """
    out = np.full(len(matches.areas), num_classes, dtype=np.int64)
    stuff_labels = np.arange(num_things, num_classes)
    # Things come last, so that they replace stuff.
    for score, classes, min_score in (
        (matches.purity, stuff_labels, min_purity),
        (matches.thing_ious, matches.thing_labels, positive_iou),
    ):
        if score.shape[1]:
            best = score.argmax(axis=1)
            out = np.where(score[np.arange(len(score)), best] >= min_score, classes[best], out)
    return out


def append_ground_truth(proposals: SegmentProposals, masks: Bools) -> SegmentProposals:
    """Append masks, bool [G, H, W], to the proposals.

    Superpixels are split where the outlines of the masks cross them: members [R + G, S'].
    """
    if not len(masks):
        return proposals
    labels = proposals.labels.ravel()
    inside = masks.reshape(len(masks), proposals.labels.size)
    # A pixel's piece stands for its superpixel and the set of masks that contain it. Pieces are
    # renumbered without gaps after each byte of this set, so that the numbers stay small.
    piece = labels.astype(np.int64) + 1
    for byte in np.packbits(inside, axis=0):
        piece = piece * 256 + byte
        piece = (np.cumsum(np.bincount(piece) > 0) - 1)[piece]
    first = np.unique(piece, return_index=True)[1]
    superpixel_of_piece = labels[first]
    members_of_masks = inside[:, first]
    keep = (superpixel_of_piece >= 0) | members_of_masks.any(axis=0)
    number = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    # The added last column, False, is for the label -1.
    members = np.pad(proposals.members, ((0, 0), (0, 1)))[:, superpixel_of_piece]
    return SegmentProposals(
        number[piece].reshape(proposals.labels.shape),
        np.concatenate([members, members_of_masks])[:, keep],
    )


class SegmentSampler:
    """Sample at most `num_samples` proposals of an image that a classifier learns from.

    Things: a proposal is positive for the thing that it overlaps most, if their mask IoU is at
    least `positive_iou`.

    Stuff: of the proposals whose purity for a class is at least `min_purity`, those that
    `segment_pursuit` draws, anew at each call (stuff_rule "pursuit"), or the same number, drawn
    uniformly ("random"). Positive things are no candidates.

    Negatives: the highest IoU with things is in [low, high) of `negative_iou`, and the purity for
    all stuff is below `max_negative_purity`, unless crowds cover more than `crowd_overlap` of the
    proposal. `low` excludes proposals that are far from all things; in an image without things it
    counts as 0, because there would be no negatives otherwise.

    All other proposals are ignored.

    num_things, num_classes: T and K.
    settings: the thresholds and shares that are named above; None: their defaults.
    """

    def __init__(
        self, num_things: int, num_classes: int, settings: SamplerSettings | None = None
    ) -> None:
        self.num_things = num_things
        self.num_classes = num_classes
        self.settings = settings or SamplerSettings()

    def __call__(
        self, proposals: SegmentProposals, truth: SegmentGroundTruth, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Sample proposals: a function of the arguments and the state of `rng`.

        -> rows i64 [n], ascending, and their labels i64 [n] in 0..K. With `append_truth`, rows from
        R on are those of `append_ground_truth(proposals, truth.masks)`.
        """
        matches = self.match(proposals, truth)
        labels_of_proposals = self.assign_labels(matches)
        is_positive = ~truth.iscrowd & truth.masks.any(axis=(1, 2)) & self.settings.append_truth
        labels_of_truth = np.where(is_positive, truth.labels, IGNORE_LABEL)
        labels = np.concatenate([labels_of_proposals, labels_of_truth])
        things = np.flatnonzero((labels >= 0) & (labels < self.num_things))
        things = _subsample(
            things, int(self.settings.num_samples * self.settings.thing_fraction), rng
        )
        stuff = self.sample_stuff(proposals, matches, labels_of_proposals, rng)
        stuff = _subsample(
            stuff, int(self.settings.num_samples * self.settings.stuff_fraction), rng
        )
        negatives = np.flatnonzero(labels == self.num_classes)
        negatives = _subsample(negatives, self.settings.num_samples - len(things) - len(stuff), rng)
        rows = np.sort(np.concatenate([things, stuff, negatives]))
        return rows, labels[rows]

    def match(self, proposals: SegmentProposals, truth: SegmentGroundTruth) -> SegmentMatches:
        """Compute the overlaps of the proposals with the ground truth."""
        return match_segments(proposals, truth, self.num_things, self.num_classes)

    def assign_labels(self, matches: SegmentMatches) -> Ints:
        """Assign the label as which each proposal may be drawn: 0..K or IGNORE_LABEL, i64 [R]."""
        labels = assign_proposal_labels(
            matches,
            self.num_things,
            self.num_classes,
            self.settings.positive_iou,
            self.settings.min_purity,
        )
        low, high = self.settings.negative_iou
        best_iou = matches.thing_ious.max(axis=1, initial=0)
        best_purity = matches.purity.max(axis=1, initial=0)
        min_iou = low if matches.has_things else 0
        is_negative = (best_iou >= min_iou) & (best_iou < high) & (matches.areas > 0)
        is_negative &= best_purity < self.settings.max_negative_purity
        is_negative &= matches.crowd_share <= self.settings.crowd_overlap
        is_background = labels == self.num_classes
        return np.where(is_background & ~is_negative, IGNORE_LABEL, labels)

    def sample_stuff(
        self,
        proposals: SegmentProposals,
        matches: SegmentMatches,
        labels: Ints,
        rng: np.random.Generator | None = None,
    ) -> Ints:
        """Select the positives of all classes of stuff, class by class: rows i64 [n].

        labels: of `assign_labels`. Without `rng`, pursuit selects the largest candidates, whatever
        the rule: always the same ones, for classifiers that are fitted once (SVM).
        """
        is_stuff = (labels >= self.num_things) & (labels < self.num_classes)
        classes = np.unique(labels[is_stuff])
        if not len(classes):
            return np.zeros(0, dtype=np.int64)
        overlaps = proposal_overlaps(proposals.labels, proposals.members, matches.areas)
        rows_of_classes: list[Ints] = []
        for label in classes.tolist():
            purity = np.where(labels == label, matches.purity[:, label - self.num_things], 0)
            rows = segment_pursuit(
                purity,
                matches.areas,
                overlaps,
                self.settings.min_purity,
                self.settings.overlap,
                rng,
            )
            if rng is not None and self.settings.stuff_rule == "random":
                candidates = np.flatnonzero(labels == label)
                rows = rng.choice(candidates, len(rows), replace=False)
            rows_of_classes.append(rows)
        return np.concatenate(rows_of_classes)


def _subsample(rows: Ints, number: int, rng: np.random.Generator) -> Ints:
    """Draw at most `number` of the rows, uniformly and without replacement."""
    return rows if len(rows) <= number else rng.choice(rows, number, replace=False)


def _superpixel_areas(labels: NDArray[np.int32], size: int) -> Floats:
    """Count the pixels of each superpixel: f64 [size]."""
    return np.bincount(labels.ravel() + 1, minlength=size + 1)[1:].astype(np.float64)


def _iou(common: Floats, first: Floats, second: NDArray[np.number]) -> Floats:
    """Compute IoU from shared pixels and areas; 0 where there are no pixels at all."""
    return np.asarray(common / np.maximum(first + second - common, 1))
