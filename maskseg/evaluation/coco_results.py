"""Converts detections to rows of COCO's result format, one image at a time.

Masks become RLE immediately, so that memory use stays flat.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.masks.base import Rle
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.structures import Batch, Categories, Outputs, Regions

# {"image_id", "category_id", "bbox": [x, y, w, h], "score", "segmentation": RLE,
# "keypoints": [x, y, score, ...]}; the last two only if the model predicts them, and keypoints only
# for classes that have them.
Row = dict[str, Any]

_DECIMALS = 3  # of coordinates in pixels


def to_original(
    detections: Regions, index: int, size: Sequence[int], original_size: Sequence[int]
) -> Regions:
    """Transform the detections of one image from the padded batch to the frame of its file.

    index: of the image in the batch; size: (height, width) of the image in the batch, without the
    padding (at the right and the bottom); original_size: (height, width) of the file. Boxes are
    scaled and clipped to the image (a box in the padding becomes empty), masks are transformed by
    `Masks.transform`, keypoints may lie outside. Order, scores and labels are unchanged.
    """
    transform = AxisAlignedTransform.resize(
        int(size[0]), int(size[1]), int(original_size[0]), int(original_size[1])
    )
    rows = torch.nonzero(detections.image_index == index).squeeze(1)
    selected = detections[rows]
    masks = None
    if selected.masks is not None:
        masks = selected.masks.transform(transform)
    keypoints = None
    if selected.keypoints is not None:
        keypoints = transform.points(selected.keypoints, clip=False)
    return replace(
        selected, boxes=transform.boxes(selected.boxes), masks=masks, keypoints=keypoints
    )


def detection_rows(
    batch: Batch, outputs: Outputs, categories: Categories, *, masks: bool = True
) -> list[Row]:
    """Convert the detections of a batch to COCO result rows in the frames of the image files.

    Boxes are rounded to 0.001 pixels; scores are not rounded, as this would create ties. Rows have
    a `segmentation` if the detections have masks, unless `masks` is False (nothing is pasted then).
    Raises ValueError if the detections have no labels.
    """
    detections = outputs.detections
    if not masks:
        detections = replace(detections, masks=None)
    detections = detections.to("cpu")
    if detections.labels is None:
        raise ValueError("detections have no labels: are these proposals?")
    sizes = batch.sizes.tolist()
    original_sizes = batch.original_sizes.tolist()
    rows: list[Row] = []
    for index, image_id in enumerate(batch.image_ids):
        original = to_original(detections, index, sizes[index], original_sizes[index])
        rles = None if original.masks is None else original.masks.to_rle()
        rows += image_rows(image_id, original, categories, rles)
    return rows


def segment_rows(image_id: int, segments: Regions) -> list[Row]:
    """Convert the segments of one image, in the frame of its file, to rows without a class."""
    assert segments.masks is not None
    boxes = _xywh(segments.boxes)
    columns = zip(boxes, segments.scores.tolist(), segments.masks.to_rle(), strict=True)
    return [
        {"image_id": image_id, "bbox": box, "score": score, "segmentation": rle}
        for box, score, rle in columns
    ]


def _xywh(boxes: Tensor) -> list[list[float]]:
    """Convert boxes [D, 4] from xyxy to xywh."""
    sides = boxes[:, 2:] - boxes[:, :2]
    xywh: list[list[float]] = torch.cat([boxes[:, :2], sides], dim=1).tolist()
    return xywh


def image_rows(
    image_id: int, detections: Regions, categories: Categories, rles: Sequence[Rle] | None
) -> list[Row]:
    """Convert the detections of one image, in the frame of its file, to COCO result rows.

    rles: their masks; None for rows without `segmentation`.
    """
    assert detections.labels is not None
    columns = zip(
        _xywh(detections.boxes.double()),
        detections.labels.tolist(),
        detections.scores.tolist(),
        [None] * len(detections) if rles is None else rles,
        strict=True,
    )
    rows: list[Row] = []
    for i, (box, label, score, rle) in enumerate(columns):
        row: Row = {
            "image_id": image_id,
            "category_id": categories.ids[label],
            "bbox": [round(v, _DECIMALS) for v in box],
            "score": score,
        }
        if rle is not None:
            row["segmentation"] = rle
        start, stop = categories.point_ranges[label]
        if detections.keypoints is not None and stop > start:
            row["keypoints"] = _coco_keypoints(detections.keypoints[i, start:stop])
        rows.append(row)
    return rows


def _coco_keypoints(points: Tensor) -> list[float]:
    """Convert points f32 [P, 3] to a flat list of x, y, score in COCO's pixel indices."""
    # COCO's keypoints are indices of pixels, whose centers lie at + 0.5.
    shifted = points.double() - torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    return [round(v, _DECIMALS) for v in shifted.ravel().tolist()]


def write_results(path: Path | str, rows: Sequence[Row]) -> None:
    """Write a COCO result file, a JSON list of the rows; it appears complete or not at all.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the results to {path}: {error.strerror or error}") from error
    with replacing(path, "the results") as file:
        file.write(b"[")
        # Row by row: the text of a large data set would double the memory use.
        for i, row in enumerate(rows):
            separator = ",\n" if i else "\n"
            file.write((separator + json.dumps(row, allow_nan=False)).encode())
        file.write(b"\n]\n")
