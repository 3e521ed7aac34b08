"""Plots and images of model errors: precision-recall curves, confusion matrix, worst images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maskseg.evaluation.coco_entries import compressed_rle
from maskseg.evaluation.coco_results import Row
from maskseg.evaluation.confidence import ScoreCurves
from maskseg.evaluation.diagnosis import (
    BAD_MASK,
    CORRECT,
    FALSE,
    MISSED,
    Finding,
    ImageDiagnosis,
)
from maskseg.evaluation.table import truncate_name
from maskseg.masks.base import rle_to_bitmaps
from maskseg.structures import Categories
from maskseg.visualization.colours import as_hex, class_colour, line_colour
from maskseg.visualization.detections import (
    Area,
    Bools,
    draw_labels,
    line_width,
    paint_mask,
    pixel_area,
)
from maskseg.visualization.layout import (
    Colour,
    HeadingText,
    RGBImage,
    add_heading,
    enlarge,
    mosaic,
    plain_text,
    render_figure,
    save_image,
    shrink,
    side_by_side,
)
from maskseg.visualization.legends import class_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Floats = NDArray[np.float64]

MAX_IMAGES = 20
MAX_NUMBERED = 20  # with more classes, the cells of a confusion matrix have no numbers
_MAX_CLASSES = 200  # of a confusion matrix; with more, the rare ones are merged
_SIDE = 720  # px of the longer side of the scaled images, so that texts have the same size on all
_TITLE_SIZE = 21  # px of the text above an image
_MIN_FRAME = 9  # px of the shorter side of the frame of an error, so that tiny objects are visible
_MAX_NAMED_ERRORS = 30  # with more errors of the only class, labels are scores without its name
_MAX_LEGEND = 12  # with more classes, the legend of the curves lists only the best and the worst
# Fields of `ScoreCurves`, and the titles of their panels.
_SCORE_PANELS = {"f1": "F1", "precision": "precision", "recall": "recall"}
_GREY: Colour = (185, 185, 185)
_OTHER_CURVES = "#c4c4c4"
_LEGEND = (
    "dashed: missed",
    "false: a detection of nothing, score",
    "A, is B: wrong class, score",
    "bad mask: IoU of the masks",
    "gray: right",
)


class _Entry(NamedTuple):
    """An annotation or a result row to draw."""

    row: Row
    outcome: str
    colour: Colour  # of its class; gray if it is correct
    texts: list[str]  # what its label may show, the most informative first


def draw_pr_curves(
    curves: Mapping[str, Mapping[str, Floats]], path: Path | str | None = None, *, iou: float = 0.5
) -> RGBImage:
    """Plot precision over recall, one panel per IoU type: thin lines of classes, bold their mean.

    curves: as returned by `CocoEvaluator.pr_curves(iou)`; path: of a PNG to write as well, or None.
    The legend lists the AP at this IoU of up to 12 classes; of more, only the 6 best and the 6
    worst are colored and named. Classes without ground truth are dropped. -> uint8 RGB [H, W, 3].
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    figure = Figure(figsize=(7.2 * max(len(curves), 1), 4.8), layout="constrained")
    axes = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axis, (kind, classes) in zip(axes, curves.items(), strict=False):
        _draw_curves(axis, classes, f"AP{round(100 * iou)}")
        axis.set_title(f"{kind}: precision over recall at IoU {iou:.2f}", fontsize=11, loc="left")
    return save_if_path(render_figure(figure), path)


def draw_confusion(
    matrix: NDArray[np.int64], names: Sequence[str], path: Path | str | None = None
) -> RGBImage:
    """Plot a confusion matrix, normalized by row. -> uint8 RGB [H, W, 3].

    matrix: i64 [K+1, K+1], ground truth in rows, prediction in columns, background last; names: K
    class names; path: of a PNG to write as well, or None. Each row is labeled with its total. Up to
    20 classes, the cells have numbers. Empty rows are gray. Raises ValueError for another shape.
    """
    size = len(names) + 1
    if matrix.shape != (size, size):
        raise ValueError(
            f"{len(names)} names need a matrix {[size, size]}, got {list(matrix.shape)}"
        )
    matrix, names = merge_rare_classes(matrix, names)
    labels = [plain_text(truncate_name(name)) for name in [*names, "background"]]
    totals = matrix.sum(axis=1).tolist()
    figure, axis = plot_row_shares(
        matrix,
        [f"{label} ({total})" for label, total in zip(labels, totals, strict=True)],
        labels,
        numbered=len(names) <= MAX_NUMBERED,
        bar_label="share of the ground-truth row",
    )
    for draw_line in (axis.axhline, axis.axvline):
        draw_line(len(names) - 0.5, color="#555555", linewidth=1)
    axis.set_xlabel("prediction (background: missed)", fontsize=10)
    axis.set_ylabel("ground truth (background: false)", fontsize=10)
    return save_if_path(render_figure(figure), path)


