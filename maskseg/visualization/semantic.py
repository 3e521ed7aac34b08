"""Pictures of semantic maps: each class in a colour of its own over the image, beside a legend; truth beside prediction; the confusion of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maskseg.visualization import detections, diagnosis, segments
from maskseg.visualization.curves import rendered
from maskseg.visualization.detections import Colour, Picture
from maskseg.visualization.segments import Labels

_FILL = 0.6  # share of the colour in a class
_TALLEST = 12  # lines that a legend may have however low the picture is
_LONGEST = 11  # widths of a legend's name, in heights of its text
_LEVELS = 8  # values of each channel among which colours are chosen
_LIGHTNESS = (0.45, 0.9)  # of those colours: neither like ink nor like paper
# The image below changes how light a colour is, and hardly its hue: a difference of lightness tells less.
_LIGHTNESS_COUNTS = 0.6


def class_colours(count: int) -> NDArray[np.uint8]:
    """The colours of classes 0..count-1, RGB [count, 3]: that of a class depends on its number alone.

    First those of the other pictures, then always the one that differs most from all before it. Some 280 differ; then they come back.
    """
    colours = _all_colours()
    return colours[np.arange(count) % len(colours)]


def draw_semantic(image: Picture, labels: Labels, names: Sequence[str]) -> Picture:
    """The image with each class filled in its colour and outlined, beside a legend of the classes that are there. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3], enlarged where it is small, as by `draw_segments`; labels: integers [H, W] in 0..K-1; pixels with negative ones stay
    as they are; names: K names. Below a colour the image is grey and of half the contrast, so that a class looks alike wherever it is.
    """
    _check(labels, names)
    canvas, classes = segments._canvas(image, labels)
    _paint(canvas, classes)
    legend = _legend(
        [labels], names, min(48, max(16, round(max(canvas.shape) / 32))), canvas.shape[0]
    )
    return segments._sheet([canvas, *legend], 2)


def semantic_sheet(
    image: Picture,
    truth: Labels,
    predicted: Labels,
    names: Sequence[str],
    titles: tuple[str, str, str] = ("image", "truth", "prediction"),
) -> Picture:
    """An image, its true classes and the predicted ones side by side under titles, with one legend of all that are there. -> uint8 RGB.

    image: uint8 RGB [H, W, 3]; truth, predicted: integers [H, W] in 0..K-1, negative for none; names: K names. The longer side of each picture
    has 720 pixels.
    """
    for labels in (truth, predicted):
        _check(labels, names)
    large, maps = segments._scaled(image, [truth, predicted])
    drawn = [large, large.copy(), large.copy()]
    for canvas, classes in zip(drawn[1:], maps, strict=True):
        _paint(canvas, classes)
    size = segments._TITLE
    legend = _legend([truth, predicted], names, size, large.shape[0])
    tiles = [
        segments._titled(tile, title, size)
        for tile, title in zip([*drawn, *legend], [*titles, ""], strict=False)
    ]
    return segments._sheet(tiles, len(tiles))


def draw_semantic_confusion(
    matrix: NDArray[np.int64], names: Sequence[str], path: Path | str | None = None
) -> Picture:
    """A confusion matrix of pixels as shares of each true class. -> uint8 RGB [H, W, 3], as PNG too where there is a path.

    matrix: i64 [K, K], truth in rows, prediction in columns, or [K, K + 1] with the pixels that were given no class last; names: K class names.
    Beside each row stands its share of all pixels. Up to 20 classes the shares are written into the cells. Rows of nothing are grey.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # half a second, and only needed here

    rows, columns = len(names), matrix.shape[-1]
    if matrix.ndim != 2 or not rows or len(matrix) != rows or columns not in (rows, rows + 1):
        raise ValueError(
            f"{rows} names need a matrix {[rows, rows]} or {[rows, rows + 1]}, got {list(matrix.shape)}"
        )
    totals = matrix.sum(axis=1)
    shares = np.ma.masked_invalid(matrix / np.where(totals, totals, np.nan)[:, None])
    numbered = rows <= diagnosis._NUMBERED
    cell, font = (0.5, 9) if numbered else (0.2, 8)
    side = max(cell * columns, 2.4)
    figure = Figure(figsize=(side + 3.6, side + (2.4 if numbered else 3.3)), layout="compressed")
    axis = figure.subplots()
    shown = axis.imshow(
        shares, cmap=diagnosis._shading(), norm=PowerNorm(0.6, vmin=0, vmax=1)
    )  # so that small shares are seen
    labels = [diagnosis._short(name) for name in [*names, "no class"]]
    percents = 100 * totals / max(int(totals.sum()), 1)
    axis.set_xticks(range(columns), labels[:columns], rotation=90, fontsize=font)
    axis.set_yticks(
        range(rows),
        [
            f"{label} ({percent:.1f} %)"
            for label, percent in zip(labels[:rows], percents, strict=True)
        ],
        fontsize=font,
    )
    axis.tick_params(length=0, labeltop=not numbered)
    _grid(axis, rows, columns)
    axis.set_xlabel("prediction", fontsize=10)
    axis.set_ylabel("truth (share of all pixels)", fontsize=10)
    diagnosis.label_shares(
        figure, axis, shown, shares if numbered else None, side, "share of the true class"
    )
    return diagnosis._finished(rendered(figure), path)


