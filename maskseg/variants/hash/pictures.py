"""Images and plots of a segmentation by hash codes: bit planes, its steps, IoU over superpixels.

Images are uint8 RGB [H, W, 3]; label maps are integers [H, W], negative where there is no label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from maskseg.errors import UserError
from maskseg.visualization.layout import (
    FRAME,
    GAP,
    LINE_COLOURS,
    PAPER,
    TILE_SIDE,
    TITLE_SIZE,
    RGBImage,
    add_title,
    arrange_grid,
    mosaic,
    render_figure,
    resize_nearest,
    save_image_atomically,
    scaled_size,
)
from maskseg.visualization.segments import (
    Bools,
    Labels,
    draw_boundaries,
    draw_segments,
    scale_to_tile,
)

Floats = NDArray[np.floating]

_BITS_PER_ROW = 8
# 11 markers are coprime to 12 colors: a pair of both repeats only after 132 lines.
_MARKERS = "os^Dv<>Ph*X"


def draw_bits(codes: Floats, columns: int = 4, *, cell: int = 240) -> RGBImage:
    """Draw the bit planes of a code map as gray tiles, each below its number.

    codes: [b, h, w] in 0..1 (soft codes) or booleans, 0 is black and 1 is white; cell: pixels of
    the longer side of a tile. The pixels of the code map stay sharp squares.
    """
    size = min(TITLE_SIZE, max(14, cell // 12))
    tiles = _bit_tiles(codes, cell)
    return arrange_grid(
        [add_title(tile, f"bit {i}", size) for i, tile in enumerate(tiles)], columns
    )


def segment_panel(
    image: RGBImage,
    superpixels: Labels,
    codes: Floats,
    segments: Labels,
    truth: Labels | None = None,
    titles: Sequence[str] | None = None,
) -> RGBImage:
    """Draw image, superpixels, merged segments and ground truth in a row, bit planes below.

    superpixels, segments, truth: label maps [H, W]; codes: [b, h, w] in 0..1, which cover the
    whole image; titles: of the first row; by default the content and its number of segments.
    """
    maps = [m for m in (superpixels, segments, truth) if m is not None]
    image, maps = scale_to_tile(image, maps)
    if titles is None:
        titles = _count_titles(maps)
    drawn = [image, draw_boundaries(image, maps[0]), *(draw_segments(image, m) for m in maps[1:])]
    tiles = [add_title(tile, title, TITLE_SIZE) for title, tile in zip(titles, drawn, strict=True)]
    row = arrange_grid(tiles, len(tiles))
    columns = min(_BITS_PER_ROW, len(codes))
    tile_width = min((row.shape[1] - GAP) // columns - GAP - 2, image.shape[1])
    height, width = codes.shape[1:]
    cell = max(1, tile_width * max(height, width) // width)
    return arrange_grid([row, draw_bits(codes, columns, cell=cell)], 1)


def _count_titles(maps: Sequence[Labels]) -> list[str]:
    """Titles of the first row of a panel, with the number of segments of each map."""
    texts = ("{} superpixels", "{} merged segments", "ground truth: {} segments")
    titles = ["image"]
    for text, labels in zip(texts, maps, strict=False):
        titles.append(text.format(len(np.unique(labels[labels >= 0]))))
    return titles


def step_pictures(
    image: RGBImage,
    features: Floats,
    codes: Floats,
    superpixels: Labels,
    superpixel_codes: Bools,
    segments: Labels,
) -> dict[str, RGBImage]:
    """Draw each step of a segmentation by hash codes, all at one size, for `arrange_panel`.

    features: [C, h, w], shown as their first three principal components; codes: [b, h, w] in 0..1,
    thresholded at 0.5 for the binary map; superpixels, segments: label maps [H, W];
    superpixel_codes: bool [S, b] of superpixels 0..S-1. Features and codes cover the whole image.
    A code has the same color in the binary map and on the superpixels, and similar codes have
    similar colors. -> title -> image.
    """
    image, (superpixels, segments) = scale_to_tile(image, [superpixels, segments])
    size = (image.shape[1], image.shape[0])
    binary = (codes > 0.5).reshape(len(codes), -1).T
    distinct, index = np.unique(
        np.concatenate([binary, superpixel_codes]), axis=0, return_inverse=True
    )
    colours = _principal_colours(distinct)[index.reshape(-1)]
    cell_colours = colours[: len(binary)].reshape(*codes.shape[1:], 3)
    superpixel_colours = colours[len(binary) :]
    coloured = np.full_like(image, 255)
    coloured[superpixels >= 0] = superpixel_colours[superpixels[superpixels >= 0]]
    feature_colours = _principal_colours(features.reshape(len(features), -1).T)
    # A tile has the aspect ratio of the image, and so has a square arrangement of tiles.
    columns = math.ceil(math.sqrt(len(codes)))
    bits = Image.fromarray(mosaic(_bit_tiles(codes, TILE_SIDE // columns), columns))
    return {
        "image": image,
        "feature map": resize_nearest(feature_colours.reshape(*features.shape[1:], 3), size),
        "bit planes": np.asarray(ImageOps.pad(bits, size, Image.Resampling.LANCZOS, PAPER)),
        "binary map": resize_nearest(cell_colours, size),
        "superpixels": draw_boundaries(image, superpixels),
        "codes of the superpixels": draw_boundaries(coloured, superpixels, PAPER),
        "merged segments": draw_segments(image, segments),
    }


def plot_segmentation_iou(
    rows: Mapping[str, Sequence[tuple[float, float]]],
    path: Path | str,
    xlabel: str = "number of superpixels",
    ylabel: str = "segmentation IoU",
) -> None:
    """Plot IoU over the number of superpixels, one line per method, into a PNG.

    rows: method -> (number of superpixels, IoU) points in any order; methods without points are
    dropped. Up to 12 methods differ by color, more also by marker. The file appears complete or
    not at all. Raises UserError if no method has a point or the file cannot be written.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    lines = {
        name: np.array(sorted(points), dtype=np.float64) for name, points in rows.items() if points
    }
    if not lines:
        raise UserError(f"{path}: no method has a point, there is nothing to plot")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis = figure.subplots()
    styles = zip(itertools.cycle(LINE_COLOURS), itertools.cycle(_MARKERS), strict=False)
    for (name, points), (colour, marker) in zip(lines.items(), styles, strict=False):
        axis.plot(
            points[:, 0],
            points[:, 1],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            label=name,
        )
    axis.set_xlabel(xlabel, fontsize=10)
    axis.set_ylabel(ylabel, fontsize=10)
    axis.tick_params(labelsize=9)
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    save_image_atomically(render_figure(figure), Path(path))


