"""Compares training runs: prints their metrics and config differences, and plots their curves.

A run is the folder that a training wrote, with its metrics.jsonl and config.yaml.

  python tools/compare.py runs/scenes_r18/TIME_A runs/scenes_r18/TIME_B
  python tools/compare.py runs/scenes_r18/*
  python tools/compare.py runs/nuclei_r18/* runs/scenes_r18/* output=all.png
  python tools/compare.py runs/scenes_r18/TIME
  python tools/compare.py baseline longer augmented output=docs/three_runs.png

The only keys are output, the PNG file to write (a new compare.png), and overwrite: true replaces a
file that this tool has written before.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from maskseg.engine.run_search import LATEST, describe_runs
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.outputs import check_outputs, find_free_name, record_outputs
from maskseg.files.similar import suggest_path
from maskseg.visualization.curves import (
    Line,
    Panel,
    Series,
    panels_figure,
    read_metrics,
    validation_loss,
)
from maskseg.visualization.layout import LINE_COLOURS, plain_text, render_figure, save_image

_AP = re.compile(r"[^/]+/AP(\d+|[sml])?")
_MAX_WIDTH = 160  # characters of a line of a table
_GAP = 3  # characters between two columns
_MISSING = "-"  # in a table, for a value that a run does not have
_LEGEND_COLOUR = "#666666"  # of the line styles, which all runs share
_LEGEND_CHARACTER = 0.085  # inches of the figure's width, at the font size of the legend
_LEGEND_HANDLE = 0.7  # inches of the line before a name

Row = tuple[str, Sequence[str]]  # title, one cell per run


@dataclass(frozen=True)
class Run:
    """A run folder.

    name: the end of the path, as long as needed to be unique among the runs; train and val: key ->
    step -> value; config: dotted key -> value as text, None without a config.yaml.
    """

    name: str
    folder: Path
    train: Mapping[str, Series]
    val: Mapping[str, Series]
    config: Mapping[str, str] | None


def main(arguments: list[str]) -> None:
    """Entry point of `tools/compare.py`."""
    compare(arguments)


def compare(arguments: Sequence[str]) -> None:
    """Print the tables of the runs and plot their curves.

    arguments: run folders and `output=PNG`. Raises UserError, before anything is written, for an
    argument that is not the folder of a run.
    """
    folders, output, overwrite = _parse_arguments(arguments)
    if output is None:
        output = find_free_name(Path("compare.png"))
    elif not output.is_dir():  # for which the error of writing it is clearer
        check_outputs([output], tool="compare", overwrite=overwrite)
    runs = read_runs(folders)
    text = metrics_table(runs)
    if len(runs) > 1:
        text += f"\n\n{config_differences(runs)}"
    with record_outputs([output], "compare"):
        draw_runs(runs, output)
    print(f"{text}\n\ncurves: {output}")


def _parse_arguments(arguments: Sequence[str]) -> tuple[list[Path], Path | None, bool]:
    """-> the run folders, the PNG file if one is named, and `overwrite`. Raises UserError."""
    folders = []
    output = None
    overwrite = False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "output" and equals:
            if not value:
                raise UserError("output= is empty: name a PNG file")
            output = Path(os.path.expanduser(value))  # noqa: PTH111
        elif key == "overwrite" and equals:
            if value.lower() not in ("true", "false"):
                raise UserError(f"{argument}: expected true or false")
            overwrite = value.lower() == "true"
        elif equals and not Path(argument).exists():
            raise UserError(
                f"{argument}: there is no such key or run folder; the only keys are output and "
                "overwrite"
            )
        else:
            folders.append(Path(argument))
    return folders, output, overwrite


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs, in the order of the folders and without duplicates.

    Raises UserError for a folder that is not that of a run, and for files that cannot be read.
    """
    # Links keep their names, which Path.resolve would replace.
    paths = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))  # noqa: PTH100
    paths = [path for path in paths if not _is_second_name(path, paths)]
    if not paths:
        raise UserError("no run folder is named (tools/compare.py --help)")
    runs = []
    for path, name in zip(paths, _unique_names(paths), strict=True):
        if not path.is_dir():
            raise UserError(f"{path}: there is no such run folder{suggest_path(path)}")
        if not (path / "metrics.jsonl").is_file():
            hint = describe_runs(path) or "is it the folder of a run?"
            raise UserError(f"{path}: there is no metrics.jsonl in it; {hint}")
        train, val = read_metrics(path / "metrics.jsonl")
        if not train and not val:
            raise UserError(f"{path}: its metrics.jsonl has no training or validation metrics")
        runs.append(Run(name, path, train, val, _read_config(path / "config.yaml")))
    return runs


