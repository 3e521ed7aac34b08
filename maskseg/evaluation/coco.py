"""COCO's average precision and recall of boxes and masks.

The numbers are read from the accumulated precision and recall tables, not from `COCOeval.summarize`, which reports AP at 100 detections
whatever the limit is. As COCO does, a number for which there is no truth (no small object, say) is -1.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.evaluation.coco_entries import BBOX, KEYPOINTS, KINDS, SEGM, row_entries, truth_entries
from maskseg.evaluation.coco_results import Row, detection_rows
from maskseg.evaluation.table import metrics_table
from maskseg.structures import Batch, Categories, Outputs

Metrics = dict[str, float]
Floats = NDArray[np.float64]

THRESHOLDS, RECALLS = 10, 101  # COCO's axes: IoU 0.50:0.05:0.95, recall 0:0.01:1
AREAS = {
    BBOX: ("", "s", "m", "l"),
    SEGM: ("", "s", "m", "l"),
    KEYPOINTS: ("", "m", "l"),
}  # object sizes; COCO names no small people's points
KEYPOINT_LIMIT = 20  # detections of a class in an image, as COCO has it
COCO_SIGMAS = (
    0.026,
    0.025,
    0.025,
    0.035,
    0.035,
    0.079,
    0.079,
    0.072,
    0.072,
    0.062,
    0.062,
    0.107,
    0.107,
    0.087,
    0.087,
    0.089,
    0.089,
)
BACKENDS = ("auto", "pycocotools", "faster")
_AP50, _AP75 = 0, 5


class _Backend(NamedTuple):
    """What compares: the library's name, its class for a data set, its class for an evaluation."""

    name: str
    dataset: Any
    evaluator: Any


