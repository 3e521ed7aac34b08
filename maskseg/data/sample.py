"""One image with its truth, and the moves that keep the two together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maskseg.masks.annotated import FileMasks
from maskseg.masks.superpixel import SegmentProposals
from maskseg.ops.geometry import Geometry


@dataclass(frozen=True)
class Sample:
    """image: uint8 RGB [3, H, W]; boxes: f32 [G, 4] in its frame; labels: i64 [G]; crowd: bool [G]; masks: G masks, None without any;
    keypoints: f32 [G, P, 3] in its frame, None without any; mirrored: i64 [P], which point each is in a mirror;
    proposals: f32 [R, 4] and their scores f32 [R], of a file, None without one;
    image_id, name: of the data set; original_size: (height, width) of the file; skipped: messages of unreadable images that this one
    stands in for; seed: of what a model draws of it; semantic: i16 [H, W], the category id of each pixel, -1 for none, where the data has such
    maps; superpixels: i32 [H, W] of the image as it is after all moves, where they are asked for; segments: proposals with masks, of a store;
    drawn: i64 [R], what each of them is learnt as, -1 for not at all, where they were drawn from."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: FileMasks | None
    image_id: int
    name: str
    original_size: tuple[int, int]
    skipped: tuple[str, ...] = ()
    seed: int = 0
    keypoints: Tensor | None = None
    mirrored: Tensor | None = None
    proposals: tuple[Tensor, Tensor] | None = None
    semantic: Tensor | None = None
    superpixels: Tensor | None = None
    segments: SegmentProposals | None = None
    drawn: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image as it is now."""
        return self.image.shape[-2], self.image.shape[-1]

    def move(self, image: Tensor, geometry: Geometry, min_pixels: float = 1.0) -> Sample:
        """The sample with the moved image; boxes and masks follow `geometry`.

        An object that the new frame cuts gets the tight box of what is left of its mask, and goes where fewer than `min_pixels` are left.
        """
        boxes, cut = geometry.cut_boxes(self.boxes)
        masks = None if self.masks is None else self.masks.warp(geometry)
        extent = boxes.numpy()[:, 2:] - boxes.numpy()[:, :2]
        keep = (extent > 1e-3).all(axis=1)
        if cut.any() and masks is not None:
            rows = torch.from_numpy(np.flatnonzero(cut))
            boxes[rows] = masks[rows].boxes()
            keep[cut] &= masks[rows].area().numpy() >= min_pixels
        elif cut.any():
            keep &= ~cut | (extent.prod(axis=1) >= min_pixels)
        points, proposals = self._points(geometry), self._proposals(geometry)
        semantic = (
            None
            if self.semantic is None
            else torch.from_numpy(geometry.sample(self.semantic.numpy(), -1))
        )
        segments = (
            None
            if self.segments is None
            else replace(self.segments, labels=geometry.sample(self.segments.labels, -1))
        )
        moved = replace(
            self,
            image=image,
            boxes=boxes,
            masks=masks,
            keypoints=points,
            proposals=proposals,
            semantic=semantic,
            segments=segments,
        )
        return moved if keep.all() else moved.only(torch.from_numpy(np.flatnonzero(keep)))

    def _proposals(self, geometry: Geometry) -> tuple[Tensor, Tensor] | None:
        """Those that are left within the frame."""
        if self.proposals is None:
            return None
        boxes = geometry.boxes(self.proposals[0])
        keep = ((boxes[:, 2:] - boxes[:, :2]) > 1e-3).all(dim=1)
        return boxes[keep], self.proposals[1][keep]

    def _points(self, geometry: Geometry) -> Tensor | None:
        if self.keypoints is None:
            return None
        moved = geometry.points(self.keypoints)
        return moved[:, self.mirrored] if geometry.mirrors and self.mirrored is not None else moved

    def only(self, index: Tensor) -> Sample:
        """The sample with some of its objects."""
        masks = None if self.masks is None else self.masks[index]
        points = None if self.keypoints is None else self.keypoints[index]
        return replace(
            self,
            boxes=self.boxes[index],
            labels=self.labels[index],
            crowd=self.crowd[index],
            masks=masks,
            keypoints=points,
        )
