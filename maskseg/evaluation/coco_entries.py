"""Truth and detections as the COCO evaluators want them: only what they read, in the form that all backends compare alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from maskseg.evaluation.coco_results import Row

BBOX, SEGM, KEYPOINTS = "bbox", "segm", "keypoints"
KINDS = {
    BBOX: "bbox",
    SEGM: "segmentation",
    KEYPOINTS: "keypoints",
}  # what is compared -> where it is in a row

_AT_ONCE = 128  # masks in one call: `area` of more than 255 overflows inside pycocotools


def _entry(index: int, source: Row, area: float, crowd: int) -> Row:
    # Ids count from 1 here: the evaluators take the id of a match for a truth value, so that 0 would be a miss.
    return {
        "id": index + 1,
        "image_id": source["image_id"],
        "category_id": source["category_id"],
        "area": area,
        "iscrowd": crowd,
    }


def truth_entries(kind: str, truths: list[Row], images: dict[int, Row]) -> list[Row]:
    """Annotations with only what the evaluation of `kind` reads; masks as RLE, so that all backends compare the same pixels."""
    entries = []
    for i, truth in enumerate(truths):
        entry = _entry(i, truth, truth["area"], int(truth.get("iscrowd", 0)))
        if kind != SEGM:
            entry["bbox"] = truth["bbox"]
        if kind == SEGM:
            image = images[truth["image_id"]]
            entry["segmentation"] = compressed_rle(
                truth["segmentation"], image["height"], image["width"]
            )
        if kind == KEYPOINTS:
            entry |= {"keypoints": truth["keypoints"], "num_keypoints": truth["num_keypoints"]}
        entries.append(entry)
    return entries


def row_entries(kind: str, rows: list[Row]) -> list[Row]:
    """As above for detections. The object size of a mask is its own area: with a `bbox` in a row, `loadRes` would take that of the box; that of
    keypoints is the box around them, as `loadRes` has it."""
    if kind == BBOX:
        areas = [r["bbox"][2] * r["bbox"][3] for r in rows]
    elif kind == SEGM:
        masks = [r["segmentation"] for r in rows]
        areas = [
            a
            for i in range(0, len(masks), _AT_ONCE)
            for a in coco_mask.area(masks[i : i + _AT_ONCE]).tolist()
        ]
    else:
        areas = [float(np.ptp(r["keypoints"][0::3]) * np.ptp(r["keypoints"][1::3])) for r in rows]
    key = KINDS[kind]
    entries = [
        _entry(i, row, area, 0) for i, (row, area) in enumerate(zip(rows, areas, strict=True))
    ]
    for entry, row in zip(entries, rows, strict=True):
        entry["score"], entry[key] = row["score"], row[key]
    return entries


def compressed_rle(segmentation: Any, height: int, width: int) -> Row:
    """A COCO segmentation (polygons, run lengths or compressed RLE) as compressed RLE."""
    if isinstance(segmentation, list):
        parts = coco_mask.frPyObjects(segmentation, height, width)
        return dict(coco_mask.merge(parts))
    if isinstance(segmentation["counts"], list):
        return dict(coco_mask.frPyObjects(segmentation, height, width))
    return dict(segmentation)
