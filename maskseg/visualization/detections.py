"""Pictures of detections, with Pillow: masks, outlines, boxes and labels over an image; pictures beside each other.

Curves of a training are in `curves`; `plot_curves` can be imported from here as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskseg.masks.base import Rle, rle_to_bitmaps
from maskseg.visualization.curves import plot_curves
from maskseg.visualization.keypoints import draw_skeletons

__all__ = ["draw_detections", "mosaic", "plot_curves", "side_by_side"]

Picture = NDArray[np.uint8]  # RGB [H, W, 3]
Bools = NDArray[np.bool_]
Colour = tuple[int, int, int]

READABLE = 640  # pixels of the longer side from which on the text can be read
_NAMED = 30  # objects up to which the name of the only class is written at each
_FILL = 0.42  # share of the colour in a mask
_PAPER, _INK, _GAP = (255, 255, 255), (30, 30, 30), 8
# Okabe and Ito's colours, which colour-blind people can tell apart, and two more for crowded pictures.
_PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
    (150, 120, 255),
    (136, 34, 85),
)


@dataclass(frozen=True)
class _Area:
    """A rectangle on the picture, in whole pixels; the ends are outside."""

    x0: int
    y0: int
    x1: int
    y1: int

    def overlaps(self, other: _Area) -> bool:
        return (
            self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1
        )


def draw_detections(
    image: Picture,
    boxes: Any,
    labels: Any,
    scores: Any | None,
    masks: Bools | Sequence[Rle] | None,
    names: Sequence[str],
    *,
    min_score: float = 0.0,
    keypoints: Any | None = None,
    lines: Sequence[Sequence[tuple[int, int]]] = (),
) -> Picture:
    """The image with its detections (or its truth: scores None) drawn over it. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3]; boxes: [D, 4] xyxy in the image's pixels; labels: [D] in 0..K-1; scores: [D] or None;
    masks: bool [D, H, W], D RLEs in the image's frame, or None; names: K names. Detections scored below `min_score` are left out.
    keypoints: [D, P, 3], x, y and visibility or score, in the image's pixels; lines: of each class, the pairs of the P points that are joined.

    An image whose longer side is under 640 pixels is enlarged first by the smallest integer factor (at most 8) that makes it longer, so
    that the text can be read: 256 becomes 768. Boxes are scaled alike and mask pixels become squares, so that no mask looks finer than it
    is. A class keeps its colour where no neighbour has it already. Labels never cover each other, nor more than a third of any object: one
    that finds no such place is shortened to its score, and then left out. Where there is one class only, more than 30 objects are labelled
    by their scores alone.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    classes = [int(v) for v in np.asarray(labels).reshape(-1)]
    chances = None if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    kept = _kept(corners, chances, min_score)
    height, width = image.shape[:2]
    factor = min(8, max(1, math.ceil(READABLE / max(height, width))))
    canvas = _enlarged(image, factor)
    colours = dict(
        zip(kept.tolist(), _colours(corners[kept], [classes[i] for i in kept]), strict=True)
    )
    areas = {i: _on_canvas(corners[i], factor, canvas) for i in kept.tolist()}
    if masks is not None:
        _paint_masks(canvas, masks, areas, colours, (height, width), factor)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for i, box in areas.items():
        draw.rectangle(
            (box.x0, box.y0, box.x1 - 1, box.y1 - 1), outline=colours[i], width=_line(box, canvas)
        )
    if keypoints is not None and areas:
        points = np.asarray(keypoints, dtype=np.float64) * (factor, factor, 1)
        draw_skeletons(
            draw,
            [(points[i], lines[classes[i]] if lines else (), colours[i]) for i in areas],
            max(canvas.shape[:2]),
        )
    with_name = len(names) != 1 or len(kept) <= _NAMED
    texts = {
        i: _texts(classes[i], None if chances is None else float(chances[i]), names, with_name)
        for i in areas
    }
    first = sorted(areas, key=lambda i: 0.0 if chances is None else -chances[i])
    _draw_labels(draw, picture.size, [(areas[i], texts[i], colours[i]) for i in first])
    return np.asarray(picture)


