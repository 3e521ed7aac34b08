"""Drawing functions of the synthetic dataset "scenes": wavy stuff regions and overlapping things.

Every thing is a level set: approximately the distance to its outline in pixels, negative inside.
The level set defines the exact mask (level < 0), the soft edge, the dark rim and the shadow. Things
and stuff share textures and colors, so that only the shape of a thing reveals its class.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.floating]
Rng = np.random.Generator

# Longest side in pixels and area in pixels of a thing, before any part of it is hidden.
MIN_SIDE = 12
MIN_AREA = 58
MAX_SIDE = 0.586  # fraction of the image's side: 150 of 256 pixels
PAD = 10  # pixels around a thing for its soft edge and its shadow


@dataclass(frozen=True)
class Shape:
    """A thing on its own pixel grid, before it is placed.

    level: f32 [h, w], pixels, negative inside; tone: f32 [h, w], factor on the brightness;
    joints: f32 [P, 2], xy in continuous pixels; P is 0 for all things but a figure.
    """

    name: str
    level: Floats
    tone: Floats
    joints: Floats
    crowd: bool = False


# Shapes ------------------------------------------------------------------------------------------
# Each function takes u, v [h, w] in units of the thing's radius and returns a level in the same
# unit. Every shape fits into the unit disc.


def _ellipse(u: Floats, v: Floats, a: float, b: float) -> Floats:
    k0 = np.hypot(u / a, v / b)
    return np.asarray(k0 * (k0 - 1) / (np.hypot(u / a**2, v / b**2) + 1e-6), np.float32)


def _half_planes(u: Floats, v: Floats, corners: Floats) -> Floats:
    """The convex polygon with corners [n, 2], clockwise with y pointing down."""
    edges = np.roll(corners, -1, axis=0) - corners
    lengths = np.linalg.norm(edges, axis=1, keepdims=True)
    normals = np.stack([edges[:, 1], -edges[:, 0]], axis=1) / lengths
    sides = [
        normal[0] * (u - corner[0]) + normal[1] * (v - corner[1])
        for normal, corner in zip(normals.astype(np.float32), corners, strict=True)
    ]
    return np.asarray(np.maximum.reduce(sides), np.float32)


def _capsule(u: Floats, v: Floats, start: Floats, end: Floats, radius: float) -> Floats:
    """A thick line from start [2] to end [2]."""
    du, dv = (end - start).astype(np.float32)
    squared_length = max(float(du * du + dv * dv), 1e-9)
    along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / squared_length, 0, 1)
    distance = np.hypot(u - start[0] - along * du, v - start[1] - along * dv)
    return np.asarray(distance - np.float32(radius), np.float32)


def _disc(u: Floats, v: Floats, rng: Rng) -> Floats:
    return _ellipse(u, v, 1.0, rng.uniform(0.65, 1))


def _box(u: Floats, v: Floats, rng: Rng) -> Floats:
    angle = rng.uniform(0.35, math.pi / 4)
    return np.asarray(np.maximum(abs(u) - math.cos(angle), abs(v) - math.sin(angle)))


def _triangle(u: Floats, v: Floats, rng: Rng) -> Floats:
    angles = np.arange(3) * 2 * math.pi / 3 + rng.uniform(-0.3, 0.3, 3)
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return _half_planes(u, v, corners)


def _star(u: Floats, v: Floats, rng: Rng) -> Floats:
    half_angle = math.pi / int(rng.integers(5, 8))
    inner_radius = rng.uniform(0.45, 0.6)
    # Symmetry maps all points to one half of one tip.
    radius = np.hypot(u, v)
    angle = abs(np.mod(np.arctan2(v, u) + half_angle, 2 * half_angle) - half_angle)
    # The edge from the tip at (1, 0) to the notch.
    du = inner_radius * math.cos(half_angle) - 1
    dv = inner_radius * math.sin(half_angle)
    level = dv * (radius * np.cos(angle) - 1) - du * radius * np.sin(angle)
    return np.asarray(level / math.hypot(du, dv))


def _ring(u: Floats, v: Floats, rng: Rng) -> Floats:
    half_width = rng.uniform(0.17, 0.3)
    outer = _ellipse(u, v, 1.0, rng.uniform(0.8, 1))
    return np.asarray(abs(outer + half_width) - half_width)


def _crescent(u: Floats, v: Floats, rng: Rng) -> Floats:
    bite = np.hypot(u - rng.uniform(0.5, 0.75), v) - rng.uniform(0.65, 0.85)
    return np.asarray(np.maximum(np.hypot(u, v) - 1, -bite))


def _cross(u: Floats, v: Floats, rng: Rng) -> Floats:
    angle = rng.uniform(0.34, 0.5)
    length = math.cos(angle)
    width = math.sin(angle)
    u = abs(u)
    v = abs(v)
    horizontal = np.maximum(u - length, v - width)
    vertical = np.maximum(u - width, v - length)
    return np.asarray(np.minimum(horizontal, vertical))


SHAPES = {
    "disc": _disc,
    "box": _box,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "crescent": _crescent,
    "cross": _cross,
}


def _grid(radius: float) -> tuple[Floats, Floats]:
    """Return x [1, s] and y [s, 1] of pixel centers around (0, 0).

    The grid is large enough for a thing of this radius in pixels.
    """
    half = int(np.ceil(1.1 * radius)) + PAD
    axis = np.arange(-half, half, dtype=np.float32) + np.float32(0.5)
    return axis[None], axis[:, None]


def _simple_shape(name: str, side: float, rng: Rng) -> Shape:
    """Draw a rotated, squeezed, slightly bent shape; its longest side has about `side` pixels."""
    is_upright = name in ("box", "cross") and rng.random() < 0.85  # as most boxes in photographs
    angle = rng.normal(0, 0.08) if is_upright else rng.uniform(0, 2 * math.pi)
    squeeze = rng.uniform(0.8, 1)
    x, y = _grid(side / 2)
    cos = math.cos(angle) * 2 / side
    sin = math.sin(angle) * 2 / side
    u = cos * x + sin * y
    v = (cos * y - sin * x) / squeeze
    bend = rng.uniform(0, 0.02 if is_upright else 0.07)
    bent = u + bend * np.sin(2.5 * v + rng.uniform(0, 2 * math.pi))
    level = SHAPES[name](bent, v, rng) * (squeeze * side / 2)
    return Shape(name, level, np.ones_like(level), np.zeros((0, 2), np.float32))


def _pose(rng: Rng) -> Floats:
    """Draw the joints [13, 2] of a figure of height 2 (approximately).

    The figure faces the viewer: its left side is on the right.
    """
    joints = np.zeros((13, 2), np.float32)
    joints[0] = rng.uniform(-0.06, 0.06), -0.82
    for side, sign in ((0, 1), (1, -1)):
        upper_arm = rng.uniform(0.25, 2.6)  # angles from the vertical
        thigh = rng.uniform(0.03, 0.65)
        forearm = upper_arm + rng.uniform(-1.3, 1.3)
        shin = thigh + rng.uniform(-0.6, 0.15)
        arm_chain = [
            (0.24, -0.48),
            (np.sin(upper_arm) * 0.32, np.cos(upper_arm) * 0.32),
            (np.sin(forearm) * 0.3, np.cos(forearm) * 0.3),
        ]
        joints[[1 + side, 3 + side, 5 + side]] = np.cumsum(arm_chain, axis=0) * (sign, 1)
        leg_chain = [
            (0.14, 0.1),
            (np.sin(thigh) * 0.4, np.cos(thigh) * 0.4),
            (np.sin(shin) * 0.38, np.cos(shin) * 0.38),
        ]
        joints[[7 + side, 9 + side, 11 + side]] = np.cumsum(leg_chain, axis=0) * (sign, 1)
    lean = rng.normal(0, 0.3) if rng.random() < 0.85 else rng.uniform(-math.pi, math.pi)
    rotation = np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]], np.float32)
    return np.asarray(joints @ rotation, np.float32)


def _figure(side: float, rng: Rng) -> Shape:
    """Draw a jointed figure in a random pose; its longest side has about `side` pixels."""
    joints = _pose(rng)
    low = joints.min(axis=0) - 0.12
    high = joints.max(axis=0) + 0.12
    scale = side / float((high - low).max())
    joints = np.asarray((joints - (low + high) / 2) * scale, np.float32)
    x, y = _grid(side / 2)
    # With thinner limbs, the pixel of a joint could miss the mask.
    limb = max(rng.uniform(0.085, 0.11) * scale, 1.3)
    head = joints[0]
    neck = joints[1:3].mean(axis=0)
    torso = _half_planes(x, y, joints[[1, 7, 8, 2]]) - 0.1 * scale
    parts = [(torso, 1.0), (_capsule(x, y, neck, head, 0.08 * scale), 1.1)]
    for start, end, tone in ((7, 9, 0.72), (9, 11, 0.72), (1, 3, 0.86), (3, 5, 0.86)):
        for side_offset in (0, 1):
            line = (joints[start + side_offset], joints[end + side_offset])
            parts.append((_capsule(x, y, *line, limb), tone))
    parts.append((np.hypot(x - head[0], y - head[1]) - np.float32(0.18 * scale), 1.2))
    level = np.minimum.reduce([part for part, _ in parts])
    shade = np.ones_like(level)
    for part, tone in parts:
        shade[part < 0] = tone
    # Two eyes mark the front of the figure, and so distinguish its left from its right.
    up = (head - neck) / 0.34
    for sign in (-1, 1):
        eye = head + 0.03 * up + sign * 0.08 * np.array([-up[1], up[0]])
        shade[np.hypot(x - eye[0], y - eye[1]) < 0.04 * scale] = 0.3
    return Shape("figure", level, shade, joints + np.float32(x.size / 2))


def random_crowd(rng: Rng) -> Shape:
    """Draw a tight cluster of small equal things, as one shape."""
    name = str(rng.choice([*SHAPES, "figure"]))
    is_figure = name == "figure"
    side = rng.uniform(32, 36) if is_figure else rng.uniform(15, 22)
    stamp = _figure(side, rng) if is_figure else _simple_shape(name, side, rng)
    inside = stamp.level < 0
    counts = rng.integers(3, 5 if is_figure else 6, 2)
    stamp_side = len(stamp.level)
    level = np.full((counts * 0.95 * side + stamp_side).astype(int), 1e3, np.float32)
    tone = np.ones_like(level)
    for place in np.argwhere(rng.random(counts) < 0.9):
        top, left = np.clip((place + rng.uniform(-0.3, 0.3, 2)) * 0.95 * side, 0, None).astype(int)
        window = np.s_[top : top + stamp_side, left : left + stamp_side]
        tone[window][inside] = stamp.tone[inside]
        level[window] = np.minimum(level[window], stamp.level)
    return Shape(name, level, tone, np.zeros((0, 2), np.float32), crowd=True)


def random_shape(size: int, rng: Rng) -> Shape:
    """Draw a random shape for an image of `size` pixels.

    Its longest side is in MIN_SIDE .. MAX_SIDE * size pixels.
    """
    name = str(rng.choice([*SHAPES, "figure"]))
    high = MAX_SIDE * size
    low = 32 if name == "figure" else 14
    while True:
        side = low * (high / low) ** (rng.random() ** 0.7)
        shape = _figure(side, rng) if name == "figure" else _simple_shape(name, side, rng)
        inside = shape.level < 0
        longest = max(int(np.ptp(np.flatnonzero(inside.any(axis=axis)))) + 1 for axis in (0, 1))
        if MIN_SIDE <= longest <= high and inside.sum() >= MIN_AREA:
            return shape


# Textures and stuff ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texture:
    """A kind of stuff: ranges that its pattern and its colors are drawn from.

    size: of the pattern, in pixels; hue: center and spread; saturation and value: low and high.
    """

    size: tuple[float, float]
    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


TEXTURES = {
    "sky": Texture((40, 80), (0.58, 0.06), (0.2, 0.6), (0.75, 1.0)),
    "water": Texture((9, 16), (0.53, 0.08), (0.4, 0.8), (0.4, 0.8)),
    "grass": Texture((2, 4), (0.27, 0.07), (0.4, 0.8), (0.35, 0.75)),
    "sand": Texture((2, 3), (0.11, 0.04), (0.25, 0.55), (0.65, 0.95)),
    "rock": Texture((10, 20), (0.6, 0.5), (0.02, 0.2), (0.3, 0.65)),
    "brick": Texture((9, 15), (0.03, 0.05), (0.4, 0.75), (0.45, 0.8)),
    "tiles": Texture((10, 18), (0.5, 0.5), (0.1, 0.5), (0.5, 0.9)),
    "field": Texture((7, 14), (0.14, 0.08), (0.35, 0.75), (0.45, 0.85)),
}

# Mean RGB distance (0 to 255 per channel) of a thing's color from its surroundings.
MIN_CONTRAST = 90.0


def _smooth_noise(shape: tuple[int, int], cell: tuple[float, float], rng: Rng) -> Floats:
    """Draw noise [h, w] around 0.5 with bumps of cell = (width, height) pixels."""
    size = int(shape[1] / cell[0]) + 2, int(shape[0] / cell[1]) + 2
    coarse = Image.fromarray(rng.random(size[::-1], dtype=np.float32))
    return np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC), np.float32)


def _pattern(name: str, shape: tuple[int, int], angle: float, rng: Rng) -> Floats:
    """Draw the texture of a kind of stuff, rotated by an angle: [h, w, 1] in about 0 .. 1."""
    size = rng.uniform(*TEXTURES[name].size)
    frequency = 2 * math.pi / size
    cos = math.cos(angle)
    sin = math.sin(angle)
    down, across = (axis.astype(np.float32) for axis in np.ogrid[: shape[0], : shape[1]])
    x = cos * across + sin * down
    y = cos * down - sin * across
    texture: Floats
    if name == "water":
        texture = 0.5 + 0.5 * np.sin(frequency * (y + 0.25 * size * np.sin(frequency / 3 * x)))
    elif name == "field":
        texture = np.clip(0.5 + 1.5 * np.sin(frequency * y), 0, 1)
    elif name == "tiles":
        texture = np.clip(0.5 + 4 * np.sin(frequency / 2 * x) * np.sin(frequency / 2 * y), 0, 1)
    elif name == "brick":
        row = np.floor(y / (0.6 * size))
        vertical_joint = np.mod(x / (1.4 * size) + 0.5 * np.mod(row, 2), 1) < 0.1
        texture = 1.0 * (vertical_joint | (y / (0.6 * size) - row < 0.2))
    else:
        cells = {"grass": (size / 2, 3 * size), "sky": (1.5 * size, 0.7 * size)}
        coarse_noise = _smooth_noise(shape, cells.get(name, (size, size)), rng)
        fine_noise = _smooth_noise(shape, (4, 4), rng)
        fine = 0.4 if name == "rock" else 0.0
        texture = (1 - fine) * coarse_noise + fine * fine_noise
    return texture.astype(np.float32)[..., None]


def _colours(name: str, rng: Rng) -> tuple[Floats, Floats]:
    """Draw the two RGB colors [3] (0 .. 255) that the pattern of a kind of stuff mixes."""
    texture = TEXTURES[name]
    center, spread = texture.hue
    hue = rng.uniform(center - spread, center + spread) % 1
    saturation = rng.uniform(*texture.saturation)
    value = rng.uniform(*texture.value)
    first = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    is_darker = rng.random() < 0.7 or name == "sky"
    factor = rng.uniform(0.6, 0.85) if is_darker else rng.uniform(1.15, 1.35)
    return first, first * np.float32(factor)


def random_background(size: int, rng: Rng) -> tuple[Floats, NDArray[np.uint8]]:
    """Draw two to four regions of stuff: RGB [S, S, 3] and indices into TEXTURES [S, S]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    kinds = rng.choice(len(TEXTURES), rng.integers(2, 5), replace=False)
    # The sky, which is the first texture, comes first: later regions are drawn below it.
    kinds = kinds[np.argsort(kinds > 0, kind="stable")]
    stuff = np.full((size, size), kinds[0], np.uint8)
    borders = np.sort(rng.uniform(0.15, 0.9, len(kinds) - 1)) * size
    for kind, border in zip(kinds[1:], borders, strict=True):
        phases = 2 * math.pi * rng.random(3)
        heights = rng.uniform(0, 0.05 * size, 3) / (1, 2, 4)
        waves = heights * np.sin(np.multiply.outer(8 * x / size, (1, 2, 4)) + phases)
        line = border + rng.normal(0, 0.12) * (x - size / 2) + waves.sum(axis=-1)
        if rng.random() < 0.3:  # an island instead of everything below the line
            left = (x - rng.uniform(0.1, 0.9) * size) / 1.8
            down = y + line - 2 * border
            lobes = 1 + 0.2 * np.sin(rng.integers(2, 5) * np.arctan2(down, left) + phases[0])
            stuff[np.hypot(left, down) < lobes * rng.uniform(0.12, 0.3) * size] = kind
        else:
            stuff[y > line] = kind
    image = np.zeros((size, size, 3), np.float32)
    for kind in kinds:
        region = stuff == kind
        name = list(TEXTURES)[kind]
        angle = rng.uniform(0, math.pi) if name in ("field", "tiles") else rng.normal(0, 0.08)
        first, second = _colours(name, rng)
        colours = first + _pattern(name, region.shape, angle, rng) * (second - first)
        image[region] = colours[region]
    return image, stuff


