"""Finds the images to predict on, and draws predictions over them."""

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
from maskseg.visualization.keypoints import Keypoints
from maskseg.visualization.layout import RGBImage
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
NO_CATEGORY = 65535  # in maps of category ids


def image_files(pattern: str) -> list[Path]:
    """List one image file, or the images of a folder or of a glob pattern, sorted.

    Subfolders of a folder are not searched.
    Raises UserError if there are none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates = list(path.iterdir())
    else:
        # `Path.glob` does not accept absolute patterns.
        candidates = [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    files = sorted(f for f in candidates if f.is_file() and f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"input={pattern}: no image found ({', '.join(sorted(SUFFIXES))})")
    return files


def detection_overlay(
    pixels: Tensor, rows: Sequence[Row], categories: Categories, min_score: float
) -> RGBImage:
    """Draw the detections of an image that score at least `min_score`.

    pixels: uint8 RGB [3, H, W]; rows: its COCO result rows. -> uint8 RGB [H', W', 3].
    """
    rows = [row for row in rows if row["score"] >= min_score]
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    label_of_id = {category_id: label for label, category_id in enumerate(categories.ids)}
    labels = [label_of_id[row["category_id"]] for row in rows]
    masks = None
    keypoints = None
    if rows and "segmentation" in rows[0]:
        masks = [row["segmentation"] for row in rows]
    if rows and categories.num_points:
        points = _keypoints(rows, labels, categories)
        keypoints = Keypoints(points, categories.skeleton_edges)
    return draw_detections(
        to_array(pixels),
        boxes,
        labels,
        [row["score"] for row in rows],
        masks,
        categories.names,
        keypoints=keypoints,
    )


def segment_overlay(pixels: Tensor, segments: Regions) -> RGBImage:
    """Draw superpixel segments over an image.

    pixels: uint8 RGB [3, H, W]; segments: in the frame of the image. -> uint8 RGB [H', W', 3].
    """
    assert isinstance(segments.masks, SegmentMasks)
    return draw_segments(to_array(pixels), segments.masks.label_maps()[0])


def semantic_overlay(pixels: Tensor, labels: Tensor, categories: Categories) -> RGBImage:
    """Draw a semantic map with a legend over an image.

    pixels: uint8 RGB [3, H, W]; labels: i64 [H, W], -1 for none. -> uint8 RGB [H', W', 3].
    """
    return draw_semantic(to_array(pixels), labels.numpy(), categories.names)


def category_id_map(labels: Tensor, categories: Categories) -> NDArray[np.uint16]:
    """The category id of each pixel, 65535 for none. labels: i64 [H, W], -1 for none."""
    ids = np.array([*categories.ids, NO_CATEGORY], dtype=np.uint16)  # label -1 selects the last
    id_map: NDArray[np.uint16] = ids[labels.numpy()]
    return id_map


def to_array(pixels: Tensor) -> RGBImage:
    """Convert an image tensor [3, H, W] to a contiguous array [H, W, 3]."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _keypoints(
    rows: Sequence[Row], labels: Sequence[int], categories: Categories
) -> NDArray[np.float64]:
    """Keypoints of COCO result rows as continuous pixels and score, f64 [D, P, 3]."""
    points = np.zeros((len(rows), categories.num_points, 3))
    for row_points, row, label in zip(points, rows, labels, strict=True):
        start, stop = categories.point_ranges[label]
        if "keypoints" in row:
            # COCO's keypoints are indices of pixels, whose centers lie at + 0.5.
            coordinates = np.reshape(row["keypoints"], (-1, 3))
            row_points[start:stop] = coordinates + np.array([0.5, 0.5, 0.0])
    return points
