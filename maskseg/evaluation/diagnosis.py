"""Per-image error analysis: missed objects, false detections, wrong classes, bad masks.

Average precision measures how good a model is; this module shows where its errors are. It uses one
score threshold and one IoU threshold, as a viewer of the images would, so its counts differ from
those behind AP.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from maskseg.errors import UserError
from maskseg.evaluation.coco_entries import compressed_rle
from maskseg.evaluation.coco_results import Row
from maskseg.structures import Categories

CORRECT = "correct"
MISSED = "missed"
FALSE = "false"
WRONG_CLASS = "wrong class"
BAD_MASK = "bad mask"
ERRORS = (MISSED, FALSE, WRONG_CLASS, BAD_MASK)  # in the order of a summary
# A detection with at least this share of its box in a crowd is neither correct nor false.
_MIN_CROWD_SHARE = 0.5


@dataclass(frozen=True)
class Finding:
    """A detection, a ground-truth object, or a matched pair of both.

    outcome: `correct`; `wrong class`: the box matches an object of another class; `bad mask`: class
    and box are correct, the mask is not; `false`: a detection without an object, also a duplicate;
    `missed`: an object without a detection. truth: the COCO annotation, None if false; row: the
    COCO result row, None if missed; both in the frame of the image. box_iou: of a pair, else 0;
    mask_iou: None if masks were not compared.
    """

    outcome: str
    truth: Row | None
    row: Row | None
    box_iou: float = 0.0
    mask_iou: float | None = None


@dataclass(frozen=True)
class ImageDiagnosis:
    """The outcome of all objects and detections of one image.

    findings: detections by falling score, then missed objects in the order of the file.
    """

    image_id: int
    findings: tuple[Finding, ...]

    def with_outcome(self, outcome: str) -> tuple[Finding, ...]:
        """The findings with one outcome."""
        return tuple(f for f in self.findings if f.outcome == outcome)

    @property
    def num_errors(self) -> int:
        """The number of findings that are not correct."""
        return sum(f.outcome != CORRECT for f in self.findings)

    @property
    def summary(self) -> str:
        """The number of errors of each kind, e.g. "missed 3, false 1, bad mask 2"; "" if none."""
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
    """Match detections with ground truth and classify the errors. -> by ascending image id.

    truths: COCO annotations (image_id, category_id, bbox xywh, iscrowd, and segmentation if there
    are masks); rows: COCO result rows, with RLE segmentations in the frame of the image if there
    are masks; categories: the classes to consider, others are ignored. image_ids: all images that
    were processed, also those without objects and detections (None: those of `truths` and `rows`).
    score: minimum score of a row; iou: minimum box IoU of a match; mask_iou: minimum of a correct
    mask, only compared if the class is correct and both have a mask.

    Rows choose greedily by falling score, and each object is matched once: objects of the row's own
    class take precedence, then the highest IoU. An unmatched row with at least half of its box in a
    crowd, of whatever class, is neither correct nor false. Raises UserError if a mask does not have
    the size of its image.
    """
    known_ids = set(categories.ids)
    image_truths = _by_image(truths, known_ids)
    image_rows = _by_image((row for row in rows if row["score"] >= score), known_ids)
    if image_ids is None:
        ids = image_truths.keys() | image_rows.keys()
    else:
        ids = {int(i) for i in image_ids}
    diagnoses = []
    for i in sorted(ids):
        findings = _match(image_truths.get(i, []), image_rows.get(i, []), iou, mask_iou)
        diagnoses.append(ImageDiagnosis(i, tuple(findings)))
    return diagnoses


def confusion_matrix(
    diagnoses: Iterable[ImageDiagnosis], categories: Categories
) -> NDArray[np.int64]:
    """Count true and predicted classes. -> i64 [K+1, K+1], ground truth in rows, background last.

    The order is that of `categories`. The last row counts false detections, the last column missed
    objects. Bad masks count as their class.
    """
    background = len(categories)
    label = {category_id: k for k, category_id in enumerate(categories.ids)}
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for diagnosis in diagnoses:
        for finding in diagnosis.findings:
            truth = background
            if finding.truth is not None:
                truth = label[finding.truth["category_id"]]
            predicted = background
            if finding.row is not None:
                predicted = label[finding.row["category_id"]]
            matrix[truth, predicted] += 1
    return matrix


def worst(diagnoses: Iterable[ImageDiagnosis], count: int = 20) -> list[ImageDiagnosis]:
    """Select the at most `count` images with the most errors, in falling order, ties by id.

    Images without errors are dropped.
    """
    wrong = [diagnosis for diagnosis in diagnoses if diagnosis.num_errors]
    return sorted(wrong, key=lambda diagnosis: (-diagnosis.num_errors, diagnosis.image_id))[:count]


def _by_image(rows: Iterable[Row], known_ids: set[int]) -> dict[int, list[Row]]:
    """Group the rows of the known classes by image id."""
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["category_id"] in known_ids:
            groups[row["image_id"]].append(row)
    return groups


def _match(
    truths: list[Row], rows: list[Row], min_iou: float, min_mask_iou: float
) -> list[Finding]:
    """Match the rows of one image with its ground truth."""
    crowds = [truth for truth in truths if truth.get("iscrowd", 0)]
    objects = [truth for truth in truths if not truth.get("iscrowd", 0)]
    rows = sorted(rows, key=lambda row: -row["score"])
    ious = _overlaps(rows, objects, crowd=False)
    crowd_shares = _overlaps(rows, crowds, crowd=True).max(axis=1, initial=0.0)
    in_crowd = crowd_shares >= _MIN_CROWD_SHARE
    unmatched = np.ones(len(objects), dtype=bool)
    classes = np.array([truth["category_id"] for truth in objects], dtype=np.int64)
    findings = []
    for i, row in enumerate(rows):
        candidates = unmatched & (ious[i] >= min_iou)
        same_class = candidates & (classes == row["category_id"])
        if same_class.any():
            candidates = same_class
        if candidates.any():
            best = int(np.argmax(np.where(candidates, ious[i], -1.0)))
            unmatched[best] = False
            findings.append(_compare(objects[best], row, float(ious[i, best]), min_mask_iou))
        elif not in_crowd[i]:
            findings.append(Finding(FALSE, None, row))
    missed = np.flatnonzero(unmatched).tolist()
    return findings + [Finding(MISSED, objects[index], None) for index in missed]


def _overlaps(rows: Sequence[Row], truths: Sequence[Row], *, crowd: bool) -> NDArray[np.float64]:
    """Box IoU [n, m]; with `crowd`, the share of each row's box inside the ground-truth box."""
    if not rows or not truths:
        return np.zeros((len(rows), len(truths)))
    row_boxes = _boxes(rows)
    true_boxes = _boxes(truths)
    iscrowd = np.full(len(true_boxes), crowd, dtype=np.uint8)
    return np.asarray(coco_mask.iou(row_boxes, true_boxes, iscrowd), dtype=np.float64)


