"""Pictures of what a model gets wrong: curves of precision over recall, the confusion matrix, the images with the most errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from maskseg.evaluation.coco_entries import compressed_rle
from maskseg.evaluation.coco_results import Row
from maskseg.evaluation.diagnosis import (
    BAD_MASK,
    CORRECT,
    FALSE,
    MISSED,
    WRONG_CLASS,
    Finding,
    ImageDiagnosis,
)
from maskseg.masks.base import rle_to_bitmaps
from maskseg.structures import Categories
from maskseg.visualization import detections
from maskseg.visualization.curves import COLOURS, rendered, save_picture
from maskseg.visualization.detections import Colour, Picture, mosaic, side_by_side

Floats = NDArray[np.float64]
Entry = tuple[
    Row, str, list[str]
]  # an annotation or a result row, its outcome, what its label may say

MOST_IMAGES = 20
_SIDE = 720  # pixels of the longer side that images are scaled to before they are drawn on, so that texts are as large on all of them
_TITLE = 21  # pixels of the text over an image
_LEAST = 9  # pixels of the shorter side of an error's outline, for objects that nobody would see
_CROWDED = 30  # errors of the only class from which on its name is not written at each
_NAMED = 12  # classes up to which all are in the legend of the curves
_NUMBERED = 20  # classes up to which the confusion matrix has numbers
_NAME = 22  # characters of a class name beside curves and matrix
_GREY, _PAPER, _INK = (185, 185, 185), (255, 255, 255), (30, 30, 30)
_MARKS: dict[
    str, tuple[Colour, str]
] = {  # of Okabe and Ito's colours, those that are seen on pictures
    MISSED: (detections._PALETTE[2], "missed: an object not detected"),
    FALSE: (detections._PALETTE[4], "false: a detection of nothing, score"),
    WRONG_CLASS: (detections._PALETTE[1], "wrong class: given, true one, score"),
    BAD_MASK: (detections._PALETTE[5], "bad mask: IoU of the masks"),
    CORRECT: (_GREY, "right"),
}


def draw_pr_curves(
    curves: Mapping[str, Mapping[str, Floats]], path: Path | str | None = None, *, iou: float = 0.5
) -> Picture:
    """Precision over recall, a panel a kind: classes thin, their mean bold. -> uint8 RGB [H, W, 3], as PNG too where there is a path.

    curves: what `CocoEvaluator.pr_curves(iou)` gives. The legend has the AP at this IoU of up to 12 classes; of more, the 6 best and the 6 worst
    have a colour and are named. Classes without truth are left out.
    """
    from matplotlib.figure import Figure  # half a second, and only needed here

    figure = Figure(figsize=(7.2 * max(len(curves), 1), 4.8), layout="constrained")
    axes = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    for axis, (kind, classes) in zip(axes, curves.items(), strict=False):
        _draw_curves(
            axis, {name: c for name, c in classes.items() if c.min() >= 0}, f"AP{round(100 * iou)}"
        )
        axis.set_title(f"{kind}: precision over recall at IoU {iou:.2f}", fontsize=11, loc="left")
    return _finished(rendered(figure), path)


def draw_confusion(
    matrix: NDArray[np.int64], names: Sequence[str], path: Path | str | None = None
) -> Picture:
    """A confusion matrix as shares of each truth row. -> uint8 RGB [H, W, 3], as PNG too where there is a path.

    matrix: i64 [K+1, K+1], truth in rows, prediction in columns, background last; names: K class names. Beside each row stands how many it
    has. Up to 20 classes the shares are written into the cells. Rows of nothing are grey.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    size = len(names) + 1
    if matrix.shape != (size, size):
        raise ValueError(
            f"{len(names)} names need a matrix {[size, size]}, got {list(matrix.shape)}"
        )
    totals = matrix.sum(axis=1)
    shares = np.ma.masked_invalid(matrix / np.where(totals, totals, np.nan)[:, None])
    numbered = len(names) <= _NUMBERED
    cell, font = (0.5, 9) if numbered else (0.2, 8)
    side = max(cell * size, 2.4)
    figure = Figure(figsize=(side + 3.6, side + (2.4 if numbered else 3.3)), layout="compressed")
    axis = figure.subplots()
    shown = axis.imshow(
        shares, cmap=_shading(), norm=PowerNorm(0.6, vmin=0, vmax=1)
    )  # so that small shares are seen
    labels = [_short(name) for name in [*names, "background"]]
    axis.set_xticks(range(size), labels, rotation=90, fontsize=font)
    axis.set_yticks(
        range(size),
        [f"{label} ({total})" for label, total in zip(labels, totals.tolist(), strict=True)],
        fontsize=font,
    )
    axis.tick_params(length=0, labeltop=not numbered, labelright=False)
    axis.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#dddddd", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    for line in (axis.axhline, axis.axvline):
        line(len(names) - 0.5, color="#555555", linewidth=1)
    axis.set_xlabel("prediction (background: missed)", fontsize=10)
    axis.set_ylabel("truth (background: false)", fontsize=10)
    label_shares(figure, axis, shown, shares if numbered else None, side, "share of the truth row")
    return _finished(rendered(figure), path)


