"""A model without weights whose detections are given, and images for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from maskseg.masks.predicted import MaskGrids
from maskseg.structures import Batch, Categories, Outputs, Regions

CATEGORIES = Categories(("disc", "box", "star"), (7, 3, 90))


def random_detections(
    count: int, height: int, width: int, seed: int = 0, largest: float = 0.75
) -> Regions:
    """Detections of one image, by falling score, with blobs as masks.

    largest: side of the largest boxes, relative to the image's shorter side.
    """
    generator = torch.Generator().manual_seed(seed)
    frame = torch.tensor([width, height], dtype=torch.float32)
    side = 4 + torch.rand((count, 2), generator=generator) * (largest * min(height, width) - 4)
    low = torch.rand((count, 2), generator=generator) * (frame - side)
    boxes = torch.cat([low, low + side], dim=1)
    axis = torch.linspace(-1, 1, 28)
    noise = torch.randn((count, 28, 28), generator=generator) / 2
    grids = torch.sigmoid(4 * (0.8 - (axis[:, None] ** 2 + axis**2).sqrt()) + noise)
    return Regions(
        boxes,
        torch.zeros(count, dtype=torch.int64),
        torch.linspace(0.99, 0.1, count),
        torch.arange(count) % len(CATEGORIES),
        MaskGrids(grids, boxes, torch.tensor([[height, width]]).expand(count, 2)),
    )


class FixedModel(nn.Module):
    """Returns the same detections for every image, moved by its mean brightness in pixels.

    detections: in the frame of the batch; sizes: the shapes of all batches so far.
    """

    def __init__(self, detections: Regions) -> None:
        super().__init__()
        self.detections = detections
        self.sizes: list[tuple[int, ...]] = []

    def predict(self, batch: Batch) -> Outputs:
        """Return the detections for each image of the batch."""
        self.sizes.append(tuple(batch.images.shape))
        shifts = [float(image.float().mean()) / 10 for image in batch.images]
        parts = [self._moved(index, shift) for index, shift in enumerate(shifts)]
        masks = None
        if self.detections.masks is not None:
            grids = [part.masks for part in parts if isinstance(part.masks, MaskGrids)]
            masks = replace(
                grids[0],
                grids=torch.cat([grid.grids for grid in grids]),
                grid_boxes=torch.cat([grid.grid_boxes for grid in grids]),
                frames=torch.cat([grid.frames for grid in grids]),
            )
        return Outputs(
            Regions(
                torch.cat([part.boxes for part in parts]),
                torch.cat([part.image_index for part in parts]),
                torch.cat([part.scores for part in parts]),
                torch.cat([_labels(part) for part in parts]),
                masks,
            )
        )

    def _moved(self, index: int, shift: float) -> Regions:
        masks = self.detections.masks
        if isinstance(masks, MaskGrids):
            masks = replace(masks, grid_boxes=masks.grid_boxes + shift)
        return replace(
            self.detections,
            boxes=self.detections.boxes + shift,
            image_index=torch.full((len(self.detections),), index),
            masks=masks,
        )


def _labels(detections: Regions) -> Tensor:
    assert detections.labels is not None
    return detections.labels
