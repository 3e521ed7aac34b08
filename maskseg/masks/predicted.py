"""Predicted masks: grids of probabilities in the frames of their boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from maskseg.masks.base import Masks, Rle, rle_iou
from maskseg.ops import rle as runs
from maskseg.ops.geometry import Geometry
from maskseg.ops.paste import paste_counts, resample


@dataclass(frozen=True)
class SoftMasks:
    """Predicted masks: probabilities on a grid over each box.

    grids: f32 [n, S, S]; grid_boxes: f32 [n, 4], the box that the grid covers; frames: i64 [n, 2] (height, width);
    paste rule and interpolation as in `ops.paste.paste_crop`; a pixel is set where the resampled value is at least `threshold`.
    """

    grids: Tensor
    grid_boxes: Tensor
    frames: Tensor
    paste_rule: str = "continuous"
    interpolation: str = "bilinear"
    threshold: float = 0.5

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: Tensor) -> SoftMasks:
        return replace(
            self,
            grids=self.grids[index],
            grid_boxes=self.grid_boxes[index],
            frames=self.frames[index],
        )

    def to(self, device: torch.device | str) -> SoftMasks:
        return replace(
            self,
            grids=self.grids.to(device),
            grid_boxes=self.grid_boxes.to(device),
            frames=self.frames.to(device),
        )

    def warp(self, geometry: Geometry) -> SoftMasks:
        g = geometry
        dims = [d for d, scale in ((2, g.scale_x), (1, g.scale_y)) if scale < 0]
        scale = self.grid_boxes.new_tensor([g.scale_x, g.scale_y])
        shift = self.grid_boxes.new_tensor([g.shift_x, g.shift_y])
        corners = (
            self.grid_boxes.view(-1, 2, 2) * scale + shift
        )  # not clipped: the grid covers the whole box
        boxes = corners.sort(dim=1).values.view(-1, 4)
        frames = torch.tensor([[g.height, g.width]], device=self.frames.device).expand(len(self), 2)
        return replace(
            self,
            grids=self.grids.flip(dims) if dims else self.grids,
            grid_boxes=boxes,
            frames=frames,
        )

    def boxes(self) -> Tensor:
        found = [coco_mask.toBbox(r) for r in self.to_rle()]
        boxes = np.array(found, dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return torch.from_numpy(boxes)

    def area(self) -> Tensor:
        return torch.tensor([float(coco_mask.area(r)) for r in self.to_rle()], dtype=torch.float32)

    def iou(self, other: Masks) -> Tensor:
        return rle_iou(self.to_rle(), other.to_rle())

    def crop_resize(self, boxes: Tensor, size: int) -> Tensor:
        steps = (torch.arange(size, device=self.grids.device, dtype=self.grids.dtype) + 0.5) / size
        boxes_here = boxes.to(self.grids)
        low, extent = (
            self.grid_boxes[:, :2],
            (self.grid_boxes[:, 2:] - self.grid_boxes[:, :2]).clamp(min=1e-6),
        )
        points = boxes_here[:, None, :2] + steps[:, None] * (
            boxes_here[:, None, 2:] - boxes_here[:, None, :2]
        )
        grid = (points - low[:, None]) / extent[:, None] * self.grids.shape[-1] - 0.5
        return (
            resample(self.grids, grid[..., 0], grid[..., 1], self.interpolation)
            .clamp(0, 1)
            .to(boxes.device)
        )

    def to_rle(self) -> list[Rle]:
        """No bitmap is made: bilinear masks are encoded from where they cross the threshold, bicubic ones from the pixels of their crops."""
        here = self.to("cpu")
        rules = self.paste_rule, self.interpolation, self.threshold
        texts = runs.strings_from_counts(
            *paste_counts(here.grids.detach(), here.grid_boxes.detach(), here.frames, *rules)
        )
        return [
            {"size": size, "counts": text}
            for size, text in zip(here.frames.tolist(), texts, strict=True)
        ]
