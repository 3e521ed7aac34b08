"""How well proposed masks agree with true ones: the measures of "Using Deep Features for Segmentation Annotations", pooled over pixels, and the mean
IoU of objects, to which large and small ones count alike.

TP, FP, FN, TN: pixels of an image that are in both masks, in the proposed one alone, in the true one alone, in neither; summed over all masks of a
class. IoU = TP / (TP + FP + FN); accuracy = (TP + TN) / (TP + FP + FN + TN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.evaluation.table import _number, _shortened

Bools = NDArray[np.bool_]
Counts = tuple[int, int, int, int]  # TP, FP, FN, TN
SMALL = 1024.0  # pixels: 32 x 32, COCO's small objects
COLUMNS = {
    "mIoU": "mean over classes of the pooled IoU",
    "frequency_weighted_IoU": "the same, weighted by true pixels",
    "mean_accuracy": "mean over classes of the pooled accuracy",
    "object_IoU": "mean over objects",
    "class_object_IoU": "mean over classes of their objects' mean",
}
ANY_SIZE = "any_object_IoU"  # the mean over objects, small ones too; what techniques are chosen by, and no column
_HEADS = ("mIoU", "fwIoU", "mAcc", "objects", "by class")
_CELL = 10  # characters of a number


def agreement(proposed: Bools, truth: Bools) -> Counts:
    """TP, FP, FN, TN of two masks [H, W]. Raises ValueError for shapes that differ."""
    if proposed.shape != truth.shape:
        raise ValueError(f"a mask of {proposed.shape} cannot be compared with one of {truth.shape}")
    both, found, true = (
        int(np.count_nonzero(mask)) for mask in (proposed & truth, proposed, truth)
    )
    return both, found - both, true - both, truth.size - found - true + both


class AnnotationScores:
    """Collects the counts of masks one by one, then gives the means.

    num_classes: K; min_area: objects of fewer true pixels count in the pooled measures, and in the mean over objects of any size, alone.
    """

    def __init__(self, num_classes: int, min_area: float = SMALL) -> None:
        self.min_area = min_area
        self.pooled: NDArray[np.int64] = np.zeros((num_classes, 4), dtype=np.int64)
        self.sums: NDArray[np.float64] = np.zeros(
            (num_classes, 2)
        )  # of the objects' IoU, and how many
        self.every: NDArray[np.float64] = np.zeros(2)  # the same over objects of any class and size

    def add(self, label: int, counts: Sequence[int]) -> None:
        """One mask of class 0..K-1 and its TP, FP, FN, TN."""
        self.pooled[label] += np.asarray(counts, dtype=np.int64)
        true, either = counts[0] + counts[2], sum(counts[:3])
        if true:
            self.every += (counts[0] / either, 1)
        if true >= self.min_area and either:
            self.sums[label] += (counts[0] / either, 1)

    def compute(self) -> dict[str, float]:
        """The means by the names of COLUMNS, over the classes that have a pixel in some mask, and ANY_SIZE; -1 where there is nothing to average."""
        iou, accuracy = self._classes()
        seen, true = iou >= 0, self.pooled[:, 0] + self.pooled[:, 2]
        there = self.sums[:, 1] > 0
        means = self.sums[there, 0] / self.sums[there, 1]
        return {
            "mIoU": _mean(iou[seen]),
            "frequency_weighted_IoU": float((true * iou)[seen].sum() / true.sum())
            if true.sum()
            else -1.0,
            "mean_accuracy": _mean(accuracy[seen]),
            "object_IoU": float(self.sums[:, 0].sum() / self.sums[:, 1].sum())
            if there.any()
            else -1.0,
            "class_object_IoU": _mean(means),
            ANY_SIZE: float(self.every[0] / self.every[1]) if self.every[1] else -1.0,
        }

    def per_class(self) -> list[dict[str, float]]:
        """Of each class: label, iou and accuracy (pooled), object_iou, objects (that count there), true_pixels; -1 where there is none."""
        iou, accuracy = self._classes()
        objects = np.where(
            self.sums[:, 1] > 0, self.sums[:, 0] / np.maximum(self.sums[:, 1], 1), -1.0
        )
        columns = (iou, accuracy, objects, self.sums[:, 1], self.pooled[:, 0] + self.pooled[:, 2])
        names = ("iou", "accuracy", "object_iou", "objects", "true_pixels")
        return [
            {"label": k, **dict(zip(names, map(float, row), strict=True))}
            for k, row in enumerate(zip(*columns, strict=True))
        ]

    def _classes(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pooled IoU and accuracy, [K] each, -1 for classes without a pixel in any mask."""
        tp, tn = self.pooled[:, 0], self.pooled[:, 3]
        either, pixels = self.pooled[:, :3].sum(axis=1), self.pooled.sum(axis=1)
        return np.where(either > 0, tp / np.maximum(either, 1), -1.0), np.where(
            either > 0, (tp + tn) / np.maximum(pixels, 1), -1.0
        )


def annotation_table(rows: Mapping[str, Mapping[str, float] | str]) -> str:
    """The means of each technique as text, in the order of `rows`; a text instead of numbers says why there are none."""
    wide = max([len("technique"), *(min(len(name), 28) for name in rows)])
    lines = [f"{'technique':<{wide}}" + "".join(f"{head:>{_CELL}}" for head in _HEADS)]
    for name, found in rows.items():
        cells = (
            f"  {found}"
            if isinstance(found, str)
            else "".join(f"{_number(found[key]):>{_CELL}}" for key in COLUMNS)
        )
        lines.append(f"{_shortened(name):<{wide}}{cells}")
    legend = [f"{head}: {meaning}" for head, meaning in zip(_HEADS, COLUMNS.values(), strict=True)]
    return "\n".join([*lines, f"{'; '.join(legend[:3])};", "; ".join(legend[3:])])


def class_lines(names: Sequence[str], per_class: Sequence[Mapping[str, Any]]) -> str:
    """Pooled IoU and accuracy, and the mean IoU of objects of each class that has true pixels, as text."""
    rows = [row for row in per_class if row["true_pixels"] > 0]
    wide = max([len("class"), *(len(_shortened(names[int(row["label"])])) for row in rows)])
    lines = [
        f"{'class':<{wide}}"
        + "".join(f"{head:>{_CELL}}" for head in ("IoU", "accuracy", "objects", "number"))
    ]
    for row in rows:
        cells = "".join(
            f"{_number(row[key]):>{_CELL}}" for key in ("iou", "accuracy", "object_iou")
        )
        lines.append(
            f"{_shortened(names[int(row['label'])]):<{wide}}{cells}{int(row['objects']):>{_CELL}}"
        )
    return "\n".join(lines)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else -1.0
