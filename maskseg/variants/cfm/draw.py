"""A sample whose segment proposals were drawn from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from maskseg.data.sample import Sample
from maskseg.errors import UserError
from maskseg.masks.base import rle_to_bitmaps
from maskseg.masks.superpixel import SegmentProposals
from maskseg.variants.cfm.sampling import IGNORED, Ints, SegmentSampler, SegmentTruth, with_truth


class FixedSegments(SegmentSampler):
    """What a classifier that is fitted once (SVM) learns from, the same at each call but for the draw of negatives.

    Positives: the things' own masks alone (rows of `with_truth`), and of stuff all that pursuit takes without a draw. Negatives: `negatives` at most,
    of those whose best IoU with things and whose purity for all stuff are below `negative_below`. What is neither is left out: R-CNN's rule. `like`
    says what stuff and crowds are.
    """

    def __init__(self, like: SegmentSampler, negatives: int, negative_below: float) -> None:
        most = min(like.positive_iou, like.min_purity)
        if negatives < 1 or not 0 < negative_below <= most:
            told = f"{negatives} and {negative_below}"
            raise UserError(
                f"fit.negatives must be at least 1, fit.negative_below above 0 and at most {most} (where segments are positive), not {told}"
            )
        super().__init__(
            like.num_things,
            like.num_classes,
            negatives,
            positive_iou=like.positive_iou,
            negative_iou=(0.0, negative_below),
            min_purity=like.min_purity,
            max_negative_purity=negative_below,
            overlap=like.overlap,
            crowd_overlap=like.crowd_overlap,
        )

    def __call__(
        self, proposals: SegmentProposals, truth: SegmentTruth, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """-> rows i64 [n], ascending, and their labels i64 [n] in 0..K."""
        matches = self.match(proposals, truth)
        labels, first = self.labels(matches), len(proposals)
        things = np.flatnonzero(~truth.crowd & truth.masks.any(axis=(1, 2)))
        negatives = np.flatnonzero(labels == self.num_classes)
        if len(negatives) > self.num_samples:
            negatives = rng.choice(negatives, self.num_samples, replace=False)
        rows = np.sort(
            np.concatenate([negatives, self.stuff(proposals, matches, labels), first + things])
        )
        return rows, np.concatenate([labels, truth.labels])[rows]


def draw_segments(
    sample: Sample, draw: SegmentSampler, rng: np.random.Generator, only: bool
) -> Sample:
    """The sample with the labels of the segments that are learnt from (`Sample.drawn`).

    only: the other segments go, and the truth's own masks may be among those that stay; else all stay, and those alone: a model that is tested must
    not be given the truth.
    """
    assert sample.segments is not None
    truth = _truth(sample)
    rows, labels = draw(sample.segments, truth, rng)
    if only:
        segments = (
            with_truth(sample.segments, truth.masks) if draw.append_truth else sample.segments
        )
        kept = SegmentProposals(segments.labels, segments.members[rows])
        return replace(sample, segments=kept, drawn=torch.from_numpy(labels))
    found = np.full(len(sample.segments), IGNORED, dtype=np.int64)
    own = rows < len(found)
    found[rows[own]] = labels[own]
    return replace(sample, drawn=torch.from_numpy(found))


def _truth(sample: Sample) -> SegmentTruth:
    height, width = sample.size
    masks = np.zeros((0, height, width), dtype=bool)
    if sample.masks is not None and len(sample.masks):
        masks = rle_to_bitmaps(sample.masks.to_rle())
    semantic = None if sample.semantic is None else sample.semantic.numpy()
    return SegmentTruth(
        masks, sample.labels.numpy()[: len(masks)], sample.crowd.numpy()[: len(masks)], semantic
    )