def _is_second_name(path: Path, paths: Sequence[Path]) -> bool:
    """Whether a path is `latest` of runs that are named, too, as in `runs/scenes_r18/*`."""
    if path.name != LATEST or not (path.is_symlink() or path.is_file()):
        return False
    return any(other.parent == path.parent and other != path for other in paths)


def _unique_names(folders: Sequence[Path]) -> list[str]:
    """The last components of each path, as many as make all names different."""
    max_depth = max(len(folder.parts) for folder in folders)
    for depth in range(1, max_depth + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read_config(path: Path) -> dict[str, str] | None:
    """The flat config of a run. Raises UserError for a file that is not a config."""
    if not path.exists():
        return None
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a config: it has no keys")
    return _flatten(values)


def _flatten(values: object, prefix: str = "") -> dict[str, str]:
    """Nested values as dotted key -> text.

    A list is a value; the items of a list of groups get keys with their indices.
    """
    pairs: list[tuple[object, object]]
    if isinstance(values, dict) and values:
        pairs = list(values.items())
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        pairs = list(enumerate(values))
    else:
        return {prefix: values if isinstance(values, str) else json.dumps(values, default=str)}
    flat: dict[str, str] = {}
    for key, value in pairs:
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def metrics_table(runs: Sequence[Run]) -> str:
    """Steps, AP, losses and speed as text, with a column for each run.

    Rows without any value are left out, such as an AP without ground truth.
    """
    getters: list[tuple[str, Callable[[Run], str]]] = [("steps", _num_steps)]
    for key in _unique_keys(run.val for run in runs):
        if _AP.fullmatch(key):
            getters.append((f"{key} best", partial(_best_of, key)))
            getters.append((f"{key} last", partial(_last_of, key)))
    getters += [
        ("training loss, last", lambda run: _last(run.train.get("loss", {}))),
        ("validation loss, last", lambda run: _last(validation_loss(run.val))),
        ("images/s, median", _speed),
        ("training time", _duration),
    ]
    rows: list[Row] = []
    for title, getter in getters:
        cells = [getter(run) for run in runs]
        if any(cell != _MISSING for cell in cells):
            rows.append((title, cells))
    return _format_table("", [run.name for run in runs], rows)


def _num_steps(run: Run) -> str:
    return str(max(chain(*run.train.values(), *run.val.values())))


def _best_of(key: str, run: Run) -> str:
    """The highest value of a metric and its step; the first of equal values."""
    values = _valid(run.val.get(key, {}))
    if not values:
        return _MISSING
    step = max(values, key=lambda step: (values[step], -step))
    return f"{values[step]:.3f} at {step}"


def _last_of(key: str, run: Run) -> str:
    return _last(run.val.get(key, {}))


def _last(series: Series) -> str:
    if not series or series[max(series)] == -1:
        return _MISSING
    return f"{series[max(series)]:.3f}"


def _valid(series: Series) -> Series:
    """The finite values, without the -1 of a metric without ground truth."""
    return {step: value for step, value in series.items() if math.isfinite(value) and value >= 0}


def _speed(run: Run) -> str:
    values = list(_valid(run.train.get("images_per_second", {})).values())
    return f"{statistics.median(values):.1f}" if values else _MISSING


def _duration(run: Run) -> str:
    """The time of the steps, without the evaluations.

    Each log entry has the mean seconds of the steps since the entry before.
    """
    seconds = _valid(run.train.get("step_seconds", {}))
    if not seconds:
        return _MISSING
    total = 0.0
    last_step = 0
    for step in sorted(seconds):
        total += (step - last_step) * seconds[step]
        last_step = step
    return str(timedelta(seconds=round(total)))


def config_differences(runs: Sequence[Run]) -> str:
    """The config keys in which the runs differ as text, with a column for each run."""
    names = []
    configs = []
    lines = []
    for run in runs:
        if run.config is None:
            lines.append(f"{run.folder}: there is no config.yaml in it")
        else:
            names.append(run.name)
            configs.append(run.config)
    if len(configs) > 1:
        rows: list[Row] = []
        for key in sorted(set().union(*configs)):
            cells = [config.get(key, _MISSING) for config in configs]
            if len({config.get(key) for config in configs}) > 1:
                rows.append((key, cells))
        lines.append(_format_table("config", names, rows) if rows else "the configs are equal")
    return "\n".join(lines)


def _format_table(title: str, names: Sequence[str], rows: Sequence[Row]) -> str:
    """Aligned columns: the titles of the rows to the left, one column per run to the right.

    Columns that do not fit into the width of a line are put into another block below.
    """
    titles = [title, *(row_title for row_title, _ in rows)]
    blocks: list[list[list[str]]] = []
    for i, name in enumerate(names):
        column = [name, *(cells[i] for _, cells in rows)]
        if not blocks or _total_width(blocks[-1]) + _width(column) > _MAX_WIDTH:
            blocks.append([titles])
        blocks[-1].append(column)
    return "\n\n".join(_format_block(block) for block in blocks)


def _format_block(columns: Sequence[Sequence[str]]) -> str:
    widths = [_width(column) for column in columns]
    lines = []
    for cells in zip(*columns, strict=True):
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        lines.append((" " * _GAP).join(padded))
    return "\n".join(lines)


def _total_width(columns: Sequence[Sequence[str]]) -> int:
    return sum(_width(column) + _GAP for column in columns)


def _width(column: Sequence[str]) -> int:
    return max(map(len, column))


def draw_runs(runs: Sequence[Run], output: Path | str) -> None:
    """Plot the curves of the runs over each other, in one color per run, and write them as PNG.

    Raises UserError where there are no curves or the file cannot be written.
    """
    from matplotlib.lines import Line2D

    panels = build_panels(runs)
    if not panels:
        raise UserError(f"{runs[0].folder}: there are no losses, learning rates or AP to draw")
    figure = panels_figure(panels, legends=False)
    handles = []
    for i, run in enumerate(runs):
        handles.append(
            Line2D([], [], color=run_colour(i), linewidth=2.5, label=plain_text(run.name))
        )
    styles: dict[str, Literal["-", "--"]] = {"training; AP": "-", "validation; AP50": "--"}
    for label, style in styles.items():
        handles.append(
            Line2D([], [], color=_LEGEND_COLOUR, linewidth=1.6, linestyle=style, label=label)
        )
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(figure.get_figwidth() / (_LEGEND_CHARACTER * longest + _LEGEND_HANDLE))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=max(1, min(len(handles), columns)),
        fontsize=10,
        frameon=False,
    )
    save_image(render_figure(figure), output)


