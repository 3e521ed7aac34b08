"""Table and bar chart of a suite's results. Suite `scaling` has its own layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from maskseg.benchmarks.results import Case, ScalingResult, SuiteResult
from maskseg.benchmarks.scaling_report import scaling_chart, scaling_table
from maskseg.files import replacing


def table(result: SuiteResult | ScalingResult) -> str:
    """Format one line per case and function: time, speedup over the first, memory; agreement."""
    if "axes" in result:
        return scaling_table(result)
    machine = result["machine"]
    lines = [
        f"{result['suite']} on {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, torchvision {machine['torchvision']}",
        "",
    ]
    labels = _labels(result["cases"])
    width = max(map(len, labels), default=0) + 2
    for case in result["cases"]:
        lines.append(case["name"])
        for label, seconds in case["seconds"].items():
            faster = case["times_faster"].get(label)
            memory = case["memory_mb"].get(label)
            columns = [
                f"{1000 * seconds:10.1f} ms",
                "       " if faster is None else f"{faster:6.2f}x",
                "" if memory is None else f"{memory:8.0f} MB",
            ]
            lines.append(f"  {label:<{width}}{' '.join(columns)}".rstrip())
        lines += [f"  {key}: {value:.3g}" for key, value in case["agreement"].items()]
    lines += [f"{key}: {_format_number(value)}" for key, value in result.get("also", {}).items()]
    return "\n".join(lines)


def chart(result: SuiteResult | ScalingResult, path: Path) -> None:
    """Write a PNG with one bar per case and function, labeled with the speedup.

    Raises UserError if the file cannot be written.
    """
    if "axes" in result:
        scaling_chart(result, path)
        return
    cases = result["cases"]
    labels = _labels(cases)
    num_bars = sum(len(case["seconds"]) for case in cases)
    height = 0.9 + 0.3 * num_bars + 0.25 * len(cases)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    place = 0.0
    ticks = []
    for case in cases:
        start = place
        for label, seconds in case["seconds"].items():
            axes.barh(place, 1000 * seconds, color=f"C{labels.index(label)}", height=0.9)
            faster = case["times_faster"].get(label)
            speedup = "" if faster is None else f" ({faster:.2f}x)"
            text = f" {1000 * seconds:.4g}{speedup}"
            axes.text(1000 * seconds, place, text, va="center", fontsize=8)
            place += 1
        ticks.append(((start + place - 1) / 2, case["name"]))
        place += 0.8
    axes.set_yticks([t for t, _ in ticks], [n for _, n in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds, median")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh(0, 0, color=f"C{i}", label=label) for i, label in enumerate(labels)]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(labels), 4),
        fontsize=8,
        frameon=False,
    )
    machine = result["machine"]
    title = f"{result['suite']}: {machine['device']}, {machine['threads']} threads"
    axes.set_title(title, fontsize=9)
    with replacing(path, "the chart") as file:
        figure.savefig(file, format="png", dpi=120)


def _labels(cases: Sequence[Case]) -> list[str]:
    """List the labels of all cases in their order, without duplicates."""
    labels: dict[str, None] = {}
    for case in cases:
        labels |= dict.fromkeys(case["seconds"])
    return list(labels)


def _format_number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
