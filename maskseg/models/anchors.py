"""Anchors: the boxes that the region proposal network starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskseg.errors import UserError


class AnchorGenerator:
    """Every cell of every level gets one anchor a size and aspect ratio, centred at (column + offset) * stride.

    sizes: for each level, the square roots of the anchors' areas, in pixels; aspect_ratios: height / width.
    offset: 0 in torchvision and detectron2, 0.5 is the middle of the cell.
    rounded: half sides are rounded to whole pixels (torchvision; detectron2 does not).
    stride_from: `level` takes the level's stride (detectron2); `image` divides the padded image by the map, rounding down (torchvision: on p6 of
    an 800-pixel image that gives 61 instead of 64).
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        offset: float = 0.0,
        rounded: bool = False,
        stride_from: str = "level",
    ) -> None:
        if stride_from not in ("level", "image"):
            raise UserError(f"anchors.stride_from must be level or image, not {stride_from!r}")
        if len({len(s) for s in sizes}) != 1:
            raise UserError(
                f"anchors.sizes needs the same number of sizes on every level, got {[list(s) for s in sizes]}"
            )
        self.offset, self.stride_from = offset, stride_from
        self.per_cell = len(sizes[0]) * len(aspect_ratios)
        heights = torch.tensor(list(aspect_ratios), dtype=torch.float32).sqrt()
        self.cells = []
        for level in sizes:
            side = torch.tensor([float(s) for s in level])
            height, width = (
                (heights[:, None] * side).ravel(),
                ((1 / heights)[:, None] * side).ravel(),
            )
            cell = torch.stack([-width, -height, width, height], dim=1) / 2
            self.cells.append(cell.round() if rounded else cell)

    def __call__(
        self,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        image: tuple[int, int],
        device: torch.device,
    ) -> list[Tensor]:
        """shapes: (height, width) of each level's map; image: (height, width) with padding. -> f32 [H * W * per_cell, 4] a level."""
        if len(shapes) != len(self.cells):
            raise UserError(
                f"anchors.sizes names {len(self.cells)} levels, the backbone has {len(shapes)}"
            )
        anchors = []
        for (height, width), stride, cell in zip(shapes, strides, self.cells, strict=True):
            step_y, step_x = (
                (image[0] // height, image[1] // width)
                if self.stride_from == "image"
                else (stride, stride)
            )
            y = (torch.arange(height, device=device) + self.offset) * step_y
            x = (torch.arange(width, device=device) + self.offset) * step_x
            rows, columns = torch.meshgrid(y.float(), x.float(), indexing="ij")
            shifts = torch.stack([columns, rows, columns, rows], dim=-1)
            anchors.append((shifts[:, :, None] + cell.to(device)).reshape(-1, 4))
        return anchors
