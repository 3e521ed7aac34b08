"""Features of regions."""

from __future__ import annotations

from collections.abc import Mapping
from math import log2

from torch import Tensor, nn

from maskseg.ops.roi_align import assign_levels, roi_align_levels
from maskseg.structures import Features


class MultiLevelRoIAlign(nn.Module):
    """RoIAlign of each box on the pyramid level of its size.

    strides: of the levels it reads, by name, finest first. sampling_ratio: sample points a bin and direction, 0 for as many as pixels (2 in
    torchvision, 0 in detectron2). aligned: boxes are shifted by half a cell, the correct way (detectron2); False is torchvision's way.
    canonical_size: a box of that side in pixels goes to the level of stride 16.
    """

    def __init__(
        self,
        strides: Mapping[str, int],
        size: int = 7,
        sampling_ratio: int = 2,
        aligned: bool = True,
        canonical_size: float = 224.0,
    ) -> None:
        super().__init__()
        self.strides, self.size = dict(strides), size
        self.sampling_ratio, self.aligned, self.canonical_size = (
            sampling_ratio,
            aligned,
            canonical_size,
        )

    def forward(self, features: Features, boxes: Tensor, image_index: Tensor) -> Tensor:
        """boxes: f32 [R, 4]; image_index: i64 [R] -> [R, C, size, size]."""
        strides = list(self.strides.values())
        lowest, highest = int(log2(strides[0])), int(log2(strides[-1]))
        level = assign_levels(boxes, lowest, highest, self.canonical_size) - lowest
        maps = [features[name] for name in self.strides]
        return roi_align_levels(
            maps, strides, boxes, image_index, level, self.size, self.sampling_ratio, self.aligned
        )
