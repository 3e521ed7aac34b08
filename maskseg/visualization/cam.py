"""Images of class activation maps (CAM): the image beside heat maps of its most likely classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.ops.superpixel_pooling import upsample
from maskseg.structures import Batch, Categories, FeatureSpec, Outputs
from maskseg.visualization.layout import TITLE_SIZE, RGBImage, add_title, arrange_grid
from maskseg.visualization.segments import scale_to_tile

MAX_CLASSES = 3  # classes that are drawn
_HEAT = 0.6  # opacity of the heat map


def cam_sheet(
    image: RGBImage,
    outputs: Outputs,
    index: int,
    feature_spec: FeatureSpec,
    input_size: Sequence[int],
    names: Sequence[str],
    title: str = "image",
) -> RGBImage:
    """Draw an image and the activation maps of its three most likely classes side by side.

    image: uint8 RGB [H, W, 3], without padding; index: of the image in the batch of `outputs`;
    feature_spec: of the maps; input_size: (height, width) of the image as the network saw it,
    without padding; names: K class names; title: of the image. The titles of the maps are class
    names and scores. Each image is scaled to a longer side of 720 pixels. -> uint8 RGB.
    """
    assert outputs.image_scores is not None
    assert outputs.image_maps is not None
    scaled, _ = scale_to_tile(image, [])
    scores, labels = outputs.image_scores[index].cpu().topk(min(MAX_CLASSES, len(names)))
    maps = resample_to_pixels(
        outputs.image_maps[index].cpu()[labels], feature_spec, input_size, scaled.shape
    )
    tiles = {title: scaled}
    for label, score, activation in zip(labels.tolist(), scores.tolist(), maps, strict=True):
        tiles[f"{names[label]} {score:.2f}"] = overlay_heat_map(scaled, activation)
    titled = [add_title(tile, text, TITLE_SIZE) for text, tile in tiles.items()]
    return arrange_grid(titled, len(tiles))


def cam_overlay(
    pixels: Tensor,
    batch: Batch,
    outputs: Outputs,
    feature_spec: FeatureSpec,
    categories: Categories,
) -> RGBImage:
    """Draw the `cam_sheet` of an image file.

    pixels: uint8 RGB [3, H, W] as in the file; batch: that image alone, as the network saw it.
    """
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    input_size = batch.sizes[0].tolist()
    return cam_sheet(
        image, outputs, 0, feature_spec, input_size, categories.names, batch.file_names[0]
    )


def overlay_heat_map(image: RGBImage, activation: Tensor) -> RGBImage:
    """Blend an image in gray with a heat map, from black (<= 0) to yellow (the map's maximum).

    image: uint8 RGB [H, W, 3]; activation: f32 [H, W]. -> uint8 RGB [H, W, 3].
    """
    from matplotlib import colormaps  # imported here because it takes half a second

    values: NDArray[np.float32] = activation.clamp(min=0).numpy()
    maximum = float(values.max(initial=0.0))
    if maximum > 0:
        values = values / maximum
    colours = np.asarray(colormaps["inferno"](values)[..., :3]) * 255
    grey = image.astype(np.float64).mean(axis=2, keepdims=True)
    return np.asarray(((1 - _HEAT) * grey + _HEAT * colours).round().astype(np.uint8))


def score_row(outputs: Outputs, index: int, categories: Categories) -> dict[str, dict[str, float]]:
    """Convert the scores of an image of a batch for JSON, the most likely class first.

    -> {"scores": {name: score}}.
    """
    assert outputs.image_scores is not None
    scores = outputs.image_scores[index].cpu()
    order = scores.argsort(descending=True, stable=True).tolist()
    return {"scores": {categories.names[label]: float(scores[label]) for label in order}}


def resample_to_pixels(
    maps: Tensor, feature_spec: FeatureSpec, input_size: Sequence[int], size: Sequence[int]
) -> Tensor:
    """Resample maps to pixels, bilinearly between the centers of their cells.

    maps: [..., h, w]; input_size: (height, width) of the image as the network saw it; size: (H, W)
    of the result. -> f32 [..., H, W].
    """
    down = float(size[0]) / float(input_size[0])
    across = float(size[1]) / float(input_size[1])
    stride = (feature_spec.stride * down, feature_spec.stride * across)
    centre = (feature_spec.centre * down, feature_spec.centre * across)
    return upsample(maps, int(size[0]), int(size[1]), stride, centre)
