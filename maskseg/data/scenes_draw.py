"""One picture of the synthetic "scenes" data set: wavy stuff regions below, overlapping things on top.

Every thing is a level set: a function of the pixel that is roughly the distance to the outline in pixels, negative
inside. It gives the exact mask (level < 0), the soft edge, the outline and the shadow at once. Things and stuff draw
their textures and colours from one pool, so that a class is told by its shape (things) or its layout and pattern
(stuff), never by colour alone.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Rng = np.random.Generator

JOINTS = ("head", *(f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
                    for side in ("left", "right")))  # fmt: skip
BONES = (("head", "left_shoulder"), ("head", "right_shoulder"), ("left_shoulder", "right_shoulder"),
         ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"), ("right_shoulder", "right_elbow"),
         ("right_elbow", "right_wrist"), ("left_shoulder", "left_hip"), ("right_shoulder", "right_hip"),
         ("left_hip", "right_hip"), ("left_hip", "left_knee"), ("left_knee", "left_ankle"),
         ("right_hip", "right_knee"), ("right_knee", "right_ankle"))  # fmt: skip
MIN_SIDE = 12  # pixels; the longest side of a thing, before anything hides a part of it
MAX_SIDE = 0.586  # of the picture's side: 150 of 256 pixels
MIN_VISIBLE_PART, MIN_VISIBLE_AREA = 0.3, 45  # a placement that leaves less of any thing is drawn again
PAD = 10  # pixels around a thing for its soft edge and its shadow


@dataclass(frozen=True)
class Shape:
    """A thing before it is placed: level [h, w] in pixels (< 0 inside), tone [h, w] (a factor on the brightness) and
    joints [P, 2] as xy of the same grid in continuous pixels (P = 0 for all but a figure)."""

    name: str
    level: Floats
    tone: Floats
    joints: Floats
    crowd: bool = False


# ------------------------------------------------------------------------------------------------------------- shapes
# Each takes u, v [h, w] in units of the thing's radius and returns a level in the same unit; it fits the unit disc.


def _ellipse(u: Floats, v: Floats, a: float, b: float) -> Floats:
    k0 = np.hypot(u / a, v / b)
    return np.asarray(k0 * (k0 - 1) / (np.hypot(u / a**2, v / b**2) + 1e-6), np.float32)


def _half_planes(u: Floats, v: Floats, corners: Floats) -> Floats:
    """The convex polygon with corners [n, 2], clockwise as seen with y down."""
    edges = np.roll(corners, -1, axis=0) - corners
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / np.linalg.norm(edges, axis=1, keepdims=True)
    sides = [n[0] * (u - c[0]) + n[1] * (v - c[1]) for n, c in zip(normals.astype(np.float32), corners, strict=True)]
    return np.asarray(np.maximum.reduce(sides), np.float32)


def _capsule(u: Floats, v: Floats, start: Floats, end: Floats, radius: float) -> Floats:
    """A thick line from start [2] to end [2]."""
    du, dv = (end - start).astype(np.float32)
    along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / max(float(du * du + dv * dv), 1e-9), 0, 1)
    return np.asarray(np.hypot(u - start[0] - along * du, v - start[1] - along * dv) - np.float32(radius), np.float32)


def _disc(u: Floats, v: Floats, rng: Rng) -> Floats:
    return _ellipse(u, v, 1.0, rng.uniform(0.6, 1))


def _box(u: Floats, v: Floats, rng: Rng) -> Floats:
    angle = rng.uniform(0.3, np.pi / 4)
    return np.maximum(abs(u) - np.float32(np.cos(angle)), abs(v) - np.float32(np.sin(angle)))


def _triangle(u: Floats, v: Floats, rng: Rng) -> Floats:
    angles = np.arange(3) * 2 * np.pi / 3 + rng.uniform(-0.3, 0.3, 3)
    return _half_planes(u, v, np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))


def _star(u: Floats, v: Floats, rng: Rng) -> Floats:
    points, inner = int(rng.integers(5, 8)), rng.uniform(0.4, 0.55)
    half = np.pi / points
    angle = abs(np.mod(np.arctan2(v, u) + half, 2 * half) - half)  # folds all the points onto half of the first one
    radius = np.hypot(u, v)
    du, dv = inner * np.cos(half) - 1, inner * np.sin(half)  # the edge from the tip at (1, 0) to the notch
    level = (dv * (radius * np.cos(angle) - 1) - du * radius * np.sin(angle)) / np.hypot(du, dv)
    return np.asarray(level, np.float32)


def _ring(u: Floats, v: Floats, rng: Rng) -> Floats:
    half = np.float32(rng.uniform(0.13, 0.22))
    return abs(_ellipse(u, v, 1.0, rng.uniform(0.75, 1)) + half) - half


def _crescent(u: Floats, v: Floats, rng: Rng) -> Floats:
    radius = rng.uniform(0.7, 0.85)
    bite = np.hypot(u - np.float32(rng.uniform(0.45, 0.6)), v) - np.float32(radius)
    return np.maximum(np.hypot(u, v) - np.float32(1), -bite)


def _cross(u: Floats, v: Floats, rng: Rng) -> Floats:
    angle = rng.uniform(0.27, 0.4)
    long, wide = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = abs(u), abs(v)
    return np.minimum(np.maximum(u - long, v - wide), np.maximum(u - wide, v - long))


SHAPES: dict[str, Callable[[Floats, Floats, Rng], Floats]] = {
    "disc": _disc, "box": _box, "triangle": _triangle, "star": _star, "ring": _ring, "crescent": _crescent,
    "cross": _cross,
}  # fmt: skip


def _grid(radius: float) -> tuple[Floats, Floats]:
    """x [1, s] and y [s, 1] of pixel centres around (0, 0), far enough for a thing of this radius in pixels."""
    half = int(np.ceil(1.1 * radius)) + PAD
    axis = np.arange(-half, half, dtype=np.float32) + np.float32(0.5)
    return axis[None], axis[:, None]


def _simple_shape(name: str, side: float, rng: Rng) -> Shape:
    """A rotated, squeezed and slightly bent shape with a longest side of about `side` pixels."""
    radius, angle, squeeze = side / 2, rng.uniform(0, 2 * np.pi), np.float32(rng.uniform(0.75, 1))
    x, y = _grid(radius)
    cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
    u, v = cos * x + sin * y, (cos * y - sin * x) / squeeze
    bend, phase = np.float32(rng.uniform(0, 0.07)), np.float32(rng.uniform(0, 2 * np.pi))
    level = SHAPES[name](u + bend * np.sin(np.float32(2.5) * v + phase), v, rng) * (np.float32(radius) * squeeze)
    return Shape(name, level, np.ones_like(level), np.zeros((0, 2), np.float32))


def _pose(rng: Rng) -> Floats:
    """The joints [13, 2] of a figure that faces us, in the order of JOINTS: its left is on our right. Height about 2."""
    joints = np.zeros((13, 2), np.float32)
    joints[0] = rng.uniform(-0.06, 0.06), -0.82
    for side, sign in ((0, 1), (1, -1)):
        arm, leg = rng.uniform(0.25, 2.6), rng.uniform(0.03, 0.65)
        fore, shin = arm + rng.uniform(-1.3, 1.3), leg + rng.uniform(-0.6, 0.15)
        chain = [(0.24, -0.48), (np.sin(arm) * 0.32, np.cos(arm) * 0.32), (np.sin(fore) * 0.3, np.cos(fore) * 0.3)]
        joints[[1 + side, 3 + side, 5 + side]] = np.cumsum(chain, axis=0) * (sign, 1)
        chain = [(0.14, 0.1), (np.sin(leg) * 0.4, np.cos(leg) * 0.4), (np.sin(shin) * 0.38, np.cos(shin) * 0.38)]
        joints[[7 + side, 9 + side, 11 + side]] = np.cumsum(chain, axis=0) * (sign, 1)
    lean = rng.normal(0, 0.3) if rng.random() < 0.85 else rng.uniform(-np.pi, np.pi)
    turn = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]], np.float32)
    return np.asarray(joints @ turn, np.float32)


def _figure(side: float, rng: Rng) -> Shape:
    """A jointed figure in a random pose with a longest side of about `side` pixels."""
    joints = _pose(rng)
    low, high = joints.min(axis=0) - 0.12, joints.max(axis=0) + 0.12
    scale = side / float((high - low).max())
    joints = np.asarray((joints - (low + high) / 2) * scale, np.float32)
    x, y = _grid(side / 2)
    stout = rng.uniform(0.085, 0.11) * scale
    limb = max(stout, 1.3)  # below this a joint's pixel could miss the mask
    head, up = joints[0], (joints[0] - joints[1:3].mean(axis=0)) / np.float32(0.34)
    across = np.array([-up[1], up[0]], np.float32)  # towards the figure's left
    trunk = _half_planes(x, y, joints[[1, 7, 8, 2]]) - np.float32(0.1 * scale)
    parts = [(trunk, 1.0), (_capsule(x, y, joints[1:3].mean(axis=0), head, 0.08 * scale), 1.1)]
    for start, end, tone in ((7, 9, 0.72), (9, 11, 0.72), (1, 3, 0.86), (3, 5, 0.86)):
        parts += [(_capsule(x, y, joints[start + side_], joints[end + side_], limb), tone) for side_ in (0, 1)]
    parts.append((np.hypot(x - head[0], y - head[1]) - np.float32(0.18 * scale), 1.2))
    level, shade = np.minimum.reduce([part for part, _ in parts]), np.ones((y.size, x.size), np.float32)
    for part, tone in parts:
        shade[part < 0] = tone
    for sign in (-1, 1):  # two eyes tell its front, and so its left from its right
        eye = head + 0.03 * up + sign * 0.08 * across
        shade[np.hypot(x - eye[0], y - eye[1]) < 0.04 * scale] = 0.3
    return Shape("figure", level, shade, joints + np.float32(x.size / 2))


def _crowd(name: str, rng: Rng) -> Shape:
    """A tight cluster of small equal things, as one shape."""
    side = rng.uniform(15, 22) if name != "figure" else rng.uniform(32, 36)
    stamp = _figure(side, rng) if name == "figure" else _simple_shape(name, side, rng)
    rows, columns, n = *rng.integers(3, 5 if name == "figure" else 6, 2), len(stamp.level)
    step = 0.95 * side
    level = np.full((n + int(step * rows), n + int(step * columns)), 1e3, np.float32)
    tone = np.ones_like(level)
    for row in range(rows):
        for column in range(columns):
            top, left = np.clip((np.array([row, column]) + rng.uniform(-0.15, 0.15, 2)) * step, 0, None).astype(int)
            here = np.s_[top : top + n, left : left + n]
            tone[here] = np.where(stamp.level < 0, stamp.tone, tone[here])
            level[here] = np.minimum(level[here], stamp.level)
    return Shape(name, level, tone, np.zeros((0, 2), np.float32), crowd=True)


def _draw_shape(side: float, max_side: float, rng: Rng) -> Shape:
    """A random shape whose longest side is in MIN_SIDE .. max_side pixels, about `side`."""
    name = str(rng.choice([*SHAPES, "figure"]))
    while True:
        shape = _figure(max(side, 32), rng) if name == "figure" else _simple_shape(name, side, rng)
        inside = shape.level < 0
        longest = max(int(np.ptp(np.flatnonzero(inside.any(axis=axis)))) + 1 for axis in (0, 1))
        if MIN_SIDE <= longest <= max_side and inside.sum() > 1.5 * MIN_VISIBLE_AREA:
            return shape
        side = np.clip(side * rng.uniform(0.9, 1.1), MIN_SIDE, max_side) * (1.05 if longest < max_side else 0.95)


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
MIN_CONTRAST = 75.0  # mean RGB distance (0 to 255 a channel) of a thing's colour from what surrounds it


def _smooth_noise(shape: tuple[int, int], cell: tuple[float, float], rng: Rng) -> Floats:
    """Noise [h, w] about 0.5 whose bumps are cell = (width, height) pixels."""
    size = int(shape[1] / cell[0]) + 2, int(shape[0] / cell[1]) + 2
    coarse = Image.fromarray(rng.random(size[::-1], dtype=np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)


def pattern(name: str, x: Floats, y: Floats, rng: Rng) -> Floats:
    """The texture of a kind of stuff as [h, w] in about 0 .. 1, from coordinates x, y [h, w] in pixels."""
    size = rng.uniform(*LOOKS[name][0])
    turns = np.float32(2 * np.pi / size)
    if name == "water":
        return 0.5 + 0.5 * np.sin(turns * (y + np.float32(0.25 * size) * np.sin(turns / 3 * x)))
    if name == "field":
        return np.clip(0.5 + 1.5 * np.sin(turns * y), 0, 1)
    if name == "tiles":
        return np.clip(0.5 + 4 * np.sin(turns / 2 * x) * np.sin(turns / 2 * y), 0, 1)
    if name == "brick":
        row = np.floor(y / np.float32(0.6 * size))
        along, down = np.mod(x / np.float32(1.4 * size) + 0.5 * np.mod(row, 2), 1), y / np.float32(0.6 * size) - row
        return np.asarray((along < 0.1) | (down < 0.2), np.float32)
    cell = {"grass": (size / 2, 3 * size), "sky": (1.5 * size, 0.7 * size)}.get(name, (size, size))
    noise = _smooth_noise(x.shape, cell, rng)
    return 0.6 * noise + 0.4 * _smooth_noise(x.shape, (4, 4), rng) if name == "rock" else noise


def colours(name: str, rng: Rng) -> tuple[Floats, Floats]:
    """The two RGB colours [3] (0 .. 255) that a kind of stuff mixes by its pattern."""
    (hue, spread), saturation, value = LOOKS[name][1:]
    h, s, v = rng.uniform(hue - spread, hue + spread) % 1, rng.uniform(*saturation), rng.uniform(*value)
    first = 255 * np.array(colorsys.hsv_to_rgb(h, s, v), np.float32)
    dark = rng.uniform(0.6, 0.85) if rng.random() < 0.7 or name == "sky" else rng.uniform(1.15, 1.35)
    return first, first * np.float32(dark)


def mix(first: Floats, second: Floats, weight: Floats) -> Floats:
    """[h, w, 3] from two colours [3] and the weight [h, w] of the second."""
    return first + weight[..., None] * (second - first)


def background(size: int, rng: Rng) -> tuple[Floats, NDArray[np.uint8]]:
    """Two to four regions of stuff: RGB [S, S, 3] and indices into LOOKS [S, S]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    names = list(LOOKS)
    # the sky has the least index: sorted, it is on top
    chosen = sorted(rng.choice(len(names), rng.integers(2, 5), replace=False), key=lambda kind: kind > 0)
    stuff = np.full((size, size), chosen[0], np.uint8)
    borders = np.sort(rng.uniform(0.15, 0.9, len(chosen) - 1)) * size
    for kind, border in zip(chosen[1:], borders, strict=True):
        waves = [rng.uniform(0, 0.05 * size) / k * np.sin(2 * np.pi * (k * x / size * 1.3 + rng.random())) for k in (1, 2, 4)]
        line = border + rng.normal(0, 0.12) * (x - size / 2) + sum(waves)
        if rng.random() < 0.3:  # an island instead of all that is below
            centre, radius = rng.uniform(0.1, 0.9) * size, rng.uniform(0.15, 0.35) * size
            stuff[np.hypot((x - centre) / 1.5, line - border + y - border) < radius] = kind
        else:
            stuff[y > line] = kind
    image = np.zeros((size, size, 3), np.float32)
    for kind in chosen:
        here, name = stuff == kind, names[kind]
        angle = np.float32(rng.uniform(0, np.pi) if name in ("field", "tiles") else rng.normal(0, 0.08))
        texture = pattern(name, np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x, rng)
        image[here] = mix(*colours(name, rng), texture)[here]
    return image, stuff
