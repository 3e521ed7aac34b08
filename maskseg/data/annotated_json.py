"""Proposed masks -> a COCO JSON file: that of the boxes, with masks in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from maskseg.data.coco import CocoFile
from maskseg.errors import UserError
from maskseg.files import replacing

Row = Mapping[str, Any]  # segmentation, area, bbox and mask_by of an annotation


def check_output(output: Path, inputs: Iterable[str | None]) -> None:
    """Raises UserError for an output that is one of the inputs, or is there already: somebody may have worked on it."""
    for path in inputs:
        if path and Path(path).resolve() == output.resolve():
            raise UserError(f"output={output} is the file that is read: choose another name")
    if output.exists():
        raise UserError(f"{output} is there already: choose another name or delete it")


def object_annotations(file: CocoFile, made: Mapping[int, Row]) -> dict[str, Any]:
    """The file's own content, unknown fields too, with the masks of objects by annotation id. Annotations without a new one stay as they are."""
    tree, clean = _tree(file), file.to_dict()
    known = {row["id"]: row for row in clean["annotations"]}
    rows = []
    for entry in tree["annotations"]:
        number: Any = entry.get("id") if isinstance(entry, dict) else None
        if number in known and number != 0:
            row = known.pop(number)
            rows.append({**row, **entry, **_without_box(made.get(number, {}))})
        elif number not in (None, 0):
            rows.append(entry)
    rows += [{**row, **_without_box(made.get(row["id"], {}))} for row in known.values()]  # those that had no id
    return {**tree, "annotations": rows}


def class_annotations(file: CocoFile, made: Mapping[int, Iterable[Row]]) -> dict[str, Any]:
    """The file's own content with one annotation for each class of each image instead of its annotations; made: by image id, with `label`."""
    rows: list[dict[str, Any]] = []
    for image, found in made.items():
        for row in found:
            values = {key: value for key, value in row.items() if key != "label"}
            category = file.categories.ids[row["label"]]
            rows.append({"id": len(rows) + 1, "image_id": image, "category_id": category, "iscrowd": 0, **values})
    return {**_tree(file), "annotations": rows}


def write_annotations(output: Path, content: Mapping[str, Any]) -> None:
    """The file, whole or not at all. Raises UserError where it cannot be written."""
    text = json.dumps(content, allow_nan=False)
    with replacing(output, "the masks") as file:
        file.write(text.encode())


def _tree(file: CocoFile) -> dict[str, Any]:
    try:
        return dict(json.loads(file.path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path}: cannot be read any more ({error})") from error


def _without_box(row: Row) -> dict[str, Any]:
    """The object's box is the one that was drawn, not that of the mask."""
    return {key: value for key, value in row.items() if key not in ("bbox", "label")}
