"""The categories of a COCO file, their keypoints, and their match with the training's classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from maskseg.data.coco.parse import as_int64
from maskseg.data.coco.report import Report
from maskseg.ops.rle import Ints
from maskseg.structures import Categories

_Edges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Category:
    name: str
    keypoints: tuple[str, ...]
    skeleton: _Edges


def parse_categories(entries: list[object], report: Report) -> Categories:
    """Parse the list `categories` of a file; the result is sorted by ascending id.

    Entries that cannot be used are errors in the report.
    """
    by_id: dict[int, _Category] = {}
    for entry in entries:
        fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
        category_id = as_int64(fields.get("id"))
        name = _parse_name(fields.get("name"))
        if category_id is None or name is None:
            report.error("category without an integer id or a name", f"{entry!r}"[:80])
            continue
        if not _is_unicode(name):
            report.error(
                "category name that is not valid Unicode", f"id {category_id}: {name!r}"[:80]
            )
            continue
        if category_id in by_id:
            report.error(
                "category id that is used more than once",
                f"id {category_id}: {by_id[category_id].name!r} and {name!r}",
            )
            continue
        keypoints, skeleton = _parse_keypoints(category_id, fields, report)
        by_id[category_id] = _Category(name, keypoints, skeleton)
    _warn_similar_names([category.name for category in by_id.values()], report)
    ids = sorted(by_id)
    return Categories(
        names=tuple(by_id[i].name for i in ids),
        ids=tuple(ids),
        keypoints=tuple(by_id[i].keypoints for i in ids),
        skeletons=tuple(by_id[i].skeleton for i in ids),
    )


def _parse_name(name: object) -> str | None:
    """Return the name as a string, None if it is absent or blank."""
    if name is None or not str(name).strip():
        return None
    return str(name)


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON can hold half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _warn_similar_names(names: list[str], report: Report) -> None:
    """Warn about different names that readers cannot tell apart."""
    spellings: dict[str, set[str]] = {}
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        spellings.setdefault("".join(key.split()), set()).add(name)
    similar = [sorted(group) for group in spellings.values() if len(group) > 1]
    if similar:
        examples = [", ".join(map(repr, group)) for group in similar]
        report.warn("category names that differ only in case, spaces or Unicode form", *examples)


def merge_repeated_names(categories: Categories, report: Report) -> tuple[Categories, Ints]:
    """Merge categories of the same name into one class, that of the lowest id.

    Returns the merged categories, and i64 [C], for each of the file's categories the index of its
    merged one.
    """
    members: dict[str, list[int]] = {}
    for i, name in enumerate(categories.names):
        members.setdefault(name, []).append(i)
    index = np.zeros(len(categories), dtype=np.int64)
    with_points = []
    for number, group in enumerate(members.values()):
        index[group] = number
        with_points.append(_choose_keypoints(categories, group, report))
    firsts = [group[0] for group in members.values()]
    merged = Categories(
        names=tuple(members),
        ids=tuple(categories.ids[i] for i in firsts),
        keypoints=tuple(categories.keypoints[i] for i in with_points),
        skeletons=tuple(categories.skeletons[i] for i in with_points),
    )
    return merged, index


def _choose_keypoints(categories: Categories, group: list[int], report: Report) -> int:
    """Return the index of the category, of several of one name, whose keypoints are used."""
    with_points = [i for i in group if categories.keypoints[i]]
    if len(group) > 1:
        ids = ", ".join(str(categories.ids[i]) for i in group)
        example = f"{categories.names[group[0]]!r}: ids {ids}"
        if len({categories.keypoints[i] for i in with_points}) > 1:
            report.error("categories of one name with different keypoints", example)
        else:
            report.warn("category name of more than one id, read as one class", example)
    return (with_points or group)[0]


def _parse_keypoints(
    category_id: int, fields: Mapping[str, object], report: Report
) -> tuple[tuple[str, ...], _Edges]:
    """Return the keypoint names and the skeleton's edges, counted from 0 (COCO counts from 1)."""
    stated = fields.get("keypoints") or []
    edges = fields.get("skeleton") or []
    names = _parse_point_names(stated)
    if names is None:
        report.error(
            "category whose keypoints are not a list of distinct names",
            f"id {category_id}: {stated!r}"[:120],
        )
        return (), ()
    skeleton = _parse_skeleton(edges, len(names))
    if skeleton is None:
        skeleton = _parse_skeleton(edges, len(names), first=0)
        if skeleton is not None:
            report.warn(
                "category whose skeleton counts keypoints from 0, read so",
                f"id {category_id}: {edges!r}"[:120],
            )
    if skeleton is None:
        report.error(
            "category whose skeleton is not pairs of its keypoints, counted from 1",
            f"id {category_id}: {edges!r}"[:120],
        )
        return names, ()
    return names, skeleton