def label_shares(
    figure: Any, axis: Any, shown: Any, shares: Any | None, side: float, told: str
) -> None:
    """Numbers in the cells of a matrix of shares (masked, None for no numbers) that matplotlib shows, and a bar of its shades; side: inches."""
    if shares is not None:
        for (row, column), share in np.ndenumerate(shares.filled(0)):
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
    bar = figure.colorbar(shown, ax=axis, shrink=min(1.0, 4 / side), aspect=25)
    bar.set_label(told, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def draw_worst(
    image: Picture, diagnosis: ImageDiagnosis, categories: Categories, file_name: str = ""
) -> Picture:
    """One image, truth | prediction, its errors in colours with a text at each, under its name and why. -> uint8 RGB [H', W', 3].

    image: uint8 RGB [H, W, 3], in the frame of the annotations and rows. An error is drawn where it is: a missed truth at the left, a false
    detection at the right, the others on both sides; with masks, where there are any. What is right is a thin grey box, detections in a crowd
    are not drawn. The image is scaled so that its longer side has 720 pixels. A text that finds no free place is shortened, then left out; of
    more than 30 errors of the only class, just the numbers are written.
    """
    names = dict(zip(categories.ids, categories.names, strict=True))
    left, right = (
        _drawn(image, _entries(diagnosis.findings, side, names)) for side in ("truth", "row")
    )
    title = f"{file_name or f'image {diagnosis.image_id}'}: {diagnosis.why or 'no errors'}"
    return _under([_Text(title, None)], side_by_side(left, right, ("truth", "prediction")), _TITLE)


def draw_worst_images(
    diagnoses: Sequence[ImageDiagnosis],
    categories: Categories,
    picture: Callable[[int], Picture],
    path: Path | str | None = None,
    *,
    file_names: Mapping[int, str] | None = None,
) -> Picture:
    """The first 20 of the diagnoses (those of `worst`) in two columns, under a legend of the colours. -> uint8 RGB, as PNG too with a path.

    picture: image id -> uint8 RGB [H, W, 3]; file_names: image id -> the name in the title (an image without one gets its id).
    """
    file_names = file_names or {}
    drawn = [
        draw_worst(picture(d.image_id), d, categories, file_names.get(d.image_id, ""))
        for d in diagnoses[:MOST_IMAGES]
    ]
    sheet = (
        mosaic(drawn, columns=2, cell=2 * _SIDE + 100)
        if drawn
        else np.full((40, 900, 3), 255, dtype=np.uint8)
    )
    legend = [_Text(text, colour) for colour, text in _MARKS.values()]
    if not drawn:
        legend.append(_Text("no image has an error", None))
    return _finished(_under(legend, sheet, min(32, max(18, sheet.shape[1] // 90))), path)


def _finished(picture: Picture, path: Path | str | None) -> Picture:
    if path is not None:
        save_picture(picture, path)
    return picture


def _short(name: str) -> str:
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _draw_curves(axis: Any, classes: Mapping[str, Floats], metric: str) -> None:
    """classes: name -> precision [101]."""
    recall = np.linspace(0, 1, 101)
    ranked = sorted(classes, key=lambda name: -classes[name].mean())
    named = ranked if len(ranked) <= _NAMED else ranked[: _NAMED // 2] + ranked[-_NAMED // 2 :]
    for name in ranked:
        if name not in named:
            axis.plot(recall, classes[name], color="#c4c4c4", linewidth=0.7)
    handles = []
    for i, name in enumerate(named):
        label = f"{classes[name].mean():.2f}  {_short(name)}"
        handles += axis.plot(
            recall,
            classes[name],
            color=COLOURS[i],
            linewidth=1.3 if len(ranked) > 1 else 3,
            label=label,
        )
    if len(named) < len(ranked):
        handles.insert(
            _NAMED // 2,
            axis.plot(
                [],
                [],
                color="#c4c4c4",
                linewidth=0.7,
                label=f"…  {len(ranked) - len(named)} others",
            )[0],
        )
    if len(ranked) > 1:
        mean = np.mean([classes[name] for name in ranked], axis=0)
        handles[:0] = axis.plot(
            recall,
            mean,
            color="black",
            linewidth=3,
            label=f"{mean.mean():.2f}  mean of {len(ranked)}",
        )
    if ranked:
        axis.legend(
            handles=handles,
            title=metric,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.02),
            fontsize=9,
            title_fontsize=9,
            frameon=False,
            alignment="left",
        )
    else:
        axis.text(0.5, 0.5, "there is no truth", ha="center", va="center", color="#777777")
    axis.set(xlim=(0, 1), ylim=(0, 1.03))
    axis.set_xlabel("recall", fontsize=9)
    axis.set_ylabel("precision", fontsize=9)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _shading() -> Any:
    """White to blue; grey where there is no number."""
    from matplotlib import colormaps

    return colormaps["Blues"].with_extremes(bad="#e4e4e4")


def _entries(findings: Sequence[Finding], side: str, names: Mapping[int, str]) -> list[Entry]:
    """What is drawn of the truths (`side` is `truth`) or of the detections (`row`), in the order in which the labels choose their places."""
    shown = [(f.truth if side == "truth" else f.row, f) for f in findings]
    entries = [(row, f.outcome, _texts(f, side, names)) for row, f in shown if row is not None]
    if len(names) == 1 and sum(outcome != CORRECT for _, outcome, _ in entries) > _CROWDED:
        entries = [
            (row, outcome, texts[-1:] if side == "row" else []) for row, outcome, texts in entries
        ]
    return entries


def _texts(finding: Finding, side: str, names: Mapping[int, str]) -> list[str]:
    """What a label may say, the most telling first."""
    truth = "" if finding.truth is None else names[finding.truth["category_id"]]
    found, score = (
        ("", "")
        if finding.row is None
        else (names[finding.row["category_id"]], f"{finding.row['score']:.2f}")
    )
    if finding.outcome == CORRECT:
        return []
    if finding.outcome == MISSED:
        return [f"missed {truth}", truth]
    if side == "truth":
        return [truth]
    if finding.outcome == FALSE:
        return [f"false {found} {score}", f"{found} {score}", score]
    if finding.outcome == WRONG_CLASS:
        return [f"{found}, is {truth} {score}", f"{found} {score}"]
    return [f"bad mask {finding.mask_iou:.2f}", f"{finding.mask_iou:.2f}"]


def _drawn(image: Picture, entries: Sequence[Entry]) -> Picture:
    """One side: what is right, then the errors, large ones first, so that what lies on them stays visible; then the texts."""
    height, width = image.shape[:2]
    canvas = np.array(
        detections._shrunk(
            detections._enlarged(image, min(8, math.ceil(_SIDE / max(height, width)))), _SIDE
        )
    )
    ratio = np.array([canvas.shape[1] / width, canvas.shape[0] / height] * 2)
    corners = [_corners(row) * ratio for row, _, _ in entries]
    lines = [detections._line(detections._on_canvas(box, 1, canvas), canvas) for box in corners]
    order = sorted(
        range(len(entries)),
        key=lambda i: (entries[i][1] != CORRECT, -float((corners[i][2:] - corners[i][:2]).prod())),
    )
    for i in order:
        row, outcome, _ = entries[i]
        if outcome != CORRECT and row.get("segmentation"):
            mask = rle_to_bitmaps([compressed_rle(row["segmentation"], height, width)])[0]
            scaled = Image.fromarray(mask).resize(canvas.shape[1::-1], Image.Resampling.NEAREST)
            detections._paint_mask(canvas, np.asarray(scaled), _MARKS[outcome][0], 1, lines[i])
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    labels = {}
    for i in order:
        outcome = entries[i][1]
        colour, thick = _MARKS[outcome][0], 1 if outcome == CORRECT else 2 * lines[i]
        area = detections._on_canvas(
            corners[i] if outcome == CORRECT else _around(corners[i], thick), 1, canvas
        )
        draw.rectangle((area.x0, area.y0, area.x1 - 1, area.y1 - 1), outline=colour, width=thick)
        labels[i] = area, entries[i][2], colour
    detections._draw_labels(
        draw, picture.size, [labels[i] for i in sorted(labels) if entries[i][2]]
    )
    return np.asarray(picture)


def _corners(row: Row) -> Floats:
    x, y, w, h = row["bbox"]
    return np.array([x, y, x + w, y + h], dtype=np.float64)


def _around(box: Floats, thick: int) -> Floats:
    """The box of an outline that lies outside of `box`, xyxy, and is not too small to be seen."""
    grown = np.maximum(thick, (_LEAST - box[2:] + box[:2]) / 2)
    return np.concatenate([box[:2] - grown, box[2:] + grown])


class _Text(NamedTuple):
    """A piece of a heading, with a field of its colour before it, or none."""

    text: str
    colour: Colour | None


def _under(texts: Sequence[_Text], picture: Picture, size: int) -> Picture:
    """The picture under texts of `size` pixels, as many a line as find place; the sheet is as wide as the widest text."""
    font = detections._font(size)
    gap, field = size // 2, round(1.3 * size)
    widths = [math.ceil(font.getlength(t.text)) + (field + gap if t.colour else 0) for t in texts]
    wide = max(picture.shape[1], 4 * gap + max(widths))
    lines, x = 1, gap
    places = []
    for width in widths:
        if x > gap and x + width + gap > wide:
            lines, x = lines + 1, gap
        places.append((x, lines - 1))
        x += width + 3 * gap
    tall = round(1.7 * size)
    sheet = Image.new("RGB", (wide, lines * tall + gap // 2 + picture.shape[0]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for (x, line), (text, colour) in zip(places, texts, strict=True):
        middle = gap // 2 + line * tall + tall // 2
        if colour:
            draw.rectangle(
                (x, middle - size // 2, x + field, middle + size // 2), fill=colour, outline=_INK
            )
            x += field + gap
        draw.text((x, middle), text, fill=_INK, font=font, anchor="lm")
    sheet.paste(Image.fromarray(picture), (0, lines * tall + gap // 2))
    return np.asarray(sheet)
