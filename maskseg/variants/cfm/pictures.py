"""Visualization of convolutional feature masking, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.structures import FeatureSpec
from maskseg.variants.cfm.boundary import (
    arrange_tiles,
    cells_to_pixels,
    draw_colour_bar,
    draw_outline,
    render_heatmap,
)
from maskseg.visualization import layout, segments, semantic
from maskseg.visualization.layout import RGBImage

Bools = NDArray[np.bool_]
_CELL_COLOUR = np.array([230, 120, 0])  # of the mask on the cells
_OPACITY = 0.65  # of that color


@dataclass(frozen=True)
class FeatureMap:
    """One level of the features of an image. values: [C, h, w]."""

    values: Tensor
    spec: FeatureSpec
    name: str = "the map"


def draw_steps(
    image: RGBImage,
    inside: Bools,
    cells: Tensor,
    feature_map: FeatureMap,
    classes: NDArray[np.integer],
    names: Sequence[str],
    prediction: str = "",
) -> RGBImage:
    """Draw what each step makes of a segment.

    The tiles are: image, proposal, its mask on the cells, feature map, masked feature map, result.
    Of features, the norm over the channels is drawn, from 0 to its 99th percentile; the masked map
    is gray where the mask is 0.

    image: uint8 RGB [H, W, 3].
    inside: bool [H, W], the segment.
    cells: f32 [h, w], its mask on the cells of the feature map.
    classes: integers [H, W] in 0..K-1, negative for none.
    names: of the K classes.
    prediction: class and score of the segment.
    """
    semantic.check_labels(classes, names)
    spec = feature_map.spec
    length = feature_map.values.float().norm(dim=0).cpu().numpy()
    masked_cells = cells.cpu().numpy() > 0
    max_length = float(np.quantile(length, 0.99))
    result, (labels,) = segments.scale_to_tile(image, [classes])
    plain = result.copy()
    height = result.shape[0]
    semantic.paint_classes(result, labels)
    legend = semantic.draw_legend([labels], names, layout.TITLE_SIZE, height)
    shape = image.shape[:2]
    whole_map = render_heatmap(length, spec, shape, max_length)
    masked_length = np.where(masked_cells, length, np.nan)
    masked_map = draw_outline(render_heatmap(masked_length, spec, shape, max_length), inside)
    colour_bar = draw_colour_bar(max_length, "|f|", height)
    cells_title = f"its mask on the {cells.shape[0]} x {cells.shape[1]} cells of {feature_map.name}"
    result_title = f"result; this segment: {prediction}" if prediction else "result"
    tiles = {
        "image": plain,
        "segment proposal": draw_outline(image, inside),
        cells_title: _draw_cells(image, masked_cells, spec, inside),
        "feature map": draw_outline(whole_map, inside),
        "masked feature map": np.hstack([masked_map, colour_bar]),
        result_title: np.hstack(
            [_outline_tile(result, inside), *(tile[:height] for tile in legend)]
        ),
    }
    return arrange_tiles(tiles, 3)


def _draw_cells(image: RGBImage, cells: Bools, spec: FeatureSpec, inside: Bools) -> RGBImage:
    """Draw the gray image with the cells of the mask in color and the outline of the segment.

    cells: bool [h, w]; inside: bool [H, W].
    """
    gray = np.repeat((image @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    is_colored = cells_to_pixels(cells, spec, image.shape[:2])[..., None]
    blended = np.where(is_colored, gray * (1 - _OPACITY) + _CELL_COLOUR * _OPACITY, gray)
    return draw_outline(blended.round().astype(np.uint8), inside)


def _outline_tile(tile: RGBImage, inside: Bools) -> RGBImage:
    """Draw the outline of a segment on a tile; `inside`, bool [H, W], has the image's size."""
    height, width = inside.shape
    rows = ((np.arange(tile.shape[0]) + 0.5) * height / tile.shape[0]).astype(np.int64)
    columns = ((np.arange(tile.shape[1]) + 0.5) * width / tile.shape[1]).astype(np.int64)
    return draw_outline(tile, inside[rows[:, None], columns])
