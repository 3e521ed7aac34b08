"""Pictures of segments: outlines, fills and bit planes, the steps of a segmentation beside each other, IoU over the number of superpixels."""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.visualization import detections
from maskseg.visualization.curves import COLOURS, rendered
from maskseg.visualization.detections import READABLE, Colour, Picture, mosaic

Labels = NDArray[np.integer[Any]]  # [H, W], numbers of superpixels or segments; negative: none
Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

TILE = 720  # pixels of the longer side of a picture in a panel
_TITLE = TILE // 24  # pixels of the text over it
_FILL = 0.55  # share of the colour in a segment
_BITS = 8  # bit planes in a row of a panel
_PAPER = detections._PAPER
_FRAME = (150, 150, 150)  # around what may be as white as the paper
_MARKERS = "os^Dv<>Ph*X"  # 11, so that with 12 colours no pair comes back before 132 lines


def draw_boundaries(image: Picture, labels: Labels, colour: Colour = (255, 255, 0)) -> Picture:
    """The image with the outlines of a label map. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3]; labels: integers [H, W]. An image whose longer side is under 640 pixels is enlarged first, as
    `draw_detections` does. Pixels with negative labels are not drawn on.
    """
    canvas, numbers = _canvas(image, labels)
    _draw_outlines(canvas, numbers, colour)
    return canvas


def draw_segments(image: Picture, segments: Labels) -> Picture:
    """The image with each segment half filled in a colour that no segment touching it has, and its outline. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3], enlarged where it is small, as by `draw_boundaries`; segments: integers [H, W], each number one segment, whether
    connected or not; pixels with negative ones stay as they are.
    """
    canvas, numbers = _canvas(image, segments)
    found, index = np.unique(np.where(numbers < 0, -1, numbers), return_inverse=True)
    index = index.reshape(numbers.shape) - int(found[0] < 0)  # 0..n-1, -1 for none
    inside = index >= 0
    colours = np.array(_colours(index), dtype=np.float64).reshape(-1, 3)[index[inside]]
    canvas[inside] = (canvas[inside] * (1 - _FILL) + colours * _FILL).round().astype(np.uint8)
    _draw_outlines(canvas, index, _PAPER)
    return canvas


