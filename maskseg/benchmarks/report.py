"""The results of a suite as a table and as a bar chart; those of the suite `scaling`, which have axes, in a way of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from maskseg.benchmarks.scaling_report import scaling_chart, scaling_table
from maskseg.files import replacing


def table(result: dict[str, Any]) -> str:
    """One line a case and thing: seconds, times faster than the first, memory; then how far the outputs are apart."""
    if "axes" in result:
        return scaling_table(result)
    about = result["machine"]
    lines = [
        f"{result['suite']} on {about['device']}, {about['threads']} threads, torch {about['torch']}, torchvision {about['torchvision']}",
        "",
    ]
    width = (
        max((len(label) for case in result["cases"] for label in case["seconds"]), default=0) + 2
    )
    for case in result["cases"]:
        lines.append(case["name"])
        for label, seconds in case["seconds"].items():
            faster = case["times_faster"].get(label)
            memory = case["memory_mb"].get(label)
            told = [
                f"{1000 * seconds:10.1f} ms",
                "       " if faster is None else f"{faster:6.2f}x",
                "" if memory is None else f"{memory:8.0f} MB",
            ]
            lines.append(f"  {label:<{width}}{' '.join(told)}".rstrip())
        lines += [f"  {key}: {value:.3g}" for key, value in case["agreement"].items()]
    lines += [f"{key}: {_number(value)}" for key, value in result.get("also", {}).items()]
    return "\n".join(lines)


def chart(result: dict[str, Any], path: Path) -> None:
    """Bars of seconds, case by case, the times faster written beside them. Raises UserError where it cannot be written."""
    if "axes" in result:
        scaling_chart(result, path)
        return
    rows = [
        (case["name"], label, value, case["times_faster"].get(label))
        for case in result["cases"]
        for label, value in case["seconds"].items()
    ]
    labels = list(dict.fromkeys(label for _, label, _, _ in rows))
    figure = Figure(
        figsize=(9, 0.9 + 0.3 * len(rows) + 0.25 * len(result["cases"])), layout="constrained"
    )
    axes = figure.subplots()
    place, ticks = 0.0, []
    for case in result["cases"]:
        start = place
        for label, seconds in case["seconds"].items():
            axes.barh(place, 1000 * seconds, color=f"C{labels.index(label)}", height=0.9)
            faster = case["times_faster"].get(label)
            axes.text(
                1000 * seconds,
                place,
                f" {1000 * seconds:.4g}" + ("" if faster is None else f" ({faster:.2f}x)"),
                va="center",
                fontsize=8,
            )
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
    axes.set_title(
        f"{result['suite']}: {result['machine']['device']}, {result['machine']['threads']} threads",
        fontsize=9,
    )
    with replacing(path, "the chart") as file:
        figure.savefig(file, format="png", dpi=120)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
