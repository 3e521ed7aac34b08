"""How well a division of images into segments finds the segments that people drew.

For each segment of the truth, the best IoU of any predicted segment, and means of it: over all segments, over images, of the annotator who agrees
most (Ravanbakhsh et al. 2016), weighted by area (covering: Arbelaez et al. 2011, equation 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Map = NDArray[np.integer]  # [H, W], a number for each pixel

# Numbers below so many times their count are counted in a table; others are sorted, which takes ten times as long but no more memory.
_TABLE = 8


def best_ious(segments: Map, truth: Map) -> tuple[NDArray[np.float64], Ints]:
    """The best IoU of any predicted segment with each segment of the truth.

    segments: int [H, W], any numbers from 0 on; truth: int [H, W], likewise, negative where unlabelled: those pixels count nowhere.
    -> IoU f64 [T] of the T segments of the truth by ascending number, and their areas i64 [T] in pixels. Raises ValueError for shapes that differ,
    maps that are not of integers, and negative segments.
    """
    _check(segments, truth)
    labelled = truth >= 0
    found, true = (
        np.asarray(numbers[labelled]).astype(np.int64, copy=False) for numbers in (segments, truth)
    )
    if not true.size:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    (names, areas), (true_names, true_areas) = _tally(found), _tally(true)
    pairs, overlaps = _tally(_places(true, true_names) * len(names) + _places(found, names))
    row, column = np.divmod(pairs, len(names))
    iou = overlaps / (true_areas[row] + areas[column] - overlaps)
    return np.maximum.reduceat(iou, np.searchsorted(row, np.arange(len(true_names)))), true_areas


class SegmentationIoU:
    """Collects images one by one, then gives the means. What several processes have collected is joined by `merge`, in any order."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, ...]] = []

    def add(self, segments: Map, truths: Sequence[Map]) -> None:
        """One image: its segments int [H, W] and the maps of its annotators (see `best_ious`). Maps, and images, without a labelled pixel are passed
        over."""
        found = [
            (iou, areas)
            for iou, areas in (best_ious(segments, truth) for truth in truths)
            if len(iou)
        ]
        if not found:
            return
        means = [float(iou.mean()) for iou, _ in found]
        coverings = [float(np.average(iou, weights=areas)) for iou, areas in found]
        total, count = fsum(fsum(iou) for iou, _ in found), sum(len(iou) for iou, _ in found)
        number = len(_tally(np.asarray(segments).astype(np.int64).ravel())[0])
        self._rows.append(
            (
                total,
                count,
                fsum(means) / len(means),
                max(means),
                fsum(coverings) / len(coverings),
                number,
            )
        )

    def state(self) -> list[list[float]]:
        """What was collected, as plain values: a row an image."""
        return [list(row) for row in self._rows]

    def merge(self, state: Iterable[Sequence[float]]) -> None:
        """Adds the images of another object's `state`."""
        self._rows += [tuple(row) for row in state]

    def compute(self) -> dict[str, float]:
        """Means of the best IoU, the same bit for bit whatever the images' order; zeros without an image.

        segments: over all segments of all annotators and images; images: over the segments of an annotator, then annotators, then images;
        best_annotator: of the annotator of each image who agrees most; covering: as `images`, each segment weighted by its area.
        num_segments: predicted ones an image; images_counted: images with a labelled pixel.
        """
        totals, counts, images, best, coverings, numbers = (
            zip(*self._rows, strict=True) if self._rows else ((),) * 6
        )
        most = max(len(self._rows), 1)
        return {
            "segments": fsum(totals) / max(fsum(counts), 1.0),
            "images": fsum(images) / most,
            "best_annotator": fsum(best) / most,
            "covering": fsum(coverings) / most,
            "num_segments": fsum(numbers) / most,
            "images_counted": float(len(self._rows)),
        }


def _check(segments: Map, truth: Map) -> None:
    if segments.shape != truth.shape:
        raise ValueError(
            f"segments of shape {segments.shape} cannot be compared with truth of shape {truth.shape}"
        )
    for name, numbers in (("segments", segments), ("truth", truth)):
        if numbers.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, not {numbers.dtype}")
    if segments.size and segments.min() < 0:
        raise ValueError(f"segments must be numbered from 0 on, not from {segments.min()}")


def _tally(numbers: Ints) -> tuple[Ints, Ints]:
    """The distinct numbers, ascending, and how often each is there."""
    if numbers.max(initial=0) >= _TABLE * numbers.size:
        return np.unique(numbers, return_counts=True)
    counts = np.bincount(numbers)
    names = np.flatnonzero(counts)
    return names, counts[names]


def _places(numbers: Ints, names: Ints) -> Ints:
    """The place of each number among the ascending `names`, which hold all of them."""
    if names[-1] >= _TABLE * numbers.size:
        return np.searchsorted(names, numbers)
    place = np.empty(names[-1] + 1, dtype=np.int64)
    place[names] = np.arange(len(names))
    return place[numbers]
