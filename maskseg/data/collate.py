"""Samples -> batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from maskseg.data.rgbx import put
from maskseg.data.sample import Sample
from maskseg.masks.annotated import FileMasks
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.structures import Batch, Regions, Targets


def collate(samples: Sequence[Sample], divisor: int = 32) -> Batch:
    """Images padded with zeros at the right and the bottom to the largest, and to a multiple of `divisor`; targets made flat."""
    height, width = (-(-max(s.size[d] for s in samples) // divisor) * divisor for d in (0, 1))
    images = torch.empty((len(samples), 3, height, width), dtype=torch.uint8)
    for canvas, sample in zip(images, samples, strict=True):
        bottom, right = sample.size
        put(canvas[:, :bottom, :right], sample.image)
        canvas[:, bottom:] = 0
        canvas[:, :bottom, right:] = 0
    index = torch.repeat_interleave(
        torch.arange(len(samples)), torch.tensor([len(s.boxes) for s in samples])
    )
    masks = None
    if all(s.masks is not None for s in samples):
        masks = FileMasks.cat([s.masks for s in samples if s.masks is not None])
    points = [s.keypoints for s in samples if s.keypoints is not None]
    targets = Targets(
        torch.cat([s.boxes for s in samples]),
        torch.cat([s.labels for s in samples]),
        index,
        torch.cat([s.crowd for s in samples]),
        masks,
        torch.cat(points) if len(points) == len(samples) else None,
    )
    return Batch(
        images,
        torch.tensor([s.size for s in samples]),
        torch.tensor([s.original_size for s in samples]),
        [s.image_id for s in samples],
        [s.name for s in samples],
        targets,
        [message for s in samples for message in s.skipped],
        torch.tensor([s.seed for s in samples]),
        _proposals(samples),
        _maps([s.superpixels for s in samples], height, width),
        _maps([s.semantic for s in samples], height, width),
    )


def _maps(maps: Sequence[Tensor | None], height: int, width: int) -> Tensor | None:
    """Maps of numbers [H, W] -> one tensor [N, height, width], padded with -1; None unless each image has one."""
    found = [m for m in maps if m is not None]
    if len(found) < len(maps):
        return None
    padded = torch.full((len(found), height, width), -1, dtype=found[0].dtype)
    for canvas, own in zip(padded, found, strict=True):
        canvas[: own.shape[0], : own.shape[1]] = own
    return padded


def _proposals(samples: Sequence[Sample]) -> Regions | None:
    if all(s.segments is not None for s in samples):
        return concatenate_regions([_segments(sample, i) for i, sample in enumerate(samples)])
    found = [s.proposals for s in samples if s.proposals is not None]
    if len(found) < len(samples):
        return None
    index = torch.repeat_interleave(
        torch.arange(len(found)), torch.tensor([len(scores) for _, scores in found])
    )
    return Regions(
        torch.cat([boxes for boxes, _ in found]), index, torch.cat([scores for _, scores in found])
    )


def _segments(sample: Sample, index: int) -> Regions:
    """Those that have pixels in the frame."""
    assert sample.segments is not None
    regions = replace(segment_regions(sample.segments, index), labels=sample.drawn)
    boxes = regions.boxes
    return regions[torch.nonzero(boxes[:, 2] > boxes[:, 0]).squeeze(1)]


def segment_regions(proposals: SegmentProposals, index: int = 0) -> Regions:
    """The proposals of one image as regions of image `index` of a batch; scores fall with their order."""
    masks = SegmentMasks.of_image(proposals.labels, torch.from_numpy(proposals.members))
    count = len(masks)
    scores = 1 - torch.arange(count, dtype=torch.float32) / max(count, 1)
    return Regions(masks.boxes(), torch.full((count,), index), scores, masks=masks)


def concatenate_regions(regions: list[Regions]) -> Regions:
    """Regions of several images, with masks of superpixels, as one flat batch; all have labels, or none."""
    masks = [r.masks for r in regions if isinstance(r.masks, SegmentMasks)]
    labels = [r.labels for r in regions if r.labels is not None]
    return Regions(
        torch.cat([r.boxes for r in regions]),
        torch.cat([r.image_index for r in regions]),
        torch.cat([r.scores for r in regions]),
        torch.cat(labels) if len(labels) == len(regions) else None,
        SegmentMasks.cat(masks),
    )
