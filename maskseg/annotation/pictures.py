"""Pictures of proposed masks: how each came about, and how good they are over the thresholds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from maskseg.annotation.grabcut import (
    BACKGROUND,
    FOREGROUND,
    MAYBE_BACKGROUND,
    MAYBE_FOREGROUND,
    Bools,
    Codes,
    Map,
)
from maskseg.annotation.metrics import COLUMNS
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.visualization import detections, segments
from maskseg.visualization.cam import heated
from maskseg.visualization.curves import COLOURS, rendered
from maskseg.visualization.detections import Colour, Picture

CELL = 320  # pixels of the longer side of a tile
SEEDS: dict[int, Colour] = {
    BACKGROUND: (40, 60, 160),
    MAYBE_BACKGROUND: (90, 190, 235),
    MAYBE_FOREGROUND: (245, 200, 60),
    FOREGROUND: (210, 40, 40),
}
_NAMES = {
    FOREGROUND: "foreground",
    MAYBE_FOREGROUND: "perhaps foreground",
    MAYBE_BACKGROUND: "perhaps background",
    BACKGROUND: "background",
}
_FILL = 0.6  # share of a seed's colour
_TITLE = 15  # pixels


@dataclass(frozen=True)
class Example:
    """How a mask came about. image: uint8 RGB [H, W, 3]; box: xyxy or None; map, codes, truth: where there is one; title: of the first picture."""

    title: str
    image: Picture
    mask: Bools
    box: Sequence[float] | None = None
    map: Map | None = None
    codes: Codes | None = None
    truth: Bools | None = None
    note: str = ""


def contact_sheet(examples: Sequence[Example]) -> Picture:
    """A row each: image and box, map, seeds in four colours, result, truth; without the columns that no example has. -> uint8 RGB."""
    columns = [
        any(getattr(one, part) is not None for one in examples)
        for part in ("map", "codes", "truth")
    ]
    shown = [True, columns[0], columns[1], True, columns[2]]
    tiles = [
        tile for one in examples for tile, here in zip(_tiles(one), shown, strict=True) if here
    ]
    sheet = segments._sheet(
        [segments._titled(tile, title, _TITLE) for title, tile in tiles], sum(shown)
    )
    return segments._sheet([_legend(sheet.shape[1]), sheet], 1) if columns[1] else sheet


def _legend(width: int) -> Picture:
    """What the colours of seeds mean, on a strip that is cut at `width` pixels."""
    strip, x = Image.new("RGB", (width, 2 * _TITLE), segments._PAPER), _TITLE
    draw, font = ImageDraw.Draw(strip), detections._font(_TITLE)
    for code, name in _NAMES.items():
        draw.rectangle((x, _TITLE // 2, x + _TITLE, _TITLE // 2 + _TITLE), fill=SEEDS[code])
        draw.text((x + 1.5 * _TITLE, _TITLE), name, fill=detections._INK, font=font, anchor="lm")
        x += round(3.5 * _TITLE + font.getlength(name))
    return np.asarray(strip)


def _tiles(one: Example) -> list[tuple[str, Picture]]:
    """Title and picture of the five columns; white where there is nothing."""
    height, width = one.image.shape[:2]
    size = segments._size((height, width), CELL)
    image = np.asarray(Image.fromarray(one.image).resize(size, Image.Resampling.LANCZOS))
    blank = np.full_like(image, 255)
    shown = [blank, blank, blank]
    if one.map is not None:
        shown[0] = heated(
            image,
            torch.from_numpy(
                np.array(Image.fromarray(one.map).resize(size, Image.Resampling.BILINEAR))
            ),
        )
    if one.codes is not None:
        shown[1] = seed_picture(
            image, np.array(Image.fromarray(one.codes).resize(size, Image.Resampling.NEAREST))
        )
    if one.truth is not None:
        shown[2] = _masked(image, one.truth)
    return [
        (one.title, _boxed(image, one.box, size[0] / width)),
        ("map" if one.map is not None else "", shown[0]),
        ("seeds" if one.codes is not None else "", shown[1]),
        (f"result{f': {one.note}' if one.note else ''}", _masked(image, one.mask)),
        ("truth" if one.truth is not None else "", shown[2]),
    ]


def seed_picture(image: Picture, codes: Codes) -> Picture:
    """An image in grey under the colours of its seeds. image: uint8 RGB [H, W, 3]; codes: [H, W]. -> uint8 RGB [H, W, 3]."""
    colours = np.array([SEEDS[code] for code in range(4)], dtype=np.float64)[codes]
    grey = image.astype(np.float64).mean(axis=2, keepdims=True)
    return np.asarray(((1 - _FILL) * grey + _FILL * colours).round().astype(np.uint8))


def _masked(image: Picture, mask: Bools) -> Picture:
    """The image with a mask of any size over it."""
    size = image.shape[1::-1]
    small = (
        np.array(
            Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
        )
        >= 128
    )
    canvas = image.copy()
    colour = np.array(SEEDS[FOREGROUND], dtype=np.float64)
    canvas[small] = (0.5 * canvas[small] + 0.5 * colour).round().astype(np.uint8)
    canvas[segments._outlines(small.astype(np.int64), 1)] = 255
    return canvas


def _boxed(image: Picture, box: Sequence[float] | None, scale: float) -> Picture:
    picture = Image.fromarray(image)
    if box is not None:
        ImageDraw.Draw(picture).rectangle(
            [value * scale for value in box], outline=SEEDS[MAYBE_FOREGROUND], width=2
        )
    return np.asarray(picture)


def plot_thresholds(
    rows: Sequence[tuple[str, float | None, Mapping[str, float]]], path: Path
) -> None:
    """The measures over the thresholds, a panel each, into a PNG, whole or not at all; needs no display.

    rows: technique, its threshold (None: a dashed line across) and its means by the names of `COLUMNS`. Raises UserError where it cannot be written.
    """
    from matplotlib.figure import Figure  # half a second, and only needed here

    names = list(dict.fromkeys(name for name, _, _ in rows))
    colours = dict(zip(names, itertools.cycle(COLOURS), strict=False))
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes: Any = figure.subplots(2, 3).ravel()
    for axis, (key, meaning) in zip(axes, COLUMNS.items(), strict=False):
        for name in names:
            points = [(threshold, found[key]) for own, threshold, found in rows if own == name]
            if points[0][0] is None:
                axis.axhline(
                    points[0][1], color=colours[name], linestyle="--", linewidth=1.3, label=name
                )
            else:
                axis.plot(
                    *zip(*sorted(points), strict=True),
                    color=colours[name],
                    marker="o",
                    markersize=3.5,
                    linewidth=1.6,
                    label=name,
                )
        axis.set_title(f"{key}: {meaning}", fontsize=8.5, loc="left")
        axis.set_xlabel("threshold", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center", fontsize=9, frameon=False)
    save_whole(rendered(figure), path)


def save_whole(picture: Picture, path: Path) -> None:
    """A picture as PNG, whole or not at all. Raises UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the picture to {path}: {error.strerror or error}") from error
    with replacing(path, "the picture") as file:
        Image.fromarray(picture).save(file, format="PNG")
