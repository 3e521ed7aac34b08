"""The classes of a COCO file, with their keypoints, and how they are matched to those of the training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from maskseg.data.coco.parse import integer
from maskseg.data.coco.report import Report
from maskseg.ops.rle import Ints
from maskseg.structures import Categories


def file_categories(entries: list[Any], report: Report) -> Categories:
    """The classes in order of ascending id; those that cannot be used are in the report."""
    found: dict[int, tuple[str, tuple[str, ...], tuple[tuple[int, int], ...]]] = {}
    for entry in entries:
        number = integer(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if number is None or name is None or not str(name).strip():
            report.error("category without an integer id or a name", f"{entry!r}"[:80])
        elif number in found:
            report.error(
                "category id that is used more than once",
                f"id {number}: {found[number][0]!r} and {str(name)!r}",
            )
        else:
            found[number] = (str(name), *_points(number, entry, report))
    names = [
        f"{name!r}, {n} times"
        for name, n in Counter(name for name, _, _ in found.values()).items()
        if n > 1
    ]
    if names:
        report.warn("category name that is used more than once", *names)
    ids = sorted(found)
    return Categories(
        tuple(found[i][0] for i in ids),
        tuple(ids),
        tuple(found[i][1] for i in ids),
        tuple(found[i][2] for i in ids),
    )


def _points(
    number: int, entry: dict[str, Any], report: Report
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Names of the keypoints and the lines between them, counted from 0 (COCO counts from 1)."""
    names, lines = entry.get("keypoints") or [], entry.get("skeleton") or []
    if not (
        isinstance(names, list)
        and all(isinstance(n, str) and n for n in names)
        and len(set(names)) == len(names)
    ):
        report.error(
            "category whose keypoints are not a list of different names",
            f"id {number}: {names!r}"[:120],
        )
        return (), ()
    ends = (
        [
            integer(end)
            for line in lines
            if isinstance(line, list) and len(line) == 2
            for end in line
        ]
        if isinstance(lines, list)
        else []
    )
    if (
        not isinstance(lines, list)
        or len(ends) != 2 * len(lines)
        or any(end is None or not 1 <= end <= len(names) for end in ends)
    ):
        report.error(
            "category whose skeleton is not pairs of its keypoints, counted from 1",
            f"id {number}: {lines!r}"[:120],
        )
        return tuple(names), ()
    whole = [int(end or 0) - 1 for end in ends]
    return tuple(names), tuple(zip(whole[::2], whole[1::2], strict=True))


def match(found: Categories, given: Categories | None, report: Report) -> tuple[Categories, Ints]:
    """The categories to use and the label of each one of the file: by name where names are unique on both sides, else by id."""
    if given is None:
        return found, np.arange(len(found))
    by_name = len(set(found.names)) == len(found) and len(set(given.names)) == len(given)
    names = {name: label for label, name in enumerate(given.names)}
    ids = {number: label for label, number in enumerate(given.ids)}
    pairs = list(zip(found.ids, found.names, strict=True))
    labels = np.array(
        [names.get(name, -1) if by_name else ids.get(number, -1) for number, name in pairs],
        dtype=np.int64,
    )
    unknown = [
        f"{name!r} (id {number})"
        for (number, name), label in zip(pairs, labels, strict=True)
        if label < 0
    ]
    if unknown:
        report.error("category that the training data or the checkpoint does not have", *unknown)
    known = [(place, k) for place, k in enumerate(labels.tolist()) if k >= 0]
    if not by_name:
        renamed = [
            f"id {found.ids[i]}: {found.names[i]!r}, expected {given.names[k]!r}"
            for i, k in known
            if found.names[i] != given.names[k]
        ]
        if renamed:
            report.warn("category matched by its id has another name", *renamed)
    other = [
        f"{given.names[k]!r}: {len(found.keypoints[i])} points {list(found.keypoints[i])[:3]} ..., expected {len(given.keypoints[k])}"
        for i, k in known
        if found.keypoints[i] and given.keypoints[k] and found.keypoints[i] != given.keypoints[k]
    ]
    if other:
        report.error(
            "category with other keypoints than in the training data or the checkpoint", *other
        )
    return given, labels