def _grid(axis: Any, rows: int, columns: int) -> None:
    """Lines between the cells, a dark one before the pixels without a class."""
    axis.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#dddddd", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    if columns > rows:
        axis.axvline(rows - 0.5, color="#555555", linewidth=1)


@lru_cache(maxsize=1)
def _all_colours() -> NDArray[np.uint8]:
    """The palette of the other pictures, then those between its colours that differ most from all before them, [n, 3]."""
    levels = np.linspace(0, 255, _LEVELS).round()
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = _oklab(cube)[:, 0]
    candidates = cube[(_LIGHTNESS[0] <= lightness) & (lightness <= _LIGHTNESS[1])]
    places = _oklab(candidates) * (_LIGHTNESS_COUNTS, 1, 1)
    chosen: list[Any] = list(detections._PALETTE)
    taken = _oklab(np.array([*chosen, (0, 0, 0), (128, 128, 128), (255, 255, 255)])) * (
        _LIGHTNESS_COUNTS,
        1,
        1,
    )  # not the image's own greys either
    nearest = np.linalg.norm(places[:, None] - taken, axis=2).min(axis=1)
    while nearest.max() > 0.02:
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(places - places[best], axis=1))
    return np.array(chosen, dtype=np.uint8)


def _oklab(colours: NDArray[Any]) -> NDArray[np.float64]:
    """sRGB 0..255 [n, 3] -> lightness and two axes of hue [n, 3], in which distance is what the eye sees (Ottosson 2020)."""
    srgb = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(
        linear
        @ np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
    )
    return np.asarray(
        cones
        @ np.array(
            [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
        )
    )


def _check(labels: Labels, names: Sequence[str]) -> None:
    if labels.size and labels.max() >= len(names):
        raise ValueError(f"label {labels.max()} has no name, there are {len(names)}")


def _paint(canvas: Picture, classes: Labels) -> None:
    """Fills and outlines the classes [H, W] of a picture of their size."""
    inside = classes >= 0
    grey = 64 + 0.5 * (canvas[inside] @ np.array([0.299, 0.587, 0.114]))
    colours = class_colours(int(classes.max(initial=-1)) + 1).astype(np.float64)[classes[inside]]
    canvas[inside] = (grey[:, None] * (1 - _FILL) + colours * _FILL).round().astype(np.uint8)
    segments._draw_outlines(canvas, classes, segments._PAPER)


def _legend(maps: Sequence[Labels], names: Sequence[str], size: int, height: int) -> list[Picture]:
    """The colours and names of the classes in the maps, in as many columns as a picture of this height needs, or nothing where there are none.

    size: pixels of the text. A colour is shown as it is on a medium grey image.
    """
    found = sorted({int(k) for labels in maps for k in np.unique(labels) if k >= 0})
    if not found:
        return []
    font, tall, field = detections._font(size), round(1.6 * size), round(1.4 * size)
    rows = min(len(found), max(height // tall, _TALLEST))
    columns = math.ceil(len(found) / rows)
    texts = [detections._fitted(names[k], font, _LONGEST * size) for k in found]
    wide = field + size // 2 + math.ceil(max(font.getlength(text) for text in texts)) + size
    sheet = Image.new("RGB", (columns * wide, max(height, rows * tall)), segments._PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (k, text) in enumerate(zip(found, texts, strict=True)):
        x, y = i // rows * wide, i % rows * tall
        draw.rectangle((x, y, x + field, y + size), fill=_shade(k), outline=segments._FRAME)
        draw.text(
            (x + field + size // 2, y + size / 2),
            text,
            fill=detections._INK,
            font=font,
            anchor="lm",
        )
    return [np.asarray(sheet)]


def _shade(label: int) -> Colour:
    red, green, blue = (
        round(128 * (1 - _FILL) + _FILL * int(value)) for value in class_colours(label + 1)[label]
    )
    return red, green, blue
