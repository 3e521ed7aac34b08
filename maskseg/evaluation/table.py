"""Formats metrics as text tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

_MEANINGS = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects",
    "APm": "medium objects",
    "APl": "large objects",
    "ARs": "small objects",
    "ARm": "medium objects",
    "ARl": "large objects",
}
_MAX_NAME_LENGTH = 24  # characters of a class name
_MIN_ROWS = 8  # rows before another column of classes is started
_GAP = "   "  # between columns of classes


def metrics_table(
    metrics: Mapping[str, float], per_class: Mapping[str, Mapping[str, float]], width: int = 110
) -> str:
    """Format COCO metrics as text: IoU types in columns, then the AP of the classes.

    metrics: `<type>/<metric>` -> value; per_class: type -> class name -> AP. `-` stands for -1 (no
    ground truth). width: characters per line; classes fill as many columns as fit.
    """
    kinds = list(per_class)
    cell = max(8, *(len(kind) + 2 for kind in kinds))
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics))
    names.sort(key=lambda name: name.startswith("AR"))  # groups metrics that only some types have
    lines = [" " * 24 + join_cells(kinds, cell)]
    for name in names:
        meaning = _MEANINGS.get(name) or f"{name.removeprefix('AR')} per class"
        values = [format_number(metrics.get(f"{kind}/{name}", -1.0)) for kind in kinds]
        lines.append(f"{name:<7}{meaning:<17}" + join_cells(values, cell))
    return "\n".join([*lines, "", *_class_lines(per_class, kinds, width, cell)])


def _class_lines(
    per_class: Mapping[str, Mapping[str, float]], kinds: Sequence[str], width: int, cell: int
) -> list[str]:
    """The AP of each class, one column per IoU type."""
    title = "AP by class"
    classes = list(per_class[kinds[0]])
    name_width = min(max([len(title), *map(len, classes)]), _MAX_NAME_LENGTH)
    entries = []
    for name in classes:
        values = [format_number(per_class[kind][name]) for kind in kinds]
        entries.append(f"{truncate(name):<{name_width}}" + join_cells(values, cell))
    return arrange_columns(f"{title:<{name_width}}" + join_cells(kinds, cell), entries, width)


def arrange_columns(head: str, entries: Sequence[str], width: int) -> list[str]:
    """Arrange entries below a repeated head in as many columns as fit, filled downwards first.

    entries: texts of the length of the head; width: characters per line. -> lines.
    """
    max_columns = (width + len(_GAP)) // (len(head) + len(_GAP))
    columns = max(1, min(max_columns, _ceil_div(len(entries), _MIN_ROWS)))
    rows = _ceil_div(len(entries), columns)
    blocks = [entries[i : i + rows] for i in range(0, len(entries), rows)]
    heads = _GAP.join([head] * len(blocks))
    rows_of_text = itertools.zip_longest(*blocks, fillvalue="")
    return [heads, *(_GAP.join(row).rstrip() for row in rows_of_text)]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def truncate(name: str) -> str:
    """Truncate a class name to 24 characters."""
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1] + "…"


def join_cells(values: Sequence[str], width: int) -> str:
    """Join cells, each right-aligned to `width` characters."""
    return "".join(f"{value:>{width}}" for value in values)


def format_number(value: float) -> str:
    """Format a metric with three decimals; `-` for negative values (undefined)."""
    return "-" if value < 0 else f"{value:.3f}"