def draw_bits(codes: Floats, columns: int = 4, *, cell: int = 240) -> Picture:
    """The bit planes of a map of codes as grey tiles, black for 0 and white for 1, each under its number. -> uint8 RGB.

    codes: [b, h, w] in 0..1 (soft codes), or booleans; cell: pixels of the longer side of a tile. Pixels of the map stay squares.
    """
    size = min(_TITLE, max(14, cell // 12))
    return _sheet(
        [_titled(tile, f"bit {i}", size) for i, tile in enumerate(_bit_tiles(codes, cell))], columns
    )


def panel(tiles: Mapping[str, Picture], columns: int) -> Picture:
    """Pictures, by title, in rows on white; larger ones are shrunk so that their longer side has 720 pixels. -> uint8 RGB."""
    return _sheet(
        [_titled(detections._shrunk(tile, TILE), title, _TITLE) for title, tile in tiles.items()],
        columns,
    )


def segment_panel(
    image: Picture,
    superpixels: Labels,
    codes: Floats,
    segments: Labels,
    truth: Labels | None = None,
    titles: Sequence[str] | None = None,
) -> Picture:
    """How an image was segmented: image, superpixels, merged segments and truth in a row, the bit planes below. -> uint8 RGB.

    image: uint8 RGB [H, W, 3]; superpixels, segments, truth: integers [H, W], negative for none; codes: [b, h, w] in 0..1, over the whole image;
    titles: of the pictures of the first row, instead of what they are and how many segments they have.
    """
    maps = [m for m in (superpixels, segments, truth) if m is not None]
    image, maps = _scaled(image, maps)
    texts = ("{} superpixels", "{} merged segments", "truth: {} segments")
    counts = [
        "image",
        *(text.format(len(np.unique(m[m >= 0]))) for text, m in zip(texts, maps, strict=False)),
    ]
    drawn = [image, draw_boundaries(image, maps[0]), *(draw_segments(image, m) for m in maps[1:])]
    tiles = [
        _titled(tile, title, _TITLE)
        for title, tile in zip(counts if titles is None else titles, drawn, strict=True)
    ]
    row = _sheet(tiles, len(tiles))
    columns = min(_BITS, len(codes))
    wide = min((row.shape[1] - detections._GAP) // columns - detections._GAP - 2, image.shape[1])
    height, width = codes.shape[1:]
    return _sheet(
        [row, draw_bits(codes, columns, cell=max(1, wide * max(height, width) // width))], 1
    )


def step_pictures(
    image: Picture,
    features: Floats,
    codes: Floats,
    superpixels: Labels,
    superpixel_codes: Bools,
    segments: Labels,
) -> dict[str, Picture]:
    """What each step of a segmentation by hash codes makes of an image, by title, all of one size, for `panel`. -> uint8 RGB each.

    image: uint8 RGB [H, W, 3]; features: [C, h, w], shown as their first three principal components; codes: [b, h, w] in 0..1, cut at 0.5 for
    the binary map; superpixels, segments: integers [H, W], negative for none; superpixel_codes: bool [S, b], of superpixels 0..S-1. Features and
    codes lie over the whole image. A code has the same colour in the map and on the superpixels, similar codes have similar ones.
    """
    image, (regions, merged) = _scaled(image, [superpixels, segments])
    size = image.shape[1::-1]
    binary = (codes > 0.5).reshape(len(codes), -1).T
    distinct, index = np.unique(
        np.concatenate([binary, superpixel_codes]), axis=0, return_inverse=True
    )
    colours = _principal_colours(distinct)[index.reshape(-1)]
    spots = np.full_like(image, 255)
    spots[regions >= 0] = colours[len(binary) :][regions[regions >= 0]]
    columns = math.ceil(
        math.sqrt(len(codes))
    )  # the tiles have the shape of the image, and so has a square of them
    bits = Image.fromarray(mosaic(_bit_tiles(codes, TILE // columns), columns))
    return {
        "image": image,
        "feature map": _resized(
            _principal_colours(features.reshape(len(features), -1).T).reshape(
                *features.shape[1:], 3
            ),
            size,
        ),
        "bit planes": np.asarray(ImageOps.pad(bits, size, Image.Resampling.LANCZOS, _PAPER)),
        "binary map": _resized(colours[: len(binary)].reshape(*codes.shape[1:], 3), size),
        "superpixels": draw_boundaries(image, regions),
        "codes of the superpixels": draw_boundaries(spots, regions, _PAPER),
        "merged segments": draw_segments(image, merged),
    }


def plot_segmentation_iou(
    rows: Mapping[str, Sequence[tuple[float, float]]],
    path: Path | str,
    xlabel: str = "number of superpixels",
    ylabel: str = "segmentation IoU",
) -> None:
    """Draws a line a method through its (number of superpixels, IoU) points into a PNG, whole or not at all; needs no display.

    Points need no order; a method without any is left out. Up to 12 methods have a colour of their own, more differ by their markers too. Raises
    UserError where there is nothing to draw, or where the file cannot be written.
    """
    from matplotlib.figure import Figure  # half a second, and only needed here

    drawn = {
        name: np.array(sorted(points), dtype=np.float64) for name, points in rows.items() if points
    }
    if not drawn:
        raise UserError(f"{path}: no method has a point, there is nothing to draw")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axis: Any = figure.subplots()
    for (name, points), colour, marker in zip(
        drawn.items(), itertools.cycle(COLOURS), itertools.cycle(_MARKERS), strict=False
    ):
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
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the picture to {path}: {error.strerror or error}") from error
    with replacing(path, "the picture") as file:
        Image.fromarray(rendered(figure)).save(file, format="PNG")


def _canvas(image: Picture, labels: Labels) -> tuple[Picture, Labels]:
    """Copies of an image and its label map, small ones enlarged alike."""
    _check(image, labels)
    factor = min(8, max(1, math.ceil(READABLE / max(labels.shape))))
    return detections._enlarged(image, factor), labels.repeat(factor, axis=0).repeat(factor, axis=1)


def _check(image: Picture, labels: Labels) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if labels.shape != image.shape[:2]:
        raise ValueError(
            f"labels have (height, width) {labels.shape}, the image has {image.shape[:2]}"
        )


def _draw_outlines(canvas: Picture, labels: Labels, colour: Colour) -> None:
    """As thin as can be seen, with a dark rim, so that they are seen on what is as bright as they are."""
    line = max(1, round(int(max(labels.shape)) / 800))
    canvas[_outlines(labels, line + 1)] //= 2
    canvas[_outlines(labels, line)] = colour


def _outlines(labels: Labels, line: int) -> Bools:
    """The pixels that have a smaller label at most `line` pixels away in their row or column. -> bool [H, W].

    Where two labels meet, the outline lies on the larger one: it is not twice as thick as it need be, and never on a negative label.
    """
    edge = np.zeros(labels.shape, dtype=bool)
    for step in range(1, line + 1):
        edge[step:] |= labels[step:] > labels[:-step]
        edge[:-step] |= labels[:-step] > labels[step:]
        edge[:, step:] |= labels[:, step:] > labels[:, :-step]
        edge[:, :-step] |= labels[:, :-step] > labels[:, step:]
    return edge & (labels >= 0)


def _touching(segments: Ints, count: int) -> Ints:
    """Pairs of the segments 0..count-1 that touch, at corners too, both ways, ascending. segments: [H, W], -1 for none. -> [E, 2]."""
    first = [segments[:, :-1], segments[:-1], segments[:-1, :-1], segments[:-1, 1:]]
    second = [segments[:, 1:], segments[1:], segments[1:, 1:], segments[1:, :-1]]
    a, b = (np.concatenate([part.ravel() for part in parts]) for parts in (first, second))
    differ = (a != b) & (a >= 0) & (b >= 0)
    a, b = a[differ], b[differ]
    keys = np.unique(np.concatenate([a * count + b, b * count + a]))
    return np.stack([keys // max(count, 1), keys % max(count, 1)], axis=1)


def _colours(segments: Ints) -> list[Colour]:
    """A colour for each segment 0..n-1 of a map [H, W] (-1 for none), other than those of the segments that touch it. Those that touch most choose
    first, the colours of the palette are used alike; where all are taken, there are more."""
    count = int(segments.max(initial=-1)) + 1
    pairs = _touching(segments, count)
    degrees = np.bincount(pairs[:, 0], minlength=count)
    near = np.split(pairs[:, 1], np.cumsum(degrees)[:-1])
    used = [0] * len(detections._PALETTE)
    chosen = [-1] * count
    for i in np.argsort(-degrees, kind="stable").tolist():
        taken = {chosen[j] for j in near[i].tolist()}
        free = [c for c in range(len(used)) if c not in taken]
        chosen[i] = min(free, key=used.__getitem__) if free else len(used)
        if not free:
            used.append(0)
        used[chosen[i]] += 1
    return [_colour(c) for c in chosen]


def _colour(number: int) -> Colour:
    """The palette's, and past its end hues that never come back, none near the one before."""
    if number < len(detections._PALETTE):
        return detections._PALETTE[number]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.6, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)


def _principal_colours(rows: NDArray[Any]) -> Picture:
    """Rows as colours: their first three principal components as red, green and blue. [n, C] -> uint8 [n, 3].

    A component goes from black to full between its 1st and its 99th percentile; one that is constant, or not there, is half full.
    """
    values = rows.astype(np.float32)
    least = 1e-5 * np.abs(values).max()  # less than this is rounding
    values -= values.mean(axis=0)
    axes = np.linalg.svd(values, full_matrices=False)[2][:3]
    axes *= np.where(axes.sum(axis=1) < 0, -1, 1)[:, None]  # a decomposition leaves the signs open
    colours = np.full((len(rows), 3), 128, dtype=np.uint8)
    for i, component in enumerate(axes @ values.T):
        low, high = np.percentile(component, (1, 99))
        if high - low > least:
            colours[:, i] = (255 * ((component - low) / (high - low)).clip(0, 1)).round()
    return colours


def _scaled(image: Picture, maps: Sequence[Labels]) -> tuple[Picture, list[Labels]]:
    """An image, its longer side scaled to 720 pixels, and label maps of its size alike."""
    for labels in maps:
        _check(image, labels)
    size = _size(image.shape[:2], TILE)
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size[::-1], image.shape, strict=False)
    )
    large = Image.fromarray(image).resize(
        size, Image.Resampling.BICUBIC if max(image.shape[:2]) < TILE else Image.Resampling.LANCZOS
    )
    return np.array(large), [m[rows[:, None], columns] for m in maps]


def _size(shape: tuple[int, ...], longest: int) -> tuple[int, int]:
    """Width and height of a picture [height, width] scaled so that its longer side has `longest` pixels."""
    scale = longest / max(shape[:2])
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _resized(picture: Picture, size: tuple[int, int]) -> Picture:
    """To (width, height); its pixels stay squares."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def _bit_tiles(codes: Floats, longest: int) -> list[Picture]:
    """Bit planes [b, h, w] in grey, in a thin frame."""
    planes = (np.asarray(codes, dtype=np.float64).clip(0, 1) * 255).round().astype(np.uint8)
    tiles = [
        _resized(np.repeat(plane[..., None], 3, axis=2), _size(plane.shape, longest))
        for plane in planes
    ]
    return [np.asarray(ImageOps.expand(Image.fromarray(tile), 1, _FRAME)) for tile in tiles]


def _titled(picture: Picture, title: str, size: int) -> Picture:
    """The picture under a title of `size` pixels, which is cut to its width."""
    font = detections._font(size)
    sheet = Image.new("RGB", (picture.shape[1], picture.shape[0] + round(1.5 * size)), _PAPER)
    text = detections._fitted(title, font, picture.shape[1])
    ImageDraw.Draw(sheet).text((0, 0.7 * size), text, fill=detections._INK, font=font, anchor="lm")
    sheet.paste(Image.fromarray(picture), (0, round(1.5 * size)))
    return np.asarray(sheet)


def _sheet(tiles: Sequence[Picture], columns: int) -> Picture:
    """A mosaic in which no tile is shrunk."""
    return mosaic(tiles, columns, cell=max((max(tile.shape) for tile in tiles), default=1))
