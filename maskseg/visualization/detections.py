"""Draws detections over an image with Pillow: masks, outlines, boxes, keypoints and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from maskseg.masks.base import Rle, decode_crop
from maskseg.visualization.colours import assign_shades, instance_colour
from maskseg.visualization.keypoints import Keypoints, draw_skeletons
from maskseg.visualization.layout import (
    MIN_READABLE_SIDE,
    Colour,
    RGBImage,
    enlarge,
    load_font,
)

Bools = NDArray[np.bool_]

_MAX_NAMED = 30  # with more objects of the only class, labels are scores without its name
_FILL = 0.42  # opacity of the color of a mask


@dataclass(frozen=True)
class Area:
    """A rectangle in whole pixels; x1 and y1 are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    def overlaps(self, other: Area) -> bool:
        """Whether the two rectangles share a pixel."""
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )


Label = tuple[Area, list[str], Colour]  # object, texts (the first that fits is drawn), color


def draw_detections(
    image: RGBImage,
    boxes: ArrayLike,
    labels: ArrayLike,
    scores: ArrayLike | None,
    masks: Bools | Sequence[Rle] | None,
    names: Sequence[str],
    *,
    min_score: float = 0.0,
    keypoints: Keypoints | None = None,
) -> RGBImage:
    """Draw detections (or ground truth: scores None) over an image. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3]; boxes: [D, 4] xyxy in pixels of the image; labels: [D] in 0..K-1;
    scores: [D] or None; masks: bool [D, H, W], D RLEs of the image's size, or None; names: K class
    names. Detections with a score below `min_score` or a box that is not finite are not drawn.

    An image whose longer side is under 640 pixels is first enlarged by the smallest integer factor
    (at most 8) that makes it at least 640, so that labels are legible. Boxes are scaled alike, and
    mask pixels become squares, so that no mask looks finer than it is. A class has one color, in
    all images (`class_colour`), and its objects differ in lightness. Labels never cover each other,
    nor more than a third of any object: a label without such a place is shortened to the score,
    then dropped. With a single class and more than 30 objects, labels are scores only.

    Raises ValueError if the image is not uint8 RGB or a mask has another size.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    classes = [int(v) for v in np.asarray(labels).reshape(-1)]
    score_values = None if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    drawn = _select_drawn(corners, score_values, min_score)
    height, width = image.shape[:2]
    factor = min(8, max(1, math.ceil(MIN_READABLE_SIDE / max(height, width))))
    canvas = enlarge(image, factor)
    colours = _assign_colours(corners, classes, drawn)
    areas = {i: pixel_area(corners[i], factor, canvas) for i in drawn.tolist()}
    if masks is not None:
        _paint_masks(canvas, masks, areas, colours, factor)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for i, area in areas.items():
        frame = (area.x0, area.y0, area.x1 - 1, area.y1 - 1)
        draw.rectangle(frame, outline=colours[i], width=line_width(area, canvas))
    if keypoints is not None and areas:
        _draw_keypoints(draw, keypoints, classes, colours, factor, max(canvas.shape[:2]))
    with_name = len(names) != 1 or len(drawn) <= _MAX_NAMED
    order = list(areas)
    if score_values is not None:
        order.sort(key=lambda i: -score_values[i])
    texts = []
    for i in order:
        score = None if score_values is None else float(score_values[i])
        texts.append((areas[i], _label_texts(classes[i], score, names, with_name), colours[i]))
    draw_labels(draw, picture.size, texts)
    return np.asarray(picture)


def _select_drawn(
    boxes: NDArray[np.float64], scores: NDArray[np.float64] | None, min_score: float
) -> NDArray[np.int64]:
    """Indices of the detections to draw, large boxes first, so that small ones stay visible."""
    valid = np.isfinite(boxes).all(axis=1)
    if scores is not None:
        valid &= scores >= min_score
    drawn = np.flatnonzero(valid)
    sides = boxes[drawn, 2:] - boxes[drawn, :2]
    return np.asarray(drawn[np.argsort(-sides.prod(axis=1), kind="stable")])


def pixel_area(box: NDArray[np.float64], factor: int, canvas: RGBImage) -> Area:
    """Round a box xyxy to pixels of the enlarged canvas: inside it and at least one pixel large."""
    height, width = canvas.shape[:2]
    x0 = min(max(round(box[0] * factor), 0), width - 1)
    y0 = min(max(round(box[1] * factor), 0), height - 1)
    x1 = min(max(round(box[2] * factor), x0 + 1), width)
    y1 = min(max(round(box[3] * factor), y0 + 1), height)
    return Area(x0, y0, x1, y1)


def line_width(area: Area, canvas: RGBImage) -> int:
    """Line width in pixels, proportional to the canvas; thinner at objects it would hide."""
    longest = int(max(canvas.shape[:2]))
    shorter_side = min(area.x1 - area.x0, area.y1 - area.y0)
    return max(1, min(round(longest / 350), shorter_side // 16))


def _assign_colours(
    boxes: NDArray[np.float64], classes: Sequence[int], drawn: NDArray[np.int64]
) -> dict[int, Colour]:
    """The colors of the objects that are drawn, by index."""
    shades = assign_shades(boxes[drawn], [classes[i] for i in drawn])
    return {
        i: instance_colour(classes[i], shade)
        for i, shade in zip(drawn.tolist(), shades, strict=True)
    }


def _paint_masks(
    canvas: RGBImage,
    masks: Bools | Sequence[Rle],
    areas: Mapping[int, Area],
    colours: Mapping[int, Colour],
    factor: int,
) -> None:
    """Paint the masks of the given areas; raises ValueError for a mask of another size."""
    size = (canvas.shape[0] // factor, canvas.shape[1] // factor)
    for i, area in areas.items():
        mask_size, crop, left, top = _crop_mask(masks, i)
        if mask_size != size:
            raise ValueError(f"mask {i} has (height, width) {mask_size}, the image has {size}")
        window = canvas[top * factor :, left * factor :]
        window = window[: crop.shape[0] * factor, : crop.shape[1] * factor]
        paint_mask(window, crop, colours[i], factor, line_width(area, canvas))


def _crop_mask(masks: Bools | Sequence[Rle], index: int) -> tuple[tuple[int, ...], Bools, int, int]:
    """-> (height, width) of a mask, a part that has all its pixels, and its left and top.

    Of an RLE only the tight box is decoded, as large images with many objects take long otherwise.
    """
    if isinstance(masks, np.ndarray):
        return masks[index].shape, masks[index], 0, 0
    return tuple(masks[index]["size"]), *decode_crop(masks[index])


def paint_mask(canvas: RGBImage, mask: Bools, colour: Colour, factor: int, width: int) -> None:
    """Fill a mask [H, W] on the enlarged canvas, with an outline of `width` px inside its edge."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    top, bottom = rows[0], rows[-1] + 1
    left, right = columns[0], columns[-1] + 1
    crop = mask[top:bottom, left:right].astype(bool).repeat(factor, axis=0).repeat(factor, axis=1)
    outline = crop & ~_erode(crop, width)
    window = canvas[top * factor : bottom * factor, left * factor : right * factor]
    filled = window[crop] * (1 - _FILL) + np.array(colour) * _FILL
    window[crop] = filled.round().astype(np.uint8)
    window[outline] = colour


