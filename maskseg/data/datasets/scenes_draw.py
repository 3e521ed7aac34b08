"""One picture of the synthetic "scenes" data set: wavy stuff regions below, overlapping things on top.

Every thing is a level set: about the distance to its outline in pixels, negative inside. It gives the exact mask
(level < 0), the soft edge, the dark rim and the shadow. Things and stuff share textures and colours, so that a thing's
class is told by its shape alone.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.floating[Any]]
Rng = np.random.Generator

MIN_SIDE, MIN_AREA = (
    12,
    58,
)  # pixels; the longest side and the area of a thing, before anything hides a part of it
MAX_SIDE = 0.586  # of the picture's side: 150 of 256 pixels
PAD = 10  # pixels around a thing for its soft edge and its shadow


@dataclass(frozen=True)
class Shape:
    """A thing before it is placed, on a grid of pixels of its own."""

    name: str
    level: Floats  # [h, w] pixels, < 0 inside
    tone: Floats  # [h, w] factor on the brightness
    joints: Floats  # [P, 2] xy in continuous pixels; P = 0 for all but a figure
    crowd: bool = False


# ------------------------------------------------------------------------------------------------------------- shapes
# Each takes u, v [h, w] in units of the thing's radius and returns a level in the same unit; it fits the unit disc.


def _ellipse(u: Floats, v: Floats, a: float, b: float) -> Floats:
    k0 = np.hypot(u / a, v / b)
    return np.asarray(k0 * (k0 - 1) / (np.hypot(u / a**2, v / b**2) + 1e-6), np.float32)


def _half_planes(u: Floats, v: Floats, corners: Floats) -> Floats:
    """The convex polygon with corners [n, 2], clockwise as seen with y down."""
    edges = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.linalg.norm(
        edges, axis=1, keepdims=True
    )
    sides = [
        n[0] * (u - c[0]) + n[1] * (v - c[1])
        for n, c in zip(normals.astype(np.float32), corners, strict=True)
    ]
    return np.asarray(np.maximum.reduce(sides), np.float32)


def _capsule(u: Floats, v: Floats, start: Floats, end: Floats, radius: float) -> Floats:
    """A thick line from start [2] to end [2]."""
    du, dv = (end - start).astype(np.float32)
    along = np.clip(
        ((u - start[0]) * du + (v - start[1]) * dv) / max(float(du * du + dv * dv), 1e-9), 0, 1
    )
    return np.asarray(
        np.hypot(u - start[0] - along * du, v - start[1] - along * dv) - np.float32(radius),
        np.float32,
    )


def _disc(u: Floats, v: Floats, rng: Rng) -> Floats:
    return _ellipse(u, v, 1.0, rng.uniform(0.65, 1))


def _box(u: Floats, v: Floats, rng: Rng) -> Floats:
    angle = rng.uniform(0.35, math.pi / 4)
    return np.asarray(np.maximum(abs(u) - math.cos(angle), abs(v) - math.sin(angle)))


def _triangle(u: Floats, v: Floats, rng: Rng) -> Floats:
    angles = np.arange(3) * 2 * math.pi / 3 + rng.uniform(-0.3, 0.3, 3)
    return _half_planes(u, v, np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))


def _star(u: Floats, v: Floats, rng: Rng) -> Floats:
    half, inner = math.pi / int(rng.integers(5, 8)), rng.uniform(0.45, 0.6)
    radius, angle = (
        np.hypot(u, v),
        abs(np.mod(np.arctan2(v, u) + half, 2 * half) - half),
    )  # folded onto half a tip
    du, dv = (
        inner * math.cos(half) - 1,
        inner * math.sin(half),
    )  # the edge from the tip at (1, 0) to the notch
    level = dv * (radius * np.cos(angle) - 1) - du * radius * np.sin(angle)
    return np.asarray(level / math.hypot(du, dv))


def _ring(u: Floats, v: Floats, rng: Rng) -> Floats:
    half = rng.uniform(0.17, 0.3)
    return np.asarray(abs(_ellipse(u, v, 1.0, rng.uniform(0.8, 1)) + half) - half)


def _crescent(u: Floats, v: Floats, rng: Rng) -> Floats:
    bite = np.hypot(u - rng.uniform(0.5, 0.75), v) - rng.uniform(0.65, 0.85)
    return np.asarray(np.maximum(np.hypot(u, v) - 1, -bite))


def _cross(u: Floats, v: Floats, rng: Rng) -> Floats:
    angle = rng.uniform(0.34, 0.5)
    long, wide, u, v = math.cos(angle), math.sin(angle), abs(u), abs(v)
    return np.asarray(np.minimum(np.maximum(u - long, v - wide), np.maximum(u - wide, v - long)))


SHAPES = {
    shape.__name__[1:]: shape for shape in (_disc, _box, _triangle, _star, _ring, _crescent, _cross)
}


def _grid(radius: float) -> tuple[Floats, Floats]:
    """x [1, s] and y [s, 1] of pixel centres around (0, 0), far enough for a thing of this radius in pixels."""
    half = int(np.ceil(1.1 * radius)) + PAD
    axis = np.arange(-half, half, dtype=np.float32) + np.float32(0.5)
    return axis[None], axis[:, None]


def _simple_shape(name: str, side: float, rng: Rng) -> Shape:
    """A rotated, squeezed and slightly bent shape with a longest side of about `side` pixels."""
    upright = name in ("box", "cross") and rng.random() < 0.85  # as most boxes in real pictures
    angle, squeeze = (
        rng.normal(0, 0.08) if upright else rng.uniform(0, 2 * math.pi),
        rng.uniform(0.8, 1),
    )
    x, y = _grid(side / 2)
    cos, sin = math.cos(angle) * 2 / side, math.sin(angle) * 2 / side
    u, v = cos * x + sin * y, (cos * y - sin * x) / squeeze
    bent = u + rng.uniform(0, 0.02 if upright else 0.07) * np.sin(
        2.5 * v + rng.uniform(0, 2 * math.pi)
    )
    level = SHAPES[name](bent, v, rng) * (squeeze * side / 2)
    return Shape(name, level, np.ones_like(level), np.zeros((0, 2), np.float32))


def _pose(rng: Rng) -> Floats:
    """The joints [13, 2] of a figure that faces us: its left is on our right. Its height is about 2."""
    joints = np.zeros((13, 2), np.float32)
    joints[0] = rng.uniform(-0.06, 0.06), -0.82
    for side, sign in ((0, 1), (1, -1)):
        arm, leg = rng.uniform(0.25, 2.6), rng.uniform(0.03, 0.65)
        fore, shin = arm + rng.uniform(-1.3, 1.3), leg + rng.uniform(-0.6, 0.15)
        chain = [
            (0.24, -0.48),
            (np.sin(arm) * 0.32, np.cos(arm) * 0.32),
            (np.sin(fore) * 0.3, np.cos(fore) * 0.3),
        ]
        joints[[1 + side, 3 + side, 5 + side]] = np.cumsum(chain, axis=0) * (sign, 1)
        chain = [
            (0.14, 0.1),
            (np.sin(leg) * 0.4, np.cos(leg) * 0.4),
            (np.sin(shin) * 0.38, np.cos(shin) * 0.38),
        ]
        joints[[7 + side, 9 + side, 11 + side]] = np.cumsum(chain, axis=0) * (sign, 1)
    lean = rng.normal(0, 0.3) if rng.random() < 0.85 else rng.uniform(-math.pi, math.pi)
    turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]], np.float32)
    return np.asarray(joints @ turn, np.float32)


def _figure(side: float, rng: Rng) -> Shape:
    """A jointed figure in a random pose with a longest side of about `side` pixels."""
    joints = _pose(rng)
    low, high = joints.min(axis=0) - 0.12, joints.max(axis=0) + 0.12
    scale = side / float((high - low).max())
    joints = np.asarray((joints - (low + high) / 2) * scale, np.float32)
    x, y = _grid(side / 2)
    limb = max(
        rng.uniform(0.085, 0.11) * scale, 1.3
    )  # below this a joint's pixel could miss the mask
    head, neck = joints[0], joints[1:3].mean(axis=0)
    up = (head - neck) / 0.34
    trunk = _half_planes(x, y, joints[[1, 7, 8, 2]]) - 0.1 * scale
    parts = [(trunk, 1.0), (_capsule(x, y, neck, head, 0.08 * scale), 1.1)]
    for start, end, tone in ((7, 9, 0.72), (9, 11, 0.72), (1, 3, 0.86), (3, 5, 0.86)):
        parts += [
            (_capsule(x, y, joints[start + other], joints[end + other], limb), tone)
            for other in (0, 1)
        ]
    parts.append((np.hypot(x - head[0], y - head[1]) - np.float32(0.18 * scale), 1.2))
    level = np.minimum.reduce([part for part, _ in parts])
    shade = np.ones_like(level)
    for part, tone in parts:
        shade[part < 0] = tone
    for sign in (-1, 1):  # two eyes tell its front, and so its left from its right
        eye = head + 0.03 * up + sign * 0.08 * np.array([-up[1], up[0]])
        shade[np.hypot(x - eye[0], y - eye[1]) < 0.04 * scale] = 0.3
    return Shape("figure", level, shade, joints + np.float32(x.size / 2))


def crowd(rng: Rng) -> Shape:
    """A tight cluster of small equal things, as one shape."""
    name = str(rng.choice([*SHAPES, "figure"]))
    side = rng.uniform(15, 22) if name != "figure" else rng.uniform(32, 36)
    stamp = _figure(side, rng) if name == "figure" else _simple_shape(name, side, rng)
    counts, n = rng.integers(3, 5 if name == "figure" else 6, 2), len(stamp.level)
    level = np.full((counts * 0.95 * side + n).astype(int), 1e3, np.float32)
    tone = np.ones_like(level)
    for place in np.argwhere(rng.random(counts) < 0.9):
        top, left = np.clip((place + rng.uniform(-0.3, 0.3, 2)) * 0.95 * side, 0, None).astype(int)
        here = np.s_[top : top + n, left : left + n]
        tone[here][stamp.level < 0] = stamp.tone[stamp.level < 0]
        level[here] = np.minimum(level[here], stamp.level)
    return Shape(name, level, tone, np.zeros((0, 2), np.float32), crowd=True)


def random_shape(size: int, rng: Rng) -> Shape:
    """A random shape for a picture of size pixels; its longest side is in MIN_SIDE .. MAX_SIDE * size pixels."""
    name, high = str(rng.choice([*SHAPES, "figure"])), MAX_SIDE * size
    low = 32 if name == "figure" else 14
    while True:
        side = low * (high / low) ** (rng.random() ** 0.7)
        shape = _figure(side, rng) if name == "figure" else _simple_shape(name, side, rng)
        inside = shape.level < 0
        longest = max(int(np.ptp(np.flatnonzero(inside.any(axis=axis)))) + 1 for axis in (0, 1))
        if MIN_SIDE <= longest <= high and inside.sum() >= MIN_AREA:
            return shape


# ------------------------------------------------------------------------------------------------- textures and stuff
# name: pattern's size in pixels (low, high), hue (centre, spread), saturation (low, high), value (low, high)
LOOKS: dict[str, tuple[tuple[float, float], ...]] = {
    "sky": ((40, 80), (0.58, 0.06), (0.2, 0.6), (0.75, 1.0)),
    "water": ((9, 16), (0.53, 0.08), (0.4, 0.8), (0.4, 0.8)),
    "grass": ((2, 4), (0.27, 0.07), (0.4, 0.8), (0.35, 0.75)),
    "sand": ((2, 3), (0.11, 0.04), (0.25, 0.55), (0.65, 0.95)),
    "rock": ((10, 20), (0.6, 0.5), (0.02, 0.2), (0.3, 0.65)),
    "brick": ((9, 15), (0.03, 0.05), (0.4, 0.75), (0.45, 0.8)),
    "tiles": ((10, 18), (0.5, 0.5), (0.1, 0.5), (0.5, 0.9)),
    "field": ((7, 14), (0.14, 0.08), (0.35, 0.75), (0.45, 0.85)),
}
MIN_CONTRAST = (
    90.0  # mean RGB distance (0 to 255 a channel) of a thing's colour from what surrounds it
)


def _smooth_noise(shape: tuple[int, int], cell: tuple[float, float], rng: Rng) -> Floats:
    """Noise [h, w] about 0.5 whose bumps are cell = (width, height) pixels."""
    size = int(shape[1] / cell[0]) + 2, int(shape[0] / cell[1]) + 2
    coarse = Image.fromarray(rng.random(size[::-1], dtype=np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)


def _pattern(name: str, shape: tuple[int, int], angle: float, rng: Rng) -> Floats:
    """The texture of a kind of stuff, turned by an angle: [h, w, 1] in about 0 .. 1."""
    size = rng.uniform(*LOOKS[name][0])
    turns, cos, sin = 2 * math.pi / size, math.cos(angle), math.sin(angle)
    down, across = (axis.astype(np.float32) for axis in np.ogrid[: shape[0], : shape[1]])
    x, y = cos * across + sin * down, cos * down - sin * across
    texture: NDArray[Any]
    if name == "water":
        texture = 0.5 + 0.5 * np.sin(turns * (y + 0.25 * size * np.sin(turns / 3 * x)))
    elif name == "field":
        texture = np.clip(0.5 + 1.5 * np.sin(turns * y), 0, 1)
    elif name == "tiles":
        texture = np.clip(0.5 + 4 * np.sin(turns / 2 * x) * np.sin(turns / 2 * y), 0, 1)
    elif name == "brick":
        row = np.floor(y / (0.6 * size))
        joint = np.mod(x / (1.4 * size) + 0.5 * np.mod(row, 2), 1) < 0.1
        texture = 1.0 * (joint | (y / (0.6 * size) - row < 0.2))
    else:
        cell = {"grass": (size / 2, 3 * size), "sky": (1.5 * size, 0.7 * size)}.get(
            name, (size, size)
        )
        fine = 0.4 if name == "rock" else 0.0
        texture = (1 - fine) * _smooth_noise(shape, cell, rng) + fine * _smooth_noise(
            shape, (4, 4), rng
        )
    return texture.astype(np.float32)[..., None]


def _colours(name: str, rng: Rng) -> tuple[Floats, Floats]:
    """The two RGB colours [3] (0 .. 255) that a kind of stuff mixes by its pattern."""
    (hue, spread), saturation, value = LOOKS[name][1:]
    h, s, v = (
        rng.uniform(hue - spread, hue + spread) % 1,
        rng.uniform(*saturation),
        rng.uniform(*value),
    )
    first = 255 * np.array(colorsys.hsv_to_rgb(h, s, v), np.float32)
    dark = (
        rng.uniform(0.6, 0.85) if rng.random() < 0.7 or name == "sky" else rng.uniform(1.15, 1.35)
    )
    return first, first * np.float32(dark)


def background(size: int, rng: Rng) -> tuple[Floats, NDArray[np.uint8]]:
    """Two to four regions of stuff: RGB [S, S, 3] and indices into LOOKS [S, S]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    chosen = rng.choice(len(LOOKS), rng.integers(2, 5), replace=False)
    chosen = chosen[
        np.argsort(chosen > 0, kind="stable")
    ]  # LOOKS starts with the sky, which is on top
    stuff = np.full((size, size), chosen[0], np.uint8)
    borders = np.sort(rng.uniform(0.15, 0.9, len(chosen) - 1)) * size
    for kind, border in zip(chosen[1:], borders, strict=True):
        phases, heights = 2 * math.pi * rng.random(3), rng.uniform(0, 0.05 * size, 3) / (1, 2, 4)
        waves = heights * np.sin(np.multiply.outer(8 * x / size, (1, 2, 4)) + phases)
        line = border + rng.normal(0, 0.12) * (x - size / 2) + waves.sum(axis=-1)
        if rng.random() < 0.3:  # an island instead of all that is below
            left, down = (x - rng.uniform(0.1, 0.9) * size) / 1.8, y + line - 2 * border
            lobes = 1 + 0.2 * np.sin(rng.integers(2, 5) * np.arctan2(down, left) + phases[0])
            stuff[np.hypot(left, down) < lobes * rng.uniform(0.12, 0.3) * size] = kind
        else:
            stuff[y > line] = kind
    image = np.zeros((size, size, 3), np.float32)
    for kind in chosen:
        here, name = stuff == kind, list(LOOKS)[kind]
        angle = rng.uniform(0, math.pi) if name in ("field", "tiles") else rng.normal(0, 0.08)
        first, second = _colours(name, rng)
        image[here] = (first + _pattern(name, here.shape, angle, rng) * (second - first))[here]
    return image, stuff


