"""What every kind of masks offers, and COCO's run-length encoding of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from maskseg.ops import rle as runs
from maskseg.ops.geometry import Geometry

Rle = dict[str, Any]  # {"size": [height, width], "counts": str}, as in COCO's result files


Floats = NDArray[np.float64]


@runtime_checkable
class Masks(Protocol):
    """n masks, each in a frame of its own size."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Self:
        """Some of the masks, by an i64 or boolean tensor."""

    def to(self, device: torch.device | str) -> Self: ...
    def area(self) -> Tensor:
        """Pixels of each mask inside its frame, f32 [n]."""

    def boxes(self) -> Tensor:
        """Tight boxes xyxy, f32 [n, 4]; zeros for an empty mask."""

    def iou(self, other: Masks) -> Tensor:
        """Intersection over union with each mask of `other`, f32 [n, m]."""

    def warp(self, geometry: Geometry) -> Self:
        """The masks in the frame that `geometry` leads to."""

    def crop_resize(self, boxes: Tensor, size: int) -> Tensor:
        """Mask i cut out by boxes[i] and scaled to size x size, f32 [n, size, size] in [0, 1], on the boxes' device."""

    def to_rle(self) -> list[Rle]:
        """Compressed RLE of each mask in its frame."""


def rle_to_bitmaps(rles: Sequence[Rle]) -> NDArray[np.bool_]:
    """Masks of one frame as bool [n, height, width] (for pictures and other libraries); [0, 0, 0] where there is none."""
    if not rles:
        return np.zeros((0, 0, 0), dtype=bool)
    return np.asarray(coco_mask.decode(list(rles)).astype(bool).transpose(2, 0, 1))


def rle_iou(first: Sequence[Rle], second: Sequence[Rle]) -> Tensor:
    """IoU of every pair, f32 [n, m]."""
    if not first or not second:
        return torch.zeros(len(first), len(second))
    iou = coco_mask.iou(list(first), list(second), np.zeros(len(second), dtype=np.uint8))
    return torch.from_numpy(np.asarray(iou, dtype=np.float32))


def rle_from_counts(counts: NDArray[np.int64], height: int, width: int) -> Rle:
    """Run lengths -> compressed RLE with a `str`, as JSON wants it."""
    return {
        "size": [height, width],
        "counts": runs.strings_from_counts(counts, np.array([len(counts)]))[0],
    }


def encoded(mask: NDArray[np.bool_]) -> tuple[Rle, list[int]]:
    """bool [height, width] -> compressed RLE, and the tight box x, y, width, height; zeros for an empty mask."""
    rle = rle_from_counts(runs.counts_from_crop(mask, 0, 0, *mask.shape), *mask.shape)
    return rle, coco_mask.toBbox(rle).astype(int).tolist()
