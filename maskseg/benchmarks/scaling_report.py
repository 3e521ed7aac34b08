"""Table and figure of the results of suite `scaling`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from maskseg.benchmarks.results import Axis, Measurement, ScalingResult
from maskseg.files import replacing

_COLUMNS = 3


@dataclass(frozen=True)
class _Quantity:
    """A measured quantity and how it is drawn.

    label: with its unit; read: a measurement in that unit.
    """

    label: str
    read: Callable[[Measurement], float]
    color: str
    style: str


_QUANTITIES = (
    _Quantity("time, ms", lambda point: 1000.0 * point["seconds"], "C0", "o-"),
    _Quantity("peak memory, MB", lambda point: point["memory_mb"], "C1", "s--"),
)


def scaling_table(result: ScalingResult) -> str:
    """Format one line per value, then the slopes."""
    machine = result["machine"]
    lines = [
        f"scaling on {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}: {result['about']}"
    ]
    for axis in result["axes"]:
        lines += ["", axis["name"]]
        lines += [
            f"  {p['value']:>6g}{1000 * p['seconds']:10.1f} ms{p['memory_mb']:8.0f} MB"
            for p in axis["points"]
        ]
        lines.append(f"  slope {_slopes(axis)}")
    return "\n".join(lines)


def scaling_chart(result: ScalingResult, path: Path) -> None:
    """Write a PNG with one panel per axis: time and memory, on logarithmic scales.

    Raises UserError if the file cannot be written.
    """
    rows = -(-len(result["axes"]) // _COLUMNS)
    figure = Figure(figsize=(4.6 * _COLUMNS, 3.4 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel, axis in zip(panels, result["axes"], strict=False):
        _panel(panel, axis)
    for panel in panels[len(result["axes"]) :]:
        panel.set_axis_off()
    machine = result["machine"]
    title = f"scaling: {result['about']}; {machine['device']}, {machine['threads']} threads"
    figure.suptitle(title, fontsize=10)
    with replacing(path, "the chart") as file:
        figure.savefig(file, format="png", dpi=120)


def _panel(left: Axes, axis: Axis) -> None:
    values = [p["value"] for p in axis["points"]]
    panels = (left, left.twinx())
    for panel, quantity in zip(panels, _QUANTITIES, strict=True):
        numbers = [quantity.read(point) for point in axis["points"]]
        plotted = [n if n > 0 else float("nan") for n in numbers]
        panel.plot(values, plotted, quantity.style, color=quantity.color, markersize=4)
        positive = [n for n in numbers if n > 0] or [1.0]
        panel.set_yscale("log")
        # At least a decade, so that constant values look constant; space for the slopes above.
        middle = (min(positive) * max(positive)) ** 0.5
        panel.set_ylim(min(min(positive) / 1.5, middle / 3.2), max(max(positive) * 3, middle * 5))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_ylabel(quantity.label, color=quantity.color, fontsize=8)
        panel.tick_params(axis="y", which="both", labelsize=7, colors=quantity.color)
    if min(values) > 0:
        left.set_xscale("log")
    else:  # zero processes need a position, too
        left.set_xscale("symlog", linthresh=1)
    left.set_xticks(values, [f"{v:g}" for v in values], fontsize=7)
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel(axis["label"], fontsize=8)
    left.set_title(axis["name"], fontsize=9)
    left.grid(alpha=0.3)
    left.text(0.03, 0.96, f"slope {_slopes(axis)}", transform=left.transAxes, va="top", fontsize=8)


def _slopes(axis: Axis) -> str:
    slope = axis["slope"]
    parts = []
    for name, value in (("time", slope["seconds"]), ("memory", slope["memory_mb"])):
        text = "-" if value is None else f"{value:.2f}"
        parts.append(f"{name} {text}")
    return ", ".join(parts)
