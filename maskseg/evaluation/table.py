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
# Columns of the table of an evaluation during a training.
_SUMMARY = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("F1", "precision", "recall", "best_threshold"),
)
_HEADS = {"best_threshold": "at score"}
_MAX_CLASSES = 24  # with more, only the classes with the highest and the lowest AP are shown
_MAX_NAME_LENGTH = 24  # characters of a class name
_MIN_ROWS = 8  # rows before another column of classes is started
_GAP = "   "  # between columns of classes


def metrics_table(
    metrics: Mapping[str, float],
    per_class: Mapping[str, Mapping[str, float]],
    width: int = 110,
    rest: str | None = None,
) -> str:
    """Format COCO metrics as text: IoU types in columns, then the AP of the classes.

    metrics: `<type>/<metric>` -> value; per_class: type -> class name -> AP. `-` stands for -1 (no
    ground truth). width: characters per line; classes fill as many columns as fit. rest: the file
    that has all classes, where many are cut; None: nothing is cut.
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
    return "\n".join([*lines, "", *class_lines(per_class, width, rest)])


def summary_table(
    metrics: Mapping[str, float],
    per_class: Mapping[str, Mapping[str, float]],
    width: int = 110,
    rest: str | None = None,
) -> str:
    """Format an evaluation as a few lines: one row per IoU type, then the AP of the classes.

    Metrics of other predictions, such as `semantic/mIoU`, are one line per group. The arguments are
    those of `metrics_table`.
    """
    groups: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        group, slash, name = key.partition("/")
        if slash and group != "loss":
            groups.setdefault(group, {})[name] = value
    lines = _summary_rows({group: values for group, values in groups.items() if "AP" in values})
    for group, values in groups.items():
        if "AP" not in values:
            texts = (f"{name} {format_number(value)}" for name, value in values.items())
            lines.append(f"{group}: {'  '.join(texts)}")
    if per_class:
        lines += class_lines(per_class, width, rest)
    return "\n".join(lines)


def _summary_rows(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line of heads and one line per IoU type; [] without any."""
    columns = [name for name in _SUMMARY if any(name in values for values in rows.values())]
    if not columns:
        return []
    heads = [_HEADS.get(name, name) for name in columns]
    lines = [" " * 10 + "".join(f"{head:>{_column(head)}}" for head in heads)]
    for group, values in rows.items():
        cells = [format_number(values.get(name, -1.0)) for name in columns]
        aligned = (f"{c:>{_column(head)}}" for c, head in zip(cells, heads, strict=True))
        lines.append(f"{group:<10}" + "".join(aligned))
    return lines


def _column(head: str) -> int:
    """The width of a column of the summary."""
    return max(7, len(head) + 2)


def class_lines(
    per_class: Mapping[str, Mapping[str, float]], width: int = 110, rest: str | None = None
) -> list[str]:
    """Format the AP of each class, one column per IoU type, in the order of the classes.

    per_class, width, rest: as in `metrics_table`. Of more than 24 classes that are cut, the 12 with
    the highest and the 12 with the lowest AP are shown, by falling AP of the last IoU type, and a
    line names the file with the others.
    """
    kinds = list(per_class)
    classes = list(per_class[kinds[0]])
    title = "AP by class"
    last_line = []
    if rest is not None and len(classes) > _MAX_CLASSES:
        values = per_class[kinds[-1]]
        # Classes without ground truth, whose AP is -1, are shown if there are too few others.
        ranked = sorted(classes, key=lambda name: (values[name] < 0, -values[name]))
        num_defined = max(sum(values[name] >= 0 for name in classes), _MAX_CLASSES)
        half = _MAX_CLASSES // 2
        ranked = ranked[:num_defined]
        num_more = len(classes) - _MAX_CLASSES
        classes = ranked[:half] + ranked[-half:]
        title = "AP, best and worst"
        last_line = [f"and {num_more} more classes: {rest} has all"]
    cell = max(8, *(len(kind) + 2 for kind in kinds))
    return [*_arrange_classes(title, classes, per_class, width, cell), *last_line]


def _arrange_classes(
    title: str,
    classes: Sequence[str],
    per_class: Mapping[str, Mapping[str, float]],
    width: int,
    cell: int,
) -> list[str]:
    """The AP of the given classes in columns. cell: characters of a value."""
    kinds = list(per_class)
    name_width = min(max([len(title), *map(len, classes)]), _MAX_NAME_LENGTH)
    entries = []
    for name in classes:
        values = [format_number(per_class[kind][name]) for kind in kinds]
        entries.append(f"{truncate_name(name):<{name_width}}" + join_cells(values, cell))
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


def truncate_name(name: str) -> str:
    """Truncate a class name to 24 characters."""
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1] + "…"


def join_cells(values: Sequence[str], width: int) -> str:
    """Join cells, each right-aligned to `width` characters."""
    return "".join(f"{value:>{width}}" for value in values)


def format_number(value: float) -> str:
    """Format a metric with three decimals; `-` for negative values (undefined)."""
    return "-" if value < 0 else f"{value:.3f}"
