"""Classes of a data set as unions of ImageNet's, for classifiers that know those (`imagenet.json` says how they were chosen)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from maskseg.errors import UserError

DATA_SETS = ("voc", "coco")


def class_members(data_set: str) -> dict[str, list[int]]:
    """Each class of `voc` (20 names) or `coco` (80) -> the ImageNet classes 0..999 that it is the union of, ascending; [] where there is none.

    Hyponyms of the class in WordNet and, after them in the file, stand-ins: classes whose pictures show it although they are none of it.
    """
    if data_set not in DATA_SETS:
        raise UserError(
            f"ImageNet's classes are told for {' and '.join(DATA_SETS)}, not for {data_set!r}"
        )
    table = _table()
    names = {name: name for name in table["coco"]} if data_set == "coco" else table["voc"]
    entries = {name: table["coco"][key] for name, key in names.items()}
    return {
        name: sorted(_numbers(entry.get("below", "")) + _numbers(entry.get("stand_ins", "")))
        for name, entry in entries.items()
    }


def members_of(names: Sequence[str]) -> list[list[int]]:
    """The same for classes of VOC or COCO by name, in order; [] for a name that has no member in ImageNet. Raises UserError where none has one."""
    known = class_members("coco") | class_members("voc")
    found = [known.get(name, []) for name in names]
    if names and not any(found):
        raise UserError(
            f"ImageNet has no class for {', '.join(names)}: train a classifier (experiment=classify_coco_r50)"
        )
    return found


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("imagenet.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _numbers(text: str) -> list[int]:
    """`7-9, 12` -> [7, 8, 9, 12]."""
    spans = [part.partition("-") for part in text.split(",") if part.strip()]
    return [
        i
        for first, dash, last in spans
        for i in range(int(first), int(last if dash else first) + 1)
    ]
