"""COCO average precision and recall of boxes, masks and keypoints.

The metrics are read from the accumulated precision and recall tables, not from
`COCOeval.summarize`, which reports AP at 100 detections whatever the limit is. As in COCO, a metric
without ground truth (no small object, for example) is -1.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.evaluation.coco_entries import (
    BBOX,
    KEYPOINTS,
    KINDS,
    SEGM,
    row_entries,
    truth_entries,
)
from maskseg.evaluation.coco_results import Row, detection_rows
from maskseg.evaluation.confidence import (
    Matches,
    ScoreCurves,
    best_metrics,
    match_class,
    merge_matches,
    score_curves,
)
from maskseg.evaluation.table import metrics_table
from maskseg.structures import Batch, Categories, Outputs

Metrics = dict[str, float]
Floats = NDArray[np.float64]
GroundTruth = Mapping[str, Sequence[Row]]  # a COCO data set: images, annotations, categories

# The axes of COCO: IoU 0.50:0.05:0.95, recall 0:0.01:1.
THRESHOLDS = 10
RECALLS = 101
# Object sizes: all, small, medium, large. COCO defines no small-object keypoint AP.
AREAS = {BBOX: ("", "s", "m", "l"), SEGM: ("", "s", "m", "l"), KEYPOINTS: ("", "m", "l")}
KEYPOINT_LIMIT = 20  # COCO's maximum of detections per class and image
# Nose, then left and right each: eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035),
    *(0.079, 0.079, 0.072, 0.072, 0.062, 0.062),
    *(0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
BACKENDS = ("auto", "pycocotools", "faster")
# Indices of the IoU thresholds.
_AP50 = 0
_AP75 = 5


class _Dataset(Protocol):
    """The data set class of a backend (`COCO`)."""

    dataset: dict[str, list[Row]]

    def createIndex(self) -> None: ...  # noqa: N802


class _Parameters(Protocol):
    """The parameters of an evaluation (`Params`)."""

    maxDets: list[int]  # noqa: N815
    kpt_oks_sigmas: Floats


class _Evaluation(Protocol):
    """The evaluation class of a backend (`COCOeval`)."""

    params: _Parameters
    eval: dict[str, Floats]

    def evaluate(self) -> None: ...
    def accumulate(self) -> None: ...


@dataclass(frozen=True)
class _Backend:
    """A library that computes the matches: its name, its data set class, its evaluation class."""

    name: str
    dataset: Callable[[], _Dataset]
    evaluation: Callable[[_Dataset, _Dataset, str], _Evaluation]

    def build_dataset(self, images: list[Row], annotations: list[Row]) -> _Dataset:
        """Build a data set of one category.

        `loadRes` is not used: it raises an error for an empty list and modifies its argument.
        """
        dataset = self.dataset()
        categories = [{"id": a["category_id"]} for a in annotations[:1]]
        dataset.dataset = {"images": images, "annotations": annotations, "categories": categories}
        dataset.createIndex()
        return dataset


class CocoEvaluator:
    """Accumulates detections image by image and evaluates them against a COCO ground truth.

    An evaluator serves one evaluation. annotations: those of the evaluated classes; images: COCO
    images by id; rows: COCO result rows so far; image_ids: the images added so far, only these are
    evaluated. An image that is added again (by a sampler that pads its last batch) is ignored, with
    its rows.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        categories: Categories,
        *,
        max_detections: int = 100,
        backend: str = "auto",
        iou_types: Sequence[str] = (BBOX, SEGM),
        oks_sigmas: Sequence[float] | None = None,
    ) -> None:
        """Configure the evaluation.

        ground_truth: a validated COCO data set (each annotation has id, image_id, category_id,
        bbox, area, iscrowd, segmentation); it is not modified. categories: the evaluated classes;
        ground truth of other classes is ignored. max_detections: the number of highest-scored
        detections per image and class that are evaluated. backend: `pycocotools`, `faster` for
        faster-coco-eval (equal metrics, less time), or `auto`: the latter if it is installed.
        iou_types: any of `bbox`, `segm`, `keypoints`.
        oks_sigmas: standard deviation of each keypoint of a class, relative to the object's size.
        By default, and for classes with another number of keypoints: COCO's 17 for 17 keypoints,
        1/P for P.

        Raises UserError for an unknown or missing backend, an unknown IoU type, and ground truth
        without masks if masks are evaluated.
        """
        _check_options(categories, max_detections, iou_types)
        self.categories = categories
        self.iou_types = tuple(iou_types)
        self.limits = _detection_limits(max_detections)
        self.oks_sigmas = None if oks_sigmas is None else tuple(float(v) for v in oks_sigmas)
        self._backend = _load_backend(backend)

        # Ground truth
        self._known_ids = set(categories.ids)
        self.images = {int(image["id"]): image for image in ground_truth["images"]}
        annotations = ground_truth.get("annotations", [])
        self.annotations = [a for a in annotations if a["category_id"] in self._known_ids]
        if SEGM in self.iou_types:
            _require_masks(self.annotations)

        # Results so far
        self.rows: list[Row] = []
        self.image_ids: list[int] = []
        self._seen: set[int] = set()
        self._tables: dict[str, tuple[Floats, Floats]] = {}
        self._matches: dict[str, dict[str, Matches]] = {}  # by IoU type and class

    def update(self, batch: Batch, outputs: Outputs) -> None:
        """Add the outputs of a model for a batch, transformed to the frames of the image files.

        Masks are pasted only if they are evaluated.
        """
        rows = detection_rows(batch, outputs, self.categories, masks=SEGM in self.iou_types)
        self.add_rows(batch.image_ids, rows)

    def add_rows(self, image_ids: Iterable[int], rows: Iterable[Row]) -> None:
        """Add images and their COCO result rows, from another process or a file.

        image_ids: all images that were processed, including those without detections. Raises
        UserError for an image that is not in the ground truth, and for an invalid row (its image,
        class, score or mask).
        """
        ids = {int(i) for i in image_ids}
        unknown = sorted(ids - self.images.keys())
        if unknown:
            raise UserError(
                f"image {unknown[0]} is not in the ground truth "
                f"({len(unknown)} of {len(ids)} images are not)"
            )
        new = ids - self._seen
        new_rows: list[Row] = []
        for row in rows:
            if row["image_id"] not in ids:
                raise UserError(
                    f"a result row belongs to image {row['image_id']}, which is not among the "
                    "images added with it"
                )
            if row["image_id"] in new:
                self._check_row(row)
                new_rows.append(row)
        self.rows += new_rows
        self.image_ids += sorted(new)
        self._seen |= new
        self._tables.clear()
        self._matches.clear()

    def compute(self) -> Metrics:
        """Compute all metrics of the images added so far, in [0, 1], or -1 without ground truth.

        For each IoU type `bbox/AP`, `AP50`, `AP75`, `APs`, `APm`, `APl` (objects under 32^2 pixels,
        under 96^2, and larger), and recalls `AR1`, `AR10`, `AR<max_detections>`, `ARs`, `ARm`,
        `ARl`. For keypoints (OKS instead of IoU) `AP`, `AP50`, `AP75`, `APm`, `APl`, `AR20`, `ARm`,
        `ARl`.
        """
        metrics: Metrics = {}
        for kind in self.iou_types:
            precision, recall = self._table(kind)
            precision = precision[..., -1]  # at the largest number of detections: [T, R, K, A]
            metrics[f"{kind}/AP"] = _mean(precision[..., 0])
            metrics[f"{kind}/AP50"] = _mean(precision[_AP50, ..., 0])
            metrics[f"{kind}/AP75"] = _mean(precision[_AP75, ..., 0])
            sizes = list(enumerate(AREAS[kind]))[1:]
            for area, size in sizes:
                metrics[f"{kind}/AP{size}"] = _mean(precision[..., area])
            for m, limit in enumerate(self._limits(kind)):
                metrics[f"{kind}/AR{limit}"] = _mean(recall[:, :, 0, m])
            for area, size in sizes:
                metrics[f"{kind}/AR{size}"] = _mean(recall[:, :, area, -1])
        return metrics

    def per_class(self) -> dict[str, dict[str, float]]:
        """Compute the AP of each class, by IoU type and name: {"segm": {"cat": 0.41, ...}}.

        -1 for a class without ground truth in the images added so far.
        """
        values: dict[str, dict[str, float]] = {}
        for kind in self.iou_types:
            precision, _ = self._table(kind)
            values[kind] = {}
            for k, name in enumerate(self.categories.names):
                values[kind][name] = _mean(precision[:, :, k, 0, -1])
        return values

    def pr_curves(self, iou: float = 0.5) -> dict[str, dict[str, Floats]]:
        """Precision at recalls 0, 0.01 ... 1, by IoU type and name: {"segm": {"cat": f64 [101]}}.

        iou: one of COCO's matching thresholds 0.5, 0.55 ... 0.95. -1 for a class without ground
        truth. Raises ValueError for another threshold.
        """
        step = (iou - 0.5) / 0.05
        t = round(step)
        if not 0 <= t < THRESHOLDS or abs(step - t) > 1e-6:
            raise ValueError(f"iou must be one of 0.5, 0.55 ... 0.95, got {iou}")
        curves: dict[str, dict[str, Floats]] = {}
        for kind in self.iou_types:
            precision, _ = self._table(kind)
            curves[kind] = {}
            for k, name in enumerate(self.categories.names):
                curves[kind][name] = precision[t, :, k, 0, -1].copy()
        return curves

    def class_counts(self) -> dict[str, int]:
        """The number of objects of each class in the images added so far, by name."""
        counts = dict.fromkeys(self.categories.ids, 0)
        for annotation in self.annotations:
            if annotation["image_id"] in self._seen and not annotation.get("iscrowd", 0):
                counts[annotation["category_id"]] += 1
        return dict(zip(self.categories.names, counts.values(), strict=True))

    def best_scores(self) -> Metrics:
        """Compute the score threshold with the highest F1 at IoU 0.50, over all classes together.

        `F1`, `precision`, `recall` and `best_threshold` of masks if they are evaluated, else of
        boxes; -1 where no detection is correct; {} if neither is evaluated.
        """
        kind = self._confidence_kind
        return {} if kind is None else best_metrics(kind, self.score_curves()[""])

    def score_curves(self) -> dict[str, ScoreCurves]:
        """Precision, recall and F1 over the score threshold, by class name, "" for all together.

        Classes without objects are left out, but count for all together.
        """
        kind = self._confidence_kind
        if kind is None:
            return {}
        self._table(kind)
        matches = self._matches[kind]
        curves = {"": score_curves(merge_matches(list(matches.values())))}
        for name, class_matches in matches.items():
            if class_matches.num_objects:
                curves[name] = score_curves(class_matches)
        return curves

    @property
    def _confidence_kind(self) -> str | None:
        """What thresholds are chosen for: masks, else boxes."""
        return next((kind for kind in (SEGM, BBOX) if kind in self.iou_types), None)

    def table(self, rest: str | None = None) -> str:
        """Format the metrics as text: IoU types side by side, then the AP of the classes.

        rest: the file that has the AP of all classes, where many are cut; None: nothing is cut.
        """
        counts = f"images: {len(self.image_ids)}, detections: {len(self.rows)}"
        limit = f"at most {self.limits[-1]} per class and image"
        title = f"{counts}, evaluated: {limit}, with {self._backend.name}"
        return f"{title}\n{metrics_table(self.compute(), self.per_class(), rest=rest)}"

    def _check_row(self, row: Row) -> None:
        """Raise UserError for a row that cannot be evaluated."""
        image_id = row["image_id"]
        category_id = row["category_id"]
        if category_id not in self._known_ids:
            raise UserError(
                f"a result row of image {image_id} has the category id {category_id}, which the "
                "data set does not have"
            )
        if not all(map(math.isfinite, (row["score"], *row.get("bbox", ())))):
            raise UserError(
                f"a result row of image {image_id} has a score or box that is not finite: has the "
                "training diverged?"
            )
        has_keypoints = bool(self.categories.keypoints[self.categories.ids.index(category_id)])
        for kind, key in KINDS.items():
            required = kind in self.iou_types and (kind != KEYPOINTS or has_keypoints)
            if required and key not in row:
                raise UserError(
                    f"a result row of image {image_id} has no {key}: exclude {kind!r} from "
                    "iou_types to evaluate without it"
                )
        if SEGM in self.iou_types:
            size = list(row["segmentation"]["size"])
            image = self.images[image_id]
            expected = [image["height"], image["width"]]
            if size != expected:
                raise UserError(
                    f"a result mask of image {image_id} has (height, width) {size}, the image has "
                    f"{expected}"
                )

    def _table(self, kind: str) -> tuple[Floats, Floats]:
        """Precision [T, R, K, A, M] and recall [T, K, A, M] of the images added; -1 if undefined.

        The evaluation runs class by class: classes are independent, and the intermediate results of
        a class (a dictionary per image and object size) are freed before the next.
        """
        if kind in self._tables:
            return self._tables[kind]
        rows = _by_category(self.rows)
        annotations = _by_category(a for a in self.annotations if a["image_id"] in self._seen)
        axes = (len(self.categories), len(AREAS[kind]), len(self._limits(kind)))
        precision = np.full((THRESHOLDS, RECALLS, *axes), -1.0)
        recall = np.full((THRESHOLDS, *axes), -1.0)
        matches: dict[str, Matches] = {}
        for k, category_id in enumerate(self.categories.ids):
            num_points = len(self.categories.keypoints[k])
            if kind == KEYPOINTS and not num_points:
                continue
            truths = truth_entries(kind, annotations[category_id], self.images)
            detections = row_entries(kind, rows[category_id])
            if truths:
                precision[:, :, k], recall[:, k] = self._evaluate_class(
                    kind, truths, detections, num_points
                )
            if kind == self._confidence_kind:
                name = self.categories.names[k]
                matches[name] = match_class(kind, truths, detections, self.limits[-1])
        self._tables[kind] = precision, recall
        self._matches[kind] = matches
        return precision, recall

    def _limits(self, kind: str) -> list[int]:
        """The numbers of detections per class and image at which recall is reported."""
        return [KEYPOINT_LIMIT] if kind == KEYPOINTS else self.limits

    def sigmas(self, num_points: int) -> tuple[float, ...]:
        """The OKS standard deviations used for a class with this number of keypoints."""
        if self.oks_sigmas is not None and len(self.oks_sigmas) == num_points:
            return self.oks_sigmas
        if num_points == len(COCO_SIGMAS):
            return COCO_SIGMAS
        return (1 / num_points,) * num_points

    def _evaluate_class(
        self, kind: str, annotations: list[Row], rows: list[Row], num_points: int
    ) -> tuple[Floats, Floats]:
        """Precision [T, R, A, M] and recall [T, A, M] of one class.

        annotations, rows: its `truth_entries` and `row_entries`.
        """
        # Images without this class do not contribute. The ids are sorted because rows of equal
        # score rank in the order of their images.
        ids = sorted({r["image_id"] for r in annotations} | {r["image_id"] for r in rows})
        images = [
            {"id": i, "height": self.images[i]["height"], "width": self.images[i]["width"]}
            for i in ids
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = self._backend.build_dataset(images, annotations)
            detections = self._backend.build_dataset(images, rows)
            evaluation = self._backend.evaluation(truth, detections, kind)
            evaluation.params.maxDets = self._limits(kind)
            if kind == KEYPOINTS:
                evaluation.params.kpt_oks_sigmas = np.array(self.sigmas(num_points))
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _check_options(categories: Categories, max_detections: int, iou_types: Sequence[str]) -> None:
    """Raise UserError for options that are out of range or do not fit the classes."""
    if max_detections < 1:
        raise UserError(f"max_detections must be at least 1, got {max_detections}")
    if not iou_types or any(kind not in KINDS for kind in iou_types):
        raise UserError(f"iou_types must be some of {', '.join(KINDS)}, got {list(iou_types)}")
    if KEYPOINTS in iou_types and not categories.num_points:
        raise UserError("no class has keypoints: evaluate without them")


def _detection_limits(max_detections: int) -> list[int]:
    """The numbers of detections at which recall is reported: 1, 10 and the maximum."""
    smaller = [n for n in (1, 10) if n < max_detections]
    return [*smaller, max_detections]


def _mean(values: Floats) -> float:
    """The mean of the defined values; -1 without any."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _by_category(rows: Iterable[Row]) -> defaultdict[int, list[Row]]:
    groups: defaultdict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["category_id"]].append(row)
    return groups


def check_backend(name: str) -> None:
    """Raise UserError for a backend that is unknown or not installed."""
    _load_backend(name)


def _load_backend(name: str) -> _Backend:
    if name not in BACKENDS:
        raise UserError(
            f"the evaluation backend must be {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}, "
            f"not {name!r}"
        )
    if name != "pycocotools":
        try:
            from faster_coco_eval import COCO as FasterCOCO  # noqa: N811
            from faster_coco_eval import COCOeval_faster

            return _Backend("faster-coco-eval", FasterCOCO, COCOeval_faster)
        except ImportError as error:
            if name == "faster":
                raise UserError(
                    "the backend 'faster' needs faster-coco-eval: pip install -e '.[fast]'"
                ) from error
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _Backend("pycocotools", COCO, COCOeval)


def _require_masks(annotations: list[Row]) -> None:
    """Raise UserError if an annotation has no mask."""
    bare = [a for a in annotations if not a.get("segmentation")]
    if bare:
        raise UserError(
            f"annotation {bare[0]['id']} of image {bare[0]['image_id']} has no segmentation "
            f"({len(bare)} of {len(annotations)} annotations have none): evaluate boxes only with "
            "iou_types ['bbox'], or add the masks"
        )
