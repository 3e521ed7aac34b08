"""Images of segments: outlines and fills of label maps.

Images are uint8 RGB [H, W, 3]; label maps are integers [H, W], negative where there is no label.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskseg.visualization.layout import (
    MIN_READABLE_SIDE,
    PALETTE,
    PAPER,
    TILE_SIDE,
    Colour,
    RGBImage,
    enlarge,
    scaled_size,
)

Labels = NDArray[np.integer]  # [H, W], superpixel or segment of each pixel; negative: none
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_FILL = 0.55  # opacity of the color of a segment


def draw_boundaries(image: RGBImage, labels: Labels, colour: Colour = (255, 255, 0)) -> RGBImage:
    """Draw the outlines of a label map over an image.

    labels: [H, W]; pixels with negative labels are not drawn on. An image whose longer side is
    under 640 pixels is enlarged first, as in `draw_detections`. -> uint8 RGB [H', W', 3].
    """
    canvas, labels = enlarge_with_labels(image, labels)
    draw_outlines(canvas, labels, colour)
    return canvas


def draw_segments(image: RGBImage, segments: Labels) -> RGBImage:
    """Fill each segment with a translucent color that no adjacent segment has, and outline it.

    segments: [H, W], each distinct label is one segment, whether connected or not; pixels with
    negative labels are unchanged. Small images are enlarged as in `draw_boundaries`.
    -> uint8 RGB [H', W', 3].
    """
    canvas, labels = enlarge_with_labels(image, segments)
    distinct, index = np.unique(np.where(labels < 0, -1, labels), return_inverse=True)
    index = index.reshape(labels.shape) - int(distinct[0] < 0)  # 0..n-1, -1 for none
    inside = index >= 0
    colours = np.array(_assign_colours(index), dtype=np.float64).reshape(-1, 3)[index[inside]]
    canvas[inside] = (canvas[inside] * (1 - _FILL) + colours * _FILL).round().astype(np.uint8)
    draw_outlines(canvas, index, PAPER)
    return canvas


def enlarge_with_labels(image: RGBImage, labels: Labels) -> tuple[RGBImage, Labels]:
    """Copy an image and its label map [H, W]; small ones are enlarged by the same factor.

    Raises ValueError if the image is not uint8 RGB or the sizes differ.
    """
    _check_sizes(image, labels)
    factor = min(8, max(1, math.ceil(MIN_READABLE_SIDE / max(labels.shape))))
    return enlarge(image, factor), labels.repeat(factor, axis=0).repeat(factor, axis=1)


def scale_to_tile(image: RGBImage, maps: Sequence[Labels]) -> tuple[RGBImage, list[Labels]]:
    """Scale an image to a longer side of 720 pixels, and label maps [H, W] of its size likewise.

    Raises ValueError if the image is not uint8 RGB or the sizes differ.
    """
    for labels in maps:
        _check_sizes(image, labels)
    size = scaled_size(image.shape[:2], TILE_SIDE)
    rows = _nearest_indices(image.shape[0], size[1])
    columns = _nearest_indices(image.shape[1], size[0])
    enlarges = max(image.shape[:2]) < TILE_SIDE
    resampling = Image.Resampling.BICUBIC if enlarges else Image.Resampling.LANCZOS
    scaled = np.array(Image.fromarray(image).resize(size, resampling))
    return scaled, [labels[rows[:, None], columns] for labels in maps]


def _nearest_indices(old: int, new: int) -> Ints:
    """For each of `new` pixels, the index of the nearest of `old` pixels of the same extent."""
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)


def _check_sizes(image: RGBImage, labels: Labels) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if labels.shape != image.shape[:2]:
        raise ValueError(
            f"labels have (height, width) {labels.shape}, the image has {image.shape[:2]}"
        )


def draw_outlines(canvas: RGBImage, labels: Labels, colour: Colour) -> None:
    """Draw the outlines of a label map [H, W] on a canvas of its size, in place.

    The lines are thin, with a dark rim that keeps them visible on areas of their own brightness.
    """
    width = max(1, round(int(max(labels.shape)) / 800))
    canvas[outline_pixels(labels, width + 1)] //= 2
    canvas[outline_pixels(labels, width)] = colour


def outline_pixels(labels: Labels, width: int) -> Bools:
    """Mark pixels with a smaller label within `width` pixels in their row or column.

    Between two labels the outline lies only on the larger one, so that it is not drawn twice, and
    never on a negative label. -> bool [H, W].
    """
    edge = np.zeros(labels.shape, dtype=bool)
    for step in range(1, width + 1):
        edge[step:] |= labels[step:] > labels[:-step]
        edge[:-step] |= labels[:-step] > labels[step:]
        edge[:, step:] |= labels[:, step:] > labels[:, :-step]
        edge[:, :-step] |= labels[:, :-step] > labels[:, step:]
    return edge & (labels >= 0)


def _adjacent_pairs(segments: Ints, count: int) -> Ints:
    """Pairs of the segments 0..count-1 that touch (8-connected), in both orders, ascending.

    segments: [H, W], -1 for none. -> [E, 2].
    """
    first = [segments[:, :-1], segments[:-1], segments[:-1, :-1], segments[:-1, 1:]]
    second = [segments[:, 1:], segments[1:], segments[1:, 1:], segments[1:, :-1]]
    a = np.concatenate([part.ravel() for part in first])
    b = np.concatenate([part.ravel() for part in second])
    differ = (a != b) & (a >= 0) & (b >= 0)
    a = a[differ]
    b = b[differ]
    keys = np.unique(np.concatenate([a * count + b, b * count + a]))
    return np.stack([keys // max(count, 1), keys % max(count, 1)], axis=1)


def _assign_colours(segments: Ints) -> list[Colour]:
    """Choose a color for each segment 0..n-1 that differs from those of the adjacent segments.

    segments: [H, W], -1 for none. Greedy graph coloring in the order of falling degree. Each
    segment gets the least used free color; if all are taken, a further color is added.
    """
    count = int(segments.max(initial=-1)) + 1
    pairs = _adjacent_pairs(segments, count)
    degrees = np.bincount(pairs[:, 0], minlength=count)
    neighbours = np.split(pairs[:, 1], np.cumsum(degrees)[:-1])
    uses = [0] * len(PALETTE)
    chosen = [-1] * count
    for i in np.argsort(-degrees, kind="stable").tolist():
        taken = {chosen[j] for j in neighbours[i].tolist()}
        free = [colour for colour in range(len(uses)) if colour not in taken]
        if free:
            chosen[i] = min(free, key=uses.__getitem__)
        else:
            chosen[i] = len(uses)
            uses.append(0)
        uses[chosen[i]] += 1
    return [_numbered_colour(number) for number in chosen]


def _numbered_colour(number: int) -> Colour:
    """A color of the palette, or, past its end, a hue that never repeats.

    Steps by the golden ratio keep consecutive hues apart.
    """
    if number < len(PALETTE):
        return PALETTE[number]
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.6, 0.85)
    return round(255 * red), round(255 * green), round(255 * blue)
