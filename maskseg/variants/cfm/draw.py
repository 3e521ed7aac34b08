"""Draw the segments of a sample that a classifier learns from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from maskseg.data.sample import Sample
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.variants.cfm.sampling import (
    IGNORE_LABEL,
    Ints,
    SegmentGroundTruth,
    SegmentSampler,
    append_ground_truth,
)
from maskseg.variants.cfm.settings import SamplerSettings


class FixedSegmentSampler(SegmentSampler):
    """Sample the segments for a classifier that is fitted once (SVM); only negatives are random.

    R-CNN's rule. Positives: the ground-truth masks of things (rows of `append_ground_truth`), and
    all stuff that segment pursuit selects without random draws. Negatives: at most `negatives`
    segments whose highest IoU with things and whose purity for all stuff are below
    `negative_below`. All other segments are ignored.

    base: defines what stuff and crowds are.

    Raises UserError for `negatives` or `negative_below` out of range.
    """

    def __init__(self, base: SegmentSampler, negatives: int, negative_below: float) -> None:
        settings = base.settings
        max_below = min(settings.positive_iou, settings.min_purity)
        if negatives < 1 or not 0 < negative_below <= max_below:
            raise UserError(
                "fit.negatives must be at least 1, fit.negative_below above 0 and at most"
                f" {max_below} (where segments are positive), not {negatives} and {negative_below}"
            )
        super().__init__(
            base.num_things,
            base.num_classes,
            SamplerSettings(
                negatives,
                positive_iou=settings.positive_iou,
                negative_iou=(0.0, negative_below),
                min_purity=settings.min_purity,
                max_negative_purity=negative_below,
                overlap=settings.overlap,
                crowd_overlap=settings.crowd_overlap,
            ),
        )

    def __call__(
        self, proposals: SegmentProposals, truth: SegmentGroundTruth, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Sample proposals: rows i64 [n], ascending, and their labels i64 [n] in 0..K."""
        matches = self.match(proposals, truth)
        labels = self.assign_labels(matches)
        things = np.flatnonzero(~truth.iscrowd & truth.masks.any(axis=(1, 2)))
        negatives = np.flatnonzero(labels == self.num_classes)
        if len(negatives) > self.settings.num_samples:
            negatives = rng.choice(negatives, self.settings.num_samples, replace=False)
        stuff = self.sample_stuff(proposals, matches, labels)
        rows = np.sort(np.concatenate([negatives, stuff, len(proposals) + things]))
        return rows, np.concatenate([labels, truth.labels])[rows]


class DrawSegments:
    """A transform that labels the segments from which a classifier learns.

    training: keep those segments alone, and with them the masks of the ground truth where the
        sampler adds these. Otherwise all segments stay, and no others, as the ground truth must
        not be given to a model that is tested.
    """

    def __init__(self, sampler: SegmentSampler, training: bool) -> None:
        self.sampler = sampler
        self.training = training

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """The sample with `Sample.segment_labels`."""
        if sample.segments is None:
            return sample
        truth = _ground_truth(sample)
        rows, labels = self.sampler(sample.segments, truth, rng)
        if not self.training:
            return replace(sample, segment_labels=self._labels_of_all(sample, rows, labels))
        segments = sample.segments
        if self.sampler.settings.append_truth:
            segments = append_ground_truth(segments, truth.masks)
        drawn = SegmentProposals(segments.labels, segments.members[rows])
        return replace(sample, segments=drawn, segment_labels=torch.from_numpy(labels))

    def _labels_of_all(self, sample: Sample, rows: Ints, labels: Ints) -> Tensor:
        """i64 [R]: the labels of the drawn segments, IGNORE_LABEL for the others."""
        assert sample.segments is not None
        labels_of_all = np.full(len(sample.segments), IGNORE_LABEL, dtype=np.int64)
        is_proposal = rows < len(labels_of_all)
        labels_of_all[rows[is_proposal]] = labels[is_proposal]
        return torch.from_numpy(labels_of_all)


def _ground_truth(sample: Sample) -> SegmentGroundTruth:
    height, width = sample.size
    masks = np.zeros((0, height, width), dtype=bool)
    if sample.masks is not None and len(sample.masks):
        masks = sample.masks.to_bitmaps()
    semantic = None if sample.semantic is None else sample.semantic.numpy()
    return SegmentGroundTruth(
        masks, sample.labels.numpy()[: len(masks)], sample.iscrowd.numpy()[: len(masks)], semantic
    )
