"""How well scores of images tell the classes that they show: average precision of each class over all images.

The area under the steps of precision over recall, not interpolated: sum over thresholds of (R_n - R_{n-1}) P_n, images of equal score taken together
(as torchmetrics' and scikit-learn's average precision; VOC's and COCO's AP make precision fall monotonically first and are a little higher).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.evaluation.semantic import _in_columns
from maskseg.evaluation.table import _number, _shortened

Floats = NDArray[np.float64]
State = list[
    tuple[list[float], list[int]]
]  # of each image its scores [K] and the classes that it shows


class ImageClassAP:
    """Collects images, then gives the numbers. What several processes have collected is joined by `merge`."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._rows: State = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, scores: Tensor, present: Tensor) -> None:
        """scores: [N, K]; present: bool [N, K], which classes each image shows. Raises ValueError for other shapes and for scores that are not
        finite."""
        if (
            scores.shape != present.shape
            or scores.dim() != 2
            or scores.shape[1] != self.num_classes
        ):
            raise ValueError(
                f"scores and classes of images must both be [N, {self.num_classes}], got {list(scores.shape)} and {list(present.shape)}"
            )
        if not scores.isfinite().all():
            raise ValueError("a score of an image is not finite: has the training diverged?")
        for row, shown in zip(scores.tolist(), present.tolist(), strict=True):
            self._rows.append((row, [k for k, there in enumerate(shown) if there]))

    def state(self) -> State:
        """What was collected, as plain values: a row an image."""
        return list(self._rows)

    def merge(self, state: State) -> None:
        """Adds the images of another object's `state`."""
        self._rows += state

    def per_class(self) -> list[dict[str, float]]:
        """Of each class: label, AP in [0, 1] (-1 where no image shows it), images that show it."""
        scores = np.array([row for row, _ in self._rows], dtype=np.float64).reshape(
            -1, self.num_classes
        )
        present = np.zeros(scores.shape, dtype=bool)
        for i, (_, shown) in enumerate(self._rows):
            present[i, shown] = True
        return [
            {
                "label": k,
                "AP": average_precision(scores[:, k], present[:, k]),
                "images": int(present[:, k].sum()),
            }
            for k in range(self.num_classes)
        ]

    def compute(self) -> dict[str, float]:
        """mAP: the mean over the classes that some image shows, -1 without any. torchmetrics (1.9) counts the others too, with 0."""
        found = [row["AP"] for row in self.per_class() if row["AP"] >= 0]
        return {"mAP": float(np.mean(found)) if found else -1.0}

    def table(self, names: Sequence[str], width: int = 110) -> str:
        """mAP, and AP and images of each class, as text; `-` for a class that no image shows. Classes fill as many columns as the width allows."""
        longest = max(12, *(len(_shortened(name)) for name in names))
        rows = zip(names, self.per_class(), strict=True)
        entries = [
            f"{_shortened(name):<{longest}}{_number(row['AP']):>8}{row['images']:>8.0f}"
            for name, row in rows
        ]
        lines = [f"classes of {len(self)} images: mAP {_number(self.compute()['mAP'])}", ""]
        return "\n".join(
            lines + _in_columns(f"{'class':<{longest}}{'AP':>8}{'images':>8}", entries, width)
        )


def average_precision(scores: Floats, present: NDArray[np.bool_]) -> float:
    """scores: [N]; present: [N] -> in [0, 1], -1 where nothing is present."""
    if not present.any():
        return -1.0
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of the images with one score
    right = np.cumsum(present[order])[last]
    precision = right / (np.flatnonzero(last) + 1)
    return float(np.sum(np.diff(right, prepend=0) * precision) / right[-1])