def _erode(mask: Bools, width: int) -> Bools:
    """Remove `width` pixels on each side of a mask [h, w]; corners stay sharp (4-connected)."""
    inner = np.pad(mask, width)
    for _ in range(width):
        core = inner.copy()
        core[1:] &= inner[:-1]
        core[:-1] &= inner[1:]
        core[:, 1:] &= inner[:, :-1]
        core[:, :-1] &= inner[:, 1:]
        inner = core
    return inner[width:-width, width:-width]


def _draw_keypoints(
    draw: ImageDraw.ImageDraw,
    keypoints: Keypoints,
    classes: Sequence[int],
    colours: Mapping[int, Colour],
    factor: int,
    longest: int,
) -> None:
    """Draw the keypoints of the objects that have a color, on a canvas enlarged by `factor`.

    longest: the longer side of the canvas in pixels.
    """
    points = np.asarray(keypoints.points, dtype=np.float64) * (factor, factor, 1)
    skeletons = []
    for i, colour in colours.items():
        edges = keypoints.skeleton_edges[classes[i]] if keypoints.skeleton_edges else ()
        skeletons.append((points[i], edges, colour))
    draw_skeletons(draw, skeletons, longest)


def _label_texts(
    label: int, score: float | None, names: Sequence[str], with_name: bool
) -> list[str]:
    """The texts that a label may show, the most informative first."""
    name = names[label] if 0 <= label < len(names) else f"class {label}"
    score_text = "" if score is None else f"{score:.2f}"
    full_text = f"{name} {score_text}".strip() if with_name else ""
    return [text for text in (full_text, score_text) if text]


