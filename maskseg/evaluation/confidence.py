"""Precision, recall and F1 of detections over the score threshold, and its best value.

A detection is correct if it matches an object of its class at IoU 0.50, by the rules of COCO: the
detections of an image choose by falling score, and those in a crowd are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from maskseg.evaluation.coco_entries import KINDS
from maskseg.evaluation.coco_results import Row

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

IOU = 0.5


@dataclass(frozen=True)
class Matches:
    """The detections of a class, or of several, without those in a crowd.

    scores: f64 [n]; is_correct: bool [n]; num_objects: number of objects to find.
    """

    scores: Floats
    is_correct: Bools
    num_objects: int


@dataclass(frozen=True)
class ScoreCurves:
    """Precision, recall and F1 of the detections with at least a score.

    scores: f64 [n], the distinct scores in falling order; precision, recall, f1: f64 [n].
    """

    scores: Floats
    precision: Floats
    recall: Floats
    f1: Floats

    @property
    def best(self) -> int | None:
        """The index of the highest F1, the highest score first; None where no detection is correct.

        A threshold is then undefined.
        """
        if not len(self.f1) or self.f1.max() <= 0:
            return None
        return int(self.f1.argmax())


def match_class(
    kind: str, truths: Sequence[Row], rows: Sequence[Row], max_detections: int
) -> Matches:
    """Match the detections of one class with its objects at IoU 0.50.

    kind: `bbox` or `segm`; truths, rows: entries of `truth_entries` and `row_entries`;
    max_detections: per image, those with the highest scores.
    """
    image_truths = _by_image(truths)
    scores: list[float] = []
    correct: list[bool] = []
    for image_id, image_rows in _by_image(rows).items():
        ranked = sorted(image_rows, key=lambda row: -row["score"])[:max_detections]
        flags = _match_image(kind, image_truths.get(image_id, []), ranked)
        for row, flag in zip(ranked, flags, strict=True):
            if flag is not None:
                scores.append(row["score"])
                correct.append(flag)
    num_objects = sum(not truth["iscrowd"] for truth in truths)
    return Matches(np.array(scores, dtype=np.float64), np.array(correct, dtype=bool), num_objects)


def merge_matches(matches: Sequence[Matches]) -> Matches:
    """The detections of several classes together."""
    return Matches(
        np.concatenate([np.zeros(0), *(part.scores for part in matches)]),
        np.concatenate([np.zeros(0, dtype=bool), *(part.is_correct for part in matches)]),
        sum(part.num_objects for part in matches),
    )


def score_curves(matches: Matches) -> ScoreCurves:
    """Compute precision, recall and F1 at each score of a detection."""
    order = np.argsort(-matches.scores, kind="stable")
    scores = matches.scores[order]
    num_correct = np.cumsum(matches.is_correct[order])
    # Detections of equal score are above the same thresholds.
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if len(scores) else order
    num_detections = last + 1
    hits = num_correct[last].astype(np.float64) if len(scores) else np.zeros(0)
    recall = hits / max(matches.num_objects, 1)
    f1 = 2 * hits / np.maximum(num_detections + matches.num_objects, 1)
    return ScoreCurves(scores[last], hits / np.maximum(num_detections, 1), recall, f1)


def best_metrics(kind: str, curves: ScoreCurves) -> dict[str, float]:
    """The highest F1, its score threshold, and precision and recall there, by metric name.

    -1 where no detection is correct.
    """
    best = curves.best
    values = [-1.0] * 4
    if best is not None:
        series = (curves.f1, curves.precision, curves.recall, curves.scores)
        values = [float(value[best]) for value in series]
    names = ("F1", "precision", "recall", "best_threshold")
    return {f"{kind}/{name}": value for name, value in zip(names, values, strict=True)}


def _by_image(rows: Sequence[Row]) -> Mapping[int, list[Row]]:
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["image_id"]].append(row)
    return groups


def _match_image(kind: str, truths: Sequence[Row], rows: Sequence[Row]) -> list[bool | None]:
    """Whether each detection of an image, by falling score, is correct; None for one in a crowd."""
    if not truths:
        return [False] * len(rows)
    key = KINDS[kind]
    crowd = np.array([bool(truth["iscrowd"]) for truth in truths])
    ious = coco_mask.iou(
        [row[key] for row in rows], [truth[key] for truth in truths], crowd.astype(np.uint8)
    )
    free = ~crowd
    flags: list[bool | None] = []
    for row_ious in np.asarray(ious).reshape(len(rows), len(truths)):
        candidates = np.where(free, row_ious, -1.0)
        # Of objects with equal IoU, COCO takes the last.
        index = len(candidates) - 1 - int(candidates[::-1].argmax())
        if candidates[index] >= IOU:
            free[index] = False
            flags.append(True)
        else:
            in_crowd = bool((row_ious[crowd] >= IOU).any())
            flags.append(None if in_crowd else False)
    return flags
