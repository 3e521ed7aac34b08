"""How well per-pixel maps of classes agree with the truth: the confusion of classes over all pixels, and the means of Long et al. 2015, section 5.

IoU of a class: pixels that are it in both maps, over those that are it in either. Unlabelled pixels count nowhere. A pixel that was given no class
is missed: it lowers IoU and accuracy of its true class, and is false of none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.evaluation.table import _cells, _number, _shortened

Map = NDArray[np.integer[Any]] | Tensor  # [H, W], the label of each pixel, -1 for none
Floats = NDArray[np.float64]

_MEANINGS = {
    "mIoU": "mean over classes",
    "mIoU_things": "of the things",
    "mIoU_stuff": "of the stuff",
    "frequency_weighted_IoU": "by true pixels",
    "pixel_accuracy": "share of pixels",
    "mean_accuracy": "mean over classes",
}
_CELL, _NAME, _GAP = 10, 12, "   "  # characters of a number, and of the names at least


class SemanticConfusion:
    """Collects maps one by one, then gives the means. What several processes have collected is joined by `merge`, in any order.

    matrix: i64 [K, K + 1] pixels, truth in rows, prediction in columns, no class last.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"a confusion of classes needs at least one class, not {num_classes}")
        self.num_classes = num_classes
        self.matrix: NDArray[np.int64] = np.zeros((num_classes, num_classes + 1), dtype=np.int64)

    def add(self, predicted: Map, truth: Map) -> None:
        """One image: two maps [H, W] of labels 0..K-1 (arrays, or tensors on the CPU); predicted -1: given no class; truth -1: unlabelled.

        Raises ValueError for shapes that differ, maps that are not of integers, and other labels.
        """
        found, true = (
            self._checked(name, np.asarray(labels))
            for name, labels in (("predicted", predicted), ("true", truth))
        )
        if found.shape != true.shape:
            raise ValueError(
                f"predicted labels of shape {found.shape} cannot be compared with true ones of shape {true.shape}"
            )
        side = self.num_classes + 1
        # -1 is a row and a column of its own: this is faster than to pick out the labelled pixels first.
        pairs = (true.astype(np.int64) + 1) * side + (found.astype(np.int64) + 1)
        counts = np.bincount(pairs.ravel(), minlength=side * side).reshape(side, side)
        self.matrix += np.roll(counts[1:], -1, axis=1)

    def _checked(self, name: str, labels: NDArray[Any]) -> NDArray[np.integer[Any]]:
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name} labels must be integers, not {labels.dtype}")
        if labels.size and not (labels.min() >= -1 and labels.max() < self.num_classes):
            raise ValueError(
                f"{name} labels must lie in -1..{self.num_classes - 1}, they go from {labels.min()} to {labels.max()}"
            )
        return labels

    def state(self) -> list[list[int]]:
        """What was collected, as plain values: the matrix."""
        return [[int(count) for count in row] for row in self.matrix]

    def merge(self, state: Sequence[Sequence[int]]) -> None:
        """Adds another object's `state`. Raises ValueError for one of another number of classes."""
        other = np.array(state, dtype=np.int64)
        if other.shape != self.matrix.shape:
            raise ValueError(
                f"a confusion of {self.num_classes} classes cannot be joined with a matrix of shape {other.shape}"
            )
        self.matrix += other

    def compute(self, num_things: int | None = None) -> dict[str, float]:
        """The means; zeros where nothing was added.

        mIoU: over the classes that are in the truth or the prediction; frequency_weighted_IoU: weighted by the true pixels; pixel_accuracy: the share
        of the labelled pixels that are right; mean_accuracy: over the classes that are in the truth. mIoU_things and mIoU_stuff: of classes
        0..num_things-1 and of the others, where `num_things` is given.
        torchmetrics (1.9) counts a class that is predicted but not in the truth into its macro accuracy, with 0; here it lowers the IoU alone.
        """
        iou, accuracy, pixels, _ = self._classes()
        means = {"mIoU": _mean(iou)}
        if num_things is not None:
            means |= {"mIoU_things": _mean(iou[:num_things]), "mIoU_stuff": _mean(iou[num_things:])}
        total = max(int(pixels.sum()), 1)
        return means | {
            "frequency_weighted_IoU": float(
                (pixels * iou).sum() / total
            ),  # a class without pixels adds nothing, whatever its IoU
            "pixel_accuracy": int(np.trace(self.matrix)) / total,
            "mean_accuracy": _mean(accuracy),
        }

    def per_class(self) -> list[dict[str, float]]:
        """Of each class: label, iou (-1 where it is in neither map), accuracy (-1 where it is not in the truth), pixels (true ones) and
        predicted_pixels, both among the labelled."""
        names = ("iou", "accuracy", "pixels", "predicted_pixels")
        return [
            {"label": k, **dict(zip(names, row, strict=True))}
            for k, row in enumerate(zip(*(c.tolist() for c in self._classes()), strict=True))
        ]

    def _classes(self) -> tuple[Floats, Floats, NDArray[np.int64], NDArray[np.int64]]:
        """IoU, accuracy (-1 where there is none), true and predicted pixels of each class, [K] each."""
        right, pixels, predicted = (
            np.diagonal(self.matrix),
            self.matrix.sum(axis=1),
            self.matrix[:, :-1].sum(axis=0),
        )
        either = pixels + predicted - right
        iou, accuracy = (
            np.where(count > 0, right / np.maximum(count, 1), -1.0) for count in (either, pixels)
        )
        return iou, accuracy, pixels, predicted

    def table(self, names: Sequence[str], num_things: int | None = None, width: int = 110) -> str:
        """The means, and IoU, accuracy and share of the labelled pixels of each class, as text; with `num_things`, things and stuff apart.

        names: K class names; width: characters of a line. `-` stands for a class that is not there. Classes fill as many columns as the width allows,
        downwards first.
        """
        if len(names) != self.num_classes:
            raise ValueError(f"{self.num_classes} classes need as many names, got {len(names)}")
        lines = [
            f"{key:<23}{_MEANINGS[key]:<18}{_number(value):>8}"
            for key, value in self.compute(num_things).items()
        ]
        total = max(int(self.matrix.sum()), 1)
        longest = max(_NAME, *(len(_shortened(name)) for name in names))
        entries = []
        for name, row in zip(names, self.per_class(), strict=True):
            shares = [f"{100 * row[key] / total:.2f}" for key in ("pixels", "predicted_pixels")]
            entries.append(
                f"{_shortened(name):<{longest}}"
                + _cells([_number(row["iou"]), _number(row["accuracy"]), *shares], _CELL)
            )
        groups = (
            {"class": entries}
            if num_things is None
            else {"things": entries[:num_things], "stuff": entries[num_things:]}
        )
        head = _cells(["IoU", "accuracy", "true %", "found %"], _CELL)
        for title, group in groups.items():
            lines += ["", *_in_columns(f"{title:<{longest}}{head}", group, width)] if group else []
        return "\n".join(lines)


def _mean(values: Floats) -> float:
    """Over those that are there; 0 without any."""
    there = values[values >= 0]
    return float(there.mean()) if len(there) else 0.0


def _in_columns(head: str, entries: Sequence[str], width: int) -> list[str]:
    columns = max(1, min((width + len(_GAP)) // (len(head) + len(_GAP)), -(-len(entries) // 8)))
    rows = -(-len(entries) // columns)
    blocks = [entries[i : i + rows] for i in range(0, len(entries), rows)]
    lines = [_GAP.join([head] * len(blocks))]
    return lines + [
        _GAP.join(line).rstrip() for line in itertools.zip_longest(*blocks, fillvalue="")
    ]
