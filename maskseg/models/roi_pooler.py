"""Feature pooling in regions."""

from __future__ import annotations

from collections.abc import Mapping
from math import log2

from torch import Tensor, nn

from maskseg.ops.roi_align import assign_levels, roi_align_levels
from maskseg.structures import Features
from maskseg.values import BinCount, PositiveFloat, SamplingRatio, Size


class MultiLevelRoIAlign(nn.Module):
    """RoIAlign of each box on the pyramid level that fits its size (FPN, eq. 1).

    strides: of the levels it reads, by name, finest first.
    size: S, bins per side.
    sampling_ratio: sampling points per bin and direction; 0: as many as the bin has cells (2 in
    torchvision, 0 in detectron2).
    aligned: shift the boxes by half a cell, which is correct (detectron2); False is torchvision's
    choice.
    canonical_size: a box with sides of this length, in pixels, is assigned to the level of stride
    16.
    """

    max_stride = 32  # of the levels that a config reads by default: not of p6, as in FPN

    def __init__(
        self,
        strides: Mapping[str, Size],
        size: BinCount = 7,
        sampling_ratio: SamplingRatio = 2,
        aligned: bool = True,
        canonical_size: PositiveFloat = 224.0,
    ) -> None:
        super().__init__()
        self.strides = dict(strides)
        self.size = size
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.canonical_size = canonical_size

    def forward(self, features: Features, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Return [R, C, S, S] for boxes f32 [R, 4] and image_index i64 [R]."""
        strides = list(self.strides.values())
        lowest = int(log2(strides[0]))
        highest = int(log2(strides[-1]))
        level = assign_levels(boxes, lowest, highest, self.canonical_size) - lowest
        maps = [features[name] for name in self.strides]
        return roi_align_levels(
            maps, strides, boxes, image_index, level, self.size, self.sampling_ratio, self.aligned
        )
