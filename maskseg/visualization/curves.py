"""The curves of a training: metrics.jsonl -> one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskseg.errors import UserError
from maskseg.files import parse_json

Series = dict[int, float]  # step -> value
Line = tuple[str, Series, str, bool]  # name, values, colour, dashed

# Six of Okabe and Ito's colours, without their yellow, which is faint on white, and six of Tol's and matplotlib's.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#332288",
    "#999933",
    "#44AA99",
    "#8C564B",
    "#9467BD",
)
_TRAIN, _VAL = "#0072B2", "#D55E00"
_AP_COLOURS = {"bbox": "#0072B2", "segm": "#D55E00", "keypoints": "#009E73"}
_WINDOW = 50  # points from which on a curve is drawn faint, with its running mean over it


def plot_curves(metrics_file: Path | str, output: Path | str) -> None:
    """Draws the losses (training and validation), the learning rate and the AP of a run into a PNG; needs no display.

    Each line of the file is a JSON object with `step` and `kind`, `train` (`loss`, `loss/<term>`, `lr`) or `val` (`<type>/AP`,
    `<type>/AP50`, `loss/<term>`). Of a step that is there twice (a resumed run) the later line counts; lines that are cut off are left
    out. Raises UserError where nothing can be drawn.
    """
    panels = _panels(*read_metrics(Path(metrics_file)))
    if not panels:
        raise UserError(f"{metrics_file} has no training or validation numbers to draw")
    save_picture(rendered(panels_figure(panels)), output)


def panels_figure(panels: Sequence[tuple[str, Sequence[Line]]], *, legends: bool = True) -> Any:
    """A matplotlib figure of panels, each a title and its lines, all over the same steps. legends: one in each panel that has several lines."""
    from matplotlib.figure import Figure  # half a second, and only needed here

    last = max(step for _, lines in panels for _, series, _, _ in lines for step in series)
    columns = (
        min(len(panels), 3) if len(panels) <= 6 else min((4, 3), key=lambda c: -len(panels) % c)
    )  # as few empty places as can be
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.3 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels, strict=False):
        _draw_panel(axis, title, lines, legends)
        axis.set_xlim(0, max(1.02 * last, 1))  # the same steps in all panels
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    return figure


def rendered(figure: Any) -> NDArray[np.uint8]:
    """A matplotlib figure as uint8 RGB [H, W, 3], at 110 pixels an inch; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(110)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_picture(picture: NDArray[np.uint8], output: Path | str) -> None:
    """uint8 RGB [H, W, 3] as PNG, whatever the name's ending; folders that are missing are made. Raises UserError where it cannot be written."""
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(output, format="PNG")
    except OSError as error:
        raise UserError(
            f"cannot write the picture to {output}: {error.strerror or error}"
        ) from error


def read_metrics(path: Path) -> tuple[dict[str, Series], dict[str, Series]]:
    """The series of the training and of the validation lines of a metrics.jsonl, by key. Raises UserError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    found: dict[str, dict[str, Series]] = {"train": {}, "val": {}}
    for line in text.splitlines():
        try:
            values = parse_json(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if (
            not isinstance(values, dict)
            or values.get("kind") not in found
            or not isinstance(values.get("step"), int)
        ):
            continue
        for key, value in values.items():
            if key not in ("step", "kind") and isinstance(value, int | float):
                found[values["kind"]].setdefault(key, {})[values["step"]] = float(value)
    return found["train"], found["val"]


def _panels(train: Mapping[str, Series], val: Mapping[str, Series]) -> list[tuple[str, list[Line]]]:
    """Title and lines of each panel: total loss, its terms, learning rate, AP. Panels without values are left out."""
    terms = [k for k in dict.fromkeys([*train, *val]) if k.startswith("loss/")]
    panels: list[tuple[str, list[Line]]] = [
        ("loss", _pair(train.get("loss"), validation_loss(val)))
    ]
    panels += [(k.replace("loss/", "loss: "), _pair(train.get(k), val.get(k))) for k in terms]
    panels.append(
        ("learning rate", [("train", train["lr"], _TRAIN, False)] if "lr" in train else [])
    )
    panels.append(("average precision", _ap_lines(val)))
    return [(title, lines) for title, lines in panels if lines]


def validation_loss(val: Mapping[str, Series]) -> Series:
    """The total validation loss, or the sum of its terms where only they were written."""
    return val.get("loss") or _sum(
        [series for key, series in val.items() if key.startswith("loss/")]
    )


def _pair(train: Series | None, val: Series | None) -> list[Line]:
    return [
        line
        for line in (("train", train or {}, _TRAIN, False), ("validation", val or {}, _VAL, False))
        if line[1]
    ]


def _sum(series: Sequence[Series]) -> Series:
    """The sum at the steps that all have."""
    steps = set.intersection(*(set(s) for s in series)) if series else set()
    return {step: sum(s[step] for s in series) for step in steps}


def _ap_lines(val: Mapping[str, Series]) -> list[Line]:
    """AP as full lines, AP50 dashed, one colour an IoU type; -1 (no truth) is not drawn."""
    lines: list[Line] = []
    for key, series in val.items():
        kind, _, name = key.partition("/")
        valid = {step: value for step, value in series.items() if value >= 0}
        if name in ("AP", "AP50") and valid:
            lines.append(
                (f"{kind} {name}", valid, _AP_COLOURS.get(kind, "#CC79A7"), name == "AP50")
            )
    return sorted(lines, key=lambda line: (line[3], line[0]))


def _draw_panel(axis: Any, title: str, lines: Sequence[Line], legend: bool) -> None:
    top = 0.0
    for name, series, colour, dashed in lines:
        steps = np.array(sorted(series))
        values = np.array([series[s] for s in steps.tolist()])
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": "--" if dashed else "-",
            "label": name,
            "linewidth": 1.6,
        }
        if len(steps) <= _WINDOW:
            style |= {
                "marker": "o",
                "markersize": 3.5,
                "markerfacecolor": "white" if dashed else colour,
            }
        elif title.startswith("loss"):
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, len(values) // 20)
        axis.plot(steps, values, **style)
        top = max(top, _highest(values))
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if top > 0:
        axis.set_ylim(0, 1.08 * top)
    if legend and (len(lines) > 1 or lines[0][0] != "train"):
        axis.legend(fontsize=8, frameon=False, loc="best")


def _highest(values: NDArray[np.float64]) -> float:
    """The top of a panel: the largest value, but a spike (as at the start of a training) does not flatten the rest."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0
    usual = float(np.quantile(finite, 0.95))
    highest = float(finite.max())
    return highest if highest <= 3 * usual else 1.5 * usual


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """The mean of the last `width` values (of those there are at the start), without values that are not finite."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], finite]))
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray((sums[last] - sums[first]) / (counts[last] - counts[first]))
