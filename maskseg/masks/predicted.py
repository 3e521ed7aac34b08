"""Predicted masks: grids of probabilities in the frames of their boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from maskseg.masks.base import Masks, Rle, rle_iou, rle_to_bitmaps
from maskseg.ops import rle as rle_ops
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.ops.paste import paste_counts, resample


@dataclass(frozen=True)
class MaskGrids:
    """Predicted masks: probabilities on a grid over each box.

    grids: f32 [n, S, S]; grid_boxes: f32 [n, 4], the box that the grid covers;
    frames: i64 [n, 2] (height, width); paste_mode, interpolation: as in `ops.paste.paste_crop`;
    threshold: a pixel is set if its resampled value is at least this.
    """

    grids: Tensor
    grid_boxes: Tensor
    frames: Tensor
    paste_mode: str = "continuous"
    interpolation: str = "bilinear"
    threshold: float = 0.5

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: Tensor) -> MaskGrids:
        return replace(
            self,
            grids=self.grids[index],
            grid_boxes=self.grid_boxes[index],
            frames=self.frames[index],
        )

    def to(self, device: torch.device | str) -> MaskGrids:
        return replace(
            self,
            grids=self.grids.to(device),
            grid_boxes=self.grid_boxes.to(device),
            frames=self.frames.to(device),
        )

    def transform(self, geometry: AxisAlignedTransform) -> MaskGrids:
        g = geometry
        flipped_dims = []
        if g.scale_x < 0:
            flipped_dims.append(2)
        if g.scale_y < 0:
            flipped_dims.append(1)
        scale = self.grid_boxes.new_tensor([g.scale_x, g.scale_y])
        shift = self.grid_boxes.new_tensor([g.shift_x, g.shift_y])
        # Not clipped to the frame: the grid covers the whole box.
        corners = self.grid_boxes.view(-1, 2, 2) * scale + shift
        frames = torch.tensor([[g.height, g.width]], device=self.frames.device)
        return replace(
            self,
            grids=self.grids.flip(flipped_dims) if flipped_dims else self.grids,
            grid_boxes=corners.sort(dim=1).values.view(-1, 4),
            frames=frames.expand(len(self), 2),
        )

    def boxes(self) -> Tensor:
        boxes = np.array([coco_mask.toBbox(rle) for rle in self.to_rle()], dtype=np.float32)
        boxes = boxes.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return torch.from_numpy(boxes)

    def area(self) -> Tensor:
        areas = [float(coco_mask.area(rle)) for rle in self.to_rle()]
        return torch.tensor(areas, dtype=torch.float32)

    def iou(self, other: Masks) -> Tensor:
        return rle_iou(self.to_rle(), other.to_rle())

    def crop_and_resize(self, boxes: Tensor, size: int) -> Tensor:
        steps = (torch.arange(size, device=self.grids.device, dtype=self.grids.dtype) + 0.5) / size
        windows = boxes.to(self.grids)
        extent = windows[:, None, 2:] - windows[:, None, :2]
        points = windows[:, None, :2] + steps[:, None] * extent
        grid_low = self.grid_boxes[:, :2]
        grid_extent = (self.grid_boxes[:, 2:] - self.grid_boxes[:, :2]).clamp(min=1e-6)
        samples = (points - grid_low[:, None]) / grid_extent[:, None]
        samples = samples * self.grids.shape[-1] - 0.5
        crops = resample(self.grids, samples[..., 0], samples[..., 1], self.interpolation)
        return crops.clamp(0, 1).to(boxes.device)

    def to_rle(self) -> list[Rle]:
        """Compressed RLE of each mask in its frame, without full-size bitmaps.

        Bilinear masks are encoded from where they cross the threshold, bicubic masks from the
        pixels of their crops.
        """
        masks = self.to("cpu")
        counts, lengths = paste_counts(
            masks.grids.detach(),
            masks.grid_boxes.detach(),
            masks.frames,
            self.paste_mode,
            self.interpolation,
            self.threshold,
        )
        texts = rle_ops.strings_from_counts(counts, lengths)
        return [
            {"size": size, "counts": text}
            for size, text in zip(masks.frames.tolist(), texts, strict=True)
        ]

    def to_bitmaps(self) -> NDArray[np.bool_]:
        return rle_to_bitmaps(self.to_rle())