def build_panels(runs: Sequence[Run]) -> list[Panel]:
    """Title and lines of each panel with values.

    Training and AP have solid lines, validation and AP50 dashed lines.
    """
    train = [run.train for run in runs]
    val = [run.val for run in runs]
    keys = _unique_keys(chain.from_iterable(zip(train, val, strict=True)))
    validation = [validation_loss(log) for log in val]
    panels = [("loss", _lines(runs, _series_of("loss", train), validation))]
    for key in keys:
        if key.startswith("loss/"):
            title = key.replace("loss/", "loss: ")
            panels.append((title, _lines(runs, _series_of(key, train), _series_of(key, val))))
    panels.append(("learning rate", _lines(runs, _series_of("lr", train), [])))
    for key in keys:
        if key.endswith("/AP"):
            ap = map(_valid, _series_of(key, val))
            ap50 = map(_valid, _series_of(f"{key}50", val))
            panels.append((key.replace("/", " "), _lines(runs, ap, ap50)))
    return [(title, lines) for title, lines in panels if lines]


def _unique_keys(logs: Iterable[Mapping[str, Series]]) -> list[str]:
    """The keys of all logs, in the order of their first occurrence."""
    return list(dict.fromkeys(chain.from_iterable(logs)))


def _series_of(key: str, logs: Sequence[Mapping[str, Series]]) -> list[Series]:
    """The values of a key in each log."""
    return [log.get(key, {}) for log in logs]


def _lines(runs: Sequence[Run], solid: Iterable[Series], dashed: Iterable[Series]) -> list[Line]:
    """The lines of one panel. solid and dashed: one series per run, or none."""
    lines = []
    for all_series, is_dashed in ((solid, False), (dashed, True)):
        for i, (run, series) in enumerate(zip(runs, all_series, strict=False)):
            if series:
                lines.append((run.name, series, run_colour(i), is_dashed))
    return lines


def run_colour(index: int) -> str:
    """The color of a run. After the colors of the palette, hues that are far from each other."""
    if index < len(LINE_COLOURS):
        return LINE_COLOURS[index]
    hue = 0.618 * index % 1  # multiples of the golden ratio spread evenly
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 0.75))
    return f"#{red:02X}{green:02X}{blue:02X}"
