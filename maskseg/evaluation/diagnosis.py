"""What a model gets wrong, image by image: missed truths, false detections, wrong classes, bad masks.

Average precision says how good a model is, this says where to look. One score threshold and one IoU threshold, as somebody sees who looks at
the pictures; the numbers are not those of AP.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from maskseg.errors import UserError
from maskseg.evaluation.coco_entries import compressed_rle
from maskseg.evaluation.coco_results import Row
from maskseg.structures import Categories

CORRECT, MISSED, FALSE, WRONG_CLASS, BAD_MASK = (
    "correct",
    "missed",
    "false",
    "wrong class",
    "bad mask",
)
ERRORS = (MISSED, FALSE, WRONG_CLASS, BAD_MASK)  # in the order in which they are told
_IN_CROWD = 0.5  # share of a detection's box in a crowd from which on it is neither right nor false


@dataclass(frozen=True)
class Finding:
    """One detection, one truth, or the two that belong together.

    outcome: `correct`; `wrong class`: the box is that of a truth of another class; `bad mask`: class and box are right, the mask is not;
    `false`: a detection without a truth (a second one of the same truth too); `missed`: a truth without a detection.
    truth: the COCO annotation, None where false; row: the COCO result row, None where missed; both in the image's frame.
    box_iou: IoU of the boxes of the two, 0 where there is only one; mask_iou: that of the masks, None where it was not compared.
    """

    outcome: str
    truth: Row | None
    row: Row | None
    box_iou: float = 0.0
    mask_iou: float | None = None


@dataclass(frozen=True)
class ImageDiagnosis:
    """What became of the truths and detections of one image: the detections by falling score, then the missed truths in the file's order."""

    image_id: int
    findings: tuple[Finding, ...]

    def of(self, outcome: str) -> tuple[Finding, ...]:
        """The findings with one outcome."""
        return tuple(f for f in self.findings if f.outcome == outcome)

    @property
    def num_errors(self) -> int:
        """Findings that are not correct."""
        return sum(f.outcome != CORRECT for f in self.findings)

    @property
    def why(self) -> str:
        """The errors in words, such as "missed 3, false 1, bad mask 2"; "" where there is none."""
        counts = Counter(f.outcome for f in self.findings)
        return ", ".join(f"{outcome} {counts[outcome]}" for outcome in ERRORS if counts[outcome])


def diagnose(
    truths: Iterable[Row],
    rows: Iterable[Row],
    categories: Categories,
    *,
    image_ids: Iterable[int] | None = None,
    score: float = 0.5,
    iou: float = 0.5,
    mask_iou: float = 0.5,
) -> list[ImageDiagnosis]:
    """One diagnosis an image, by ascending id.

    truths: COCO annotations (image_id, category_id, bbox xywh, iscrowd, segmentation where there are masks); rows: COCO result rows, with RLE
    segmentations in the image's frame where there are masks; categories: the classes that are looked at, truth and rows of others are
    ignored. image_ids: the images that were looked at, those without truth or rows too (None: those of the truths and rows).

    score: rows below it are ignored; iou: the box IoU from which on a row is a truth's; mask_iou: what a mask must reach, compared only
    where the class is right and both have a mask.

    The row with the highest score chooses first, each truth is taken once: a truth of the row's own class before any other, then the one with
    the highest IoU. What then has no truth and lies with half of its box or more in a crowd, of whatever class, is neither right nor false.
    Raises UserError where a mask does not have the size of its image.
    """
    known = set(categories.ids)
    truths_of, rows_of = (
        _by_image(truths, known),
        _by_image((r for r in rows if r["score"] >= score), known),
    )
    ids = truths_of.keys() | rows_of.keys() if image_ids is None else {int(i) for i in image_ids}
    return [
        ImageDiagnosis(i, tuple(_findings(truths_of.get(i, []), rows_of.get(i, []), iou, mask_iou)))
        for i in sorted(ids)
    ]