class CocoEvaluator:
    """Collects detections image by image and compares them with a COCO ground truth. One evaluator serves one evaluation.

    truths: the annotations of the classes; images: the truth's, by id; rows: COCO result rows so far; image_ids: the images seen so far: only
    these are evaluated. An image that comes a second time (a sampler that pads its last batch) is ignored, with its rows.
    """

    def __init__(
        self,
        ground_truth: dict[str, Any],
        categories: Categories,
        *,
        max_detections: int = 100,
        backend: str = "auto",
        iou_types: Sequence[str] = (BBOX, SEGM),
        oks_sigmas: Sequence[float] | None = None,
    ) -> None:
        """ground_truth: a checked COCO data set (every annotation has id, image_id, category_id, bbox, area, iscrowd, segmentation);
        it is not changed. categories: the classes that are evaluated, truth of others is ignored.

        max_detections: the highest-scored detections of an image and class that count. backend: `pycocotools`, `faster` for faster-coco-eval (the
        same numbers in less time), or `auto`: the latter where it is installed. oks_sigmas: how far off each point of a class may be, as a share of
        the object's size (COCO's 17 for a class of 17 points, 1/P for one of P others; a class of another number of points than is given keeps
        these).
        Raises UserError for an unknown or missing backend, an unknown IoU type, or truth without masks where masks are evaluated.
        """
        if max_detections < 1:
            raise UserError(f"max_detections must be at least 1, got {max_detections}")
        if not iou_types or any(kind not in KINDS for kind in iou_types):
            raise UserError(f"iou_types must be some of {', '.join(KINDS)}, got {list(iou_types)}")
        if KEYPOINTS in iou_types and not categories.num_points:
            raise UserError("no class has keypoints: evaluate without them")
        self.categories = categories
        self.iou_types = tuple(iou_types)
        self.limits = sorted({n for n in (1, 10) if n < max_detections} | {max_detections})
        self.oks_sigmas = None if oks_sigmas is None else tuple(float(v) for v in oks_sigmas)
        self.rows: list[Row] = []
        self.image_ids: list[int] = []
        self._backend = _load_backend(backend)
        self.images = {int(i["id"]): i for i in ground_truth["images"]}
        known = set(categories.ids)
        self.truths = [a for a in ground_truth.get("annotations", []) if a["category_id"] in known]
        if "segm" in self.iou_types:
            _require_masks(self.truths)
        self._seen: set[int] = set()
        self._tables: dict[str, tuple[Floats, Floats]] = {}

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Adds what a model found in a batch, moved to the images' own frames. Masks are pasted only if they are evaluated."""
        self.add_rows(
            batch.image_ids,
            detection_rows(batch, outputs, self.categories, masks="segm" in self.iou_types),
        )

    def add_rows(self, image_ids: Iterable[int], rows: Iterable[Row]) -> None:
        """Adds images and their COCO result rows from elsewhere: another process (one call for each), a file.

        image_ids: all images that were looked at, those where nothing was found too.
        Raises UserError for an image that the truth does not have, and for a row that does not fit (its image, class, score, mask).
        """
        wanted = {int(i) for i in image_ids}
        unknown = sorted(wanted - self.images.keys())
        if unknown:
            raise UserError(
                f"image {unknown[0]} is not in the ground truth ({len(unknown)} of {len(wanted)} images are not)"
            )
        new = wanted - self._seen
        known, masks = set(self.categories.ids), "segm" in self.iou_types
        chosen: list[Row] = []
        for row in rows:
            if row["image_id"] not in wanted:
                raise UserError(
                    f"a result row is of image {row['image_id']}, which is not among the images given with it"
                )
            if row["image_id"] in new:
                self._check(row, known, masks)
                chosen.append(row)
        self.rows += chosen
        self.image_ids += sorted(new)
        self._seen |= new
        self._tables.clear()

    def compute(self) -> Metrics:
        """All numbers of the images seen, in [0, 1], or -1 where there is no truth: for each IoU type `bbox/AP`, `AP50`, `AP75`, `APs`,
        `APm`, `APl` (objects under 32^2, under 96^2 and larger), recalls `AR1`, `AR10`, `AR<max_detections>`, `ARs`, `ARm`, `ARl`. Of keypoints (OKS
        instead of IoU) `AP`, `AP50`, `AP75`, `APm`, `APl`, `AR20`, `ARm`, `ARl`.
        """
        metrics: Metrics = {}
        for kind in self.iou_types:
            precision, recall = self._table(kind)
            best = precision[..., -1]  # at the largest number of detections: [T, R, K, A]
            metrics[f"{kind}/AP"] = _mean(best[..., 0])
            metrics[f"{kind}/AP50"] = _mean(best[_AP50, ..., 0])
            metrics[f"{kind}/AP75"] = _mean(best[_AP75, ..., 0])
            metrics |= {
                f"{kind}/AP{size}": _mean(best[..., a])
                for a, size in enumerate(AREAS[kind])
                if size
            }
            metrics |= {
                f"{kind}/AR{limit}": _mean(recall[:, :, 0, m])
                for m, limit in enumerate(self._limits(kind))
            }
            metrics |= {
                f"{kind}/AR{size}": _mean(recall[:, :, a, -1])
                for a, size in enumerate(AREAS[kind])
                if size
            }
        return metrics

    def per_class(self) -> dict[str, dict[str, float]]:
        """AP of each class by IoU type and name: {"segm": {"cat": 0.41, ...}}; -1 for a class without truth in the images seen."""
        return {
            kind: {
                name: _mean(self._table(kind)[0][:, :, k, 0, -1])
                for k, name in enumerate(self.categories.names)
            }
            for kind in self.iou_types
        }

    def pr_curves(self, iou: float = 0.5) -> dict[str, dict[str, Floats]]:
        """Precision at the recalls 0, 0.01 ... 1 by IoU type and name: {"segm": {"cat": f64 [101], ...}}; -1 for a class without truth.

        iou: one of COCO's thresholds 0.5, 0.55 ... 0.95 from which on a detection is a match; another raises ValueError.
        """
        step = (iou - 0.5) / 0.05
        t = round(step)
        if not 0 <= t < THRESHOLDS or abs(step - t) > 1e-6:
            raise ValueError(f"iou must be one of 0.5, 0.55 ... 0.95, got {iou}")
        return {
            kind: {
                name: self._table(kind)[0][t, :, k, 0, -1].copy()
                for k, name in enumerate(self.categories.names)
            }
            for kind in self.iou_types
        }

    def table(self) -> str:
        """The numbers as text: IoU types side by side, then the AP of the classes. `-` where there is no truth."""
        seen = f"images: {len(self.image_ids)}, detections: {len(self.rows)}"
        title = f"{seen}, evaluated: up to {self.limits[-1]} of a class in an image, by {self._backend.name}"
        return f"{title}\n{metrics_table(self.compute(), self.per_class())}"

    def _check(self, row: Row, known: set[int], masks: bool) -> None:
        image = row["image_id"]
        if row["category_id"] not in known:
            raise UserError(
                f"a result row of image {image} has the category id {row['category_id']}, which the data set does not have"
            )
        if not all(map(math.isfinite, (row["score"], *row.get("bbox", ())))):
            raise UserError(
                f"a result row of image {image} has a score or box that is not finite: has the training diverged?"
            )
        for kind, key in KINDS.items():
            needed = (
                kind != KEYPOINTS
                or self.categories.keypoints[self.categories.ids.index(row["category_id"])]
            )
            if kind in self.iou_types and needed and key not in row:
                raise UserError(
                    f"a result row of image {image} has no {key}: evaluate without it, with iou_types that leave out {kind!r}"
                )
        if masks:
            size, expected = (
                row["segmentation"]["size"],
                [self.images[image]["height"], self.images[image]["width"]],
            )
            if list(size) != expected:
                raise UserError(
                    f"a result mask of image {image} has (height, width) {list(size)}, the image has {expected}"
                )

    def _table(self, kind: str) -> tuple[Floats, Floats]:
        """Precision [T, R, K, A, M] and recall [T, K, A, M] of the images seen; -1 where there is no truth.

        Class by class: no number depends on another class, and the intermediate results of one class (a dictionary for each image and
        object size) are freed before the next.
        """
        if kind not in self._tables:
            rows, truths = (
                _by_category(self.rows),
                _by_category(t for t in self.truths if t["image_id"] in self._seen),
            )
            axes = len(self.categories), len(AREAS[kind]), len(self._limits(kind))
            precision, recall = (
                np.full((THRESHOLDS, RECALLS, *axes), -1.0),
                np.full((THRESHOLDS, *axes), -1.0),
            )
            for k, category in enumerate(self.categories.ids):
                if truths[category] and (kind != KEYPOINTS or self.categories.keypoints[k]):
                    precision[:, :, k], recall[:, k] = self._one_class(
                        kind, truths[category], rows[category], len(self.categories.keypoints[k])
                    )
            self._tables[kind] = precision, recall
        return self._tables[kind]

    def _limits(self, kind: str) -> list[int]:
        return [KEYPOINT_LIMIT] if kind == KEYPOINTS else self.limits

    def sigmas(self, points: int) -> tuple[float, ...]:
        """Those in use for a class of so many points."""
        if self.oks_sigmas is not None and len(self.oks_sigmas) == points:
            return self.oks_sigmas
        return COCO_SIGMAS if points == len(COCO_SIGMAS) else (1 / points,) * points

    def _one_class(
        self, kind: str, truths: list[Row], rows: list[Row], points: int
    ) -> tuple[Floats, Floats]:
        """Precision [T, R, A, M] and recall [T, A, M] of one class."""
        # Images that have nothing of the class add nothing. Sorted, as rows of equal score count in the order of their images.
        ids = sorted({r["image_id"] for r in truths} | {r["image_id"] for r in rows})
        images = [
            {"id": i, "height": self.images[i]["height"], "width": self.images[i]["width"]}
            for i in ids
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = _dataset(
                self._backend.dataset, images, truth_entries(kind, truths, self.images)
            )
            found = _dataset(self._backend.dataset, images, row_entries(kind, rows))
            evaluator = self._backend.evaluator(truth, found, kind)
            evaluator.params.maxDets = self._limits(kind)
            if kind == KEYPOINTS:
                evaluator.params.kpt_oks_sigmas = np.array(self.sigmas(points))
            evaluator.evaluate()
            evaluator.accumulate()
        return evaluator.eval["precision"][:, :, 0], evaluator.eval["recall"][:, 0]


def _mean(values: Floats) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _by_category(rows: Iterable[Row]) -> defaultdict[int, list[Row]]:
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["category_id"]].append(row)
    return groups


