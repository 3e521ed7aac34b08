"""Classes of stuff, which have no instances, behind those of the things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskseg.data.coco.categories import file_categories
from maskseg.data.coco.report import Report
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.structures import Categories


def with_stuff(things: Categories, path: Path, within: range | None = None) -> Categories:
    """The things' classes and those of the file that they do not have: its `stuff_categories` (the embedded data), or its `categories`
    (COCO-stuff's and panoptic files; of those with `isthing`, where it is 0), or the lines of a .txt file (`read_labels`; 0 is no class).

    within: the ids that stuff has, None for any. Raises UserError for a file that names none.
    """
    report = Report(str(path))
    found = file_categories(_entries(path), report)
    if report.errors:
        raise UserError(report.text())
    named = zip(found.names, found.ids, strict=True)
    rows = [
        (name, number)
        for name, number in named
        if number not in things.ids and (within is None or number in within)
    ]
    if not rows:
        raise UserError(f"data.stuff_json={path}: it has no class that the things do not have")
    return things.with_stuff([name for name, _ in rows], [number for _, number in rows])


def _entries(path: Path) -> list[Any]:
    if path.suffix == ".txt":
        return [
            {"id": number, "name": name}
            for number, name in read_labels(path, "data.stuff_json").items()
            if number
        ]
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        entries = list(content.get("stuff_categories") or content["categories"])
    except OSError as error:
        raise UserError(
            f"data.stuff_json={path}: cannot be read ({error.strerror or error})"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"data.stuff_json={path}: no JSON with a list of categories or stuff_categories"
        ) from error
    return [entry for entry in entries if not (isinstance(entry, dict) and entry.get("isthing"))]


def read_labels(path: Path, key: str) -> dict[int, str]:
    """The names by number of a file with a line `1: accordion` for each class, as COCO-stuff and PASCAL-Context have. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: no UTF-8 text ({error})") from error
    found: dict[int, str] = {}
    for place, line in enumerate(lines, 1):
        number, _, name = (part.strip() for part in line.partition(":"))
        if not line.strip():
            continue
        if not (number.isascii() and number.isdigit() and name) or int(number) in found:
            raise UserError(
                f"{key}={path}: line {place}, {line[:60]!r}, is not a number of its own, a colon and a name"
            )
        found[int(number)] = name
    if not found:
        raise UserError(f"{key}={path}: no class in it")
    return found
