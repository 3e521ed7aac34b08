"""Samples -> batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from maskseg.data.rgbx import copy_to_planes
from maskseg.data.sample import Sample
from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.structures import Batch, Regions, Targets


def collate(samples: Sequence[Sample], divisor: int = 32) -> Batch:
    """Pad the images to one size and concatenate the targets.

    Images are padded with zeros at the right and the bottom, to the largest height and width,
    each rounded up to a multiple of `divisor` pixels.
    """
    sizes = torch.tensor([sample.size for sample in samples])
    height, width = (round_up(side, divisor) for side in sizes.amax(dim=0).tolist())
    return Batch(
        images=_pad_images(samples, height, width),
        sizes=sizes,
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        image_ids=[sample.image_id for sample in samples],
        file_names=[sample.file_name for sample in samples],
        targets=_concatenate_targets(samples),
        read_errors=list(chain.from_iterable(sample.read_errors for sample in samples)),
        seeds=torch.tensor([sample.seed for sample in samples]),
        proposals=_collate_proposals(samples),
        superpixels=_pad_maps([sample.superpixels for sample in samples], height, width),
        semantic=_pad_maps([sample.semantic for sample in samples], height, width),
    )


def round_up(value: int, divisor: int) -> int:
    """The smallest multiple of `divisor` that is not below `value`."""
    return -(-value // divisor) * divisor


def _pad_images(samples: Sequence[Sample], height: int, width: int) -> Tensor:
    """-> uint8 [N, 3, height, width]."""
    images = torch.empty((len(samples), 3, height, width), dtype=torch.uint8)
    for canvas, sample in zip(images, samples, strict=True):
        bottom, right = sample.size
        copy_to_planes(canvas[:, :bottom, :right], sample.image)
        canvas[:, bottom:] = 0
        canvas[:, :bottom, right:] = 0
    return images


def _concatenate_targets(samples: Sequence[Sample]) -> Targets:
    """The objects of all images; masks and keypoints where every image has them."""
    counts = torch.tensor([len(sample.boxes) for sample in samples])
    masks = [sample.masks for sample in samples if sample.masks is not None]
    points = [sample.keypoints for sample in samples if sample.keypoints is not None]
    return Targets(
        torch.cat([sample.boxes for sample in samples]),
        torch.cat([sample.labels for sample in samples]),
        torch.repeat_interleave(torch.arange(len(samples)), counts),
        torch.cat([sample.iscrowd for sample in samples]),
        AnnotatedMasks.cat(masks) if len(masks) == len(samples) else None,
        torch.cat(points) if len(points) == len(samples) else None,
    )


def _pad_maps(maps: Sequence[Tensor | None], height: int, width: int) -> Tensor | None:
    """Integer maps [H, W] -> [N, height, width], padded with -1; None unless each image has one."""
    present = [m for m in maps if m is not None]
    if len(present) < len(maps):
        return None
    padded = torch.full((len(present), height, width), -1, dtype=present[0].dtype)
    for canvas, values in zip(padded, present, strict=True):
        canvas[: values.shape[0], : values.shape[1]] = values
    return padded


def _collate_proposals(samples: Sequence[Sample]) -> Regions | None:
    """The segments or proposals of all images as flat regions; None unless each image has some."""
    if all(sample.segments is not None for sample in samples):
        segments = [_segments_in_frame(sample, index) for index, sample in enumerate(samples)]
        return concatenate_regions(segments)
    proposals = [sample.proposals for sample in samples if sample.proposals is not None]
    if len(proposals) < len(samples):
        return None
    counts = torch.tensor([len(scores) for _, scores in proposals])
    return Regions(
        torch.cat([boxes for boxes, _ in proposals]),
        torch.repeat_interleave(torch.arange(len(proposals)), counts),
        torch.cat([scores for _, scores in proposals]),
    )


def _segments_in_frame(sample: Sample, index: int) -> Regions:
    """The segments that have pixels in the frame of the image."""
    assert sample.segments is not None
    regions = replace(segment_regions(sample.segments, index), labels=sample.segment_labels)
    has_pixels = regions.boxes[:, 2] > regions.boxes[:, 0]
    return regions[torch.nonzero(has_pixels).squeeze(1)]


def segment_regions(proposals: SegmentProposals, index: int = 0) -> Regions:
    """The segment proposals of one image as regions of image `index` of a batch.

    Their scores descend with their order.
    """
    masks = SegmentMasks.of_image(proposals.labels, torch.from_numpy(proposals.members))
    count = len(masks)
    scores = 1 - torch.arange(count, dtype=torch.float32) / max(count, 1)
    return Regions(masks.boxes(), torch.full((count,), index), scores, masks=masks)


def concatenate_regions(regions: Sequence[Regions]) -> Regions:
    """Regions with superpixel masks of several images as one batch. All have labels, or none."""
    masks = [r.masks for r in regions if isinstance(r.masks, SegmentMasks)]
    labels = [r.labels for r in regions if r.labels is not None]
    return Regions(
        torch.cat([r.boxes for r in regions]),
        torch.cat([r.image_index for r in regions]),
        torch.cat([r.scores for r in regions]),
        torch.cat(labels) if len(labels) == len(regions) else None,
        SegmentMasks.cat(masks),
    )
