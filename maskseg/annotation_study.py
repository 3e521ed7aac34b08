"""Techniques of annotation compared on images that have masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.bottomup.techniques import OF_MAPS, Technique
from maskseg.data.annotation_jobs import AnnotationJob, work_through
from maskseg.evaluation.annotation import AnnotationScores, Counts, agreement, annotation_table, class_lines
from maskseg.files import write_json
from maskseg.inference.annotation_pictures import plot_thresholds
from maskseg.inference.class_maps import Maps

WITHOUT = "needs weights: checkpoint=RUN of tools/train.py experiment=classify_..., or classifier=squeezenet1_1 weights=FILE"
# The measure by which the best technique is chosen, by `by`. Not the mean over classes of their objects: of a class with two objects it is chance.
CHOSEN_BY = {"object": "object_IoU", "class": "mIoU"}


@dataclass(frozen=True)
class Row:
    """A technique, its means by the names of `evaluation.annotation.COLUMNS`, and the numbers of each class."""

    technique: Technique
    means: Mapping[str, float]
    per_class: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Measuring:
    """A job -> for each mask that is wanted its label and, for each technique, TP, FP, FN, TN. Raises ValueError for a mask without truth."""

    techniques: tuple[Technique, ...]
    maps: Maps | None

    def __call__(self, job: AnnotationJob) -> list[tuple[int, list[Counts]]]:
        if not job.wanted:
            return []
        image, rows = job.load(), []
        maps = maps_of(self.maps if any(t.needs_map for t in self.techniques) else None, image, job)[1]
        for wanted, own in zip(job.wanted, maps, strict=True):
            truth = wanted.true_mask()
            if truth is None:
                raise ValueError(f"annotation {wanted.id} has no mask to compare with")
            rows.append((wanted.label, [agreement(technique(image, wanted.box, own).mask, truth) for technique in self.techniques]))
        return rows


def maps_of(maps: Maps | None, image: NDArray[np.uint8], job: AnnotationJob) -> tuple[list[float] | list[None], NDArray[np.float32] | list[None]]:
    """The score and the map [H, W] of the class of each mask that is wanted, Nones without a classifier."""
    if maps is None:
        return [None] * len(job.wanted), [None] * len(job.wanted)
    labels = sorted({wanted.label for wanted in job.wanted})
    scores, found = maps(image, labels)  # of each class once
    places = [labels.index(wanted.label) for wanted in job.wanted]
    return [scores[i] for i in places], found[places]


def study(
    jobs: Sequence[AnnotationJob],
    measuring: Measuring,
    journal: Path,
    settings: Mapping[str, Any],
    workers: int,
    num_classes: int,
    min_area: float,
) -> list[Row]:
    """Every technique on every job; see `work_through`."""
    found = work_through(jobs, measuring, journal, settings, workers, "techniques")
    scores = [AnnotationScores(num_classes, min_area) for _ in measuring.techniques]
    for rows in found.values():
        for label, counts in rows:
            for score, own in zip(scores, counts, strict=True):
                score.add(label, own)
    return [Row(t, s.compute(), s.per_class()) for t, s in zip(measuring.techniques, scores, strict=True)]


def best_of(rows: Sequence[Row], by: str) -> Row:
    """The highest mean IoU, of objects or of classes; the first of several."""
    return max(rows, key=lambda row: row.means[CHOSEN_BY[by]])


def study_text(rows: Sequence[Row], names: Sequence[str], by: str) -> str:
    """The table, what is lacking in it, and the classes of the best technique."""
    means: dict[str, Mapping[str, float] | str] = {row.technique.text: row.means for row in rows}
    means |= {name: WITHOUT for name in OF_MAPS if not any(row.technique.name == name for row in rows)}
    best = best_of(rows, by)
    return f"{annotation_table(means)}\n\n{best.technique.text}, class by class:\n{class_lines(names, best.per_class)}"


def save_study(rows: Sequence[Row], names: Sequence[str], table: Path, curves: Path) -> None:
    """The numbers as JSON, the curves as a picture."""
    told = [
        {
            **row.technique.values(),
            **row.means,
            "classes": [{"name": names[int(own["label"])], **own} for own in row.per_class if own["true_pixels"] > 0],
        }
        for row in rows
    ]
    write_json(table, told)
    plot_thresholds([(row.technique.name, row.technique.threshold, row.means) for row in rows], curves)