def merge_rare_classes(
    matrix: NDArray[np.int64], names: Sequence[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Merge the classes of a large confusion matrix beyond the 200 with most ground truth into one.

    matrix: i64 [K, C], ground truth in rows, prediction in columns; further columns and the rows of
    no class follow those of the K classes. -> the matrix and the names of its classes.
    """
    num_classes = len(names)
    if num_classes <= _MAX_CLASSES:
        return matrix, list(names)
    totals = matrix[:num_classes].sum(axis=1)
    kept = np.sort(np.argsort(-totals, kind="stable")[:_MAX_CLASSES])
    group = np.full(num_classes, _MAX_CLASSES)  # of each class; the last has all others
    group[kept] = np.arange(_MAX_CLASSES)
    groups = []
    for size in matrix.shape:
        extra = np.arange(size - num_classes) + _MAX_CLASSES + 1
        groups.append(np.concatenate([group, extra]))
    merged = np.zeros([_MAX_CLASSES + 1 + size - num_classes for size in matrix.shape], np.int64)
    np.add.at(merged, (groups[0][:, None], groups[1][None]), matrix)
    others = f"{num_classes - _MAX_CLASSES} others"
    return merged, [*(names[i] for i in kept.tolist()), others]


def plot_row_shares(
    matrix: NDArray[np.int64],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    numbered: bool,
    bar_label: str,
) -> tuple[Figure, Axes]:
    """Plot a matrix of counts [R, C] as the share of each cell in its row, with a color bar.

    Empty rows are gray. numbered: write the shares into the cells, which are larger then.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # imported here because it takes half a second

    rows, columns = matrix.shape
    totals = matrix.sum(axis=1)
    shares = np.ma.masked_invalid(matrix / np.where(totals, totals, np.nan)[:, None])
    cell, font_size = (0.5, 9) if numbered else (0.2, 8)
    side = max(cell * columns, 2.4)  # inches
    figure = Figure(figsize=(side + 3.6, side + (2.4 if numbered else 3.3)), layout="compressed")
    axis = figure.subplots()
    shading = colormaps["Blues"].with_extremes(bad="#e4e4e4")
    # The power norm makes small shares visible.
    image = axis.imshow(shares, cmap=shading, norm=PowerNorm(0.6, vmin=0, vmax=1))
    axis.set_xticks(range(columns), column_labels, rotation=90, fontsize=font_size)
    axis.set_yticks(range(rows), row_labels, fontsize=font_size)
    axis.tick_params(length=0, labeltop=not numbered)
    axis.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#dddddd", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    if numbered:
        _write_shares(axis, shares.filled(0))
    bar = figure.colorbar(image, ax=axis, shrink=min(1.0, 4 / side), aspect=25)
    bar.set_label(bar_label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure, axis


def _write_shares(axis: Axes, shares: Floats) -> None:
    """Write the shares that round to at least 0.01 into the cells."""
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            axis.text(
                column,
                row,
                f"{share:.2f}",
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if share > 0.4 else "black",
            )


def draw_worst(
    image: RGBImage, diagnosis: ImageDiagnosis, categories: Categories, file_name: str = ""
) -> RGBImage:
    """Draw the errors of one image: ground truth | prediction. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3], in the frame of the annotations and rows. A missed object is drawn
    at the left, in a dashed frame, a false detection at the right, other errors on both sides, with
    their masks if there are any, in the colors of their classes. Correct objects are thin gray
    boxes; detections in a crowd are not drawn. The image is scaled to a longer side of 720 pixels.
    A label without a free place is shortened, then dropped; with more than 30 errors of the only
    class, labels are scores only. The title has the file name (or the image id) and the number of
    errors of each kind.
    """
    left = _draw_entries(image, _entries(diagnosis.findings, "truth", categories))
    right = _draw_entries(image, _entries(diagnosis.findings, "row", categories))
    title = f"{file_name or f'image {diagnosis.image_id}'}: {diagnosis.summary or 'no errors'}"
    pair = side_by_side(left, right, ("ground truth", "prediction"))
    return add_heading([HeadingText(title, None)], pair, _TITLE_SIZE)


def draw_worst_images(
    diagnoses: Sequence[ImageDiagnosis],
    categories: Categories,
    load_image: Callable[[int], RGBImage],
    path: Path | str | None = None,
    *,
    file_names: Mapping[int, str] | None = None,
) -> RGBImage:
    """Draw the first 20 diagnoses in two columns below a legend. -> uint8 RGB.

    diagnoses: as returned by `evaluation.diagnosis.worst`; load_image: image id -> uint8 RGB
    [H, W, 3]; path: of a PNG to write as well, or None; file_names: image id -> name in the title
    (by default the id).
    """
    file_names = file_names or {}
    images = []
    for diagnosis in diagnoses[:MAX_IMAGES]:
        image = load_image(diagnosis.image_id)
        name = file_names.get(diagnosis.image_id, "")
        images.append(draw_worst(image, diagnosis, categories, name))
    legend = [HeadingText(text, None) for text in _LEGEND]
    if images:
        sheet = mosaic(images, columns=2, cell=2 * _SIDE + 100)
    else:
        sheet = np.full((40, 900, 3), 255, dtype=np.uint8)
        legend.append(HeadingText("no image has an error", None))
    text_size = min(32, max(18, sheet.shape[1] // 90))
    sheet = add_heading(legend, sheet, text_size)
    classes = class_texts(_error_labels(diagnoses[:MAX_IMAGES], categories), categories.names)
    if classes:
        sheet = add_heading(classes, sheet, text_size)
    return save_if_path(sheet, path)


def _error_labels(diagnoses: Sequence[ImageDiagnosis], categories: Categories) -> list[int]:
    """The classes of the objects and detections that are errors."""
    label_of_id = {category_id: label for label, category_id in enumerate(categories.ids)}
    labels = []
    for diagnosis in diagnoses:
        for finding in diagnosis.findings:
            if finding.outcome != CORRECT:
                drawn = [row for row in (finding.truth, finding.row) if row is not None]
                labels += [label_of_id[row["category_id"]] for row in drawn]
    return labels


def save_if_path(image: RGBImage, path: Path | str | None) -> RGBImage:
    """Write an image as PNG unless the path is None, and return it."""
    if path is not None:
        save_image(image, path)
    return image


def _draw_curves(axis: Axes, classes: Mapping[str, Floats], metric: str) -> None:
    """Plot the curves of one IoU type.

    classes: name -> precision [101], in the order of the labels, negative without ground truth.
    """
    recall = np.linspace(0, 1, 101)
    valid = {name: values for name, values in classes.items() if values.min() >= 0}
    ranked = sorted(valid, key=lambda name: -valid[name].mean())
    lines = [_ClassLine(name, recall, valid[name], float(valid[name].mean())) for name in ranked]
    handles = _draw_class_lines(axis, lines, list(classes))
    if len(ranked) > 1:
        mean = np.mean([valid[name] for name in ranked], axis=0)
        label = f"{mean.mean():.2f}  mean of {len(ranked)}"
        handles[:0] = axis.plot(recall, mean, color="black", linewidth=3, label=label)
    if ranked:
        _add_curve_legend(axis, handles, metric)
    else:
        axis.text(0.5, 0.5, "no ground truth", ha="center", va="center", color="#777777")
    axis.set_xlabel("recall", fontsize=9)
    axis.set_ylabel("precision", fontsize=9)
    _style_curves(axis)


class _ClassLine(NamedTuple):
    """The curve of a class. value: in the legend."""

    name: str
    x: Floats
    y: Floats
    value: float


def _draw_class_lines(
    axis: Axes, lines: Sequence[_ClassLine], names: Sequence[str]
) -> list[Line2D]:
    """Plot curves of classes in their colors. -> the entries of the legend.

    lines: by falling value; of more than 12, only the 6 first and the 6 last are colored and named.
    names: of all classes, in the order of the labels.
    """
    half = _MAX_LEGEND // 2
    first_unnamed = half if len(lines) > _MAX_LEGEND else len(lines)
    last_named = len(lines) - half
    is_named = [i < first_unnamed or i >= last_named for i in range(len(lines))]
    labels = {name: label for label, name in enumerate(names)}
    for line, named in zip(lines, is_named, strict=True):
        if not named:
            axis.plot(line.x, line.y, color=_OTHER_CURVES, linewidth=0.7)
    handles: list[Line2D] = []
    for line, named in zip(lines, is_named, strict=True):
        if named:
            handles += axis.plot(
                line.x,
                line.y,
                color=as_hex(line_colour(labels[line.name])),
                linewidth=1.5 if len(lines) > 1 else 3,
                # A second cue where many classes have similar colors.
                linestyle="--" if len(lines) > _MAX_LEGEND and len(handles) >= half else "-",
                label=f"{line.value:.2f}  {plain_text(truncate_name(line.name))}",
            )
    if len(lines) > _MAX_LEGEND:
        label = f"…  {len(lines) - _MAX_LEGEND} others"
        others = axis.plot([], [], color=_OTHER_CURVES, linewidth=0.7, label=label)
        handles.insert(half, others[0])
    return handles


def _add_curve_legend(axis: Axes, handles: Sequence[Line2D], title: str) -> None:
    axis.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        fontsize=9,
        title_fontsize=9,
        frameon=False,
        alignment="left",
    )


def _style_curves(axis: Axes) -> None:
    """The common style of panels whose both axes run from 0 to 1."""
    axis.set(xlim=(0, 1), ylim=(0, 1.03))
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def draw_score_curves(
    curves: Mapping[str, ScoreCurves], names: Sequence[str], path: Path | str | None = None
) -> RGBImage:
    """Plot F1, precision and recall over the score threshold, with the threshold of the best F1.

    curves: as returned by `CocoEvaluator.score_curves`; names: K class names; path: of a PNG to
    write as well, or None. Thin lines are classes, the bold line is all detections together. The
    legend lists the best F1 of up to 12 classes. -> uint8 RGB [H, W, 3].
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    figure = Figure(figsize=(16.5, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    together = curves.get("")
    best = None if together is None else together.best
    ranked = sorted((name for name in curves if name), key=lambda name: -_best_f1(curves[name]))
    for axis, (field, title) in zip(axes, _SCORE_PANELS.items(), strict=True):
        lines = []
        for name in ranked if len(names) > 1 else []:
            x, y = _steps(curves[name], field)
            lines.append(_ClassLine(name, x, y, _best_f1(curves[name])))
        handles = _draw_class_lines(axis, lines, names)
        if together is not None:
            x, y = _steps(together, field)
            label = f"{_best_f1(together):.2f}  all detections"
            handles[:0] = axis.plot(x, y, color="black", linewidth=3, label=label)
        if together is not None and best is not None:
            score = float(together.scores[best])
            axis.axvline(score, color="#777777", linewidth=1, linestyle=":")
            value = float(getattr(together, field)[best])
            title = f"{title}: {value:.2f} at score {score:.2f}"
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel("minimum score of a detection", fontsize=9)
        _style_curves(axis)
    _add_curve_legend(axes[-1], handles, "best F1 at IoU 0.50")
    return save_if_path(render_figure(figure), path)


def _best_f1(curves: ScoreCurves) -> float:
    return float(curves.f1.max(initial=0.0))


def _steps(curves: ScoreCurves, field: str) -> tuple[Floats, Floats]:
    """The points of a curve over the threshold from 0 to 1, by rising score.

    Above the highest score nothing is detected: recall and F1 are 0 there, and the precision, which
    is then undefined, ends.
    """
    scores = curves.scores[::-1]
    values = np.asarray(getattr(curves, field), dtype=np.float64)[::-1]
    if not len(scores):
        return np.array([0.0, 1.0]), np.zeros(2)
    x = np.concatenate([[0.0], scores])
    y = np.concatenate([values[:1], values])
    if field != "precision":
        x = np.concatenate([x, [scores[-1], 1.0]])
        y = np.concatenate([y, [0.0, 0.0]])
    return x, y


def _entries(findings: Sequence[Finding], side: str, categories: Categories) -> list[_Entry]:
    """What to draw on one side, in the order in which the labels choose their places.

    side: `truth` for the ground truth, `row` for the detections.
    """
    names = dict(zip(categories.ids, categories.names, strict=True))
    entries = []
    for finding in findings:
        row = finding.truth if side == "truth" else finding.row
        if row is not None:
            colour = class_colour(categories.ids.index(row["category_id"]))
            if finding.outcome == CORRECT:
                colour = _GREY
            texts = _label_texts(finding, side, names)
            entries.append(_Entry(row, finding.outcome, colour, texts))
    num_errors = sum(entry.outcome != CORRECT for entry in entries)
    if len(names) == 1 and num_errors > _MAX_NAMED_ERRORS:
        shortened = []
        for row, outcome, colour, texts in entries:
            shown = texts[-1:] if side == "row" else []
            shortened.append(_Entry(row, outcome, colour, shown))
        return shortened
    return entries


def _label_texts(finding: Finding, side: str, names: Mapping[int, str]) -> list[str]:
    """The texts that a label may show, the most informative first."""
    if finding.outcome == CORRECT:
        return []
    truth = "" if finding.truth is None else names[finding.truth["category_id"]]
    if finding.outcome == MISSED:
        return [f"missed {truth}", truth]
    if side == "truth":
        return [truth]
    if finding.outcome == BAD_MASK:
        return [f"bad mask {finding.mask_iou:.2f}", f"{finding.mask_iou:.2f}"]
    assert finding.row is not None
    predicted = names[finding.row["category_id"]]
    score = f"{finding.row['score']:.2f}"
    if finding.outcome == FALSE:
        return [f"false {predicted} {score}", f"{predicted} {score}", score]
    return [f"{predicted}, is {truth} {score}", f"{predicted} {score}"]


def _draw_entries(image: RGBImage, entries: Sequence[_Entry]) -> RGBImage:
    """Draw one side: masks of errors, frames, labels; large objects first, so small ones show."""
    height, width = image.shape[:2]
    factor = min(8, math.ceil(_SIDE / max(height, width)))
    canvas = np.array(shrink(enlarge(image, factor), _SIDE))
    ratio = np.array([canvas.shape[1] / width, canvas.shape[0] / height] * 2)
    boxes = [_corners(entry.row) * ratio for entry in entries]
    widths = [line_width(pixel_area(box, 1, canvas), canvas) for box in boxes]
    order = sorted(
        range(len(entries)),
        key=lambda i: (entries[i].outcome != CORRECT, -float((boxes[i][2:] - boxes[i][:2]).prod())),
    )
    for i in order:
        entry = entries[i]
        if entry.outcome != CORRECT and entry.row.get("segmentation"):
            mask = _scaled_mask(entry.row, (height, width), canvas)
            paint_mask(canvas, mask, entry.colour, 1, widths[i])
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    areas: dict[int, Area] = {}
    for i in order:
        outcome = entries[i].outcome
        frame = boxes[i]
        frame_width = 1
        if outcome != CORRECT:
            frame_width = 2 * widths[i]
            frame = _outer_frame(boxes[i], frame_width)
        area = pixel_area(frame, 1, canvas)
        _draw_frame(draw, area, entries[i].colour, frame_width, dashed=outcome == MISSED)
        areas[i] = area
    labels = []
    for i, entry in enumerate(entries):
        if entry.texts:
            labels.append((areas[i], entry.texts, entry.colour))
    draw_labels(draw, picture.size, labels)
    return np.asarray(picture)


def _draw_frame(
    draw: ImageDraw.ImageDraw, area: Area, colour: Colour, width: int, dashed: bool
) -> None:
    """Draw the frame of an area; dashed where it is long enough for dashes."""
    dash = 4 * width
    if not dashed or min(area.x1 - area.x0, area.y1 - area.y0) < 4 * dash:
        frame = (area.x0, area.y0, area.x1 - 1, area.y1 - 1)
        draw.rectangle(frame, outline=colour, width=width)
        return
    for x in range(area.x0, area.x1, 2 * dash):
        end = min(x + dash, area.x1) - 1
        draw.rectangle((x, area.y0, end, area.y0 + width - 1), fill=colour)
        draw.rectangle((x, area.y1 - width, end, area.y1 - 1), fill=colour)
    for y in range(area.y0, area.y1, 2 * dash):
        end = min(y + dash, area.y1) - 1
        draw.rectangle((area.x0, y, area.x0 + width - 1, end), fill=colour)
        draw.rectangle((area.x1 - width, y, area.x1 - 1, end), fill=colour)


def _scaled_mask(row: Row, size: tuple[int, int], canvas: RGBImage) -> Bools:
    """The mask of a row in an image of (height, width) `size`, scaled to the canvas. -> [H, W]."""
    mask = rle_to_bitmaps([compressed_rle(row["segmentation"], *size)])[0]
    target = (canvas.shape[1], canvas.shape[0])
    return np.asarray(Image.fromarray(mask).resize(target, Image.Resampling.NEAREST))


def _corners(row: Row) -> Floats:
    """The box of a row as xyxy."""
    x, y, w, h = row["bbox"]
    return np.array([x, y, x + w, y + h], dtype=np.float64)


def _outer_frame(box: Floats, width: int) -> Floats:
    """The frame around a box xyxy whose line lies outside it; large enough to be visible."""
    margin = np.maximum(width, (_MIN_FRAME - box[2:] + box[:2]) / 2)
    return np.concatenate([box[:2] - margin, box[2:] + margin])
