"""Converts ground truth and detections to the form that the COCO evaluators read.

The entries hold only what the evaluation reads, in a form that all backends compare alike.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from maskseg.evaluation.coco_results import Row
from maskseg.masks.base import Rle, rle_areas

BBOX = "bbox"
SEGM = "segm"
KEYPOINTS = "keypoints"
KINDS = {BBOX: "bbox", SEGM: "segmentation", KEYPOINTS: "keypoints"}  # IoU type -> key of a row


def _entry(index: int, source: Row, area: float, crowd: int) -> Row:
    # pycocotools treats match id 0 as "unmatched", so ids start at 1.
    return {
        "id": index + 1,
        "image_id": source["image_id"],
        "category_id": source["category_id"],
        "area": area,
        "iscrowd": crowd,
    }


def truth_entries(kind: str, truths: list[Row], images: dict[int, Row]) -> list[Row]:
    """Convert annotations for the evaluation of `kind`.

    images: COCO images by id. Masks become RLE, so that all backends compare the same pixels.
    """
    entries = []
    for i, truth in enumerate(truths):
        entry = _entry(i, truth, truth["area"], int(truth.get("iscrowd", 0)))
        if kind == SEGM:
            image = images[truth["image_id"]]
            entry["segmentation"] = compressed_rle(
                truth["segmentation"], image["height"], image["width"]
            )
        else:
            entry["bbox"] = truth["bbox"]
        if kind == KEYPOINTS:
            entry["keypoints"] = truth["keypoints"]
            entry["num_keypoints"] = truth["num_keypoints"]
        entries.append(entry)
    return entries


def row_entries(kind: str, rows: list[Row]) -> list[Row]:
    """Convert COCO result rows for the evaluation of `kind`.

    The object size of a mask is the area of the mask (`loadRes` would use the box if a row has
    one); that of keypoints is the area of their bounding box, as in `loadRes`.
    """
    key = KINDS[kind]
    entries = []
    for i, (row, area) in enumerate(zip(rows, _areas(kind, rows), strict=True)):
        entry = _entry(i, row, area, 0)
        entry["score"] = row["score"]
        entry[key] = row[key]
        entries.append(entry)
    return entries


def _areas(kind: str, rows: list[Row]) -> list[float]:
    """The object size of each row in square pixels."""
    if kind == BBOX:
        return [row["bbox"][2] * row["bbox"][3] for row in rows]
    areas: list[float] = []
    if kind == SEGM:
        mask_areas: list[float] = rle_areas([row["segmentation"] for row in rows]).tolist()
        return mask_areas
    for row in rows:
        x = row["keypoints"][0::3]
        y = row["keypoints"][1::3]
        areas.append(float(np.ptp(x) * np.ptp(y)))
    return areas


def compressed_rle(segmentation: list[list[float]] | Rle, height: int, width: int) -> Rle:
    """Convert a COCO segmentation (polygons, run lengths or compressed RLE) to compressed RLE."""
    if isinstance(segmentation, list):
        parts = coco_mask.frPyObjects(segmentation, height, width)
        merged: Rle = coco_mask.merge(parts)
        return merged
    if isinstance(segmentation["counts"], list):
        compressed: Rle = coco_mask.frPyObjects(segmentation, height, width)
        return compressed
    rle: Rle = segmentation.copy()
    return rle
