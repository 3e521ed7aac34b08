"""Writing of proposed masks to a COCO JSON file, based on the file with the boxes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Required, TypedDict

from maskseg.data.coco.documents import PolygonLists
from maskseg.data.coco.file import CocoFile
from maskseg.data.coco.parse import as_int64
from maskseg.errors import UserError
from maskseg.files import parse_json, replacing
from maskseg.masks.base import Rle


class MaskProvenance(TypedDict, total=False):
    """How a mask was made: the field `mask_by` of its annotation.

    thresholds: of the map, `Technique.thresholds`; score: of the class, by the classifier;
    fallback: why the mask is not the result of the technique.
    """

    technique: Required[str]
    threshold: float
    thresholds: tuple[float, float, float]
    score: float
    fallback: str


class ProposedMask(TypedDict):
    """A mask that was made for an annotation, or for a class of an image.

    id: of the request; label: of its class; bbox: x, y, width, height.
    """

    id: int
    label: int
    segmentation: PolygonLists | Rle
    area: int
    bbox: list[int]
    mask_by: MaskProvenance


def object_annotations(file: CocoFile, masks: Mapping[int, ProposedMask]) -> dict[str, object]:
    """The content of a file, including unknown fields, with new masks of its objects.

    masks: by annotation id, as assigned by `CocoFile`. Annotations without a new mask are
    unchanged. The box stays the annotator's, not that of the mask. Annotations without an id get
    one.
    """
    tree, entries = _read_tree(file)
    # By position in the file. Crowds that stand for image labels have none, which is -1.
    parsed = dict(zip(file.rows.tolist(), file.to_dict()["annotations"], strict=True))
    given_ids = [as_int64(entry.get("id")) for entry in entries]
    ids = [row["id"] for row in parsed.values()]
    ids += [number for number in given_ids if number is not None]
    free_ids = count(max(ids, default=0) + 1)
    rows = []
    for position, entry in enumerate(entries):
        row = parsed.get(position, {})
        mask = masks.get(row["id"]) if row else None
        original = dict(entry)
        new_fields: dict[str, object] = {}
        if mask is not None:
            original.pop("review", None)  # the decision was about the old mask
            new_fields = {k: v for k, v in mask.items() if k not in ("id", "label", "bbox")}
        if entry.get("id") is not None:
            annotation_id = entry["id"]
        elif row:
            annotation_id = row["id"]
        else:
            annotation_id = next(free_ids)
        rows.append({**row, **original, "id": annotation_id, **new_fields})
    return {**tree, "annotations": rows}


def class_annotations(
    file: CocoFile, masks: Mapping[int, Iterable[ProposedMask]], keep_masks: bool = False
) -> dict[str, object]:
    """The content of a file, with one annotation per class of each image as its annotations.

    masks: by image id, each with its `label`; keep_masks: the annotations of the file that have a
    mask come first, unchanged.
    """
    rows = _annotations_with_masks(file) if keep_masks else []
    first_id = max((as_int64(row.get("id")) or 0 for row in rows), default=0) + 1
    num_kept = len(rows)
    for image_id, image_masks in masks.items():
        for mask in image_masks:
            row = {
                "id": first_id + len(rows) - num_kept,
                "image_id": image_id,
                "category_id": file.categories.ids[mask["label"]],
                "iscrowd": 0,
            }
            new_fields = {k: v for k, v in mask.items() if k not in ("id", "label")}
            rows.append({**row, **new_fields})
    tree, _ = _read_tree(file)
    return {**tree, "annotations": rows}


def _annotations_with_masks(file: CocoFile) -> list[dict[str, object]]:
    """The annotations of a file that have a mask, as they are in the file."""
    _, entries = _read_tree(file)
    parsed = dict(zip(file.rows.tolist(), file.to_dict()["annotations"], strict=True))
    rows = []
    for position, entry in enumerate(entries):
        if parsed.get(position, {}).get("segmentation"):
            rows.append({**parsed[position], **entry})
    return rows


def write_annotations(output: Path, content: Mapping[str, object]) -> None:
    """Write a COCO file; it appears complete or not at all.

    Raises UserError if it cannot be written.
    """
    text = json.dumps(content, allow_nan=False)
    with replacing(output, "the masks") as file:
        file.write(text.encode())


def _read_tree(file: CocoFile) -> tuple[dict[str, object], list[dict[str, object]]]:
    """The fields of the file, and its list of annotations. Raises UserError."""
    try:
        tree = parse_json(file.path.read_text(encoding="utf-8-sig"))
        return dict(tree), list(tree["annotations"])
    except (OSError, ValueError) as error:
        raise UserError(f"{file.path}: can no longer be read ({error})") from error
