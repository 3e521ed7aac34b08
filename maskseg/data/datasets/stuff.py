"""Stuff classes, which have no instances and follow the thing classes."""

from __future__ import annotations

from pathlib import Path

from maskseg.data.coco.categories import parse_categories
from maskseg.data.coco.report import Report
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.structures import Categories


def with_stuff(things: Categories, path: Path, within: range | None = None) -> Categories:
    """Append the classes of a file that are not among the things.

    The classes of the file are:
    - its `stuff_categories` (the built-in synthetic dataset), if it has any;
    - else its `categories` (COCO-Stuff and panoptic files), without those with a true `isthing`;
    - of a .txt file, its lines (see `read_labels`; number 0 is not a class).

    within: the ids of stuff, None for any. Raises UserError for a file without such classes.
    """
    report = Report(str(path))
    categories = parse_categories(_read_entries(path), report)
    if report.errors:
        raise UserError(report.text())
    names = []
    ids = []
    for name, category_id in zip(categories.names, categories.ids, strict=True):
        if category_id not in things.ids and (within is None or category_id in within):
            names.append(name)
            ids.append(category_id)
    if not ids:
        raise UserError(f"data.stuff_json={path}: it has no class that the things do not have")
    return things.with_stuff(names, ids)


def _read_entries(path: Path) -> list[object]:
    """Return the file's entries in the form of COCO's categories. Raises UserError."""
    if path.suffix == ".txt":
        labels = read_labels(path, "data.stuff_json")
        return [{"id": number, "name": name} for number, name in labels.items() if number]
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        entries = list(content.get("stuff_categories") or content["categories"])
    except OSError as error:
        raise UserError(
            f"data.stuff_json={path}: cannot be read ({error.strerror or error})"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"data.stuff_json={path}: not JSON with a list of categories or stuff_categories"
        ) from error
    return [entry for entry in entries if not (isinstance(entry, dict) and entry.get("isthing"))]


def read_labels(path: Path, key: str) -> dict[int, str]:
    """Read a text file with one line like `1: accordion` per class.

    COCO-Stuff and PASCAL-Context have such files. Returns the names by number. key: the config key
    of the file, for messages. Raises UserError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: not UTF-8 text ({error})") from error
    names: dict[int, str] = {}
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        number, _, name = (part.strip() for part in line.partition(":"))
        is_valid = number.isascii() and number.isdigit() and name
        if not is_valid or int(number) in names:
            raise UserError(
                f"{key}={path}: line {line_number}, {line[:60]!r}, is not a new number, "
                "a colon and a name"
            )
        names[int(number)] = name
    if not names:
        raise UserError(f"{key}={path}: no class in it")
    return names
