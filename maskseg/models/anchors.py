"""Anchors: the reference boxes of the region proposal network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.values import Fraction, Length, PositiveFloat

STRIDE_SOURCES = ("level", "image")
LevelSizes = Annotated[Sequence[PositiveFloat], Length(1)]


class AnchorGenerator:
    """Generates one anchor per size and aspect ratio in every cell of every level.

    The anchors are centred at (column + offset) * stride and (row + offset) * stride.

    sizes: for each level, the square roots of the anchors' areas, in pixels.
    aspect_ratios: height / width.
    offset: 0 in torchvision and detectron2; 0.5 is the middle of the cell.
    rounded: round half sides to whole pixels (torchvision; detectron2 does not).
    stride_from: `level` uses the level's stride (detectron2). `image` divides the padded image by
    the feature map, rounding down (torchvision: on p6 of an 800-pixel image this gives 61, not 64).

    Raises UserError for an unknown `stride_from` or for levels with different numbers of sizes.
    """

    def __init__(
        self,
        sizes: Annotated[Sequence[LevelSizes], Length(1)] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: LevelSizes = (0.5, 1.0, 2.0),
        offset: Fraction = 0.0,
        rounded: bool = False,
        stride_from: str = "level",
    ) -> None:
        if stride_from not in STRIDE_SOURCES:
            raise UserError(f"anchors.stride_from must be level or image, not {stride_from!r}")
        if len({len(level_sizes) for level_sizes in sizes}) != 1:
            raise UserError(
                "anchors.sizes needs the same number of sizes on every level, "
                f"got {[list(level_sizes) for level_sizes in sizes]}"
            )
        self.offset = offset
        self.stride_from = stride_from
        self.per_cell = len(sizes[0]) * len(aspect_ratios)
        height_factors = torch.tensor(list(aspect_ratios), dtype=torch.float32).sqrt()
        width_factors = 1 / height_factors
        self.cell_anchors = []  # per level, the anchors around the origin, [per_cell, 4]
        for level_sizes in sizes:
            side = torch.tensor([float(size) for size in level_sizes])
            height = (height_factors[:, None] * side).ravel()
            width = (width_factors[:, None] * side).ravel()
            boxes = torch.stack([-width, -height, width, height], dim=1) / 2
            self.cell_anchors.append(boxes.round() if rounded else boxes)

    def __call__(
        self,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        image: tuple[int, int],
        device: torch.device,
    ) -> list[Tensor]:
        """Return the anchors of each level, f32 [H * W * per_cell, 4].

        shapes: (height, width) of each level's feature map; image: (height, width) with padding.
        Raises UserError for a wrong number of levels.
        """
        if len(shapes) != len(self.cell_anchors):
            raise UserError(
                f"anchors.sizes has {len(self.cell_anchors)} levels, the proposer reads "
                f"{len(shapes)}"
            )
        anchors = []
        for (height, width), stride, boxes in zip(shapes, strides, self.cell_anchors, strict=True):
            step_y = step_x = stride
            if self.stride_from == "image":
                step_y = image[0] // height
                step_x = image[1] // width
            y = (torch.arange(height, device=device) + self.offset) * step_y
            x = (torch.arange(width, device=device) + self.offset) * step_x
            rows, columns = torch.meshgrid(y.float(), x.float(), indexing="ij")
            shifts = torch.stack([columns, rows, columns, rows], dim=-1)
            anchors.append((shifts[:, :, None] + boxes.to(device)).reshape(-1, 4))
        return anchors