def _parse_point_names(names: object) -> tuple[str, ...] | None:
    """Return the names of keypoints; None unless they are a list of distinct Unicode strings."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return None
    if not all(map(_is_unicode, names)):
        return None
    return tuple(names) if len(set(names)) == len(names) else None


def _parse_skeleton(edges: object, num_keypoints: int, first: int = 1) -> _Edges | None:
    """Return the edges counted from 0; None unless all are pairs of keypoints.

    first: the number of the first keypoint in `edges`, 1 in COCO.
    """
    if not isinstance(edges, list):
        return None
    parsed = []
    for edge in edges:
        if not isinstance(edge, list) or len(edge) != 2:
            return None
        start = as_int64(edge[0])
        end = as_int64(edge[1])
        if start is None or end is None:
            return None
        if min(start, end) < first or max(start, end) >= first + num_keypoints:
            return None
        parsed.append((start - first, end - first))
    return tuple(parsed)


def match_categories(
    categories: Categories, expected: Categories | None, report: Report
) -> tuple[Categories, Ints]:
    """Match the categories of a file with the expected ones (the training's, a checkpoint's).

    Categories are matched by name if the names are unique on both sides, and by id otherwise.
    Returns the categories to use, `expected` if it is given, and the label of each category of
    the file, i64 [C], -1 for one that is not expected (an error in the report).
    """
    if expected is None:
        return categories, np.arange(len(categories))
    unique_names = len(set(categories.names)) == len(categories)
    by_name = unique_names and len(set(expected.names)) == len(expected)
    label_of_name = {name: label for label, name in enumerate(expected.names)}
    label_of_id = {category_id: label for label, category_id in enumerate(expected.ids)}
    matches = []
    for category_id, name in zip(categories.ids, categories.names, strict=True):
        label = label_of_name.get(name, -1) if by_name else label_of_id.get(category_id, -1)
        if label < 0:
            report.error(
                "category that the training data or the checkpoint does not have",
                f"{name!r} (id {category_id})",
            )
        matches.append(label)
    matched = [(i, label) for i, label in enumerate(matches) if label >= 0]
    if not by_name:
        _check_names(categories, expected, matched, report)
    _check_keypoints(categories, expected, matched, report)
    return expected, np.array(matches, dtype=np.int64)


def _check_names(
    categories: Categories, expected: Categories, matched: list[tuple[int, int]], report: Report
) -> None:
    """Report categories with the same id but another name, whose labels would be wrong."""
    for i, label in matched:
        name = categories.names[i]
        expected_name = expected.names[label]
        if name != expected_name:
            report.error(
                "category matched by its id has another name (names repeat, so that they cannot be "
                "matched)",
                f"id {categories.ids[i]}: {name!r}, expected {expected_name!r}",
            )


def _check_keypoints(
    categories: Categories, expected: Categories, matched: list[tuple[int, int]], report: Report
) -> None:
    """Report categories whose keypoints differ; a side without keypoints matches any."""
    for i, label in matched:
        keypoints = categories.keypoints[i]
        expected_keypoints = expected.keypoints[label]
        if keypoints and expected_keypoints and keypoints != expected_keypoints:
            report.error(
                "category whose keypoints differ from the training data's or the checkpoint's",
                f"{expected.names[label]!r}: {len(keypoints)} points {list(keypoints)[:3]} ..., "
                f"expected {len(expected_keypoints)}",
            )