def _principal_colours(rows: NDArray[np.number]) -> RGBImage:
    """Map vectors to colors: their first three principal components as RGB. [n, C] -> uint8 [n, 3].

    Each component is scaled from its 1st (0) to its 99th percentile (255); components that are
    constant or missing are 128.
    """
    values = rows.astype(np.float32)
    min_range = 1e-5 * np.abs(values).max()  # smaller ranges are rounding errors
    values -= values.mean(axis=0)
    axes = np.linalg.svd(values, full_matrices=False)[2][:3]
    # The signs of singular vectors are arbitrary: fix them, so that colors are reproducible.
    axes *= np.where(axes.sum(axis=1) < 0, -1, 1)[:, None]
    colours = np.full((len(rows), 3), 128, dtype=np.uint8)
    for i, component in enumerate(axes @ values.T):
        low, high = np.percentile(component, (1, 99))
        if high - low > min_range:
            colours[:, i] = (255 * ((component - low) / (high - low)).clip(0, 1)).round()
    return colours


def _bit_tiles(codes: Floats, longest: int) -> list[RGBImage]:
    """Draw bit planes [b, h, w] in gray, each with a thin frame."""
    planes = (np.asarray(codes, dtype=np.float64).clip(0, 1) * 255).round().astype(np.uint8)
    tiles = []
    for plane in planes:
        gray = np.repeat(plane[..., None], 3, axis=2)
        tile = resize_nearest(gray, scaled_size(plane.shape, longest))
        tiles.append(np.asarray(ImageOps.expand(Image.fromarray(tile), 1, FRAME)))
    return tiles
