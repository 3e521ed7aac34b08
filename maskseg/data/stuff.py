"""Classes of stuff, which have no instances, behind those of the things."""

from __future__ import annotations

import json
from pathlib import Path

from maskseg.data.categories import file_categories
from maskseg.data.report import Report
from maskseg.errors import UserError
from maskseg.structures import Categories


def with_stuff(things: Categories, path: Path) -> Categories:
    """The things' classes and those of the file that they do not have: its `stuff_categories` (the embedded data), or its `categories`
    (COCO-stuff's and panoptic files). Raises UserError for a file that names none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content.get("stuff_categories") or content["categories"]
    except OSError as error:
        raise UserError(f"data.stuff_json={path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"data.stuff_json={path}: no JSON with a list of categories or stuff_categories") from error
    report = Report(str(path))
    found = file_categories(list(entries), report)
    if report.errors:
        raise UserError(report.text())
    rows = [(name, number) for name, number in zip(found.names, found.ids, strict=True) if number not in things.ids]
    if not rows:
        raise UserError(f"data.stuff_json={path}: it has no class that the things do not have")
    return things.with_stuff([name for name, _ in rows], [number for _, number in rows])
