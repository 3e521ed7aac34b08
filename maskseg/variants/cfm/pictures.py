"""Pictures of convolutional feature masking: a segment of the image, its mask on the cells of the feature map, what is left, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.structures import FeatureSpec
from maskseg.variants.cfm.boundary import colour_bar, heat, on_pixels, outlined, sheet
from maskseg.visualization import segments, semantic
from maskseg.visualization.detections import Picture

Bools = NDArray[np.bool_]
_CELL = np.array([230, 120, 0])  # of the mask on the cells
_FILL = 0.65  # share of that colour


def step_pictures(
    image: Picture,
    inside: Bools,
    cells: Tensor,
    feature: Tensor,
    at: FeatureSpec,
    classes: NDArray[np.integer[Any]],
    names: Sequence[str],
    level: str = "the map",
    found: str = "",
) -> Picture:
    """What each step makes of a segment: image, proposal, its mask on the cells, the feature map, the masked one, the result. -> RGB.

    image: uint8 RGB [H, W, 3]; inside: bool [H, W], the segment; cells: f32 [h, w], its mask on the cells of the map; feature: [C, h, w], shown as
    the length of its vectors, from 0 to the 99th percentile; at, level: where the map's cells look, and its name; classes: integers [H, W] in 0..K-1,
    negative for none; names: K names; found: what the segment was classified as. The masked map is grey where the mask is 0.
    """
    semantic._check(classes, names)
    length = feature.float().norm(dim=0).cpu().numpy()
    inner = cells.cpu().numpy() > 0
    top = float(np.quantile(length, 0.99))
    result, (labels,) = segments._scaled(image, [classes])
    plain, height = result.copy(), result.shape[0]
    semantic._paint(result, labels)
    legend = semantic._legend([labels], names, segments._TITLE, height)
    maps = [
        outlined(heat(values, at, image.shape[:2], top), inside)
        for values in (length, np.where(inner, length, np.nan))
    ]
    tiles = {
        "image": plain,
        "segment proposal": outlined(image, inside),
        f"its mask on the {inner.shape[0]} x {inner.shape[1]} cells of {level}": _on_cells(
            image, inner, at, inside
        ),
        "feature map": maps[0],
        "masked feature map": np.hstack([maps[1], colour_bar(top, "|f|", height)]),
        f"result; this segment: {found}" if found else "result": np.hstack(
            [_marked(result, inside), *(tile[:height] for tile in legend)]
        ),
    }
    return sheet(tiles, 3)


def _on_cells(image: Picture, inner: Bools, at: FeatureSpec, inside: Bools) -> Picture:
    """The image in grey with the cells of the mask, bool [h, w], in colour, and the segment's outline, bool [H, W]."""
    grey = np.repeat((image @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
    shown = on_pixels(inner, at, image.shape[:2])[..., None]
    return outlined(
        np.where(shown, grey * (1 - _FILL) + _CELL * _FILL, grey).round().astype(np.uint8), inside
    )


def _marked(tile: Picture, inside: Bools) -> Picture:
    """A tile with the outline of the segment, bool [H, W], of an image of another size."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(tile.shape, inside.shape, strict=False)
    )
    return outlined(tile, inside[rows[:, None], columns])
