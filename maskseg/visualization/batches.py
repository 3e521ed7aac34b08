"""Pictures of what the model is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from maskseg.structures import Batch, Categories
from maskseg.visualization.detections import Picture, draw_detections, mosaic


def draw_batch(
    batch: Batch, categories: Categories, most: int
) -> Iterator[tuple[Picture, Picture]]:
    """The first `most` images of a batch as the model gets them, without the padding, and the same with their truth drawn over them."""
    assert batch.targets is not None
    for i in range(min(len(batch), most)):
        height, width = cast(list[int], batch.sizes[i].tolist())
        image = np.ascontiguousarray(batch.images[i, :, :height, :width].permute(1, 2, 0).numpy())
        truth = batch.targets[batch.targets.image_index == i]
        masks = truth.masks.to_rle() if truth.masks else None
        points: dict[str, Any] = {"keypoints": truth.keypoints, "lines": categories.lines}
        yield (
            image,
            draw_detections(
                image, truth.boxes, truth.labels, None, masks, categories.names, **points
            ),
        )


def save_batch(batch: Batch, categories: Categories, path: Path, most: int = 16) -> None:
    """A mosaic of a batch with its truth, after all transforms, as PNG."""
    drawn = [picture for _, picture in draw_batch(batch, categories, most)]
    columns = next(c for c in range(1, len(drawn) + 1) if c * c >= len(drawn))
    Image.fromarray(mosaic(drawn, columns)).save(path)