def _material(surroundings: Floats, rng: Rng) -> tuple[str, Floats, Floats]:
    """Draw a pattern's name and two colors [3] with contrast to the colors [n, 3] around."""
    best_contrast = -1.0
    best = None
    while best is None or (best_contrast < MIN_CONTRAST and rng.random() < 0.95):
        first, second = _colours(str(rng.choice(list(TEXTURES))), rng)
        if rng.random() < 0.5:
            vivid = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.4, 1), rng.uniform(0.3, 1))
            first = 255 * np.array(vivid, np.float32)
            second = first * rng.uniform(0.65, 1.3)
        contrast = float(np.linalg.norm(surroundings - (first + second) / 2, axis=1).mean())
        if contrast > best_contrast:
            best_contrast = contrast
            best = (str(rng.choice(list(TEXTURES))), first, second)
    return best


def paint(image: Floats, shape: Shape, light: float, rng: Rng) -> None:
    """Paint a shape and its shadow into a window of the image.

    image: [h, w, 3], of the size of the shape's grid; light: the direction that shadows fall in.
    """
    level = shape.level
    if rng.random() < 0.5:
        offset = rng.uniform(2, 5) * np.array([math.sin(light), math.cos(light)])
        shadow = np.roll(level, np.rint(offset).astype(int), (0, 1))
        image *= 1 - 0.4 * np.clip(0.5 - shadow[..., None] / 4, 0, 1)
    name, first, second = _material(image[(level > -3) & (level < 6)], rng)
    pattern = _pattern(name, level.shape, rng.uniform(0, math.pi), rng)
    colour = first + pattern * (second - first)
    y, x = (np.linspace(-0.5, 0.5, side) for side in level.shape)
    gradient = np.add.outer(math.sin(light) * y, math.cos(light) * x)
    tone = shape.tone * (1 - rng.uniform(0, 0.5) * gradient)
    if shape.crowd or (level.min() < -6 and rng.random() < 0.4):
        tone = tone * np.where(level > -1.5, 0.55, 1)  # a dark rim
    image += np.clip(0.5 - level, 0, 1)[..., None] * (colour * tone[..., None] - image)
