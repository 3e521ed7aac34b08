"""Proposed masks -> a COCO JSON file: that of the boxes, with masks in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from maskseg.data.coco.file import CocoFile
from maskseg.errors import UserError
from maskseg.files import parse_json, replacing

Row = Mapping[str, Any]  # segmentation, area, bbox and mask_by of an annotation


def check_output(output: Path, inputs: Iterable[str | Path | None], what: str = "output=") -> None:
    """Raises UserError for an output that is one of the inputs, or is there already: somebody may have worked on it."""
    check_not_read(output, inputs, what)
    if output.exists():
        raise UserError(f"{output} is there already: choose another name or delete it")


def check_not_read(
    output: Path, inputs: Iterable[str | Path | None], what: str = "output="
) -> None:
    """Raises UserError for an output that is one of the inputs. what: stands before its name in the message."""
    for path in inputs:
        if path and Path(path).resolve() == output.resolve():
            raise UserError(f"{what}{output} is a file that is read: choose another name")


def object_annotations(file: CocoFile, made: Mapping[int, Row]) -> dict[str, Any]:
    """The file's own content, unknown fields too, with the masks of objects by annotation id as `CocoFile` has it.

    Annotations without a new mask stay as they are; the box is the one that was drawn, not that of the mask; whatever has no id gets one.
    """
    tree = _tree(file)
    entries = tree["annotations"]
    known = dict(
        zip(file._kept.rows.tolist(), file.to_dict()["annotations"], strict=True)
    )  # by place in the file; made-up crowds are beyond its end
    numbers = [row["id"] for row in known.values()] + [
        entry["id"] for entry in entries if entry.get("id") is not None
    ]
    free = count(max(numbers, default=0) + 1)
    rows = []
    for place, entry in enumerate(entries):
        row = known.get(place, {})
        new = made.get(row.get("id", 0), {})  # 0: of none
        old = {
            key: value for key, value in entry.items() if key != "review" or not new
        }  # a decision was on the mask that was there
        number = entry["id"] if entry.get("id") is not None else row["id"] if row else next(free)
        rows.append(
            {
                **row,
                **old,
                "id": number,
                **{key: value for key, value in new.items() if key not in ("id", "label", "bbox")},
            }
        )
    return {**tree, "annotations": rows}


def class_annotations(file: CocoFile, made: Mapping[int, Iterable[Row]]) -> dict[str, Any]:
    """The file's own content with one annotation for each class of each image instead of its annotations; made: by image id, with `label`."""
    rows: list[dict[str, Any]] = []
    for image, found in made.items():
        for row in found:
            values = {key: value for key, value in row.items() if key != "label"}
            category = file.categories.ids[row["label"]]
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": image,
                    "category_id": category,
                    "iscrowd": 0,
                    **values,
                }
            )
    return {**_tree(file), "annotations": rows}


def write_annotations(output: Path, content: Mapping[str, Any]) -> None:
    """The file, whole or not at all. Raises UserError where it cannot be written."""
    text = json.dumps(content, allow_nan=False)
    with replacing(output, "the masks") as file:
        file.write(text.encode())


def _tree(file: CocoFile) -> dict[str, Any]:
    try:
        return dict(parse_json(file.path.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path}: cannot be read any more ({error})") from error
