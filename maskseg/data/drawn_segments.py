"""A sample whose segment proposals were drawn from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from maskseg.bottomup.proposals import SegmentProposals
from maskseg.data.sample import Sample
from maskseg.data.segment_sampling import IGNORED, SegmentSampler, SegmentTruth, with_truth
from maskseg.masks import rle_to_bitmaps


def draw_segments(sample: Sample, draw: SegmentSampler, rng: np.random.Generator, only: bool) -> Sample:
    """The sample with the labels of the segments that are learnt from (`Sample.drawn`).

    only: the other segments go, and the truth's own masks may be among those that stay; else all stay, and those alone: a model that is tested must
    not be given the truth.
    """
    assert sample.segments is not None
    truth = _truth(sample)
    rows, labels = draw(sample.segments, truth, rng)
    if only:
        segments = with_truth(sample.segments, truth.masks) if draw.append_truth else sample.segments
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
    return SegmentTruth(masks, sample.labels.numpy()[: len(masks)], sample.crowd.numpy()[: len(masks)], semantic)
