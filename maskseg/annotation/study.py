"""What is done with each image of a data set: masks are proposed, or techniques compared where there are masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.annotation.activation_maps import ClassMap, Maps
from maskseg.annotation.jobs import AnnotationJob
from maskseg.annotation.metrics import (
    ANY_SIZE,
    AnnotationScores,
    Counts,
    agreement,
    annotation_table,
    class_lines,
)
from maskseg.annotation.pictures import plot_thresholds
from maskseg.annotation.polygons import polygons
from maskseg.annotation.techniques import OF_MAPS, Technique
from maskseg.files import write_json
from maskseg.masks.base import encoded

WITHOUT = "needs weights: checkpoint=RUN of tools/train.py experiment=classify_..., or classifier=squeezenet1_1 weights=FILE"
# The measure by which the best technique is chosen, by `by`. Of objects all count: those of a data set may all be small. Not the mean over classes of
# their objects: of a class with two objects it is chance.
CHOSEN_BY = {"object": ANY_SIZE, "class": "mIoU"}
Found = dict[
    int, list[tuple[int, list[Counts]]]
]  # by image id: of each mask its label and, for each technique, TP, FP, FN, TN


@dataclass(frozen=True)
class Row:
    """A technique, its means as `AnnotationScores` gives them, and the numbers of each class."""

    technique: Technique
    means: Mapping[str, float]
    per_class: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Proposing:
    """A job -> for each mask that is wanted: id, label, segmentation, area, bbox (x, y, width, height) and mask_by, which tells how it came about."""

    technique: Technique
    maps: Maps | None
    as_polygons: bool

    def __call__(self, job: AnnotationJob) -> list[dict[str, Any]]:
        if not job.wanted:
            return []
        image, rows = job.load(), []
        for wanted, (score, own) in zip(job.wanted, maps_of(self.maps, image, job), strict=True):
            cut = self.technique(image, wanted.box, own)
            rle, box = encoded(cut.mask)
            told = {
                "technique": self.technique.name,
                "threshold": self.technique.threshold,
                "thresholds": self.technique.thresholds(),
            }
            told |= {"score": score, "fallback": cut.fallback or None}
            rows.append(
                {
                    "id": wanted.id,
                    "label": wanted.label,
                    "segmentation": polygons(cut.mask) if self.as_polygons else rle,
                    "area": int(cut.mask.sum()),
                    "bbox": box,
                    "mask_by": {key: value for key, value in told.items() if value is not None},
                }
            )
        return rows


@dataclass(frozen=True)
class Measuring:
    """A job -> for each mask that is wanted its label and, for each technique, TP, FP, FN, TN. Raises ValueError for a mask without truth."""

    techniques: tuple[Technique, ...]
    maps: Maps | None

    def __call__(self, job: AnnotationJob) -> list[tuple[int, list[Counts]]]:
        if not job.wanted:
            return []
        image, rows = job.load(), []
        maps = maps_of(self.maps if any(t.needs_map for t in self.techniques) else None, image, job)
        for wanted, (_, own) in zip(job.wanted, maps, strict=True):
            truth = wanted.true_mask()
            if truth is None:
                raise ValueError(f"annotation {wanted.id} has no mask to compare with")
            rows.append(
                (
                    wanted.label,
                    [
                        agreement(technique(image, wanted.box, own).mask, truth)
                        for technique in self.techniques
                    ],
                )
            )
        return rows


def maps_of(
    maps: Maps | None, image: NDArray[np.uint8], job: AnnotationJob
) -> list[ClassMap | tuple[None, None]]:
    """The score and the map [H, W] of the class of each mask that is wanted, Nones without a classifier and for a class that has no map."""
    labels = sorted({wanted.label for wanted in job.wanted})  # each class once
    found = {} if maps is None else dict(zip(labels, maps(image, labels), strict=True))
    return [found.get(wanted.label) or (None, None) for wanted in job.wanted]


def study(
    found: Found, techniques: Sequence[Technique], num_classes: int, min_area: float
) -> list[Row]:
    """The means of every technique over what `Measuring` found."""
    scores = [AnnotationScores(num_classes, min_area) for _ in techniques]
    for rows in found.values():
        for label, counts in rows:
            for score, own in zip(scores, counts, strict=True):
                score.add(label, own)
    return [Row(t, s.compute(), s.per_class()) for t, s in zip(techniques, scores, strict=True)]


def best_of(rows: Sequence[Row], by: str) -> Row:
    """The highest mean IoU, of objects of any size or of classes; the first of several."""
    return max(rows, key=lambda row: row.means[CHOSEN_BY[by]])


def study_text(rows: Sequence[Row], names: Sequence[str], by: str) -> str:
    """The table, what is lacking in it, and the classes of the best technique."""
    means: dict[str, Mapping[str, float] | str] = {row.technique.text: row.means for row in rows}
    means |= {
        name: WITHOUT for name in OF_MAPS if not any(row.technique.name == name for row in rows)
    }
    best = best_of(rows, by)
    measure = f"{'mean IoU of objects of any size' if by == 'object' else 'mIoU'}, {best.means[CHOSEN_BY[by]]:.3f}"
    lines = class_lines(names, best.per_class)
    return f"{annotation_table(means)}\n\n{best.technique.text} has the highest {measure}; class by class:\n{lines}"


def save_study(rows: Sequence[Row], names: Sequence[str], table: Path, curves: Path) -> None:
    """The numbers as JSON, the curves as a picture."""
    told = [
        {
            **row.technique.values(),
            **row.means,
            "classes": [
                {"name": names[int(own["label"])], **own}
                for own in row.per_class
                if own["true_pixels"] > 0
            ],
        }
        for row in rows
    ]
    write_json(table, told)
    plot_thresholds(
        [(row.technique.name, row.technique.threshold, row.means) for row in rows], curves
    )
