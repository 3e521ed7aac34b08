"""Average precision (AP) of image classification, per class over all images.

AP is the area under the step function of precision over recall, without interpolation:
sum over thresholds of (R_n - R_{n-1}) P_n, where images of equal score form one threshold (as in
torchmetrics and scikit-learn; VOC and COCO make precision monotone first, which yields slightly
higher values).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.evaluation.table import arrange_columns, format_number, truncate_name

Floats = NDArray[np.float64]
# For each image its scores [K] and the labels of the classes that it shows.
State = list[tuple[list[float], list[int]]]


class ImageClassAP:
    """Accumulates images, then computes AP. `merge` joins what several processes accumulated."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._rows: State = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, scores: Tensor, present: Tensor) -> None:
        """Add images.

        scores: [N, K]; present: bool [N, K], the classes that each image shows. Raises ValueError
        for other shapes and for scores that are not finite.
        """
        if scores.shape != present.shape or scores.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"scores and classes of images must both be [N, {self.num_classes}], "
                f"got {list(scores.shape)} and {list(present.shape)}"
            )
        if not scores.isfinite().all():
            raise ValueError("the score of an image is not finite: has the training diverged?")
        for row, flags in zip(scores.tolist(), present.tolist(), strict=True):
            self._rows.append((row, [label for label, flag in enumerate(flags) if flag]))

    def state(self) -> State:
        """Everything accumulated so far as plain values, one row per image."""
        return list(self._rows)

    def merge(self, state: State) -> None:
        """Add the images of another object's `state`."""
        self._rows += state

    def per_class(self) -> list[dict[str, float]]:
        """Label, AP in [0, 1] (-1 if no image shows it) and number of images of each class."""
        rows = [row for row, _ in self._rows]
        scores = np.array(rows, dtype=np.float64).reshape(-1, self.num_classes)
        present = np.zeros(scores.shape, dtype=bool)
        for i, (_, labels) in enumerate(self._rows):
            present[i, labels] = True
        return [
            {
                "label": label,
                "AP": average_precision(scores[:, label], present[:, label]),
                "images": int(present[:, label].sum()),
            }
            for label in range(self.num_classes)
        ]

    def compute(self) -> dict[str, float]:
        """Compute mAP, the mean over the classes that occur in any image; -1 without any.

        torchmetrics (1.9) also counts the other classes, as 0.
        """
        values = [row["AP"] for row in self.per_class() if row["AP"] >= 0]
        return {"mAP": float(np.mean(values)) if values else -1.0}

    def table(self, names: Sequence[str], width: int = 110) -> str:
        """Format mAP, and AP and number of images of each class, as text.

        names: K class names; width: characters per line. `-` stands for a class that no image
        shows.
        """
        name_width = max(12, *(len(truncate_name(name)) for name in names))
        entries = []
        for name, row in zip(names, self.per_class(), strict=True):
            ap = format_number(row["AP"])
            entries.append(f"{truncate_name(name):<{name_width}}{ap:>8}{row['images']:>8.0f}")
        title = f"classes of {len(self)} images: mAP {format_number(self.compute()['mAP'])}"
        head = f"{'class':<{name_width}}{'AP':>8}{'images':>8}"
        return "\n".join([title, "", *arrange_columns(head, entries, width)])


def average_precision(scores: Floats, present: NDArray[np.bool_]) -> float:
    """Compute the AP of one class in [0, 1]; -1 if no image shows it.

    scores: f64 [N]; present: bool [N].
    """
    if not present.any():
        return -1.0
    order = np.argsort(-scores, kind="stable")
    last_of_ties = np.append(np.diff(scores[order]) != 0, True)
    true_positives = np.cumsum(present[order])[last_of_ties]
    precision = true_positives / (np.flatnonzero(last_of_ties) + 1)
    steps = np.diff(true_positives, prepend=0)
    return float(np.sum(steps * precision) / true_positives[-1])
