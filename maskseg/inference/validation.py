"""A model over a split: losses, AP, pictures. The trainer is given one as a callable; `evaluate` runs one alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from maskseg.errors import UserError
from maskseg.evaluation import diagnosis
from maskseg.evaluation.coco import CocoEvaluator, check_backend
from maskseg.evaluation.coco_entries import BBOX, KEYPOINTS, SEGM
from maskseg.evaluation.coco_results import Row, detection_rows, to_original
from maskseg.inference.pixel_scores import MapPart, MapScores
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories, Outputs
from maskseg.visualization.batches import draw_batch
from maskseg.visualization.detections import Picture, draw_detections, mosaic, side_by_side
from maskseg.visualization.diagnosis import draw_confusion, draw_pr_curves, draw_worst_images


@dataclass(frozen=True)
class Processes:
    """How the processes that share an evaluation meet. gather: everyone's value where rank is 0, elsewhere nothing."""

    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]


@dataclass(frozen=True)
class _Part:
    """What one batch gave: its images, their result rows, each loss times the number of images, scores of maps of pixels."""

    image_ids: list[int]
    rows: list[Row]
    losses: dict[str, float]
    maps: MapPart


class Validation:
    """batches: this process' share of the images, each once, with its truth; truth: all of it as a COCO data set (`CocoFile.to_dict`);
    min_score: of the detections that are drawn and diagnosed; picture: image id -> uint8 RGB [H, W, 3], for the images that went worst.

    Called with a model, gives `bbox/AP` ... `segm/AR100` of one that finds objects, of one that says something of every pixel or of the image what
    `MapScores.metrics` says, and, with truth, `loss` and `loss/<term>` (in evaluation mode, without gradients); the batches of several processes
    are put together in the order that one would have, so that the numbers are the same; where rank is not 0 there are none.

    After a call: `table` (text), `evaluator` (rows, per-class AP; None of a model that finds no objects), `drawn` (pictures: truth | prediction).
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        truth: Callable[[], dict[str, Any]],
        categories: Categories,
        max_detections: int = 100,
        backend: str = "pycocotools",
        pictures: int = 8,
        min_score: float = 0.5,
        picture: Callable[[int], NDArray[np.uint8]] | None = None,
        processes: Processes | None = None,
        oks_sigmas: Sequence[float] | None = None,
    ) -> None:
        self.batches, self.truth, self.categories = batches, truth, categories
        check_backend(backend)  # not only at the first evaluation
        self.max_detections, self.backend = max_detections, backend
        self.pictures, self.min_score, self.picture = pictures, min_score, picture
        self.processes, self.oks_sigmas = processes or Processes(), oks_sigmas
        self.table = ""
        self.drawn: list[Picture] = []
        self.maps = MapScores(categories)
        self._sheets: dict[str, Picture] | None = None
        self.evaluator: CocoEvaluator | None = None

    def __call__(self, model: nn.Module, step: int, log: Any = None) -> dict[str, float]:
        """log: a `RunLog`, for TensorBoard's pictures and curves, or None."""
        model.eval()
        rcnn = cast(GeneralizedRCNN, model)
        device, kinds = next(model.parameters()).device, _kinds(model)
        self.drawn, self.maps, self._sheets = (
            [],
            MapScores(self.categories, getattr(model, "level", None)),
            None,
        )
        self.evaluator = None
        parts = []
        for batch in tqdm(
            self.batches(),
            desc="evaluating",
            leave=False,
            disable=None if self.processes.rank == 0 else True,
        ):
            losses, outputs = rcnn.validate(batch.to(device))
            rows = detection_rows(batch, outputs, self.categories, masks=SEGM in kinds)
            parts.append(
                _Part(
                    batch.image_ids,
                    rows,
                    {k: float(v) * len(batch) for k, v in losses.items()},
                    self.maps.part(batch, outputs),
                )
            )
            if self.processes.rank == 0:
                self.draw(batch, outputs)
        shares = self.processes.gather(parts)
        del parts
        if not shares:
            return {}
        metrics = self._together(shares, kinds)
        if log is not None:
            self._show(log, step)
        return metrics

    def _together(self, shares: list[list[_Part]], kinds: list[str]) -> dict[str, float]:
        """Batch b was worked on by process b % world: the order of one process, in which equal scores count and losses are summed."""
        keys: dict[str, Any] = {
            "max_detections": self.max_detections,
            "backend": self.backend,
            "oks_sigmas": self.oks_sigmas,
        }
        evaluator = (
            CocoEvaluator(self.truth(), self.categories.things(), iou_types=kinds, **keys)
            if kinds
            else None
        )
        sums: dict[str, float] = defaultdict(float)
        images = 0
        for row in zip_longest(*shares):
            for part in (p for p in row if p is not None):
                if evaluator is not None:
                    evaluator.add_rows(part.image_ids, part.rows)
                images += len(part.image_ids)
                self.maps.merge(part.maps)
                for name, value in part.losses.items():
                    sums[name] += value
        self.evaluator, found = evaluator, {} if evaluator is None else evaluator.compute()
        metrics = {**found, **self.maps.metrics(), "loss": sum(sums.values()) / images}
        self.table = "\n\n".join(
            text
            for text in ("" if evaluator is None else evaluator.table(), self.maps.table())
            if text
        )
        return metrics | {f"loss/{name}": value / images for name, value in sums.items()}

    def _show(self, log: Any, step: int) -> None:
        try:
            for name, sheet in self.sheets().items():
                log.picture(name, sheet, step)
        except (
            OSError,
            UserError,
        ) as error:  # an image that has gone since is not worth a training
            log.say(f"warning: the pictures of step {step} could not be made ({error})")
        for kind, curves in (
            self.evaluator.pr_curves() if self.evaluator is not None else {}
        ).items():
            for name, precision in curves.items():
                if precision.min() >= 0:
                    log.pr_curve(f"{kind} at IoU 0.50/{name}", precision, step)

    def draw(self, batch: Batch, outputs: Outputs) -> None:
        """Adds the first pictures of a batch to `drawn`: truth beside prediction, in its frame."""
        most = min(len(batch), self.pictures - len(self.drawn))
        if most <= 0:
            return
        detections = outputs.detections.to("cpu")
        for i, (image, left) in enumerate(draw_batch(batch, self.categories, most)):
            size = cast(list[int], batch.sizes[i].tolist())
            found = to_original(detections, i, size, size)
            found = found[found.scores >= self.min_score]
            assert found.labels is not None
            masks = found.masks.to_rle() if found.masks else None
            points: dict[str, Any] = {"keypoints": found.keypoints, "lines": self.categories.lines}
            right = draw_detections(
                image,
                found.boxes,
                found.labels,
                found.scores,
                masks,
                self.categories.names,
                **points,
            )
            self.drawn.append(side_by_side(left, right, (f"{batch.names[i]}: truth", "prediction")))
            self.maps.draw(batch, outputs, i, image)

    def sheets(self) -> dict[str, Picture]:
        """The pictures of the last call by name: those of `MapScores` and, of a model that finds objects, `validation` (truth | prediction),
        `pr_curves`, `confusion`, and `worst`, the 20 images with the most errors and why."""
        if self._sheets is None:
            objects = {} if self.evaluator is None else self._diagnosed(self.evaluator)
            drawn = (
                {"validation": mosaic(self.drawn, columns=2)}
                if self.drawn and self.evaluator is not None
                else {}
            )
            self._sheets = drawn | self.maps.sheets() | objects
        return self._sheets

    def _diagnosed(self, evaluator: CocoEvaluator) -> dict[str, Picture]:
        ids, names = (
            evaluator.image_ids,
            {i: image["file_name"] for i, image in evaluator.images.items()},
        )
        things = self.categories.things()
        found = diagnosis.diagnose(
            evaluator.truths, evaluator.rows, things, image_ids=ids, score=self.min_score
        )
        sheets = {"pr_curves": draw_pr_curves(evaluator.pr_curves())}
        sheets["confusion"] = draw_confusion(
            diagnosis.confusion_matrix(found, things), things.names
        )
        if self.picture is not None:
            sheets["worst"] = draw_worst_images(
                diagnosis.worst(found), things, self.picture, file_names=names
            )
        return sheets

    def per_class(self) -> dict[str, dict[str, float]]:
        """AP of each class by what was evaluated and name, as `CocoEvaluator.per_class`."""
        return (
            {} if self.evaluator is None else self.evaluator.per_class()
        ) | self.maps.per_class()

    def save(self, folder: Path) -> list[str]:
        """Writes the pictures of the last call into a folder. -> their names."""
        for name, sheet in self.sheets().items():
            Image.fromarray(sheet).save(folder / f"{name}.png")
        return [f"{name}.png" for name in self.sheets()]


def _kinds(model: nn.Module) -> list[str]:
    """What is to be compared of the objects that the model finds; nothing of one that finds none."""
    classifier = getattr(model, "classifier", None)
    if classifier is None:
        return []
    adds = {
        getattr(head, "adds", "")
        for head in (classifier, *cast(GeneralizedRCNN, model).heads.values())
    }
    return [
        BBOX,
        *([SEGM] if "masks" in adds else []),
        *([KEYPOINTS] if "keypoints" in adds else []),
    ]
