"""Validates a model on a split: losses, metrics and images.

The trainer gets a `Validation` as a callable; the command `evaluate` calls one alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from PIL import Image
from torch import nn
from tqdm import tqdm

from maskseg.engine.distributed import DistributedContext, run_while_others_wait
from maskseg.engine.logs import PER_CLASS_FILE, RunLog
from maskseg.engine.signals import check_interrupted
from maskseg.errors import warn_if_not_drawn
from maskseg.evaluation.coco import CocoEvaluator, GroundTruth, check_backend
from maskseg.evaluation.coco_entries import BBOX, KEYPOINTS, SEGM
from maskseg.evaluation.coco_results import Row, detection_rows, to_original
from maskseg.evaluation.diagnosis import confusion_matrix, diagnose, worst
from maskseg.evaluation.table import summary_table
from maskseg.inference.pixel_scores import PixelResult, PixelScores
from maskseg.models.interfaces import TrainableModel
from maskseg.structures import Batch, Categories, Outputs
from maskseg.visualization.batches import draw_batch
from maskseg.visualization.detections import draw_detections
from maskseg.visualization.diagnosis import (
    draw_confusion,
    draw_pr_curves,
    draw_score_curves,
    draw_worst_images,
)
from maskseg.visualization.keypoints import Keypoints
from maskseg.visualization.layout import RGBImage, mosaic, side_by_side
from maskseg.visualization.legends import add_class_legend

# The names of all images that a validation may draw.
SHEETS = (
    "validation",
    "pr_curves",
    "confidence",
    "confusion",
    "worst",
    "segments",
    "semantic",
    "semantic_confusion",
    "cam",
)


@dataclass(frozen=True)
class ValidationSettings:
    """What is evaluated and drawn.

    max_detections, backend, oks_sigmas: see `CocoEvaluator`; num_images: images that are drawn, 0:
    neither images nor plots; min_score: minimum score of the detections that are drawn and
    diagnosed.
    """

    max_detections: int = 100
    backend: str = "pycocotools"
    num_images: int = 8
    min_score: float = 0.5
    oks_sigmas: Sequence[float] | None = None


@dataclass(frozen=True)
class BatchResult:
    """The results of one batch. losses: each multiplied by the number of images."""

    image_ids: list[int]
    rows: list[Row]
    losses: dict[str, float]
    pixels: PixelResult


class Validation:
    """Evaluates a model on a split.

    Called with a model, it returns the metrics: `bbox/AP` ... `segm/AR100` for a model that detects
    objects, those of `PixelScores` for predictions of pixels and whole images, and `loss` and
    `loss/<term>` (in evaluation mode, without gradients). The results of several processes are
    merged in the order of a single process, so that the metrics are the same; ranks other than 0
    return {}.

    After a call: `evaluator` (rows, AP per class; None for a model that detects no objects),
    `drawn` (images: ground truth | prediction).
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        truth: Callable[[], GroundTruth],
        categories: Categories,
        settings: ValidationSettings | None = None,
        load_image: Callable[[int], RGBImage] | None = None,
        context: DistributedContext | None = None,
    ) -> None:
        """Configure the validation.

        batches: this process's share of the images, each once, with ground truth; truth: the whole
        ground truth as a COCO data set (`CocoFile.to_dict`); load_image: image id -> uint8 RGB
        [H, W, 3], for the sheet of the worst images (None: no such sheet). Raises UserError for an
        unknown or missing backend.
        """
        self.batches = batches
        self.truth = truth
        self.categories = categories
        self.settings = settings or ValidationSettings()
        self.load_image = load_image
        self.context = context or DistributedContext()
        check_backend(self.settings.backend)  # now, not at the first evaluation
        self.drawn: list[RGBImage] = []
        self._drawn_labels: list[int] = []  # of the objects in `drawn`
        self.pixels = PixelScores(categories)
        self.evaluator: CocoEvaluator | None = None
        self._sheets: dict[str, RGBImage] | None = None

    def __call__(self, model: nn.Module, step: int, log: RunLog | None = None) -> dict[str, float]:
        """Evaluate a model. log: for the table, AP by class, images and curves, or None."""
        if not isinstance(model, TrainableModel):
            raise TypeError(f"a {type(model).__name__} has no losses and predictions to evaluate")
        model.eval()
        device = next(model.parameters()).device
        kinds = _iou_types(model)
        self.drawn = []
        self._drawn_labels = []
        self.pixels = PixelScores(self.categories, getattr(model, "level", None))
        self.evaluator = None
        self._sheets = None
        results = []
        disable = None if self.context.main else True
        for batch in tqdm(self.batches(), desc="evaluating", leave=False, disable=disable):
            check_interrupted()
            losses, outputs = model.validate(batch.to(device))
            result = BatchResult(
                batch.image_ids,
                detection_rows(batch, outputs, self.categories, masks=SEGM in kinds),
                {name: float(value) * len(batch) for name, value in losses.items()},
                self.pixels.score_batch(batch, outputs),
            )
            results.append(result)
            if self.context.main:
                with warn_if_not_drawn("an image of the validation"):
                    self.draw(batch, outputs)
        check_interrupted()
        results_by_rank = self.context.gather(results)
        del results  # gathering has copied them
        metrics: dict[str, float] = {}

        def merge() -> None:
            metrics.update(self._merge(results_by_rank, kinds))
            if log is not None:
                self._log_classes(log, step, metrics)
                self._log_images(log, step)

        # The metrics of a large dataset take longer than a message may.
        run_while_others_wait(self.context, self.context.main, merge)
        return metrics

    def _merge(
        self, results_by_rank: Sequence[Sequence[BatchResult]], kinds: Sequence[str]
    ) -> dict[str, float]:
        """Compute the metrics of all results.

        Batch b was processed by rank b % world_size. The results are merged in the order of the
        batches, because the order matters for equal scores and for sums of losses.
        """
        evaluator = None
        if kinds:
            evaluator = CocoEvaluator(
                self.truth(),
                self.categories.thing_categories(),
                max_detections=self.settings.max_detections,
                backend=self.settings.backend,
                iou_types=kinds,
                oks_sigmas=self.settings.oks_sigmas,
            )
        losses: dict[str, float] = defaultdict(float)
        num_images = 0
        for result in _interleave(results_by_rank):
            if evaluator is not None:
                evaluator.add_rows(result.image_ids, result.rows)
            num_images += len(result.image_ids)
            self.pixels.merge(result.pixels)
            for name, value in result.losses.items():
                losses[name] += value
        self.evaluator = evaluator
        metrics: dict[str, float] = {}
        if evaluator is not None:
            metrics |= evaluator.compute()
            metrics |= evaluator.best_scores()
        metrics |= self.pixels.metrics()
        metrics["loss"] = sum(losses.values()) / num_images
        for name, value in losses.items():
            metrics[f"loss/{name}"] = value / num_images
        return metrics

    def table(self, rest: str | None = None) -> str:
        """Format all metrics of the last call as text.

        rest: the file that has the AP of all classes, where many are cut; None: nothing is cut.
        """
        tables = [] if self.evaluator is None else [self.evaluator.table(rest)]
        tables.append(self.pixels.table())
        return "\n\n".join(table for table in tables if table)

    def _log_classes(self, log: RunLog, step: int, metrics: dict[str, float]) -> None:
        """Print a compact table of an evaluation, and log the AP of each class."""
        if log.path is None:
            return
        per_class = self.per_class()
        rest = str(log.path.with_name(PER_CLASS_FILE))
        log.print(f"evaluation of step {step}\n{summary_table(metrics, per_class, rest=rest)}")
        counts = {} if self.evaluator is None else self.evaluator.class_counts()
        log.log_classes(step, per_class, counts)

    def _log_images(self, log: RunLog, step: int) -> None:
        """Log images and precision-recall curves."""
        if self.settings.num_images <= 0:
            return
        for name, sheet in self.sheets(log.print).items():
            with warn_if_not_drawn(f"{name} of step {step} in a logger", log.print):
                log.log_image(name, sheet, step)
        if self.evaluator is None:
            return
        with warn_if_not_drawn(f"precision-recall curves of step {step}", log.print):
            for kind, curves in self.evaluator.pr_curves().items():
                for name, precision in curves.items():
                    if precision.min() >= 0:
                        log.log_pr_curve(f"{kind} at IoU 0.50/{name}", precision, step)

    def draw(self, batch: Batch, outputs: Outputs) -> None:
        """Draw the first images of a batch, ground truth beside prediction, in its frame."""
        max_images = min(len(batch), self.settings.num_images - len(self.drawn))
        if max_images <= 0:
            return
        detections = outputs.detections.to("cpu")
        for i, (image, truth) in enumerate(draw_batch(batch, self.categories, max_images)):
            size = batch.sizes[i].tolist()
            shown = to_original(detections, i, size, size)
            shown = shown[shown.scores >= self.settings.min_score]
            assert shown.labels is not None
            assert batch.targets is not None
            self._drawn_labels += shown.labels.tolist()
            self._drawn_labels += batch.targets.labels[batch.targets.image_index == i].tolist()
            keypoints = None
            if shown.keypoints is not None:
                keypoints = Keypoints(shown.keypoints, self.categories.skeleton_edges)
            predicted = draw_detections(
                image,
                shown.boxes,
                shown.labels,
                shown.scores,
                shown.masks.to_rle() if shown.masks else None,
                self.categories.names,
                keypoints=keypoints,
            )
            titles = (f"{batch.file_names[i]}: ground truth", "prediction")
            self.drawn.append(side_by_side(truth, predicted, titles))
            self.pixels.draw(batch, outputs, i, image)

    def sheets(self, warn: Callable[[str], None] | None = None) -> dict[str, RGBImage]:
        """The images of the last call by name.

        Those of `PixelScores` and, for a model that detects objects, `validation` (ground truth |
        prediction), `pr_curves`, `confidence`, `confusion`, and `worst`, the 20 images with the
        most errors. An image that cannot be drawn is reported to `warn`, by default on the console,
        and missing. Empty if no image is to be drawn.
        """
        if self.settings.num_images <= 0:
            return {}
        if self._sheets is None:
            sheets: dict[str, RGBImage] = {}
            for name, draw in self._drawings().items():
                with warn_if_not_drawn(f"{name}.png", warn):
                    sheets[name] = draw()
            self._sheets = sheets
        return self._sheets

    def _drawings(self) -> dict[str, Callable[[], RGBImage]]:
        """The functions that draw the images, by name."""
        drawings: dict[str, Callable[[], RGBImage]] = {}
        if self.drawn and self.evaluator is not None:
            drawings["validation"] = self._draw_validation
        drawings |= self.pixels.drawings()
        if self.evaluator is not None:
            drawings |= self._diagnosis_drawings(self.evaluator)
        return drawings

    def _draw_validation(self) -> RGBImage:
        """The drawn images below a legend of the classes."""
        sheet = mosaic(self.drawn, columns=2)
        return add_class_legend(sheet, self._drawn_labels, self.categories.names)

    def _diagnosis_drawings(self, evaluator: CocoEvaluator) -> dict[str, Callable[[], RGBImage]]:
        """The functions that draw the errors of detection."""
        categories = self.categories.thing_categories()
        diagnoses = diagnose(
            evaluator.annotations,
            evaluator.rows,
            categories,
            image_ids=evaluator.image_ids,
            score=self.settings.min_score,
        )
        drawings: dict[str, Callable[[], RGBImage]] = {
            "pr_curves": lambda: draw_pr_curves(evaluator.pr_curves()),
            "confidence": lambda: draw_score_curves(evaluator.score_curves(), categories.names),
            "confusion": lambda: draw_confusion(
                confusion_matrix(diagnoses, categories), categories.names
            ),
        }
        load_image = self.load_image
        if load_image is not None:
            file_names = {i: image["file_name"] for i, image in evaluator.images.items()}
            drawings["worst"] = lambda: draw_worst_images(
                worst(diagnoses), categories, load_image, file_names=file_names
            )
        return drawings

    def per_class(self) -> dict[str, dict[str, float]]:
        """The AP of each class by what was evaluated and name, as `CocoEvaluator.per_class`."""
        values = {} if self.evaluator is None else self.evaluator.per_class()
        return values | self.pixels.per_class()

    def save(self, folder: Path) -> list[str]:
        """Write the images of the last call into a folder. -> the names of those written."""
        files = []
        for name, sheet in self.sheets().items():
            with warn_if_not_drawn(str(folder / f"{name}.png")):
                Image.fromarray(sheet).save(folder / f"{name}.png")
                files.append(f"{name}.png")
        return files


def _interleave(results_by_rank: Sequence[Sequence[BatchResult]]) -> list[BatchResult]:
    """The results in the order of the batches, which the ranks processed in turn."""
    results = []
    for row in zip_longest(*results_by_rank):
        results += [result for result in row if result is not None]
    return results


def _iou_types(model: nn.Module) -> list[str]:
    """What to evaluate of the detected objects; [] for a model that detects none."""
    classifier = getattr(model, "classifier", None)
    if classifier is None:
        return []
    stages = (classifier, *getattr(model, "heads", {}).values())
    fields = {getattr(stage, "adds", "") for stage in stages}
    kinds = [BBOX]
    if "masks" in fields:
        kinds.append(SEGM)
    if "keypoints" in fields:
        kinds.append(KEYPOINTS)
    return kinds
