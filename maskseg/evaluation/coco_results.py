"""Detections -> rows of COCO's result format, one image at a time: masks become RLE at once, so that memory stays flat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.masks.base import Rle
from maskseg.ops.geometry import Geometry
from maskseg.structures import Batch, Categories, Outputs, Regions

# {"image_id", "category_id", "bbox": [x, y, w, h], "score", "segmentation": RLE, "keypoints": [x, y, score, ...]}, the last two where the model
# has them, and the class has points.
Row = dict[str, Any]

_DECIMALS = 3  # of a box, in pixels


def to_original(
    detections: Regions, index: int, size: Sequence[int], original_size: Sequence[int]
) -> Regions:
    """The detections of one image, moved from the padded batch to the frame of the image's file.

    size: (height, width) of the image in the batch, without the padding (which lies at the right and the bottom, so that it only has to be
    cut off); original_size: (height, width) of the file. Boxes are scaled and cut at the border (one that lies in the padding becomes
    empty), masks follow by `Masks.warp`, points may lie outside. Order, scores and labels stay.
    """
    geometry = Geometry.resize(
        int(size[0]), int(size[1]), int(original_size[0]), int(original_size[1])
    )
    rows = torch.nonzero(detections.image_index == index).squeeze(1)
    found = detections[rows]
    masks = None if found.masks is None else found.masks.warp(geometry)
    points = None if found.keypoints is None else geometry.points(found.keypoints, cut=False)
    return replace(found, boxes=geometry.boxes(found.boxes), masks=masks, keypoints=points)


def detection_rows(
    batch: Batch, outputs: Outputs, categories: Categories, *, masks: bool = True
) -> list[Row]:
    """Detections of a batch as COCO result rows in the images' own frames.

    Boxes are rounded to a thousandth of a pixel; scores are not rounded, as that would make ties. `segmentation` is there where the
    detections have masks, unless `masks` is False (boxes only: nothing is pasted). Raises ValueError where detections have no labels.
    """
    detections = (outputs.detections if masks else replace(outputs.detections, masks=None)).to(
        "cpu"
    )
    if detections.labels is None:
        raise ValueError("detections have no labels: are these proposals?")
    sizes, originals = batch.sizes.tolist(), batch.original_sizes.tolist()
    rows: list[Row] = []
    for index, image_id in enumerate(batch.image_ids):
        rows += _image_rows(
            image_id, to_original(detections, index, sizes[index], originals[index]), categories
        )
    return rows


def segment_rows(image_id: int, segments: Regions) -> list[Row]:
    """The segments of one image, in its own frame, as rows without a class."""
    assert segments.masks is not None
    boxes = torch.cat(
        [segments.boxes[:, :2], segments.boxes[:, 2:] - segments.boxes[:, :2]], dim=1
    ).tolist()
    columns = zip(boxes, segments.scores.tolist(), segments.masks.to_rle(), strict=True)
    return [
        {"image_id": image_id, "bbox": box, "score": score, "segmentation": rle}
        for box, score, rle in columns
    ]


def _image_rows(image_id: int, found: Regions, categories: Categories) -> list[Row]:
    assert found.labels is not None
    corners = found.boxes.double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    rles: Iterable[Rle | None] = (
        [None] * len(found) if found.masks is None else found.masks.to_rle()
    )
    rows: list[Row] = []
    for box, label, score, rle in zip(
        boxes, found.labels.tolist(), found.scores.tolist(), rles, strict=True
    ):
        row: Row = {
            "image_id": image_id,
            "category_id": categories.ids[label],
            "bbox": [round(v, _DECIMALS) for v in box],
            "score": score,
        }
        if rle is not None:
            row["segmentation"] = rle
        start, stop = categories.point_ranges[label]
        if found.keypoints is not None and stop > start:
            row["keypoints"] = _coco_keypoints(found.keypoints[len(rows), start:stop])
        rows.append(row)
    return rows


def _coco_keypoints(points: Tensor) -> list[float]:
    """f32 [P, 3] -> x, y, score of each in COCO's pixel indices."""
    shifted = points.double() - torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    return [round(v, _DECIMALS) for v in shifted.ravel().tolist()]


def write_results(path: Path | str, rows: Sequence[Row]) -> None:
    """COCO's result file: a JSON list of the rows, written whole or not at all. Raises UserError where it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the results to {path}: {error.strerror or error}") from error
    with replacing(path, "the results") as file:
        file.write(b"[")
        for i, row in enumerate(
            rows
        ):  # row by row: the whole text of a large set would need as much memory again
            file.write(((",\n" if i else "\n") + json.dumps(row, allow_nan=False)).encode())
        file.write(b"\n]\n")
