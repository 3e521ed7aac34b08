"""Pictures of class activation maps: the image beside its likeliest classes, each as a heat map over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.ops.superpixel_pooling import upsample
from maskseg.structures import Batch, Categories, FeatureSpec, Outputs
from maskseg.visualization import segments
from maskseg.visualization.detections import Picture

TOP = 3  # classes that are drawn
_HEAT = 0.6  # share of the colour


def cam_sheet(
    image: Picture,
    outputs: Outputs,
    index: int,
    level: FeatureSpec,
    seen: Sequence[int],
    names: Sequence[str],
    title: str = "image",
) -> Picture:
    """An image and the maps of its three likeliest classes, side by side under the classes' names and scores. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3], without padding; index: its place in the batch that `outputs` is of; level: of the maps' cells; seen: the (height,
    width) at which the network saw it, without padding; names: K names. The longer side of each picture has 720 pixels.
    """
    assert outputs.image_scores is not None
    assert outputs.image_maps is not None
    large = segments._scaled(image, [])[0]
    scores, labels = outputs.image_scores[index].cpu().topk(min(TOP, len(names)))
    maps = at_pixels(outputs.image_maps[index].cpu()[labels], level, seen, large.shape)
    tiles = {title: large} | {
        f"{names[k]} {s:.2f}": heated(large, m)
        for k, s, m in zip(labels.tolist(), scores.tolist(), maps, strict=True)
    }
    size = segments._TITLE
    return segments._sheet(
        [segments._titled(tile, text, size) for text, tile in tiles.items()], len(tiles)
    )


def cam_overlay(
    pixels: Tensor, batch: Batch, outputs: Outputs, level: FeatureSpec, categories: Categories
) -> Picture:
    """`cam_sheet` of a picture as its file has it. pixels: uint8 RGB [3, H, W]; batch: of one, the picture as the network saw it."""
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return cam_sheet(
        image, outputs, 0, level, batch.sizes[0].tolist(), categories.names, batch.names[0]
    )


def heated(image: Picture, activation: Tensor) -> Picture:
    """An image in grey under the colours of a map, from black (zero and below) to yellow (the map's greatest value). -> uint8 RGB [H, W, 3].

    image: uint8 RGB [H, W, 3]; activation: f32 [H, W].
    """
    from matplotlib import colormaps  # half a second, and only needed here

    values: NDArray[np.float32] = activation.clamp(min=0).numpy()
    most = float(values.max(initial=0.0))
    colours = np.asarray(colormaps["inferno"](values / most if most > 0 else values)[..., :3]) * 255
    grey = image.astype(np.float64).mean(axis=2, keepdims=True)
    return np.asarray(((1 - _HEAT) * grey + _HEAT * colours).round().astype(np.uint8))


def score_row(outputs: Outputs, index: int, categories: Categories) -> dict[str, Any]:
    """{"scores": {name: score}} of an image of a batch, the likeliest class first, for a JSON file."""
    assert outputs.image_scores is not None
    scores = outputs.image_scores[index].cpu()
    return {
        "scores": {
            categories.names[k]: float(scores[k])
            for k in scores.argsort(descending=True, stable=True).tolist()
        }
    }


def at_pixels(maps: Tensor, level: FeatureSpec, seen: Sequence[int], size: Sequence[int]) -> Tensor:
    """Maps [..., h, w] of an image that the network saw at (height, width) `seen` -> f32 [..., H, W] at the pixels of `size`, bilinear between the
    centres of the cells."""
    down, across = (float(size[d]) / float(seen[d]) for d in (0, 1))
    stride, centre = (
        (level.stride * down, level.stride * across),
        (level.centre * down, level.centre * across),
    )
    return upsample(maps, int(size[0]), int(size[1]), stride, centre)
