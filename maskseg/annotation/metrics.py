"""Agreement of proposed masks with the ground truth.

The metrics of "Using Deep Features for Segmentation Annotations" are pooled over pixels; the mean
IoU of objects weights large and small objects equally.

TP, FP, FN, TN are numbers of pixels of an image that are in both masks, only in the proposed mask,
only in the ground truth, in neither; summed over all masks of a class.
IoU = TP / (TP + FP + FN); accuracy = (TP + TN) / (TP + FP + FN + TN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from maskseg.evaluation.table import format_number, truncate_name

Bools = NDArray[np.bool_]
Counts = tuple[int, int, int, int]  # TP, FP, FN, TN
SMALL = 1024.0  # px: 32 x 32, COCO's small objects
COLUMNS = {
    "mIoU": "mean over classes of the pooled IoU",
    "frequency_weighted_IoU": "the same, weighted by ground truth pixels",
    "mean_accuracy": "mean over classes of the pooled accuracy",
    "object_IoU": "mean over objects",
    "class_object_IoU": "mean over classes of their objects' mean",
}
# Mean over objects including small ones: the metric that selects techniques, not a column.
OBJECT_IOU_ANY_SIZE = "any_object_IoU"
_HEADS = ("mIoU", "fwIoU", "mAcc", "objects", "by class")
_CELL = 10  # characters of a number


def confusion_counts(proposed: Bools, ground_truth: Bools) -> Counts:
    """TP, FP, FN, TN of two masks [H, W]. Raises ValueError if the shapes differ."""
    if proposed.shape != ground_truth.shape:
        raise ValueError(
            f"a mask of {proposed.shape} cannot be compared with one of {ground_truth.shape}"
        )
    both = int(np.count_nonzero(proposed & ground_truth))
    predicted = int(np.count_nonzero(proposed))
    actual = int(np.count_nonzero(ground_truth))
    neither = ground_truth.size - predicted - actual + both
    return both, predicted - both, actual - both, neither


class AnnotationScores:
    """Accumulates the counts of masks and computes the means.

    num_classes: K; min_area: objects with fewer ground truth pixels contribute only to the pooled
    metrics and to the mean over objects of any size.
    """

    def __init__(self, num_classes: int, min_area: float = SMALL) -> None:
        self.min_area = min_area
        # TP, FP, FN, TN of each class.
        self.pooled: NDArray[np.int64] = np.zeros((num_classes, 4), dtype=np.int64)
        # Sum of the objects' IoU and number of objects: of each class, and over any class and size.
        self.object_sums: NDArray[np.float64] = np.zeros((num_classes, 2))
        self.any_size_sums: NDArray[np.float64] = np.zeros(2)

    def add(self, label: int, counts: Sequence[int]) -> None:
        """Add a mask of class 0..K-1 by its TP, FP, FN, TN."""
        self.pooled[label] += np.asarray(counts, dtype=np.int64)
        actual = counts[0] + counts[2]
        union = sum(counts[:3])
        if actual:
            self.any_size_sums += (counts[0] / union, 1)
        if actual >= self.min_area and union:
            self.object_sums[label] += (counts[0] / union, 1)

    def compute(self) -> dict[str, float]:
        """Means with the keys of COLUMNS and OBJECT_IOU_ANY_SIZE; -1 if undefined.

        Means over classes include the classes that have a pixel in any mask.
        """
        iou, accuracy = self._pooled_metrics()
        present = iou >= 0
        actual = self.pooled[:, 0] + self.pooled[:, 2]
        has_objects = self.object_sums[:, 1] > 0
        class_means = self.object_sums[has_objects, 0] / self.object_sums[has_objects, 1]
        frequency_weighted = -1.0
        if actual.sum():
            frequency_weighted = float((actual * iou)[present].sum() / actual.sum())
        object_iou = -1.0
        if has_objects.any():
            object_iou = float(self.object_sums[:, 0].sum() / self.object_sums[:, 1].sum())
        any_size = -1.0
        if self.any_size_sums[1]:
            any_size = float(self.any_size_sums[0] / self.any_size_sums[1])
        return {
            "mIoU": _mean(iou[present]),
            "frequency_weighted_IoU": frequency_weighted,
            "mean_accuracy": _mean(accuracy[present]),
            "object_IoU": object_iou,
            "class_object_IoU": _mean(class_means),
            OBJECT_IOU_ANY_SIZE: any_size,
        }

    def per_class(self) -> list[dict[str, float]]:
        """Metrics of each class; -1 if undefined.

        label; iou, accuracy (pooled); object_iou; objects: number of objects behind object_iou;
        true_pixels.
        """
        iou, accuracy = self._pooled_metrics()
        count = self.object_sums[:, 1]
        object_iou = np.where(count > 0, self.object_sums[:, 0] / np.maximum(count, 1), -1.0)
        true_pixels = self.pooled[:, 0] + self.pooled[:, 2]
        return [
            {
                "label": label,
                "iou": float(iou[label]),
                "accuracy": float(accuracy[label]),
                "object_iou": float(object_iou[label]),
                "objects": float(count[label]),
                "true_pixels": float(true_pixels[label]),
            }
            for label in range(len(iou))
        ]

    def _pooled_metrics(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pooled IoU and accuracy, [K] each, -1 for classes without a pixel in any mask."""
        tp = self.pooled[:, 0]
        tn = self.pooled[:, 3]
        union = self.pooled[:, :3].sum(axis=1)
        pixels = self.pooled.sum(axis=1)
        iou = np.where(union > 0, tp / np.maximum(union, 1), -1.0)
        accuracy = np.where(union > 0, (tp + tn) / np.maximum(pixels, 1), -1.0)
        return iou, accuracy


def annotation_table(rows: Mapping[str, Mapping[str, float] | str]) -> str:
    """Format the means of techniques as a table, in the order of `rows`.

    A string instead of means says why there are none.
    """
    width = max([len("technique"), *(min(len(name), 28) for name in rows)])
    lines = [f"{'technique':<{width}}" + "".join(f"{head:>{_CELL}}" for head in _HEADS)]
    for name, means in rows.items():
        if isinstance(means, str):
            cells = f"  {means}"
        else:
            cells = "".join(f"{format_number(means[key]):>{_CELL}}" for key in COLUMNS)
        lines.append(f"{truncate_name(name):<{width}}{cells}")
    legend = [f"{head}: {meaning}" for head, meaning in zip(_HEADS, COLUMNS.values(), strict=True)]
    return "\n".join([*lines, f"{'; '.join(legend[:3])};", "; ".join(legend[3:])])


def class_lines(names: Sequence[str], per_class: Sequence[Mapping[str, float]]) -> str:
    """Format the metrics of the classes that have ground truth pixels as a table."""
    rows = [row for row in per_class if row["true_pixels"] > 0]
    labels = [truncate_name(names[int(row["label"])]) for row in rows]
    width = max([len("class"), *(len(label) for label in labels)])
    heads = ("IoU", "accuracy", "objects", "number")
    lines = [f"{'class':<{width}}" + "".join(f"{head:>{_CELL}}" for head in heads)]
    for label, row in zip(labels, rows, strict=True):
        values = [format_number(row[key]) for key in ("iou", "accuracy", "object_iou")]
        cells = "".join(f"{value:>{_CELL}}" for value in values)
        lines.append(f"{label:<{width}}{cells}{int(row['objects']):>{_CELL}}")
    return "\n".join(lines)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else -1.0
