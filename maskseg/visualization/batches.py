"""Images of training batches: what the model is trained on, after all transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from maskseg.structures import Batch, Categories
from maskseg.visualization.detections import draw_detections
from maskseg.visualization.keypoints import Keypoints
from maskseg.visualization.layout import RGBImage, mosaic


def draw_batch(
    batch: Batch, categories: Categories, max_images: int
) -> Iterator[tuple[RGBImage, RGBImage]]:
    """Yield the first `max_images` images of a batch, plain and with their ground truth drawn.

    The images are as the model gets them, without the padding.
    """
    assert batch.targets is not None
    for i in range(min(len(batch), max_images)):
        height, width = batch.sizes[i].tolist()
        image = np.ascontiguousarray(batch.images[i, :, :height, :width].permute(1, 2, 0).numpy())
        targets = batch.targets[batch.targets.image_index == i]
        masks = targets.masks.to_rle() if targets.masks else None
        keypoints = None
        if targets.keypoints is not None:
            keypoints = Keypoints(targets.keypoints, categories.skeleton_edges)
        drawn = draw_detections(
            image,
            targets.boxes,
            targets.labels,
            None,
            masks,
            categories.names,
            keypoints=keypoints,
        )
        yield image, drawn


def save_batch(batch: Batch, categories: Categories, path: Path, max_images: int = 16) -> None:
    """Write a mosaic of a batch with its ground truth as PNG."""
    drawn = [image for _, image in draw_batch(batch, categories, max_images)]
    columns = math.isqrt(len(drawn) - 1) + 1  # the square root, rounded up
    Image.fromarray(mosaic(drawn, columns)).save(path)