def _boxes(rows: Sequence[Row]) -> NDArray[np.float64]:
    """The boxes xywh, [n, 4]."""
    return np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)


def _compare(truth: Row, row: Row, box_iou: float, min_mask_iou: float) -> Finding:
    """Classify a matched pair."""
    if truth["category_id"] != row["category_id"]:
        return Finding(WRONG_CLASS, truth, row, box_iou)
    if not truth.get("segmentation") or not row.get("segmentation"):
        return Finding(CORRECT, truth, row, box_iou)
    mask_iou = _mask_iou(truth, row)
    outcome = CORRECT if mask_iou >= min_mask_iou else BAD_MASK
    return Finding(outcome, truth, row, box_iou, mask_iou)


def _mask_iou(truth: Row, row: Row) -> float:
    """The IoU of the masks; raises UserError if their sizes differ."""
    predicted = row["segmentation"]
    height, width = predicted["size"]
    true = compressed_rle(truth["segmentation"], height, width)
    if list(true["size"]) != [height, width]:
        raise UserError(
            f"a result mask of image {row['image_id']} has (height, width) {[height, width]}, "
            f"its ground truth has {list(true['size'])}"
        )
    return float(coco_mask.iou([predicted], [true], np.zeros(1, dtype=np.uint8))[0, 0])
