"""Images and plots of proposed masks: contact sheets, and metrics over the thresholds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from maskseg.annotation.grabcut import (
    BACKGROUND,
    FOREGROUND,
    MAYBE_BACKGROUND,
    MAYBE_FOREGROUND,
    Bools,
    Map,
    Trimap,
)
from maskseg.annotation.metrics import COLUMNS
from maskseg.visualization import layout
from maskseg.visualization.cam import overlay_heat_map
from maskseg.visualization.layout import (
    LINE_COLOURS,
    Colour,
    RGBImage,
    render_figure,
    save_image_atomically,
)
from maskseg.visualization.segments import outline_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = 320  # px of the longer side of a tile
TRIMAP_COLOURS: dict[int, Colour] = {
    BACKGROUND: (40, 60, 160),
    MAYBE_BACKGROUND: (90, 190, 235),
    MAYBE_FOREGROUND: (245, 200, 60),
    FOREGROUND: (210, 40, 40),
}
_LEGEND = {
    FOREGROUND: "foreground",
    MAYBE_FOREGROUND: "probable foreground",
    MAYBE_BACKGROUND: "probable background",
    BACKGROUND: "background",
}
_TRIMAP_OPACITY = 0.6
_TITLE = 15  # px


@dataclass(frozen=True)
class Example:
    """A mask and what it was computed from.

    title: of the image; image: uint8 RGB [H, W, 3]; box: xyxy; note: shown with the result. None
    for a missing box, map, trimap or ground truth.
    """

    title: str
    image: RGBImage
    mask: Bools
    box: Sequence[float] | None = None
    map: Map | None = None
    trimap: Trimap | None = None
    ground_truth: Bools | None = None
    note: str = ""


def contact_sheet(examples: Sequence[Example]) -> RGBImage:
    """Draw a row per example: image and box, map, trimap, result, ground truth.

    Columns that no example has are dropped. Returns uint8 RGB.
    """
    has_map = any(example.map is not None for example in examples)
    has_trimap = any(example.trimap is not None for example in examples)
    has_ground_truth = any(example.ground_truth is not None for example in examples)
    is_shown = [True, has_map, has_trimap, True, has_ground_truth]
    tiles = []
    for example in examples:
        for (title, tile), is_column_shown in zip(_tiles(example), is_shown, strict=True):
            if is_column_shown:
                tiles.append(layout.add_title(tile, title, _TITLE))
    sheet = layout.arrange_grid(tiles, sum(is_shown))
    if not has_trimap:
        return sheet
    legend = [layout.HeadingText(name, TRIMAP_COLOURS[value]) for value, name in _LEGEND.items()]
    return layout.add_heading(legend, sheet, _TITLE)


def _tiles(example: Example) -> list[tuple[str, RGBImage]]:
    """Title and image of the five columns; a missing one is white and without a title."""
    height, width = example.image.shape[:2]
    size = layout.scaled_size((height, width), CELL)
    image = np.asarray(Image.fromarray(example.image).resize(size, Image.Resampling.LANCZOS))
    blank = ("", np.full_like(image, 255))
    map_tile = blank
    if example.map is not None:
        scaled = Image.fromarray(example.map).resize(size, Image.Resampling.BILINEAR)
        map_tile = ("map", overlay_heat_map(image, torch.from_numpy(np.array(scaled))))
    trimap_tile = blank
    if example.trimap is not None:
        scaled = Image.fromarray(example.trimap).resize(size, Image.Resampling.NEAREST)
        trimap_tile = ("trimap", draw_trimap(image, np.array(scaled)))
    ground_truth_tile = blank
    if example.ground_truth is not None:
        ground_truth_tile = ("ground truth", _draw_mask(image, example.ground_truth))
    note = f": {example.note}" if example.note else ""
    return [
        (example.title, _draw_box(image, example.box, size[0] / width)),
        map_tile,
        trimap_tile,
        (f"result{note}", _draw_mask(image, example.mask)),
        ground_truth_tile,
    ]


def draw_trimap(image: RGBImage, trimap: Trimap) -> RGBImage:
    """Draw a trimap [H, W] in color over the gray image. uint8 RGB [H, W, 3] -> the same."""
    colours = np.array([TRIMAP_COLOURS[value] for value in range(4)], dtype=np.float64)[trimap]
    gray = image.astype(np.float64).mean(axis=2, keepdims=True)
    blended = (1 - _TRIMAP_OPACITY) * gray + _TRIMAP_OPACITY * colours
    return np.asarray(blended.round().astype(np.uint8))


def _draw_mask(image: RGBImage, mask: Bools) -> RGBImage:
    """Draw a mask of any size over the image."""
    size = image.shape[1::-1]
    grayscale = Image.fromarray(mask.astype(np.uint8) * 255)
    scaled = np.array(grayscale.resize(size, Image.Resampling.BILINEAR)) >= 128
    canvas = image.copy()
    colour = np.array(TRIMAP_COLOURS[FOREGROUND], dtype=np.float64)
    canvas[scaled] = (0.5 * canvas[scaled] + 0.5 * colour).round().astype(np.uint8)
    canvas[outline_pixels(scaled.astype(np.int64), 1)] = 255
    return canvas


def _draw_box(image: RGBImage, box: Sequence[float] | None, scale: float) -> RGBImage:
    """Draw a box, whose coordinates are multiplied by `scale`, over the image."""
    canvas = Image.fromarray(image)
    if box is not None:
        scaled = [value * scale for value in box]
        colour = TRIMAP_COLOURS[MAYBE_FOREGROUND]
        ImageDraw.Draw(canvas).rectangle(scaled, outline=colour, width=2)
    return np.asarray(canvas)


def plot_thresholds(
    rows: Sequence[tuple[str, float | None, Mapping[str, float]]], path: Path
) -> None:
    """Plot the metrics over the thresholds, a panel per metric, into a PNG.

    rows: technique, threshold (None: a horizontal dashed line) and means with the keys of
    `COLUMNS`. The file appears complete or not at all; no display is needed. Raises UserError if it
    cannot be written.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    names = list(dict.fromkeys(name for name, _, _ in rows))
    colours = dict(zip(names, itertools.cycle(LINE_COLOURS), strict=False))
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 3).flat)
    for axis, (key, meaning) in zip(axes, COLUMNS.items(), strict=False):
        for name in names:
            points = [(threshold, means[key]) for other, threshold, means in rows if other == name]
            _plot_technique(axis, name, points, colours[name])
        axis.set_title(f"{key}: {meaning}", fontsize=8.5, loc="left")
        axis.set_xlabel("threshold", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center", fontsize=9, frameon=False)
    save_image_atomically(render_figure(figure), path)


def _plot_technique(
    axis: Axes, name: str, points: Sequence[tuple[float | None, float]], colour: str
) -> None:
    """Plot (threshold, metric) points of a technique; a dashed line without a threshold."""
    if points[0][0] is None:
        axis.axhline(points[0][1], color=colour, linestyle="--", linewidth=1.3, label=name)
        return
    thresholds, values = zip(*sorted(points), strict=True)
    axis.plot(
        thresholds, values, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=name
    )
