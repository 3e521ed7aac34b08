"""Work on each image of a data set: propose masks, or score techniques against the ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskseg.annotation.activation_maps import ActivationMapper, ScoredMap
from maskseg.annotation.jobs import AnnotationJob
from maskseg.annotation.metrics import (
    OBJECT_IOU_ANY_SIZE,
    AnnotationScores,
    Counts,
    annotation_table,
    class_lines,
    confusion_counts,
)
from maskseg.annotation.pictures import plot_thresholds
from maskseg.annotation.techniques import CAM_TECHNIQUES, Technique
from maskseg.annotation.write import MaskProvenance, ProposedMask
from maskseg.errors import warn_if_not_drawn
from maskseg.files import write_json
from maskseg.masks.base import encode_rle
from maskseg.masks.polygons import coco_polygons

NO_CLASSIFIER = (
    "needs weights: checkpoint=RUN of tools/train.py experiment=classify_..., "
    "or classifier=squeezenet1_1 weights=FILE"
)
# The metric that selects the best technique, by mode. It includes objects of all sizes, as a data
# set may have small ones only, and it is not a mean over classes of object means, as that is
# random for a class with two objects.
SELECTION_METRIC = {"object": OBJECT_IOU_ANY_SIZE, "class": "mIoU"}
# By image id: the label of each mask and, for each technique, its TP, FP, FN, TN.
CountsByImage = dict[int, list[tuple[int, list[Counts]]]]


@dataclass(frozen=True)
class TechniqueScores:
    """A technique, its means (`AnnotationScores.compute`) and its metrics of each class."""

    technique: Technique
    means: Mapping[str, float]
    per_class: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class ProposeMasks:
    """Computes the requested masks of a job.

    Each mask is a dict with id, label, segmentation, area, bbox (x, y, width, height) and mask_by,
    which records how it was computed.
    """

    technique: Technique
    maps: ActivationMapper | None
    as_polygons: bool

    def __call__(self, job: AnnotationJob) -> list[ProposedMask]:
        if not job.requests:
            return []
        image = job.load()
        rows: list[ProposedMask] = []
        scored_maps = request_maps(self.maps, image, job)
        for request, (score, class_map) in zip(job.requests, scored_maps, strict=True):
            result = self.technique(image, request.box, class_map)
            rle, box = encode_rle(result.mask)
            rows.append(
                {
                    "id": request.id,
                    "label": request.label,
                    "segmentation": coco_polygons(result.mask) if self.as_polygons else rle,
                    "area": int(result.mask.sum()),
                    "bbox": box,
                    "mask_by": self._provenance(score, result.fallback_reason),
                }
            )
        return rows

    def _provenance(self, score: float | None, fallback_reason: str) -> MaskProvenance:
        provenance: MaskProvenance = {"technique": self.technique.name}
        thresholds = self.technique.thresholds()
        if self.technique.threshold is not None:
            provenance["threshold"] = self.technique.threshold
        if thresholds is not None:
            provenance["thresholds"] = thresholds
        if score is not None:
            provenance["score"] = score
        if fallback_reason:
            provenance["fallback"] = fallback_reason
        return provenance


@dataclass(frozen=True)
class ScoreTechniques:
    """Compares the masks of several techniques with the ground truth of a job.

    Returns, for each requested mask, its label and the TP, FP, FN, TN of each technique. Raises
    ValueError for a mask without ground truth.
    """

    techniques: tuple[Technique, ...]
    maps: ActivationMapper | None

    def __call__(self, job: AnnotationJob) -> list[tuple[int, list[Counts]]]:
        if not job.requests:
            return []
        image = job.load()
        needs_maps = any(technique.needs_map for technique in self.techniques)
        scored_maps = request_maps(self.maps if needs_maps else None, image, job)
        rows = []
        for request, (_, class_map) in zip(job.requests, scored_maps, strict=True):
            ground_truth = request.ground_truth_mask()
            if ground_truth is None:
                raise ValueError(f"annotation {request.id} has no mask to compare with")
            counts = []
            for technique in self.techniques:
                mask = technique(image, request.box, class_map).mask
                counts.append(confusion_counts(mask, ground_truth))
            rows.append((request.label, counts))
        return rows


def request_maps(
    maps: ActivationMapper | None, image: NDArray[np.uint8], job: AnnotationJob
) -> list[ScoredMap | tuple[None, None]]:
    """Score and map [H, W] of the class of each request.

    (None, None) without a classifier and for classes without a map.
    """
    labels = sorted({request.label for request in job.requests})  # compute each class only once
    by_label: dict[int, ScoredMap | None] = {}
    if maps is not None:
        by_label = dict(zip(labels, maps(image, labels), strict=True))
    return [by_label.get(request.label) or (None, None) for request in job.requests]


def summarize(
    counts_by_image: CountsByImage,
    techniques: Sequence[Technique],
    num_classes: int,
    min_area: float,
) -> list[TechniqueScores]:
    """Compute the scores of each technique from the results of `ScoreTechniques`."""
    scores = [AnnotationScores(num_classes, min_area) for _ in techniques]
    for rows in counts_by_image.values():
        for label, counts in rows:
            for score, technique_counts in zip(scores, counts, strict=True):
                score.add(label, technique_counts)
    results = []
    for technique, score in zip(techniques, scores, strict=True):
        results.append(TechniqueScores(technique, score.compute(), score.per_class()))
    return results


def best_scores(rows: Sequence[TechniqueScores], by: str) -> TechniqueScores:
    """The technique with the highest selection metric, the first one of ties."""
    return max(rows, key=lambda row: row.means[SELECTION_METRIC[by]])


def format_study(rows: Sequence[TechniqueScores], names: Sequence[str], by: str) -> str:
    """Format the table of all techniques and the class metrics of the best one.

    Techniques that need a missing classifier are listed with what they need.
    """
    means: dict[str, Mapping[str, float] | str] = {row.technique.label: row.means for row in rows}
    evaluated = {row.technique.name for row in rows}
    for name in CAM_TECHNIQUES:
        if name not in evaluated:
            means[name] = NO_CLASSIFIER
    best = best_scores(rows, by)
    metric = "mean IoU of objects of any size" if by == "object" else "mIoU"
    value = best.means[SELECTION_METRIC[by]]
    return (
        f"{annotation_table(means)}\n\n"
        f"{best.technique.label} has the highest {metric}, {value:.3f}; class by class:\n"
        f"{class_lines(names, best.per_class)}"
    )


def save_study(
    rows: Sequence[TechniqueScores], names: Sequence[str], table: Path, curves: Path
) -> None:
    """Write the scores as JSON and the curves over the thresholds as PNG."""
    content = []
    points = []
    for row in rows:
        technique = row.technique
        classes = [
            {"name": names[int(values["label"])], **values}
            for values in row.per_class
            if values["true_pixels"] > 0
        ]
        content.append({**technique.to_dict(), **row.means, "classes": classes})
        points.append((technique.name, technique.threshold, row.means))
    write_json(table, content)
    with warn_if_not_drawn(str(curves)):
        plot_thresholds(points, curves)
