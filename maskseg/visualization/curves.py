"""Plots the curves of a training run: metrics.jsonl -> one image."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.visualization.layout import render_figure, save_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = dict[int, float]  # step -> value
Line = tuple[str, Series, str, bool]  # name, values, color, dashed
Panel = tuple[str, Sequence[Line]]  # title, lines

_TRAIN = "#0072B2"
_VAL = "#D55E00"
_AP_COLOURS = {"bbox": "#0072B2", "segm": "#D55E00", "keypoints": "#009E73"}
_MAX_STEP = 2**53  # of a line that is not damaged
# Curves with more points are drawn faintly, below their running mean.
_MAX_UNSMOOTHED = 50


def plot_curves(metrics_file: Path | str, output: Path | str) -> None:
    """Plot losses (training and validation), learning rate and AP of a run into a PNG.

    metrics_file: one JSON object per line with `step` and `kind`: `train` (`loss`, `loss/<term>`,
    `lr`) or `val` (`<type>/AP`, `<type>/AP50`, `loss/<term>`). If a step occurs twice (a resumed
    run), the later line counts; incomplete lines are dropped. Works without a display. Raises
    UserError if there is nothing to plot or a file cannot be read or written.
    """
    panels = _panels(*read_metrics(Path(metrics_file)))
    if not panels:
        raise UserError(f"{metrics_file} has no training or validation metrics to plot")
    save_image(render_figure(panels_figure(panels)), output)


def panels_figure(panels: Sequence[Panel], *, legends: bool = True) -> Figure:
    """Build a matplotlib figure of panels that share their range of steps.

    legends: add a legend to each panel with more than one line.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    last_step = 0
    for _, lines in panels:
        for _, series, _, _ in lines:
            last_step = max(last_step, max(series, default=0))
    columns = _num_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels, strict=False):
        _draw_panel(axis, title, lines, legends)
        axis.set_xlim(0, max(1.02 * last_step, 1))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def _num_columns(panels: int) -> int:
    """At most 3 columns for up to 6 panels; else 4 or 3, whichever leaves fewer empty cells."""
    if panels <= 6:
        return min(panels, 3)
    return min((4, 3), key=lambda columns: -panels % columns)


def read_metrics(path: Path) -> tuple[dict[str, Series], dict[str, Series]]:
    """Read the series of a metrics.jsonl, by key. -> those of training, those of validation.

    Raises UserError if the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    series: dict[str, dict[str, Series]] = {"train": {}, "val": {}}
    for line in text.splitlines():
        record = _parse_record(line)
        kind = record.get("kind")
        step = record.get("step")
        if not isinstance(kind, str) or kind not in series or not _is_step(step):
            continue
        for key, value in record.items():
            if key not in ("step", "kind") and _is_number(value):
                series[kind].setdefault(key, {})[step] = float(value)
    return series["train"], series["val"]


def _parse_record(line: str) -> dict[str, object]:
    """The values of a line; none where it is damaged, as the last one of an interrupted run."""
    try:
        record = parse_json(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_step(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_STEP


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value fits into a float; NaN and infinity do."""
    if isinstance(value, float):
        return True
    return isinstance(value, int) and abs(value) <= sys.float_info.max


def _panels(train: Mapping[str, Series], val: Mapping[str, Series]) -> list[Panel]:
    """Title and lines of each panel: total loss, its terms, learning rate, AP; none is empty."""
    panels: list[Panel] = [("loss", _train_val_lines(train.get("loss"), validation_loss(val)))]
    for key in dict.fromkeys([*train, *val]):
        if key.startswith("loss/"):
            lines = _train_val_lines(train.get(key), val.get(key))
            panels.append((key.replace("loss/", "loss: "), lines))
    rate: list[Line] = [("train", train["lr"], _TRAIN, False)] if "lr" in train else []
    panels.append(("learning rate", rate))
    panels.append(("average precision", _ap_lines(val)))
    return [(title, lines) for title, lines in panels if lines]


def validation_loss(val: Mapping[str, Series]) -> Series:
    """The total validation loss, or the sum of its terms if only they were logged."""
    terms = [series for key, series in val.items() if key.startswith("loss/")]
    return val.get("loss") or _sum(terms)


def _train_val_lines(train: Series | None, val: Series | None) -> list[Line]:
    lines: list[Line] = []
    if train:
        lines.append(("train", train, _TRAIN, False))
    if val:
        lines.append(("validation", val, _VAL, False))
    return lines


def _sum(series: Sequence[Series]) -> Series:
    """The sum of several series, at the steps that all of them have."""
    if not series:
        return {}
    steps = set.intersection(*(set(values) for values in series))
    return {step: sum(values[step] for values in series) for step in steps}


def _ap_lines(val: Mapping[str, Series]) -> list[Line]:
    """AP as solid and AP50 as dashed lines, one color per IoU type; -1 (undefined) is dropped."""
    lines: list[Line] = []
    for key, series in val.items():
        kind, _, metric = key.partition("/")
        valid = {step: value for step, value in series.items() if value >= 0}
        if metric in ("AP", "AP50") and valid:
            colour = _AP_COLOURS.get(kind, "#CC79A7")
            lines.append((f"{kind} {metric}", valid, colour, metric == "AP50"))
    return sorted(lines, key=lambda line: (line[3], line[0]))


def _draw_panel(axis: Axes, title: str, lines: Sequence[Line], legend: bool) -> None:
    top = 0.0
    for name, series, colour, dashed in lines:
        steps = np.array(sorted(series))
        values = np.array([series[step] for step in steps.tolist()])
        is_short = len(steps) <= _MAX_UNSMOOTHED
        if not is_short and title.startswith("loss"):
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, len(values) // 20)
        axis.plot(
            steps,
            values,
            color=colour,
            linestyle="--" if dashed else "-",
            linewidth=1.6,
            marker="o" if is_short else None,
            markersize=3.5,
            markerfacecolor="white" if dashed else colour,
            label=name,
        )
        top = max(top, _upper_limit(values))
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if top > 0:
        axis.set_ylim(0, 1.08 * top)
    if legend and (len(lines) > 1 or lines[0][0] != "train"):
        axis.legend(fontsize=8, frameon=False, loc="best")


def _upper_limit(values: NDArray[np.float64]) -> float:
    """The largest value of a panel, clipped so that a spike does not flatten the other values.

    Losses often start with such a spike.
    """
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0
    usual = float(np.quantile(finite, 0.95))
    highest = float(finite.max())
    return highest if highest <= 3 * usual else 1.5 * usual


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of the last `width` finite values (fewer at the start) at each position."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[last] - sums[first]) / (counts[last] - counts[first]))
