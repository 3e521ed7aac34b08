"""Semantic segmentation metrics from the confusion matrix of pixels (Long et al. 2015, section 5).

The IoU of a class is the number of pixels labeled as it in both maps over those labeled as it in
either. Unlabeled pixels are ignored. A pixel predicted as no class is a miss: it lowers the IoU and
the accuracy of its true class, and is a false positive of no class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.evaluation.table import arrange_columns, format_number, join_cells, truncate_name

Labels = NDArray[np.integer]  # [H, W]
Map = Labels | Tensor  # [H, W], the label of each pixel, -1 for none
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MEANINGS = {
    "mIoU": "mean over classes",
    "mIoU_things": "of the things",
    "mIoU_stuff": "of the stuff",
    "frequency_weighted_IoU": "by true pixels",
    "pixel_accuracy": "share of pixels",
    "mean_accuracy": "mean over classes",
}
_CELL = 10  # characters of a number
_MIN_NAME_WIDTH = 12  # characters


class SemanticConfusion:
    """Accumulates maps, then computes metrics. `merge` joins several processes' in any order.

    matrix: i64 [K, K + 1] pixels, ground truth in rows, prediction in columns, no class last.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"a confusion matrix needs at least one class, not {num_classes}")
        self.num_classes = num_classes
        self.matrix: Ints = np.zeros((num_classes, num_classes + 1), dtype=np.int64)

    def add(self, predicted: Map, truth: Map) -> None:
        """Add one image.

        predicted, truth: [H, W] of labels 0..K-1 (arrays, or tensors on the CPU), or -1: no class
        predicted, or unlabeled. Raises ValueError if the shapes differ, the maps are not integers,
        or other labels occur.
        """
        predicted_labels = self._check_labels("predicted", np.asarray(predicted))
        true_labels = self._check_labels("true", np.asarray(truth))
        if predicted_labels.shape != true_labels.shape:
            raise ValueError(
                f"predicted labels of shape {predicted_labels.shape} cannot be compared with true "
                f"ones of shape {true_labels.shape}"
            )
        side = self.num_classes + 1
        # -1 gets a row and a column of its own: faster than selecting the labeled pixels first.
        rows = true_labels.astype(np.int64) + 1
        pairs = rows * side + (predicted_labels.astype(np.int64) + 1)
        counts = np.bincount(pairs.ravel(), minlength=side * side).reshape(side, side)
        self.matrix += np.roll(counts[1:], -1, axis=1)

    def _check_labels(self, name: str, labels: Labels) -> Labels:
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{name} labels must be integers, not {labels.dtype}")
        if labels.size and not (labels.min() >= -1 and labels.max() < self.num_classes):
            raise ValueError(
                f"{name} labels must be in -1..{self.num_classes - 1}, "
                f"got {labels.min()} to {labels.max()}"
            )
        return labels

    def state(self) -> list[list[int]]:
        """Everything accumulated so far as plain values: the matrix."""
        return [[int(count) for count in row] for row in self.matrix]

    def merge(self, state: Sequence[Sequence[int]]) -> None:
        """Add another object's `state`; raises ValueError if its number of classes differs."""
        other = np.array(state, dtype=np.int64)
        if other.shape != self.matrix.shape:
            raise ValueError(
                f"a confusion matrix of {self.num_classes} classes cannot be merged with a matrix "
                f"of shape {other.shape}"
            )
        self.matrix += other

    def compute(self, num_things: int | None = None) -> dict[str, float]:
        """Compute the means; zeros without images.

        mIoU: over the classes that occur in the ground truth or the prediction; mIoU_things and
        mIoU_stuff: of classes 0..num_things-1 and of the others, if `num_things` is given;
        frequency_weighted_IoU: weighted by true pixels; pixel_accuracy: share of the labeled pixels
        that are correct; mean_accuracy: over the classes that occur in the ground truth.

        torchmetrics (1.9) counts a class that is predicted but not in the ground truth as 0 in its
        macro accuracy; here it only lowers the IoU.
        """
        iou, accuracy, pixels, _ = self._class_metrics()
        means = {"mIoU": _mean(iou)}
        if num_things is not None:
            means["mIoU_things"] = _mean(iou[:num_things])
            means["mIoU_stuff"] = _mean(iou[num_things:])
        total = max(int(pixels.sum()), 1)
        # The undefined IoU (-1) of a class without true pixels has weight 0.
        means["frequency_weighted_IoU"] = float((pixels * iou).sum() / total)
        means["pixel_accuracy"] = int(np.trace(self.matrix)) / total
        means["mean_accuracy"] = _mean(accuracy)
        return means

    def per_class(self) -> list[dict[str, float]]:
        """Compute the metrics of each class, over labeled pixels.

        label; iou (-1 if it occurs in neither map); accuracy (-1 if it is not in the ground truth);
        pixels (true) and predicted_pixels.
        """
        iou, accuracy, pixels, predicted_pixels = self._class_metrics()
        return [
            {
                "label": label,
                "iou": float(iou[label]),
                "accuracy": float(accuracy[label]),
                "pixels": int(pixels[label]),
                "predicted_pixels": int(predicted_pixels[label]),
            }
            for label in range(self.num_classes)
        ]

    def _class_metrics(self) -> tuple[Floats, Floats, Ints, Ints]:
        """IoU and accuracy (-1 where undefined), true and predicted pixels per class, [K] each."""
        correct = np.diagonal(self.matrix)
        pixels = self.matrix.sum(axis=1)
        predicted_pixels = self.matrix[:, :-1].sum(axis=0)
        union = pixels + predicted_pixels - correct
        return _ratio(correct, union), _ratio(correct, pixels), pixels, predicted_pixels

    def table(self, names: Sequence[str], num_things: int | None = None, width: int = 110) -> str:
        """Format the means, and IoU, accuracy and share of labeled pixels of each class, as text.

        names: K class names; num_things: lists things and stuff separately if given; width:
        characters per line. `-` stands for a class that does not occur. Classes fill as many
        columns as fit, downwards first. Raises ValueError for another number of names.
        """
        if len(names) != self.num_classes:
            raise ValueError(f"{self.num_classes} classes need as many names, got {len(names)}")
        lines = []
        for key, value in self.compute(num_things).items():
            lines.append(f"{key:<23}{_MEANINGS[key]:<18}{format_number(value):>8}")
        total = max(int(self.matrix.sum()), 1)
        name_width = max(_MIN_NAME_WIDTH, *(len(truncate_name(name)) for name in names))
        entries = []
        for name, row in zip(names, self.per_class(), strict=True):
            cells = [format_number(row["iou"]), format_number(row["accuracy"])]
            cells += [f"{100 * row[key] / total:.2f}" for key in ("pixels", "predicted_pixels")]
            entries.append(f"{truncate_name(name):<{name_width}}" + join_cells(cells, _CELL))
        groups = {"class": entries}
        if num_things is not None:
            groups = {"things": entries[:num_things], "stuff": entries[num_things:]}
        head = join_cells(["IoU", "accuracy", "true %", "pred. %"], _CELL)
        for title, group in groups.items():
            if group:
                lines += ["", *arrange_columns(f"{title:<{name_width}}{head}", group, width)]
        return "\n".join(lines)


def _ratio(numerator: Ints, denominator: Ints) -> Floats:
    """Divide elementwise; -1 where the denominator is 0."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), -1.0)


def _mean(values: Floats) -> float:
    """The mean of the defined (non-negative) values; 0 without any."""
    defined = values[values >= 0]
    return float(defined.mean()) if len(defined) else 0.0
