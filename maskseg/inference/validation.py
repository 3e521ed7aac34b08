"""A model over a split: losses, AP, pictures. The trainer is given one as a callable; `evaluate` runs one alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from maskseg.evaluation.coco import CocoEvaluator, check_backend
from maskseg.evaluation.rows import to_original
from maskseg.inference.pictures import draw_detections, mosaic, side_by_side
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories, Outputs


class Validation:
    """batches: every image once, with its truth; truth: the same as a COCO data set (`CocoFile.to_dict`).

    Called with a model, gives `bbox/AP` ... `segm/AR100` and, with truth, `loss` and `loss/<term>` (in evaluation mode, without gradients).

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
    ) -> None:
        self.batches, self.truth, self.categories = batches, truth, categories
        check_backend(backend)  # not only at the first evaluation
        self.max_detections, self.backend = max_detections, backend
        self.pictures, self.picture_score = pictures, picture_score
        self.table = ""
        self.drawn: list[Any] = []
        self.evaluator: CocoEvaluator | None = None

    def __call__(self, model: nn.Module, step: int, log: Any = None) -> dict[str, float]:
        """log: a `RunLog`, for TensorBoard's pictures, or None."""
        model.eval()
        rcnn = cast(GeneralizedRCNN, model)
        device = next(model.parameters()).device
        kinds = ["bbox", "segm"] if any(getattr(head, "adds", "") == "masks" for head in rcnn.heads.values()) else ["bbox"]
        self.evaluator = CocoEvaluator(self.truth(), self.categories, max_detections=self.max_detections, backend=self.backend, iou_types=kinds)
        self.drawn = []
        sums: dict[str, float] = defaultdict(float)
        images = 0
        for batch in tqdm(self.batches(), desc="evaluating", leave=False, disable=None):
            with torch.no_grad():
                placed = batch.to(device)
                losses, outputs = rcnn(placed), rcnn.predict(placed)
            for name, value in losses.items():
                sums[name] += float(value) * len(batch)
            images += len(batch)
            self.evaluator.update(batch, outputs)
            self._draw(batch, outputs)
        metrics = {**self.evaluator.compute(), "loss": sum(sums.values()) / images}
        metrics |= {f"loss/{name}": value / images for name, value in sums.items()}
        self.table = self.evaluator.table()
        if log is not None and self.drawn:
            log.picture("validation", mosaic(self.drawn, columns=2), step)
        return metrics

    def _draw(self, batch: Batch, outputs: Outputs) -> None:
        """Truth beside prediction, in the frame of the batch."""
        detections = outputs.detections.to("cpu")
        for i in range(min(len(batch), self.pictures - len(self.drawn))):
            size = cast(list[int], batch.sizes[i].tolist())
            image = np.ascontiguousarray(batch.images[i, :, : size[0], : size[1]].permute(1, 2, 0).numpy())
            found = to_original(detections, i, size, size)
            found = found[found.scores >= self.picture_score]
            assert batch.targets is not None
            assert found.labels is not None
            truth = batch.targets[batch.targets.image_index == i]
            names = self.categories.names
            left = draw_detections(image, truth.boxes, truth.labels, None, truth.masks.to_rle() if truth.masks else None, names)
            right = draw_detections(image, found.boxes, found.labels, found.scores, found.masks.to_rle() if found.masks else None, names)
            self.drawn.append(side_by_side(left, right, (f"{batch.names[i]}: truth", "prediction")))

    def save_pictures(self, path: Path) -> None:
        """The mosaic of what was drawn, as PNG."""
        if self.drawn:
            Image.fromarray(mosaic(self.drawn, columns=2)).save(path)
