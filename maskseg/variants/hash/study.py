"""Comparison of segmentation methods at equal numbers of segments.

Ravanbakhsh et al., "CNN-aware Binary Map for General Semantic Segmentation", ICIP 2016, figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskseg.errors import UserError
from maskseg.evaluation.segmentation_iou import SegmentationIoU
from maskseg.inference.predictor import Prepare
from maskseg.models.rcnn import PixelModel
from maskseg.structures import Batch
from maskseg.superpixels.methods import SLIC, Felzenszwalb, Labels, neighbours
from maskseg.variants.hash.merging import cluster_features, merge_labels
from maskseg.variants.hash.segmenter import Frame, HashSegmenter

BASES = ("slic", "egs")
METHODS = ("hash", "kmeans", "egs", "slic", "superpixels")
IOU_KEYS = ("segments", "images", "best_annotator", "covering")
_CLUSTERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

Metrics = dict[str, dict[int, dict[str, float]]]  # method -> value of the sweep -> metrics


@dataclass(frozen=True)
class ImageFeatures:
    """Features and codes of one image.

    features: of the segmenter's level, [C, h, w], of unit length if the layer normalizes them;
    codes: soft codes, f32 [b, h, w]; frame: of the image's original pixels.
    """

    features: Tensor
    codes: Tensor
    frame: Frame


def extract_features(model: PixelModel, segmenter: HashSegmenter, batch: Batch) -> ImageFeatures:
    """Compute features and soft codes for a batch of one image."""
    features = model.features(batch)[segmenter.level]
    height, width = batch.original_sizes[0].tolist()
    scale = (batch.sizes[0] / batch.original_sizes[0]).tolist()
    vectors = segmenter.layer.vectors(features).view(*features.shape[2:], -1).permute(2, 0, 1)
    frame = Frame(height, width, (scale[0], scale[1]))
    return ImageFeatures(vectors, segmenter.layer(features)[0], frame)


def check_study(sweep: Sequence[float], scales: Sequence[float], base: str) -> None:
    """Validate the arguments of a `SegmentStudy`. Raises UserError."""
    valid = base in BASES and len(sweep) > 0 and len(scales) > 0
    for value in sweep:
        is_number = type(value) is int or (base == "egs" and type(value) is float)
        valid = valid and is_number and value > 0
    for value in scales:
        valid = valid and type(value) in (int, float) and value > 0
    if not valid or len(set(sweep)) < len(sweep):
        raise UserError(
            f"segments: base must be {' or '.join(BASES)}, sweep and scales lists of distinct, "
            "positive numbers (whole numbers for slic)"
        )


class SegmentStudy:
    """Segmentation IoU of each method for several numbers of superpixels.

    * `hash` merges superpixels by their codes. The superpixels come from SLIC (base `slic`; the
      sweep is their number) or from graph-based segmentation (base `egs`; the sweep is its scale).

    The other methods produce about as many segments as `hash` does for the same image:

    * `kmeans` merges the same superpixels by k-means clusters of their mean features;
    * `egs` is graph-based segmentation at one of `scales`;
    * `slic` runs SLIC with that number of superpixels.

    `superpixels` are the superpixels before merging.

    model: in evaluation mode; segmenter: the model's; prepare: pixels -> batch of one image.
    """

    def __init__(
        self,
        model: PixelModel,
        segmenter: HashSegmenter,
        prepare: Prepare,
        sweep: Sequence[int],
        scales: Sequence[float],
        base: str = "slic",
    ) -> None:
        check_study(sweep, scales, base)
        self.model = model
        self.segmenter = segmenter
        self.prepare = prepare
        self.sweep = list(sweep)
        self.scales = list(scales)
        self.base = base
        self.scores: dict[tuple[str, int], SegmentationIoU] = {}
        for method in METHODS:
            for value in self.sweep:
                self.scores[method, value] = SegmentationIoU()

    @torch.no_grad()
    def add(
        self, pixels: Tensor, ground_truths: Sequence[NDArray[np.integer]]
    ) -> dict[int, tuple[Labels, Labels]]:
        """Segment an image with every method and update the scores.

        pixels: uint8 RGB [3, H, W]; ground_truths: label map [H, W] of each annotator. Returns, for
        each value of the sweep, the superpixels and the segments of `hash`.
        """
        features = self.extract_features(pixels)
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        graph_segments = [Felzenszwalb(scale=scale)(image) for scale in self.scales]
        results = {}
        for value in self.sweep:
            if self.base == "slic":
                superpixels = SLIC(value)(image)
            else:
                superpixels = Felzenszwalb(scale=value)(image)
            segments = self.merge_by_codes(features, superpixels)
            count = int(segments.max()) + 1
            label_maps = {
                "hash": segments,
                "kmeans": self.merge_by_clusters(features, superpixels, count),
                "egs": _closest_in_count(graph_segments, count),
                "slic": SLIC(count)(image),
                "superpixels": superpixels,
            }
            for method, labels in label_maps.items():
                self.scores[method, value].add(labels, ground_truths)
            results[value] = (superpixels, segments)
        return results

    def extract_features(self, pixels: Tensor) -> ImageFeatures:
        """Features and codes of an image, uint8 RGB [3, H, W]."""
        device = next(self.model.parameters()).device
        return extract_features(self.model, self.segmenter, self.prepare(pixels).to(device))

    def merge_by_codes(self, features: ImageFeatures, superpixels: Labels) -> Labels:
        """Merge superpixels [H, W] by their binary codes. Returns segments, i32 [H, W]."""
        codes = self.segmenter.superpixel_means(features.codes, superpixels, features.frame)
        return self.segmenter.merge(codes, superpixels)[superpixels].astype(np.int32)

    def merge_by_clusters(self, features: ImageFeatures, superpixels: Labels, count: int) -> Labels:
        """Merge superpixels [H, W] by k-means clusters of their mean features, i32 [H, W].

        k is the candidate whose number of segments is closest to `count`.
        """
        means = self.segmenter.superpixel_means(features.features, superpixels, features.frame)
        vectors = means.cpu().numpy()
        pairs = neighbours(superpixels) if self.segmenter.scope == "neighbours" else None
        candidates = []
        for k in (*_CLUSTERS, len(vectors)):
            if k <= len(vectors):
                merged = merge_labels(cluster_features(vectors, k), pairs)
                candidates.append(merged[superpixels].astype(np.int32))
        return _closest_in_count(candidates, count)

    def metrics(self) -> Metrics:
        """Result of `SegmentationIoU.compute` for each method and value of the sweep."""
        return {
            method: {value: self.scores[method, value].compute() for value in self.sweep}
            for method in METHODS
        }


def _closest_in_count(label_maps: Sequence[Labels], count: int) -> Labels:
    """The label map whose number of segments is closest to `count`, as a ratio."""
    return min(label_maps, key=lambda labels: abs(float(np.log((int(labels.max()) + 1) / count))))


def flatten_metrics(metrics: Metrics) -> dict[str, float]:
    """Flat metrics for metrics.json.

    `segmentation_iou/<method>/<value of the sweep>` is the mean IoU over all segments; the other
    metrics have keys below it.
    """
    flat = {}
    for method, rows in metrics.items():
        for value, values in rows.items():
            key = f"segmentation_iou/{method}/{value}"
            flat[key] = values["segments"]
            for name in (*IOU_KEYS[1:], "num_segments", "images_counted"):
                flat[f"{key}/{name}"] = values[name]
    return flat


def format_table(metrics: Metrics, base: str) -> str:
    """Format a table of the methods by number of superpixels (base `egs`: by scale)."""
    names = " ".join(f"{name:>14}" for name in IOU_KEYS)
    column = "superpixels" if base == "slic" else "scale"
    lines = [f"{'method':12} {column:>11} {'segments':>9}  IoU: {names}"]
    for method, rows in metrics.items():
        for value, values in rows.items():
            cells = " ".join(f"{values[name]:14.4f}" for name in IOU_KEYS)
            lines.append(f"{method:12} {value:11} {values['num_segments']:9.1f}       {cells}")
    return "\n".join(lines)
