"""Metrics as a text table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

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
_LONGEST = 24  # characters of a class name


def metrics_table(
    metrics: Mapping[str, float], per_class: Mapping[str, Mapping[str, float]], width: int = 110
) -> str:
    """metrics: `<type>/<name>` -> number; per_class: type -> class -> AP. `-` stands for -1 (no truth). width: characters of a line.

    Classes fill as many columns as the width allows, downwards first.
    """
    kinds = list(per_class)
    cell = max(8, *(len(kind) + 2 for kind in kinds))
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics))
    names.sort(key=lambda name: name.startswith("AR"))  # what only one kind has stays with its like
    lines = [" " * 24 + _cells(kinds, cell)]
    for name in names:
        meaning = _MEANINGS.get(name) or f"{name.removeprefix('AR')} a class"
        lines.append(
            f"{name:<7}{meaning:<17}"
            + _cells([_number(metrics.get(f"{kind}/{name}", -1.0)) for kind in kinds], cell)
        )
    return "\n".join([*lines, "", *_class_lines(per_class, kinds, width, cell)])


def _class_lines(
    per_class: Mapping[str, Mapping[str, float]], kinds: list[str], width: int, cell: int
) -> list[str]:
    classes = list(per_class[kinds[0]])
    longest = min(max([len("AP by class"), *map(len, classes)]), _LONGEST)
    entries = [
        f"{_shortened(name):<{longest}}"
        + _cells([_number(per_class[kind][name]) for kind in kinds], cell)
        for name in classes
    ]
    head, gap = f"{'AP by class':<{longest}}" + _cells(kinds, cell), "   "
    columns = max(1, min((width + len(gap)) // (len(head) + len(gap)), -(-len(entries) // 8)))
    rows = -(-len(entries) // columns)
    blocks = [entries[i : i + rows] for i in range(0, len(entries), rows)]
    lines = [gap.join([head] * len(blocks))]
    return lines + [
        gap.join(line).rstrip() for line in itertools.zip_longest(*blocks, fillvalue="")
    ]


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _cells(values: list[str], width: int) -> str:
    return "".join(f"{value:>{width}}" for value in values)


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
