"""Images of training batches: what the model is trained on, after all transforms."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maskseg.structures import Batch, Categories
from maskseg.visualization.detections import draw_detections
from maskseg.visualization.keypoints import Keypoints
from maskseg.visualization.layout import RGBImage, add_title, arrange_grid, save_image, shrink
from maskseg.visualization.legends import add_class_legend

_TILE_SIDE = 1280  # px of the longer side of an image in the mosaic


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
    """Write a mosaic of a batch with its ground truth as PNG.

    Each image has its file name above it; a legend names the classes.
    """
    tiles = []
    for i, (_, drawn) in enumerate(draw_batch(batch, categories, max_images)):
        tile = shrink(drawn, _TILE_SIDE)
        tiles.append(add_title(tile, batch.file_names[i], max(14, round(max(tile.shape) / 40))))
    columns = math.isqrt(len(tiles) - 1) + 1  # the square root, rounded up
    assert batch.targets is not None
    is_drawn = batch.targets.image_index < len(tiles)
    labels = batch.targets.labels[is_drawn].tolist()
    sheet = add_class_legend(arrange_grid(tiles, columns), labels, categories.names)
    save_image(sheet, path)
