"""Prints the numbers of runs beside each other and the config keys in which they differ, and draws their curves over each other.
A run is the folder that a training wrote, with its metrics.jsonl and config.yaml.

  python tools/compare.py runs/scenes_r18/TIME_A runs/scenes_r18/TIME_B
  python tools/compare.py runs/scenes_r18/*
  python tools/compare.py runs/nuclei_r18/* runs/scenes_r18/* output=all.png
  python tools/compare.py runs/scenes_r18/TIME
  python tools/compare.py baseline longer augmented output=docs/three_runs.png

The one key is output, the PNG to write (compare.png).
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.visualization.curves import (
    COLOURS,
    Line,
    Series,
    panels_figure,
    read_metrics,
    rendered,
    save_picture,
    validation_loss,
)

_AP = re.compile(r"[^/]+/AP(\d+|[sml])?")
_LINE = 160  # characters of a table's line
_NOTHING = "-"  # in a table: there is no such number, key or file


@dataclass(frozen=True)
class Run:
    """A run folder. name: its path's end, as much as tells it from the others; train, val: key -> step -> number; config: flat, None without one."""

    name: str
    folder: Path
    train: Mapping[str, Series]
    val: Mapping[str, Series]
    config: Mapping[str, str] | None


def compare(words: Sequence[str]) -> None:
    """What `tools/compare.py` does with its words, run folders and `output=PNG`: draws the curves, prints the tables.

    Raises UserError, before anything is written, for a word that is no run folder.
    """
    output, folders = Path("compare.png"), []
    for word in words:
        key, equals, value = word.partition("=")
        if key == "output" and equals:
            if not value:
                raise UserError("output= is empty: name a PNG file")
            output = Path(value)
        elif equals and not Path(word).exists():
            raise UserError(f"{word}: there is no such key or run folder, the only key is output")
        else:
            folders.append(Path(word))
    runs = read_runs(folders)
    text = f"{numbers_table(runs)}\n\n{differences(runs)}" if len(runs) > 1 else numbers_table(runs)
    draw_runs(runs, output)
    print(f"{text}\n\ncurves: {output}")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in their order, one that is named twice once. Raises UserError where a folder is none of a run or its files can't be read."""
    paths = list(dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders))  # noqa: PTH100 - a link keeps its name
    if not paths:
        raise UserError("no run folder is named (tools/compare.py --help)")
    runs = []
    for path, name in zip(paths, _names(paths), strict=True):
        if not path.is_dir():
            raise UserError(f"{path}: there is no such run folder")
        if not (path / "metrics.jsonl").is_file():
            raise UserError(f"{path}: there is no metrics.jsonl in it, is it the folder of a run?")
        train, val = read_metrics(path / "metrics.jsonl")
        if not train and not val:
            raise UserError(f"{path}: its metrics.jsonl has no training or validation numbers")
        runs.append(Run(name, path, train, val, _config(path / "config.yaml")))
    return runs


def numbers_table(runs: Sequence[Run]) -> str:
    """Steps, AP, losses and speed as text, a column a run, `-` where a run has no such number. An AP of which there is no truth is left out."""
    lines: list[tuple[str, Callable[[Run], str]]] = [("steps", _steps)]
    for key in dict.fromkeys(key for run in runs for key in run.val if _AP.fullmatch(key)):
        lines += [(f"{key} best", partial(_best_of, key)), (f"{key} last", partial(_last_of, key))]
    lines += [
        ("training loss, last", lambda run: _last(run.train.get("loss", {}))),
        ("validation loss, last", lambda run: _last(validation_loss(run.val))),
        ("images/s, median", _speed),
        ("training time", _duration),
    ]
    cells = [(title, [cell(run) for run in runs]) for title, cell in lines]
    return _table(
        "",
        [run.name for run in runs],
        [(t, values) for t, values in cells if any(v != _NOTHING for v in values)],
    )


def differences(runs: Sequence[Run]) -> str:
    """The config keys in which runs differ as text, a column a run, `-` where a run does not have the key."""
    having = [(run.name, run.config) for run in runs if run.config is not None]
    lines = [f"{run.folder}: there is no config.yaml in it" for run in runs if run.config is None]
    if len(having) > 1:
        keys = sorted({key for _, config in having for key in config})
        rows = [
            (key, [config.get(key, _NOTHING) for _, config in having])
            for key in keys
            if len({config.get(key) for _, config in having}) > 1
        ]
        lines.append(
            _table("config", [name for name, _ in having], rows)
            if rows
            else "the configs are equal"
        )
    return "\n".join(lines)


def draw_runs(runs: Sequence[Run], output: Path | str) -> None:
    """The curves of the runs over each other, a colour each, as PNG. Raises UserError where it cannot be written."""
    from matplotlib.lines import Line2D

    panels = _panels(runs)
    if not panels:
        raise UserError(f"{runs[0].folder}: there are no losses, learning rates or AP to draw")
    figure = panels_figure(panels, legends=False)
    handles = [
        Line2D([], [], color=_colour(i), linewidth=2.5, label=run.name)
        for i, run in enumerate(runs)
    ]
    handles.append(Line2D([], [], color="#666666", linewidth=1.6, label="training; AP"))
    handles.append(
        Line2D([], [], color="#666666", linewidth=1.6, linestyle="--", label="validation; AP50")
    )
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = int(
        figure.get_figwidth() / (0.085 * longest + 0.7)
    )  # inches of a character at this size, and of the line before it
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=max(1, min(len(handles), fitting)),
        fontsize=10,
        frameon=False,
    )
    save_picture(rendered(figure), output)


