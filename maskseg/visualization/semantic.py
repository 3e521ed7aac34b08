"""Images of semantic maps: colored classes with a legend, ground truth, confusion of classes.

Images are uint8 RGB [H, W, 3]; semantic maps are integers [H, W] in 0..K-1, negative for no class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maskseg.evaluation.table import truncate_name
from maskseg.visualization.colours import class_colour, class_colours
from maskseg.visualization.diagnosis import (
    MAX_NUMBERED,
    merge_rare_classes,
    plot_row_shares,
    save_if_path,
)
from maskseg.visualization.layout import (
    FRAME,
    INK,
    PAPER,
    TITLE_SIZE,
    Colour,
    RGBImage,
    add_title,
    arrange_grid,
    fit_text,
    load_font,
    plain_text,
    render_figure,
)
from maskseg.visualization.segments import (
    Labels,
    draw_outlines,
    enlarge_with_labels,
    scale_to_tile,
)

_FILL = 0.6  # opacity of the color of a class
_MIN_LEGEND_ROWS = 12  # rows that a legend may have even beside a low image
_MAX_LEGEND = 40  # classes in a legend: those of most pixels
_MAX_NAME_WIDTH = 11  # of a name in the legend, in multiples of the text size
_LUMA = (0.299, 0.587, 0.114)


def draw_semantic(image: RGBImage, labels: Labels, names: Sequence[str]) -> RGBImage:
    """Fill and outline the classes of an image, beside a legend of those that occur.

    labels: [H, W]; pixels without a class are unchanged; names: K class names. Small images are
    enlarged as by `draw_segments`. Below a color the image is gray with half the contrast, so that
    a class looks alike everywhere. -> uint8 RGB [H', W', 3].
    """
    check_labels(labels, names)
    canvas, classes = enlarge_with_labels(image, labels)
    paint_classes(canvas, classes)
    text_size = min(48, max(16, round(max(canvas.shape) / 32)))
    legend = draw_legend([labels], names, text_size, canvas.shape[0])
    return arrange_grid([canvas, *legend], 2)


def semantic_sheet(
    image: RGBImage,
    truth: Labels,
    predicted: Labels,
    names: Sequence[str],
    titles: tuple[str, str, str] = ("image", "ground truth", "prediction"),
) -> RGBImage:
    """Draw an image, its true and its predicted classes side by side, with a common legend.

    truth, predicted: [H, W]; names: K class names. Each image is scaled to a longer side of 720
    pixels. -> uint8 RGB.
    """
    for labels in (truth, predicted):
        check_labels(labels, names)
    scaled, maps = scale_to_tile(image, [truth, predicted])
    images = [scaled, scaled.copy(), scaled.copy()]
    for canvas, classes in zip(images[1:], maps, strict=True):
        paint_classes(canvas, classes)
    legend = draw_legend([truth, predicted], names, TITLE_SIZE, scaled.shape[0])
    titled = zip([*images, *legend], [*titles, ""], strict=False)
    tiles = [add_title(tile, title, TITLE_SIZE) for tile, title in titled]
    return arrange_grid(tiles, len(tiles))


def draw_semantic_confusion(
    matrix: NDArray[np.int64], names: Sequence[str], path: Path | str | None = None
) -> RGBImage:
    """Plot a confusion matrix of pixels, normalized by row. -> uint8 RGB [H, W, 3].

    matrix: i64 [K, K], ground truth in rows, prediction in columns, or [K, K + 1] with the pixels
    predicted as no class last; names: K class names; path: of a PNG to write as well, or None. Each
    row is labeled with its share of all pixels. Up to 20 classes, the cells have numbers. Empty
    rows are gray. Raises ValueError for another shape.
    """
    rows = len(names)
    columns = matrix.shape[-1]
    if matrix.ndim != 2 or not rows or len(matrix) != rows or columns not in (rows, rows + 1):
        raise ValueError(
            f"{rows} names need a matrix {[rows, rows]} or {[rows, rows + 1]}, "
            f"got {list(matrix.shape)}"
        )
    matrix, names = merge_rare_classes(matrix, names)
    rows = len(names)
    columns = matrix.shape[-1]
    labels = [plain_text(truncate_name(name)) for name in [*names, "no class"]]
    totals = matrix.sum(axis=1)
    percents = 100 * totals / max(int(totals.sum()), 1)
    figure, axis = plot_row_shares(
        matrix,
        [f"{label} ({share:.1f} %)" for label, share in zip(labels[:rows], percents, strict=True)],
        labels[:columns],
        numbered=rows <= MAX_NUMBERED,
        bar_label="share of the true class",
    )
    if columns > rows:
        axis.axvline(rows - 0.5, color="#555555", linewidth=1)
    axis.set_xlabel("prediction", fontsize=10)
    axis.set_ylabel("ground truth (share of all pixels)", fontsize=10)
    return save_if_path(render_figure(figure), path)


def check_labels(labels: Labels, names: Sequence[str]) -> None:
    """Raise ValueError for a label without a name."""
    if labels.size and labels.max() >= len(names):
        raise ValueError(f"label {labels.max()} has no name, there are {len(names)}")


def paint_classes(canvas: RGBImage, classes: Labels) -> None:
    """Fill and outline the classes [H, W] on a canvas of their size, in place."""
    inside = classes >= 0
    grey = 64 + 0.5 * (canvas[inside] @ np.array(_LUMA))
    colours = class_colours(int(classes.max(initial=-1)) + 1).astype(np.float64)[classes[inside]]
    canvas[inside] = (grey[:, None] * (1 - _FILL) + colours * _FILL).round().astype(np.uint8)
    draw_outlines(canvas, classes, PAPER)


def draw_legend(
    maps: Sequence[Labels], names: Sequence[str], size: int, height: int
) -> list[RGBImage]:
    """Draw the colors and names of the classes that occur in the maps. -> [image], [] without any.

    Of more than 40 classes, those of most pixels are shown, and the number of the others. size:
    pixels of the text; height: of the image beside it, which limits the rows per column. Colors are
    shown as they look on a medium gray image.
    """
    counts: Counter[int] = Counter()
    for labels in maps:
        values, sizes = np.unique(labels[labels >= 0], return_counts=True)
        counts.update(dict(zip(values.tolist(), sizes.tolist(), strict=True)))
    if not counts:
        return []
    classes = sorted(label for label, _ in counts.most_common(_MAX_LEGEND))
    names = [*names, f"and {len(counts) - len(classes)} more"]
    font = load_font(size)
    row_height = round(1.6 * size)
    field = round(1.4 * size)  # width of a field of color
    shown = [*classes, -1] if len(counts) > len(classes) else classes
    rows = min(len(shown), max(height // row_height, _MIN_LEGEND_ROWS))
    columns = math.ceil(len(shown) / rows)
    texts = [fit_text(names[label], font, _MAX_NAME_WIDTH * size) for label in shown]
    text_width = math.ceil(max(font.getlength(text) for text in texts))
    column_width = field + size // 2 + text_width + size
    sheet = Image.new("RGB", (columns * column_width, max(height, rows * row_height)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (label, text) in enumerate(zip(shown, texts, strict=True)):
        x = i // rows * column_width
        y = i % rows * row_height
        if label >= 0:
            draw.rectangle((x, y, x + field, y + size), fill=_shade(label), outline=FRAME)
        draw.text((x + field + size // 2, y + size / 2), text, fill=INK, font=font, anchor="lm")
    return [np.asarray(sheet)]


def _shade(label: int) -> Colour:
    """The color of a class over medium gray."""
    shaded = (round(128 * (1 - _FILL) + _FILL * value) for value in class_colour(label))
    red, green, blue = shaded
    return red, green, blue
