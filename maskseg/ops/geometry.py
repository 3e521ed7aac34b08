"""The one map that flips, resizes and crops share, so that an image, its boxes, masks and points always move alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """An axis-aligned map into a new frame: x' = scale_x * x + shift_x, y' alike; then cut at the frame's borders."""

    scale_x: float
    shift_x: float
    scale_y: float
    shift_y: float
    height: int
    width: int

    @classmethod
    def flip_x(cls, height: int, width: int) -> Geometry:
        """Left-right flip of a [height, width] frame."""
        return cls(-1.0, float(width), 1.0, 0.0, height, width)

    @classmethod
    def flip_y(cls, height: int, width: int) -> Geometry:
        """Up-down flip of a [height, width] frame."""
        return cls(1.0, 0.0, -1.0, float(height), height, width)

    @classmethod
    def resize(cls, height: int, width: int, new_height: int, new_width: int) -> Geometry:
        """From a [height, width] frame to a [new_height, new_width] one."""
        return cls(new_width / width, 0.0, new_height / height, 0.0, new_height, new_width)

    @classmethod
    def crop(cls, left: int, top: int, height: int, width: int) -> Geometry:
        """The window of that size at (left, top)."""
        return cls(1.0, -float(left), 1.0, -float(top), height, width)

    def sample(self, pixels: NDArray[Any], outside: int) -> NDArray[Any]:
        """A map of numbers [H, W] in the new frame: of each pixel there, what lies at its centre here; `outside` beyond the map's border."""
        row = np.floor((np.arange(self.height) + 0.5 - self.shift_y) / self.scale_y).astype(
            np.int64
        )
        column = np.floor((np.arange(self.width) + 0.5 - self.shift_x) / self.scale_x).astype(
            np.int64
        )
        rows, columns = (
            at.clip(0, side - 1) for at, side in zip((row, column), pixels.shape, strict=True)
        )
        moved: NDArray[Any] = pixels[rows[:, None], columns]
        moved[rows != row] = outside
        moved[:, columns != column] = outside
        return moved

    @property
    def mirrors(self) -> bool:
        """Whether left and right change places."""
        return self.scale_x * self.scale_y < 0

    def points(self, points: Tensor, cut: bool = True) -> Tensor:
        """Points f32 [..., 3] (x, y, visibility or score) in the new frame; those that are not there stay zeros, and, with `cut`, so do those
        outside of it."""
        x, y = (
            points[..., 0] * self.scale_x + self.shift_x,
            points[..., 1] * self.scale_y + self.shift_y,
        )
        there = points[..., 2] > 0
        if cut:
            there = there & (x >= 0) & (x <= self.width) & (y >= 0) & (y <= self.height)
        return torch.stack([x, y, points[..., 2]], dim=-1) * there[..., None]

    def cut_boxes(self, boxes: Tensor) -> tuple[Tensor, NDArray[np.bool_]]:
        """What `boxes` gives, and which of them the frame cut, bool [n]. For tensors on the CPU: a few boxes are moved five times as fast."""
        moved = boxes.numpy().reshape(-1, 2, 2) * np.array([self.scale_x, self.scale_y], np.float32)
        moved += np.array([self.shift_x, self.shift_y], np.float32)
        ends = np.stack([moved.min(axis=1), moved.max(axis=1)], axis=1)
        inside = np.clip(ends, np.float32(0), np.array([self.width, self.height], np.float32))
        return torch.from_numpy(inside.reshape(-1, 4)), (inside != ends).any(axis=(1, 2))

    def boxes(self, boxes: Tensor, cut: bool = True) -> Tensor:
        """Boxes f32 [n, 4] in the new frame, `cut` at its borders (a box outside becomes empty)."""
        x = (boxes[:, 0::2] * self.scale_x + self.shift_x).sort(dim=1).values
        y = (boxes[:, 1::2] * self.scale_y + self.shift_y).sort(dim=1).values
        if cut:
            x, y = x.clamp(0, self.width), y.clamp(0, self.height)
        return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