def _panels(runs: Sequence[Run]) -> list[tuple[str, list[Line]]]:
    """Title and lines of each panel; training and AP are full lines, validation and AP50 dashed. Panels without values are left out."""
    keys = dict.fromkeys(key for run in runs for key in (*run.train, *run.val))
    pairs = [
        (
            "loss",
            [run.train.get("loss", {}) for run in runs],
            [validation_loss(run.val) for run in runs],
        )
    ]
    for key in keys:
        if key.startswith("loss/"):
            pairs += [
                (
                    key.replace("loss/", "loss: "),
                    [run.train.get(key, {}) for run in runs],
                    [run.val.get(key, {}) for run in runs],
                )
            ]
    pairs.append(("learning rate", [run.train.get("lr", {}) for run in runs], []))
    for key in (k for k in keys if k.endswith("/AP")):
        ap, ap50 = ([_valid(run.val.get(name, {})) for run in runs] for name in (key, f"{key}50"))
        pairs.append((key.replace("/", " "), ap, ap50))
    panels = [
        (title, _lines(runs, full, False) + _lines(runs, dashed, True))
        for title, full, dashed in pairs
    ]
    return [(title, lines) for title, lines in panels if lines]


def _lines(runs: Sequence[Run], series: Sequence[Series], dashed: bool) -> list[Line]:
    return [
        (run.name, values, _colour(i), dashed)
        for i, (run, values) in enumerate(zip(runs, series, strict=False))
        if values
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make them distinct."""
    for depth in range(1, max(len(f.parts) for f in folders) + 1):
        names = ["/".join(f.parts[-depth:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in folders]


def _colour(index: int) -> str:
    """The colour of a run; after those that are easily told apart, hues that lie as far from each other as can be."""
    if index < len(COLOURS):
        return COLOURS[index]
    red, green, blue = (round(255 * v) for v in colorsys.hsv_to_rgb(0.618 * index % 1, 0.9, 0.75))
    return f"#{red:02X}{green:02X}{blue:02X}"


def _config(path: Path) -> dict[str, str] | None:
    """The flat config of a run. Raises UserError for a file that is no config."""
    if not path.exists():
        return None
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it holds no keys")
    return _flat(values)


def _flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Nested values as dotted key -> text; lists are values, but those of other groups are numbered."""
    if isinstance(values, dict) and values:
        pairs = list(values.items())
    elif isinstance(values, list) and any(isinstance(v, dict) for v in values):
        pairs = list(enumerate(values))
    else:
        return {prefix: values if isinstance(values, str) else json.dumps(values, default=str)}
    found: dict[str, str] = {}
    for key, value in pairs:
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Columns as wide as they need to be, the first to the left, the others to the right; below each other what finds no place in a line."""
    first = [title, *(key for key, _ in rows)]
    blocks: list[list[list[str]]] = []
    for i, name in enumerate(names):
        column = [name, *(values[i] for _, values in rows)]
        if not blocks or sum(_width(c) + 3 for c in blocks[-1]) + _width(column) > _LINE:
            blocks.append([first])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join(_line_of(cells, [_width(c) for c in block]) for cells in zip(*block, strict=True))
        for block in blocks
    )


def _width(column: Sequence[str]) -> int:
    return max(map(len, column))


def _line_of(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "   ".join(
        f"{cell:<{width}}" if not i else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _valid(series: Series) -> Series:
    """Without what is not finite, and without the -1 that stands for no truth."""
    return {step: value for step, value in series.items() if math.isfinite(value) and value >= 0}


def _steps(run: Run) -> str:
    return str(
        max(step for group in (run.train, run.val) for series in group.values() for step in series)
    )


def _best(series: Series) -> str:
    valid = _valid(series)
    if not valid:
        return _NOTHING
    step = max(valid, key=lambda s: (valid[s], -s))
    return f"{valid[step]:.3f} at {step}"


def _best_of(key: str, run: Run) -> str:
    return _best(run.val.get(key, {}))


def _last_of(key: str, run: Run) -> str:
    return _last(run.val.get(key, {}))


def _last(series: Series) -> str:
    return f"{series[max(series)]:.3f}" if series and series[max(series)] != -1 else _NOTHING


def _speed(run: Run) -> str:
    values = list(_valid(run.train.get("images_per_second", {})).values())
    return f"{statistics.median(values):.1f}" if values else _NOTHING


def _duration(run: Run) -> str:
    """The steps' own time: evaluations are not in it. Each line has the mean seconds of a step since the line before."""
    seconds = _valid(run.train.get("step_seconds", {}))
    steps = sorted(seconds)
    if not steps:
        return _NOTHING
    total = sum(
        (step - before) * seconds[step] for before, step in zip([0, *steps], steps, strict=False)
    )
    return str(timedelta(seconds=round(total)))


def main(arguments: list[str]) -> None:
    """Entry point of `tools/compare.py`."""
    compare(arguments)