def check_backend(name: str) -> None:
    """Raises UserError for a backend that is not there."""
    _load_backend(name)


def _load_backend(name: str) -> _Backend:
    if name not in BACKENDS:
        raise UserError(
            f"the evaluation backend must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, not {name!r}"
        )
    if name != "pycocotools":
        try:
            from faster_coco_eval import COCO as FasterCOCO  # noqa: N811
            from faster_coco_eval import COCOeval_faster

            return _Backend("faster-coco-eval", FasterCOCO, COCOeval_faster)
        except ImportError as error:
            if name == "faster":
                raise UserError(
                    "the backend 'faster' needs faster-coco-eval: pip install maskseg[fast]"
                ) from error
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _Backend("pycocotools", COCO, COCOeval)


def _require_masks(truths: list[Row]) -> None:
    bare = [t for t in truths if not t.get("segmentation")]
    if bare:
        raise UserError(
            f"annotation {bare[0]['id']} of image {bare[0]['image_id']} has no segmentation ({len(bare)} of {len(truths)} annotations "
            "have none): evaluate boxes only with iou_types ['bbox'], or add the masks"
        )


def _dataset(dataset_type: Any, images: list[Row], annotations: list[Row]) -> Any:
    """A data set in the backend's class, without `loadRes`, which raises for no rows at all and writes into those it gets."""
    dataset = dataset_type()
    categories = [{"id": a["category_id"]} for a in annotations[:1]]
    dataset.dataset = {"images": images, "annotations": annotations, "categories": categories}
    dataset.createIndex()
    return dataset