def confusion_matrix(
    diagnoses: Iterable[ImageDiagnosis], categories: Categories
) -> NDArray[np.int64]:
    """How often a class was taken for another -> i64 [K+1, K+1], truth in rows, prediction in columns, both in the order of `categories`.

    The last row is background taken for a class (false), the last column truth taken for background (missed). Bad masks count as their class.
    """
    background = len(categories)
    label = {number: k for k, number in enumerate(categories.ids)}
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for diagnosis in diagnoses:
        for f in diagnosis.findings:
            truth = background if f.truth is None else label[f.truth["category_id"]]
            predicted = background if f.row is None else label[f.row["category_id"]]
            matrix[truth, predicted] += 1
    return matrix


def worst(diagnoses: Iterable[ImageDiagnosis], count: int = 20) -> list[ImageDiagnosis]:
    """The `count` images with the most errors, the most first, ties by id; `why` of each says which. Images without an error are left out."""
    wrong = [(d.num_errors, d) for d in diagnoses]
    return [
        d
        for number, d in sorted(wrong, key=lambda pair: (-pair[0], pair[1].image_id))[:count]
        if number
    ]


def _by_image(rows: Iterable[Row], known: set[int]) -> dict[int, list[Row]]:
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["category_id"] in known:
            groups[row["image_id"]].append(row)
    return groups


def _findings(truths: list[Row], rows: list[Row], iou: float, mask_iou: float) -> list[Finding]:
    """The findings of one image."""
    crowds = [t for t in truths if t.get("iscrowd", 0)]
    objects = [t for t in truths if not t.get("iscrowd", 0)]
    rows = sorted(rows, key=lambda r: -r["score"])
    overlaps = _overlaps(rows, objects, crowd=False)
    in_crowd = _overlaps(rows, crowds, crowd=True).max(axis=1, initial=0.0) >= _IN_CROWD
    free = np.ones(len(objects), dtype=bool)
    classes = np.array([t["category_id"] for t in objects], dtype=np.int64)
    findings = []
    for i, row in enumerate(rows):
        fits = free & (overlaps[i] >= iou)
        own = fits & (classes == row["category_id"])
        chosen = own if own.any() else fits
        if chosen.any():
            best = int(np.argmax(np.where(chosen, overlaps[i], -1.0)))
            free[best] = False
            findings.append(_pair(objects[best], row, float(overlaps[i, best]), mask_iou))
        elif not in_crowd[i]:
            findings.append(Finding(FALSE, None, row))
    return findings + [
        Finding(MISSED, truth, None)
        for truth, left in zip(objects, free.tolist(), strict=True)
        if left
    ]


def _overlaps(rows: Sequence[Row], truths: Sequence[Row], *, crowd: bool) -> NDArray[np.float64]:
    """Box IoU [n, m]; with `crowd` the share of a row's box that lies in the truth's."""
    if not rows or not truths:
        return np.zeros((len(rows), len(truths)))
    found, true = (
        np.array([r["bbox"] for r in group], dtype=np.float64).reshape(-1, 4)
        for group in (rows, truths)
    )
    return np.asarray(
        coco_mask.iou(found, true, np.full(len(true), crowd, dtype=np.uint8)), dtype=np.float64
    )


def _pair(truth: Row, row: Row, box_iou: float, least: float) -> Finding:
    if truth["category_id"] != row["category_id"]:
        return Finding(WRONG_CLASS, truth, row, box_iou)
    if not truth.get("segmentation") or not row.get("segmentation"):
        return Finding(CORRECT, truth, row, box_iou)
    overlap = _mask_overlap(truth, row)
    return Finding(CORRECT if overlap >= least else BAD_MASK, truth, row, box_iou, overlap)


def _mask_overlap(truth: Row, row: Row) -> float:
    found: dict[str, Any] = row["segmentation"]
    height, width = found["size"]
    true = compressed_rle(truth["segmentation"], height, width)
    if list(true["size"]) != [height, width]:
        raise UserError(
            f"a result mask of image {row['image_id']} has (height, width) {[height, width]}, its truth has {list(true['size'])}"
        )
    return float(coco_mask.iou([found], [true], np.zeros(1, dtype=np.uint8))[0, 0])
