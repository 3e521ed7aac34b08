"""Pictures in, overlays out."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.errors import UserError
from maskseg.evaluation.coco_results import Row
from maskseg.masks.superpixel import SegmentMasks
from maskseg.structures import Categories, Regions
from maskseg.visualization.detections import draw_detections
from maskseg.visualization.segments import draw_segments
from maskseg.visualization.semantic import draw_semantic

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".jp2",
    ".ppm",
    ".pgm",
}


def image_files(pattern: str) -> list[Path]:
    """The image itself, the images of a folder (not of those below it), or those that match a pattern, sorted. Raises UserError for none."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    found = (
        list(path.iterdir())
        if path.is_dir()
        else [Path(name) for name in glob.glob(pattern, recursive=True)]
    )  # noqa: PTH207 - absolute too
    files = sorted(f for f in found if f.is_file() and f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"input={pattern}: no image there ({', '.join(sorted(SUFFIXES))})")
    return files


def overlay(
    pixels: Tensor, rows: Sequence[Row], categories: Categories, min_score: float
) -> NDArray[np.uint8]:
    """pixels: uint8 RGB [3, H, W]; rows: its COCO result rows -> the picture with what scores at least `min_score`, uint8 [H', W', 3]."""
    shown = [row for row in rows if row["score"] >= min_score]
    boxes = np.array([row["bbox"] for row in shown], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label = {number: k for k, number in enumerate(categories.ids)}
    masks = [row["segmentation"] for row in shown] if shown and "segmentation" in shown[0] else None
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    labels, scores = [label[row["category_id"]] for row in shown], [row["score"] for row in shown]
    points = _points(shown, labels, categories) if shown and categories.num_points else None
    return draw_detections(
        image,
        boxes,
        labels,
        scores,
        masks,
        categories.names,
        keypoints=points,
        lines=categories.lines,
    )


def segment_overlay(pixels: Tensor, segments: Regions) -> NDArray[np.uint8]:
    """pixels: uint8 RGB [3, H, W]; segments: of superpixels, in its frame -> the picture with them, uint8 [H', W', 3]."""
    assert isinstance(segments.masks, SegmentMasks)
    return draw_segments(
        np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), segments.masks.label_maps()[0]
    )


def class_pictures(
    pixels: Tensor, classes: Tensor, categories: Categories
) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """pixels: uint8 RGB [3, H, W]; classes: labels i64 [H, W], -1 for none -> the picture with them and a legend, and the category ids [H, W]."""
    ids = np.array([*categories.ids, 65535], dtype=np.uint16)  # -1 is the last one
    labels = classes.numpy()
    return draw_semantic(
        np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), labels, categories.names
    ), ids[labels]


def _points(
    rows: Sequence[Row], labels: Sequence[int], categories: Categories
) -> NDArray[np.float64]:
    """The keypoints of COCO result rows -> f64 [D, P, 3], continuous pixels and score."""
    points = np.zeros((len(rows), categories.num_points, 3))
    for own, row, label in zip(points, rows, labels, strict=True):
        start, stop = categories.point_ranges[label]
        if "keypoints" in row:
            own[start:stop] = np.reshape(row["keypoints"], (-1, 3)) + np.array([0.5, 0.5, 0.0])
    return points
