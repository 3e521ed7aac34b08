"""The colors of classes and of their objects, the same in all images of a dataset.

A class has one color, which depends only on its label. Objects of one class differ in lightness.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from maskseg.visualization.layout import PALETTE, Colour

Floats = NDArray[np.float64]

NUM_SHADES = 5
_LEVELS = 8  # values per channel of the candidate colors
_LIGHTNESS_RANGE = (0.45, 0.9)  # of the candidate colors: neither like ink nor like paper
# The image below changes the lightness of a color but hardly its hue, so that a difference in
# lightness is a weaker cue.
_LIGHTNESS_WEIGHT = 0.6
_SHADE_STEP = 0.09  # of lightness between the color of a class and its next shade
_SHADE_RANGE = (0.42, 0.93)  # lightness of shades
_MAX_LINE_LIGHTNESS = 0.76  # of a line on white
# Of Oklab: linear RGB -> responses of cones, and their cube roots -> lightness and two axes of hue.
_TO_CONES = np.array([[0.4122, 0.2119, 0.0883], [0.5363, 0.6807, 0.2817], [0.0514, 0.1074, 0.6300]])
_TO_LAB = np.array(
    [[0.2105, 1.9780, 0.0259], [0.7936, -2.4286, 0.7828], [-0.0041, 0.4506, -0.8087]]
)


def class_colours(count: int) -> NDArray[np.uint8]:
    """The colors of classes 0..count-1, RGB [count, 3]; each depends only on the class's label.

    First the palette of all visualizations, then always the color that differs most from all
    before it. About 280 colors are distinct; then they repeat.
    """
    colours = _all_colours()
    return colours[np.arange(count) % len(colours)]


def class_colour(label: int) -> Colour:
    """The color of a class. label: any integer, also that of an unknown class."""
    colours = _all_colours()
    red, green, blue = colours[label % len(colours)].tolist()
    return red, green, blue


@lru_cache(maxsize=4096)
def instance_colour(label: int, shade: int) -> Colour:
    """The color of an object of a class.

    shade: 0 is the color of the class itself; shades 1..4 are lighter or darker.
    """
    lightness, *hue = to_oklab(np.array([class_colour(label)]))[0].tolist()
    low, high = _SHADE_RANGE
    steps = (0.0, 1.0, -1.0, 0.5, -0.5)
    if lightness + _SHADE_STEP > high:
        steps = (0.0, -1.0, -2.0, -0.5, -1.5)
    elif lightness - _SHADE_STEP < low:
        steps = (0.0, 1.0, 2.0, 0.5, 1.5)
    if shade % NUM_SHADES == 0:
        return class_colour(label)
    shifted = lightness + _SHADE_STEP * steps[shade % NUM_SHADES]
    return _from_oklab(shifted, np.array(hue))


def line_colour(label: int) -> Colour:
    """The color of a class for lines and text on white: as it is, or darker if it is bright."""
    colour = class_colour(label)
    lightness, *hue = to_oklab(np.array([colour]))[0].tolist()
    if lightness <= _MAX_LINE_LIGHTNESS:
        return colour
    return _from_oklab(_MAX_LINE_LIGHTNESS, np.array(hue))


def as_hex(colour: Colour) -> str:
    """A color as matplotlib takes it: `#e69f00`."""
    return "#" + "".join(f"{value:02x}" for value in colour)


def assign_shades(boxes: Floats, labels: Sequence[int]) -> list[int]:
    """Choose a shade 0..4 for each object, so that nearby objects of a class differ.

    boxes: [D, 4] xyxy; labels: their classes. The shade that the nearby objects of the class use
    least, of these the one that its objects use least in the whole image.
    """
    margin = 0.15 * (boxes[:, 2:] - boxes[:, :2]) + 2
    low = boxes[:, :2] - margin
    high = boxes[:, 2:] + margin
    classes = np.asarray(labels, dtype=np.int64)
    shades = np.zeros(len(boxes), dtype=np.int64)
    for i in range(len(boxes)):
        same = classes[:i] == classes[i]
        near = np.all((low[i] < high[:i]) & (low[:i] < high[i]), axis=1) & same
        uses_near = np.bincount(shades[:i][near], minlength=NUM_SHADES)
        uses = np.bincount(shades[:i][same], minlength=NUM_SHADES)
        shades[i] = np.lexsort((uses, uses_near))[0]
    return shades.tolist()


@lru_cache(maxsize=1)
def _all_colours() -> NDArray[np.uint8]:
    """The palette, then the colors of a grid that differ most from all before them, [n, 3]."""
    levels = np.linspace(0, 255, _LEVELS).round()
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness = to_oklab(cube)[:, 0]
    candidates = cube[(_LIGHTNESS_RANGE[0] <= lightness) & (lightness <= _LIGHTNESS_RANGE[1])]
    weights = (_LIGHTNESS_WEIGHT, 1, 1)
    points = to_oklab(candidates) * weights
    chosen = [np.array(colour, dtype=np.float64) for colour in PALETTE]
    # Black, gray and white are taken by the image.
    taken = to_oklab(np.array([*chosen, (0, 0, 0), (128, 128, 128), (255, 255, 255)])) * weights
    nearest = np.linalg.norm(points[:, None] - taken, axis=2).min(axis=1)
    while nearest.max() > 0.02:
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(points - points[best], axis=1))
    return np.array(chosen, dtype=np.uint8)


def to_oklab(colours: NDArray[np.number]) -> Floats:
    """Convert sRGB 0..255 [n, 3] to Oklab: lightness and two axes of hue, f64 [n, 3].

    Distances in it approximate perceived differences (Ottosson 2020, "A perceptual color space for
    image processing").
    """
    srgb = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _TO_CONES) @ _TO_LAB)


def _from_oklab(lightness: float, hue: Floats) -> Colour:
    """The sRGB color of a lightness and hue, with the most saturation that a screen can show."""
    for saturation in np.linspace(1, 0, 21):
        lab = np.array([lightness, *(saturation * hue)])
        linear = (lab @ np.linalg.inv(_TO_LAB)) ** 3 @ np.linalg.inv(_TO_CONES)
        if linear.min() >= -1e-3 and linear.max() <= 1 + 1e-3:
            break
    clipped = linear.clip(0, 1)
    srgb = np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)
    red, green, blue = (255 * srgb).round().astype(int).tolist()
    return red, green, blue
