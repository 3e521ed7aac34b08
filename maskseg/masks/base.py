"""The Protocol of all kinds of masks, and COCO's compressed run-length encoding (RLE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, TypedDict, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from maskseg.ops import rle as rle_ops
from maskseg.ops.geometry import AxisAlignedTransform

Floats = NDArray[np.float64]

_AREA_CHUNK = 128  # masks per call: `area` of more than 255 overflows inside pycocotools


class Rle(TypedDict):
    """Compressed RLE, as in COCO's result files. size: height, width."""

    size: list[int]
    counts: str


@runtime_checkable
class Masks(Protocol):
    """n masks, each in a frame of (height, width) pixels."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Self:
        """Select masks by an i64 or boolean tensor."""

    def to(self, device: torch.device | str) -> Self: ...
    def area(self) -> Tensor:
        """Number of pixels of each mask inside its frame, f32 [n]."""

    def boxes(self) -> Tensor:
        """Tight boxes xyxy, f32 [n, 4]; zeros for an empty mask."""

    def iou(self, other: Masks) -> Tensor:
        """Intersection over union with each mask of `other`, f32 [n, m]."""

    def transform(self, geometry: AxisAlignedTransform) -> Self:
        """Transform the masks into the frame of `geometry`."""

    def crop_and_resize(self, boxes: Tensor, size: int) -> Tensor:
        """Crop mask i by boxes[i] and resize it to size x size.

        boxes: f32 [n, 4]. Returns f32 [n, size, size] in [0, 1] on the device of the boxes.
        """

    def to_rle(self) -> list[Rle]:
        """Compressed RLE of each mask in its frame."""

    def to_bitmaps(self) -> NDArray[np.bool_]:
        """Masks of one frame as bool [n, height, width]; [0, 0, 0] if there are no masks."""


def rle_to_bitmaps(rles: Sequence[Rle]) -> NDArray[np.bool_]:
    """Decode masks of one frame to bool [n, height, width]; [0, 0, 0] if there are no masks."""
    if not rles:
        return np.zeros((0, 0, 0), dtype=bool)
    return np.asarray(coco_mask.decode(list(rles)).astype(bool).transpose(2, 0, 1))


def decode_crop(rle: Rle) -> tuple[NDArray[np.bool_], int, int]:
    """Decode the part of a mask within its tight box, without the rest of the image.

    Returns bool [h, w], and the left column and top row of the box; [0, 0] for an empty mask.
    """
    ends = np.cumsum(rle_ops.counts_from_string(rle["counts"].encode()))
    column, top, bottom = rle_ops.column_spans(ends, rle["size"][0])
    if not len(column):
        return np.zeros((0, 0), dtype=bool), 0, 0
    left = int(column.min())
    first_row = int(top.min())
    changes = np.zeros((int(bottom.max()) - first_row + 1, int(column.max()) - left + 1), np.int8)
    changes[top - first_row, column - left] += 1
    changes[bottom - first_row, column - left] -= 1
    return np.cumsum(changes, axis=0, dtype=np.int8)[:-1].astype(bool), left, first_row


def rle_areas(rles: Sequence[Rle]) -> NDArray[np.int64]:
    """The number of pixels of each mask, i64 [n]."""
    areas = [np.zeros(0, dtype=np.int64)]
    for start in range(0, len(rles), _AREA_CHUNK):
        chunk = coco_mask.area(list(rles[start : start + _AREA_CHUNK]))
        areas.append(np.asarray(chunk, dtype=np.int64))
    return np.concatenate(areas)


def rle_iou(first: Sequence[Rle], second: Sequence[Rle]) -> Tensor:
    """IoU of every pair, f32 [n, m]."""
    if not first or not second:
        return torch.zeros(len(first), len(second))
    iou = coco_mask.iou(list(first), list(second), np.zeros(len(second), dtype=np.uint8))
    return torch.from_numpy(np.asarray(iou, dtype=np.float32))


def rle_from_counts(counts: NDArray[np.int64], height: int, width: int) -> Rle:
    """Encode run lengths as compressed RLE, with `counts` as a `str` for JSON."""
    (text,) = rle_ops.strings_from_counts(counts, np.array([len(counts)]))
    return {"size": [height, width], "counts": text}


def encode_rle(mask: NDArray[np.bool_]) -> tuple[Rle, list[int]]:
    """Encode a mask, bool [height, width], as compressed RLE.

    Returns the RLE and the tight box x, y, width, height; zeros for an empty mask.
    """
    height, width = mask.shape
    rle = rle_from_counts(rle_ops.counts_from_crop(mask, 0, 0, height, width), height, width)
    return rle, coco_mask.toBbox(rle).astype(int).tolist()
