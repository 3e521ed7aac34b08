"""Segmentation IoU: how well predicted segments recover annotated ones.

Each annotated segment is scored by the best IoU of any predicted segment. Means of it are taken
over all segments, over images, for the best-agreeing annotator (Ravanbakhsh et al. 2016), and
weighted by area (covering: Arbelaez et al. 2011, equation 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Map = NDArray[np.integer]  # [H, W], the segment of each pixel

# Labels below this multiple of the number of pixels are counted in a table. Larger labels are
# sorted, which takes ten times as long but no more memory.
_MAX_TABLE_RATIO = 8


def best_ious(segments: Map, truth: Map) -> tuple[NDArray[np.float64], Ints]:
    """Compute the best IoU of any predicted segment with each annotated segment.

    segments: int [H, W], labels >= 0; truth: int [H, W], negative where unlabeled: these pixels are
    ignored. -> IoU f64 [T] of the T annotated segments by ascending label, and their areas i64 [T]
    in pixels. Raises ValueError if the shapes differ, the maps are not integers, or a predicted
    label is negative.
    """
    _check_maps(segments, truth)
    labelled = truth >= 0
    predicted_labels = np.asarray(segments[labelled]).astype(np.int64, copy=False)
    true_labels = np.asarray(truth[labelled]).astype(np.int64, copy=False)
    if not true_labels.size:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    distinct, areas = _count_labels(predicted_labels)
    true_distinct, true_areas = _count_labels(true_labels)
    rows = _indices(true_labels, true_distinct)
    pairs, overlaps = _count_labels(rows * len(distinct) + _indices(predicted_labels, distinct))
    row, column = np.divmod(pairs, len(distinct))
    iou = overlaps / (true_areas[row] + areas[column] - overlaps)
    starts = np.searchsorted(row, np.arange(len(true_distinct)))
    return np.maximum.reduceat(iou, starts), true_areas


class SegmentationIoU:
    """Accumulates images, then computes means. `merge` joins several processes' in any order."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(self, segments: Map, truths: Sequence[Map]) -> None:
        """Add one image: its segments int [H, W] and the maps of its annotators (see `best_ious`).

        Maps and images without a labeled pixel are ignored.
        """
        ious = []
        coverings = []
        for truth in truths:
            iou, areas = best_ious(segments, truth)
            if len(iou):
                ious.append(iou)
                coverings.append(float(np.average(iou, weights=areas)))
        if not ious:
            return
        means = [float(iou.mean()) for iou in ious]
        labels = np.asarray(segments).astype(np.int64).ravel()
        self._rows.append(
            (
                fsum(fsum(iou) for iou in ious),
                sum(len(iou) for iou in ious),
                fsum(means) / len(means),
                max(means),
                fsum(coverings) / len(coverings),
                len(_count_labels(labels)[0]),
            )
        )

    def state(self) -> list[list[float]]:
        """Everything accumulated so far as plain values, one row per image."""
        return [list(row) for row in self._rows]

    def merge(self, state: Iterable[Sequence[float]]) -> None:
        """Add the images of another object's `state`."""
        self._rows += [tuple(row) for row in state]

    def compute(self) -> dict[str, float]:
        """Compute means of the best IoU; bit-identical in any order of the images, 0 without any.

        segments: over all segments of all annotators and images; images: over the segments of an
        annotator, then over annotators, then over images; best_annotator: of the best-agreeing
        annotator of each image; covering: as `images`, with segments weighted by area.
        num_segments: mean number of predicted segments per image; images_counted: number of images
        with a labeled pixel.
        """
        if not self._rows:
            totals, counts, images, best, coverings, numbers = ((),) * 6
        else:
            totals, counts, images, best, coverings, numbers = zip(*self._rows, strict=True)
        num_images = max(len(self._rows), 1)
        return {
            "segments": fsum(totals) / max(fsum(counts), 1.0),
            "images": fsum(images) / num_images,
            "best_annotator": fsum(best) / num_images,
            "covering": fsum(coverings) / num_images,
            "num_segments": fsum(numbers) / num_images,
            "images_counted": float(len(self._rows)),
        }


def _check_maps(segments: Map, truth: Map) -> None:
    if segments.shape != truth.shape:
        raise ValueError(
            f"segments of shape {segments.shape} cannot be compared with truth of shape "
            f"{truth.shape}"
        )
    for name, labels in (("segments", segments), ("truth", truth)):
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, not {labels.dtype}")
    if segments.size and segments.min() < 0:
        raise ValueError(f"labels of segments must be at least 0, got {segments.min()}")


def _count_labels(labels: Ints) -> tuple[Ints, Ints]:
    """The distinct labels, ascending, and the count of each."""
    if labels.max(initial=0) >= _MAX_TABLE_RATIO * labels.size:
        return np.unique(labels, return_counts=True)
    counts = np.bincount(labels)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _indices(labels: Ints, distinct: Ints) -> Ints:
    """The index of each label among the ascending `distinct` labels, which contain all of them."""
    if distinct[-1] >= _MAX_TABLE_RATIO * labels.size:
        return np.searchsorted(distinct, labels)
    index = np.empty(distinct[-1] + 1, dtype=np.int64)
    index[distinct] = np.arange(len(distinct))
    return index[labels]