def side_by_side(left: Picture, right: Picture, titles: tuple[str, str] = ("", "")) -> Picture:
    """Two pictures beside each other on white, each under its title, tops aligned. -> uint8 RGB."""
    font = _font(max(14, round(max(left.shape[0], right.shape[0]) / 36)))
    top = _GAP if not any(titles) else round(font.size * 1.9)
    height = top + max(left.shape[0], right.shape[0]) + _GAP
    sheet = Image.new("RGB", (left.shape[1] + right.shape[1] + 3 * _GAP, height), _PAPER)
    draw, x = ImageDraw.Draw(sheet), _GAP
    for picture, title in zip((left, right), titles, strict=True):
        draw.text(
            (x, top / 2), _fitted(title, font, picture.shape[1]), fill=_INK, font=font, anchor="lm"
        )
        sheet.paste(Image.fromarray(picture), (x, top))
        x += picture.shape[1] + _GAP
    return np.asarray(sheet)


def mosaic(pictures: Sequence[Picture], columns: int, *, cell: int = 1600) -> Picture:
    """Pictures in rows on white, each in the middle of its cell. Those whose longer side is over `cell` pixels are shrunk to it. -> RGB."""
    if not pictures or columns < 1:
        raise ValueError("a mosaic needs at least one picture and one column")
    pictures = [_shrunk(p, cell) for p in pictures]
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    widths = [max(p.shape[1] for p in pictures[c::columns]) for c in range(columns)]
    heights = [
        max(p.shape[0] for p in pictures[r * columns : (r + 1) * columns]) for r in range(rows)
    ]
    sheet = np.full(
        (sum(heights) + (rows + 1) * _GAP, sum(widths) + (columns + 1) * _GAP, 3),
        _PAPER,
        dtype=np.uint8,
    )
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        h, w = picture.shape[:2]
        y = sum(heights[:r]) + (r + 1) * _GAP + (heights[r] - h) // 2
        x = sum(widths[:c]) + (c + 1) * _GAP + (widths[c] - w) // 2
        sheet[y : y + h, x : x + w] = picture
    return sheet


def _shrunk(picture: Picture, longest: int) -> Picture:
    scale = longest / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def _kept(
    boxes: NDArray[np.float64], scores: NDArray[np.float64] | None, min_score: float
) -> NDArray[np.int64]:
    """Which detections are drawn, large ones first, so that what lies on them stays visible."""
    finite = np.isfinite(boxes).all(axis=1)
    kept = np.flatnonzero(finite if scores is None else finite & (scores >= min_score))
    sides = boxes[kept, 2:] - boxes[kept, :2]
    return np.asarray(kept[np.argsort(-sides.prod(axis=1), kind="stable")])


def _enlarged(image: Picture, factor: int) -> Picture:
    if factor == 1:
        return image.copy()
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _on_canvas(box: NDArray[np.float64], factor: int, canvas: Picture) -> _Area:
    """A box on the enlarged picture, at least one pixel large and inside."""
    height, width = canvas.shape[:2]
    x0, y0 = (
        min(max(round(box[0] * factor), 0), width - 1),
        min(max(round(box[1] * factor), 0), height - 1),
    )
    x1, y1 = (
        min(max(round(box[2] * factor), x0 + 1), width),
        min(max(round(box[3] * factor), y0 + 1), height),
    )
    return _Area(x0, y0, x1, y1)


