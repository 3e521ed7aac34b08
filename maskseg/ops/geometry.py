"""The axis-aligned map behind flips, resizes and crops of images, boxes, masks and keypoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class AxisAlignedTransform:
    """An axis-aligned map into a new frame: x' = scale_x * x + shift_x, and y likewise.

    height, width: size of the new frame in pixels, to which the result is clipped.
    """

    scale_x: float
    shift_x: float
    scale_y: float
    shift_y: float
    height: int
    width: int

    @classmethod
    def flip_x(cls, height: int, width: int) -> AxisAlignedTransform:
        """Left-right flip of a [height, width] frame."""
        return cls(-1.0, float(width), 1.0, 0.0, height, width)

    @classmethod
    def flip_y(cls, height: int, width: int) -> AxisAlignedTransform:
        """Up-down flip of a [height, width] frame."""
        return cls(1.0, 0.0, -1.0, float(height), height, width)

    @classmethod
    def resize(
        cls, height: int, width: int, new_height: int, new_width: int
    ) -> AxisAlignedTransform:
        """Resize of a [height, width] frame to [new_height, new_width]."""
        return cls(new_width / width, 0.0, new_height / height, 0.0, new_height, new_width)

    @classmethod
    def crop(cls, left: int, top: int, height: int, width: int) -> AxisAlignedTransform:
        """Crop of a [height, width] window at (left, top)."""
        return cls(1.0, -float(left), 1.0, -float(top), height, width)

    def sample(self, pixels: NDArray[Scalar], outside: int) -> NDArray[Scalar]:
        """Nearest-neighbor resampling of a label map [H, W] to the new frame.

        Each new pixel takes the value at its centre; `outside` where that is beyond the map.
        """
        y = (np.arange(self.height) + 0.5 - self.shift_y) / self.scale_y
        x = (np.arange(self.width) + 0.5 - self.shift_x) / self.scale_x
        row = np.floor(y).astype(np.int64)
        column = np.floor(x).astype(np.int64)
        height, width = pixels.shape
        clipped_row = row.clip(0, height - 1)
        clipped_column = column.clip(0, width - 1)
        sampled: NDArray[Scalar] = pixels[clipped_row[:, None], clipped_column]
        sampled[clipped_row != row] = outside
        sampled[:, clipped_column != column] = outside
        return sampled

    @property
    def mirrors(self) -> bool:
        """Whether the transform exchanges left and right."""
        return self.scale_x * self.scale_y < 0

    def points(self, points: Tensor, clip: bool = True) -> Tensor:
        """Transform points f32 [..., 3] (x, y, visibility or score).

        Points whose third value is 0 become zeros, and with `clip` also those outside the frame.
        """
        x = points[..., 0] * self.scale_x + self.shift_x
        y = points[..., 1] * self.scale_y + self.shift_y
        valid = points[..., 2] > 0
        if clip:
            valid = valid & (x >= 0) & (x <= self.width) & (y >= 0) & (y <= self.height)
        return torch.stack([x, y, points[..., 2]], dim=-1) * valid[..., None]

    def transform_and_clip_boxes(self, boxes: Tensor) -> tuple[Tensor, NDArray[np.bool_]]:
        """The result of `boxes` for tensors on the CPU, and which boxes were clipped, bool [n].

        In numpy, which takes a fifth of the time of tensor operations for a few boxes.
        """
        corners = boxes.numpy().reshape(-1, 2, 2)
        corners = corners * np.array([self.scale_x, self.scale_y], np.float32)
        corners += np.array([self.shift_x, self.shift_y], np.float32)
        ends = np.stack([corners.min(axis=1), corners.max(axis=1)], axis=1)
        limit = np.array([self.width, self.height], np.float32)
        clipped = np.clip(ends, np.float32(0), limit)
        return torch.from_numpy(clipped.reshape(-1, 4)), (clipped != ends).any(axis=(1, 2))

    def boxes(self, boxes: Tensor, clip: bool = True) -> Tensor:
        """Transform boxes f32 [n, 4]; `clip` them to the frame (a box outside becomes empty)."""
        x = (boxes[:, 0::2] * self.scale_x + self.shift_x).sort(dim=1).values
        y = (boxes[:, 1::2] * self.scale_y + self.shift_y).sort(dim=1).values
        if clip:
            x = x.clamp(0, self.width)
            y = y.clamp(0, self.height)
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
