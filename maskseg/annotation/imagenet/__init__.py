"""Classes of other data sets as unions of ImageNet's classes.

For classifiers trained on ImageNet; `imagenet.json` documents how the classes were chosen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypedDict

from maskseg.errors import UserError

DATA_SETS = ("voc", "coco")


class ClassEntry(TypedDict, total=False):
    """The members of a class of COCO; ranges are texts such as `7-9, 12`."""

    synsets: list[str]
    below: str
    stand_ins: str


class ImageNetTable(TypedDict):
    """The content of `imagenet.json`. coco: by name; voc: name -> the name in `coco`."""

    about: str
    coco: dict[str, ClassEntry]
    voc: dict[str, str]


def class_members(data_set: str) -> dict[str, list[int]]:
    """ImageNet classes 0..999 whose union is each class of `voc` (20 names) or `coco` (80 names).

    Lists are ascending, [] for a class without members. Members are the hyponyms of the class in
    WordNet, plus stand-ins: classes whose images show it although they are not hyponyms.
    Raises UserError for another data set.
    """
    if data_set not in DATA_SETS:
        raise UserError(
            f"ImageNet's classes are known for {' and '.join(DATA_SETS)}, not for {data_set!r}"
        )
    table = _table()
    names = {name: name for name in table["coco"]} if data_set == "coco" else table["voc"]
    members = {}
    for name, key in names.items():
        entry = table["coco"][key]
        hyponyms = _parse_ranges(entry.get("below", ""))
        stand_ins = _parse_ranges(entry.get("stand_ins", ""))
        members[name] = sorted(hyponyms + stand_ins)
    return members


def members_of(names: Sequence[str]) -> list[list[int]]:
    """ImageNet members of classes of VOC or COCO by name, [] for a name without members.

    Raises UserError if none of the names has members.
    """
    known = class_members("coco") | class_members("voc")
    members = [known.get(name, []) for name in names]
    if names and not any(members):
        raise UserError(
            f"ImageNet has no class for {', '.join(names)}: train a classifier "
            "(experiment=classify_coco_r50)"
        )
    return members


@cache
def _table() -> ImageNetTable:
    text = Path(__file__).with_name("imagenet.json").read_text(encoding="utf-8")
    table: ImageNetTable = json.loads(text)
    return table


def _parse_ranges(text: str) -> list[int]:
    """`7-9, 12` -> [7, 8, 9, 12]."""
    numbers: list[int] = []
    for part in text.split(","):
        if part.strip():
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    return numbers