def _material(surroundings: Floats, rng: Rng) -> tuple[str, Floats, Floats]:
    """A pattern's name and two colours [3] that stand out from the colours [n, 3] around."""
    best, choice = -1.0, None
    while choice is None or (best < MIN_CONTRAST and rng.random() < 0.95):
        first, second = _colours(str(rng.choice(list(LOOKS))), rng)
        if rng.random() < 0.5:
            vivid = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 1), rng.uniform(0.3, 1))
            first = 255 * np.array(vivid, np.float32)
            second = first * rng.uniform(0.65, 1.3)
        contrast = float(np.linalg.norm(surroundings - (first + second) / 2, axis=1).mean())
        if contrast > best:
            best, choice = contrast, (str(rng.choice(list(LOOKS))), first, second)
    return choice


def paint(image: Floats, shape: Shape, light: float, rng: Rng) -> None:
    """Paints a shape into a piece of the picture, [h, w, 3] as its grid, with a shadow that falls towards `light`."""
    level = shape.level
    if rng.random() < 0.5:
        shift = np.rint(rng.uniform(2, 5) * np.array([math.sin(light), math.cos(light)])).astype(
            int
        )
        image *= 1 - 0.4 * np.clip(0.5 - np.roll(level, shift, (0, 1))[..., None] / 4, 0, 1)
    name, first, second = _material(image[(level > -3) & (level < 6)], rng)
    colour = first + _pattern(name, level.shape, rng.uniform(0, math.pi), rng) * (second - first)
    y, x = (np.linspace(-0.5, 0.5, side) for side in level.shape)
    tone = shape.tone * (
        1 - rng.uniform(0, 0.5) * np.add.outer(math.sin(light) * y, math.cos(light) * x)
    )
    if shape.crowd or (level.min() < -6 and rng.random() < 0.4):
        tone = tone * np.where(level > -1.5, 0.55, 1)
    image += np.clip(0.5 - level, 0, 1)[..., None] * (colour * tone[..., None] - image)
