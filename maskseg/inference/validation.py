"""A model over a split: losses, AP, pictures. The trainer is given one as a callable; `evaluate` runs one alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from tqdm import tqdm

from maskseg.evaluation.coco import CocoEvaluator, check_backend
from maskseg.evaluation.rows import Row, detection_rows, to_original
from maskseg.inference.batches import draw_batch
from maskseg.inference.pictures import draw_detections, mosaic, side_by_side
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories, Outputs


@dataclass(frozen=True)
class Processes:
    """How the processes that share an evaluation meet. gather: everyone's value where rank is 0, elsewhere nothing."""

    rank: int = 0
    gather: Callable[[Any], list[Any]] = lambda value: [value]


@dataclass(frozen=True)
class _Part:
    """What one batch gave: its images, their result rows, each loss times the number of images."""

    image_ids: list[int]
    rows: list[Row]
    losses: dict[str, float]


class Validation:
    """batches: this process' share of the images, each once, with its truth; truth: all of it as a COCO data set (`CocoFile.to_dict`);
    picture: image id -> uint8 RGB [H, W, 3], for the images that went worst.

    Called with a model, gives `bbox/AP` ... `segm/AR100` and, with truth, `loss` and `loss/<term>` (in evaluation mode, without gradients); the
    batches of several processes are put together in the order that one would have, so that the numbers are the same; where rank is not 0
    there are none.

    After a call: `table` (text), `evaluator` (rows, per-class AP), `drawn` (pictures: truth | prediction).
    """

    def __init__(
        self,
        batches: Callable[[], Iterable[Batch]],
        truth: Callable[[], dict[str, Any]],
        categories: Categories,
        max_detections: int = 100,
        backend: str = "pycocotools",
        pictures: int = 8,
        picture_score: float = 0.5,
        picture: Callable[[int], NDArray[np.uint8]] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.batches, self.truth, self.categories = batches, truth, categories
        check_backend(backend)  # not only at the first evaluation
        self.max_detections, self.backend = max_detections, backend
        self.pictures, self.picture_score, self.picture = pictures, picture_score, picture
        self.processes = processes or Processes()
        self.table = ""
        self.drawn: list[Any] = []
        self.evaluator: CocoEvaluator | None = None

    def __call__(self, model: nn.Module, step: int, log: Any = None) -> dict[str, float]:
        """log: a `RunLog`, for TensorBoard's pictures and curves, or None."""
        model.eval()
        rcnn = cast(GeneralizedRCNN, model)
        kinds = ["bbox", "segm"] if any(getattr(head, "adds", "") == "masks" for head in rcnn.heads.values()) else ["bbox"]
        device = next(model.parameters()).device
        self.drawn = []
        parts = []
        for batch in tqdm(self.batches(), desc="evaluating", leave=False, disable=None if self.processes.rank == 0 else True):
            losses, outputs = rcnn.validate(batch.to(device))
            rows = detection_rows(batch, outputs, self.categories, masks="segm" in kinds)
            parts.append(_Part(batch.image_ids, rows, {k: float(v) * len(batch) for k, v in losses.items()}))
            if self.processes.rank == 0:
                self._draw(batch, outputs)
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
        self.evaluator = CocoEvaluator(self.truth(), self.categories, max_detections=self.max_detections, backend=self.backend, iou_types=kinds)
        sums: dict[str, float] = defaultdict(float)
        images = 0
        for row in zip_longest(*shares):
            for part in (p for p in row if p is not None):
                self.evaluator.add_rows(part.image_ids, part.rows)
                images += len(part.image_ids)
                for name, value in part.losses.items():
                    sums[name] += value
        metrics = {**self.evaluator.compute(), "loss": sum(sums.values()) / images}
        self.table = self.evaluator.table()
        return metrics | {f"loss/{name}": value / images for name, value in sums.items()}

    def _show(self, log: Any, step: int) -> None:
        assert self.evaluator is not None
        if self.drawn:
            log.picture("validation", mosaic(self.drawn, columns=2), step)
        for kind, curves in self.evaluator.pr_curves().items():
            for name, precision in curves.items():
                if precision.min() >= 0:
                    log.pr_curve(f"{kind} at IoU 0.50/{name}", precision, step)

    def _draw(self, batch: Batch, outputs: Outputs) -> None:
        """Truth beside prediction, in the frame of the batch."""
        most = min(len(batch), self.pictures - len(self.drawn))
        if most <= 0:
            return
        detections = outputs.detections.to("cpu")
        for i, (image, left) in enumerate(draw_batch(batch, self.categories.names, most)):
            size = cast(list[int], batch.sizes[i].tolist())
            found = to_original(detections, i, size, size)
            found = found[found.scores >= self.picture_score]
            assert found.labels is not None
            masks = found.masks.to_rle() if found.masks else None
            right = draw_detections(image, found.boxes, found.labels, found.scores, masks, self.categories.names)
            self.drawn.append(side_by_side(left, right, (f"{batch.names[i]}: truth", "prediction")))

    def save(self, folder: Path) -> list[str]:
        """Writes the pictures of the last call into a folder. -> their names."""
        names = []
        if self.drawn:
            Image.fromarray(mosaic(self.drawn, columns=2)).save(folder / "validation.png")
            names.append("validation.png")
        return names