def _line(box: _Area, canvas: Picture) -> int:
    """Pixels of a line: by the picture, and thinner at small objects, which it would hide."""
    longest = int(max(canvas.shape[:2]))
    return max(1, min(round(longest / 350), min(box.x1 - box.x0, box.y1 - box.y0) // 16))


def _colours(boxes: NDArray[np.float64], classes: Sequence[int]) -> list[Colour]:
    """A colour each: that of the class, or the next one that no neighbour (a box that nearly touches) has."""
    margin = 0.15 * (boxes[:, 2:] - boxes[:, :2]) + 2
    low, high = boxes[:, :2] - margin, boxes[:, 2:] + margin
    near: Bools = np.all((low[:, None] < high[None]) & (low[None] < high[:, None]), axis=2)
    chosen = np.zeros(len(boxes), dtype=np.int64)
    for i, label in enumerate(classes):
        used = np.bincount(chosen[:i][near[i][:i]], minlength=len(_PALETTE))
        order = (label + np.arange(len(_PALETTE))) % len(_PALETTE)
        chosen[i] = order[int(np.argmin(used[order]))]
    return [_PALETTE[c] for c in chosen]


def _paint_masks(
    canvas: Picture,
    masks: Bools | Sequence[Rle],
    areas: Mapping[int, _Area],
    colours: Mapping[int, Colour],
    size: tuple[int, int],
    factor: int,
) -> None:
    for i, area in areas.items():
        mask = masks[i] if isinstance(masks, np.ndarray) else rle_to_bitmaps([masks[i]])[0]
        if mask.shape != size:
            raise ValueError(f"mask {i} has (height, width) {mask.shape}, the image has {size}")
        _paint_mask(canvas, mask, colours[i], factor, _line(area, canvas))


def _paint_mask(canvas: Picture, mask: Bools, colour: Colour, factor: int, line: int) -> None:
    """Fills a mask [H, W] on the enlarged canvas, with an outline of `line` pixels on its inside."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    crop = mask[top:bottom, left:right].astype(bool).repeat(factor, axis=0).repeat(factor, axis=1)
    inner = np.pad(crop, line)
    for _ in range(line):  # one pixel less on each side, corners kept sharp
        core = inner.copy()
        core[1:] &= inner[:-1]
        core[:-1] &= inner[1:]
        core[:, 1:] &= inner[:, :-1]
        core[:, :-1] &= inner[:, 1:]
        inner = core
    outline = crop & ~inner[line:-line, line:-line]
    window = canvas[top * factor : bottom * factor, left * factor : right * factor]
    filled = window[crop] * (1 - _FILL) + np.array(colour) * _FILL
    window[crop] = filled.round().astype(np.uint8)
    window[outline] = colour


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _texts(label: int, score: float | None, names: Sequence[str], with_name: bool) -> list[str]:
    """What a label may say, the most telling first."""
    name = names[label] if 0 <= label < len(names) else f"class {label}"
    number = "" if score is None else f"{score:.2f}"
    return [text for text in (f"{name} {number}".strip() if with_name else "", number) if text]


def _fitted(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _draw_labels(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], labels: list[tuple[_Area, list[str], Colour]]
) -> None:
    """Each label in the first free place at its box; the first labels choose first."""
    width, height = size
    font = _font(min(28, max(13, round(max(size) / 52))))
    pad = max(2, round(font.size / 6))
    tall = round(font.size * 1.1) + 2 * pad
    taken: list[_Area] = []
    boxes = np.array([(b.x0, b.y0, b.x1, b.y1) for b, _, _ in labels], dtype=np.int64).reshape(
        -1, 4
    )
    for box, texts, colour in labels:
        for text in texts:
            wide = math.ceil(font.getlength(text)) + 2 * pad
            places = _places(box, wide, tall, width, height)
            place = next((p for p in places if _is_free(p, taken, boxes)), None)
            if place is not None:
                draw.rectangle((place.x0, place.y0, place.x1 - 1, place.y1 - 1), fill=colour)
                bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 125
                middle = (place.x0 + pad, (place.y0 + place.y1) / 2)
                draw.text(
                    middle,
                    text,
                    fill=(0, 0, 0) if bright else (255, 255, 255),
                    font=font,
                    anchor="lm",
                )
                taken.append(place)
                break


def _is_free(place: _Area, taken: Sequence[_Area], boxes: NDArray[np.int64]) -> bool:
    """Whether a label there covers no other label, and no more than a third of any box [D, 4]."""
    if any(place.overlaps(t) for t in taken):
        return False
    low, high = (
        np.maximum(boxes[:, :2], (place.x0, place.y0)),
        np.minimum(boxes[:, 2:], (place.x1, place.y1)),
    )
    covered = (high - low).clip(0).prod(axis=1)
    return bool((3 * covered <= (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)).all())


def _places(box: _Area, wide: int, tall: int, width: int, height: int) -> Iterator[_Area]:
    """Places for a label inside the picture: above the box, inside it at the top, below, inside at the bottom; left, then right."""
    if wide > width or tall > height:
        return
    lefts = [min(max(x, 0), width - wide) for x in (box.x0, box.x1 - wide)]
    tops = [box.y0 - tall, box.y0, box.y1, box.y1 - tall]
    for y in tops:
        for x in lefts:
            if 0 <= y <= height - tall:
                yield _Area(x, y, x + wide, y + tall)
