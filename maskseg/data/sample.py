"""One image with its ground truth, and the transforms that keep the two consistent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.superpixel import SegmentProposals
from maskseg.ops.geometry import AxisAlignedTransform

MIN_SIDE = 1e-3  # pixels; boxes with a shorter side are dropped


@dataclass(frozen=True)
class Sample:
    """One image with its G objects.

    image: uint8 RGB [3, H, W].
    boxes: f32 [G, 4], xyxy in the frame of the image.
    labels: i64 [G].
    iscrowd: bool [G].
    masks: G masks, None where an object has none.
    image_id, file_name: those of the dataset.
    original_size: (height, width) of the file.
    read_errors: messages of the unreadable images that this one replaces.
    seed: determines what a model draws at random for this image.
    keypoints: f32 [G, P, 3], x, y, visibility; None where the data has none.
    flip_indices: i64 [P], the keypoint that each one becomes when the image is flipped.
    proposals: boxes f32 [R, 4] and scores f32 [R] of a proposal file.
    semantic: i16 [H, W], the class of each pixel, -1 for none.
    superpixels: i32 [H, W], of the transformed image, where the model asks for them.
    segments: R segment proposals with masks.
    segment_labels: i64 [R], the label that each segment is learnt with, -1 for not at all.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    iscrowd: Tensor
    masks: AnnotatedMasks | None
    image_id: int
    file_name: str
    original_size: tuple[int, int]
    read_errors: tuple[str, ...] = ()
    seed: int = 0
    keypoints: Tensor | None = None
    flip_indices: Tensor | None = None
    proposals: tuple[Tensor, Tensor] | None = None
    semantic: Tensor | None = None
    superpixels: Tensor | None = None
    segments: SegmentProposals | None = None
    segment_labels: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image in its present frame."""
        return self.image.shape[-2], self.image.shape[-1]

    def transform(
        self, image: Tensor, geometry: AxisAlignedTransform, min_pixels: float = 1.0
    ) -> Sample:
        """The sample with the transformed image; all that has a place in the image follows.

        An object that the new frame cuts gets the tight box of the visible part of its mask.
        It is dropped where fewer than `min_pixels` remain visible.
        """
        boxes, cut = geometry.transform_and_clip_boxes(self.boxes)
        masks = None if self.masks is None else self.masks.transform(geometry)
        sides = boxes.numpy()[:, 2:] - boxes.numpy()[:, :2]
        keep = (sides > MIN_SIDE).all(axis=1)
        if cut.any() and masks is not None:
            rows = torch.from_numpy(np.flatnonzero(cut))
            boxes[rows] = masks[rows].boxes()
            keep[cut] &= masks[rows].area().numpy() >= min_pixels
        elif cut.any():
            keep &= ~cut | (sides.prod(axis=1) >= min_pixels)
        sample = replace(
            self,
            image=image,
            boxes=boxes,
            masks=masks,
            keypoints=self._transform_keypoints(geometry),
            proposals=self._transform_proposals(geometry),
            semantic=self._transform_semantic(geometry),
            segments=self._transform_segments(geometry),
        )
        return sample if keep.all() else sample.select(torch.from_numpy(np.flatnonzero(keep)))

    def _transform_keypoints(self, geometry: AxisAlignedTransform) -> Tensor | None:
        if self.keypoints is None:
            return None
        points = geometry.points(self.keypoints)
        if geometry.mirrors and self.flip_indices is not None:
            return points[:, self.flip_indices]
        return points

    def _transform_proposals(self, geometry: AxisAlignedTransform) -> tuple[Tensor, Tensor] | None:
        """The proposals that remain within the frame."""
        if self.proposals is None:
            return None
        boxes, scores = self.proposals
        boxes = geometry.boxes(boxes)
        keep = ((boxes[:, 2:] - boxes[:, :2]) > MIN_SIDE).all(dim=1)
        return boxes[keep], scores[keep]

    def _transform_semantic(self, geometry: AxisAlignedTransform) -> Tensor | None:
        if self.semantic is None:
            return None
        return torch.from_numpy(geometry.sample(self.semantic.numpy(), -1))

    def _transform_segments(self, geometry: AxisAlignedTransform) -> SegmentProposals | None:
        if self.segments is None:
            return None
        return replace(self.segments, labels=geometry.sample(self.segments.labels, -1))

    def select(self, index: Tensor) -> Sample:
        """The sample with some of its objects, by an i64 index."""
        return replace(
            self,
            boxes=self.boxes[index],
            labels=self.labels[index],
            iscrowd=self.iscrowd[index],
            masks=None if self.masks is None else self.masks[index],
            keypoints=None if self.keypoints is None else self.keypoints[index],
        )