def draw_labels(draw: ImageDraw.ImageDraw, size: tuple[int, int], labels: Sequence[Label]) -> None:
    """Draw each label in the first free place at its object; earlier labels choose first.

    size: (width, height) of the image. The first text of a label that finds a place is drawn.
    """
    font = load_font(min(28, max(13, round(max(size) / 52))))
    pad = max(2, round(font.size / 6))
    label_height = round(font.size * 1.1) + 2 * pad
    taken: list[Area] = []
    corners = [(area.x0, area.y0, area.x1, area.y1) for area, _, _ in labels]
    boxes = np.array(corners, dtype=np.int64).reshape(-1, 4)
    for area, texts, colour in labels:
        for text in texts:
            label_width = math.ceil(font.getlength(text)) + 2 * pad
            places = _candidate_places(area, (label_width, label_height), size)
            place = next((p for p in places if _is_free(p, taken, boxes)), None)
            if place is not None:
                draw.rectangle((place.x0, place.y0, place.x1 - 1, place.y1 - 1), fill=colour)
                left = (place.x0 + pad, (place.y0 + place.y1) / 2)
                draw.text(left, text, fill=_contrasting_ink(colour), font=font, anchor="lm")
                taken.append(place)
                break


def _contrasting_ink(colour: Colour) -> Colour:
    """Black on bright colors, white on dark ones."""
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (0, 0, 0) if luma > 125 else (255, 255, 255)


def _is_free(place: Area, taken: Sequence[Area], boxes: NDArray[np.int64]) -> bool:
    """Whether a label covers no other label, and at most a third of each box [D, 4]."""
    if any(place.overlaps(other) for other in taken):
        return False
    low = np.maximum(boxes[:, :2], (place.x0, place.y0))
    high = np.minimum(boxes[:, 2:], (place.x1, place.y1))
    covered = (high - low).clip(0).prod(axis=1)
    return bool((3 * covered <= (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)).all())


def _candidate_places(
    area: Area, label_size: tuple[int, int], size: tuple[int, int]
) -> Iterator[Area]:
    """Places for a label inside the image, in the order of preference.

    Above the object, inside it at the top, below it, inside it at the bottom; each aligned at the
    left, then at the right. label_size, size: (width, height) of the label and of the image.
    """
    label_width, label_height = label_size
    width, height = size
    if label_width > width or label_height > height:
        return
    lefts = [min(max(x, 0), width - label_width) for x in (area.x0, area.x1 - label_width)]
    tops = [area.y0 - label_height, area.y0, area.y1, area.y1 - label_height]
    for y in tops:
        for x in lefts:
            if 0 <= y <= height - label_height:
                yield Area(x, y, x + label_width, y + label_height)
