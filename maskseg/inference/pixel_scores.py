"""Metrics and images of predictions for pixels (segments, classes) and for whole images.

A part of `Validation`; these predictions are compared with the ground truth of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from maskseg.data.region_map import MIN_STUFF_PIXELS, region_map
from maskseg.evaluation.classification import ImageClassAP, State
from maskseg.evaluation.segmentation_iou import SegmentationIoU
from maskseg.evaluation.semantic import SemanticConfusion
from maskseg.masks.superpixel import SegmentMasks
from maskseg.structures import Batch, Categories, FeatureSpec, Outputs, class_presence
from maskseg.visualization.cam import cam_sheet
from maskseg.visualization.layout import RGBImage, mosaic, side_by_side
from maskseg.visualization.segments import draw_segments
from maskseg.visualization.semantic import draw_semantic_confusion, semantic_sheet

_SHEET_WIDTH = 2600  # px of a sheet of semantic maps, so that its legend stays legible

Labels = NDArray[np.integer]


@dataclass(frozen=True)
class PixelResult:
    """The results of one batch as plain values.

    The states of `SegmentationIoU`, `SemanticConfusion` and `ImageClassAP`.
    """

    segments: list[list[float]]
    semantic: list[list[int]]
    images: State


def segment_maps(outputs: Outputs) -> list[Labels]:
    """The segment of each pixel of each image of a batch, without the padding, i32 [H, W]."""
    assert outputs.segments is not None
    assert isinstance(outputs.segments.masks, SegmentMasks)
    return list(outputs.segments.masks.label_maps())


def semantic_labels(batch: Batch, outputs: Outputs) -> list[Labels]:
    """The label of each pixel of each image, without the padding, i64 [H, W]; -1 for none."""
    maps = outputs.semantic["classes"].cpu().numpy()
    return [maps[i, :height, :width] for i, (height, width) in enumerate(batch.sizes.tolist())]


class PixelScores:
    """Accumulates results of batches, in any order, and draws the first images.

    feature_spec: of the class activation maps of an image classifier, None for other models.
    """

    def __init__(self, categories: Categories, feature_spec: FeatureSpec | None = None) -> None:
        self.categories = categories
        self.feature_spec = feature_spec
        self.segments = SegmentationIoU()
        self.semantic = SemanticConfusion(max(len(categories), 1))
        self.images = ImageClassAP(len(categories))
        self.drawn: dict[str, list[RGBImage]] = {"segments": [], "semantic": [], "cam": []}

    def score_batch(self, batch: Batch, outputs: Outputs) -> PixelResult:
        """Compute the results of a batch.

        They are empty where the model makes no such predictions or the data has no ground truth.
        """
        segments = SegmentationIoU()
        if outputs.segments is not None:
            for i, labels in enumerate(segment_maps(outputs)):
                segments.add(labels, [region_map(batch, i, MIN_STUFF_PIXELS)])
        semantic: list[list[int]] = []
        if "classes" in outputs.semantic and batch.semantic is not None:
            confusion = SemanticConfusion(self.semantic.num_classes)
            for i, labels in enumerate(semantic_labels(batch, outputs)):
                confusion.add(labels, _true_labels(batch, i))
            semantic = confusion.state()
        images = ImageClassAP(self.images.num_classes)
        if outputs.image_scores is not None and batch.targets is not None:
            present = class_presence(batch.targets, len(batch), images.num_classes)
            images.add(outputs.image_scores.cpu(), present)
        return PixelResult(segments.state(), semantic, images.state())

    def merge(self, result: PixelResult) -> None:
        """Add the results of a batch."""
        self.segments.merge(result.segments)
        if result.semantic:
            self.semantic.merge(result.semantic)
        self.images.merge(result.images)

    def metrics(self) -> dict[str, float]:
        """`segmentation_iou/...`, `semantic/...` and `classification/...`, as far as defined."""
        groups: dict[str, dict[str, float]] = {}
        if self.segments.state():
            groups["segmentation_iou"] = self.segments.compute()
        if self.semantic.matrix.any():
            groups["semantic"] = self.semantic.compute(self._num_things())
        if len(self.images):
            groups["classification"] = self.images.compute()
        metrics: dict[str, float] = {}
        for group, values in groups.items():
            for name, value in values.items():
                metrics[f"{group}/{name}"] = value
        return metrics

    def per_class(self) -> dict[str, dict[str, float]]:
        """{"classification": {name: AP}} for an image classifier, else {}."""
        if not len(self.images):
            return {}
        rows = self.images.per_class()
        values = {self.categories.names[int(row["label"])]: row["AP"] for row in rows}
        return {"classification": values} if values else {}

    def table(self) -> str:
        """Tables of semantic segmentation and of image classification; "" without results."""
        tables = []
        if self.semantic.matrix.any():
            tables.append(self.semantic.table(self.categories.names, self._num_things()))
        if len(self.images):
            tables.append(self.images.table(self.categories.names))
        return "\n\n".join(tables)

    def draw(self, batch: Batch, outputs: Outputs, index: int, image: RGBImage) -> None:
        """Draw the predictions of one image of a batch. image: it, without the padding."""
        name = batch.file_names[index]
        if outputs.segments is not None:
            truth = draw_segments(image, region_map(batch, index, MIN_STUFF_PIXELS))
            predicted = draw_segments(image, segment_maps(outputs)[index])
            titles = (f"{name}: true segments", "segments by codes")
            self.drawn["segments"].append(side_by_side(truth, predicted, titles))
        if "classes" in outputs.semantic and batch.semantic is not None:
            sheet = semantic_sheet(
                image,
                _true_labels(batch, index),
                semantic_labels(batch, outputs)[index],
                self.categories.names,
            )
            self.drawn["semantic"].append(sheet)
        if outputs.image_scores is not None and self.feature_spec is not None:
            true_names = ", ".join(self._true_names(batch, index)) or "nothing"
            sheet = cam_sheet(
                image,
                outputs,
                index,
                self.feature_spec,
                batch.sizes[index].tolist(),
                self.categories.names,
                f"{name}: {true_names}",
            )
            self.drawn["cam"].append(sheet)

    def _true_names(self, batch: Batch, index: int) -> list[str]:
        """The names of the classes that an image shows."""
        if batch.targets is None:
            return []
        present = class_presence(batch.targets, len(batch), len(self.categories))[index].tolist()
        return [name for name, flag in zip(self.categories.names, present, strict=True) if flag]

    def drawings(self) -> dict[str, Callable[[], RGBImage]]:
        """The functions that draw `segments`, `semantic`, `semantic_confusion` and `cam`."""
        drawings: dict[str, Callable[[], RGBImage]] = {}
        for name, images in self.drawn.items():
            if images and name == "segments":
                drawings[name] = partial(mosaic, images, columns=2)
            elif images:
                drawings[name] = partial(mosaic, images, columns=1, cell=_SHEET_WIDTH)
        if self.semantic.matrix.any():
            drawings["semantic_confusion"] = partial(
                draw_semantic_confusion, self.semantic.matrix, self.categories.names
            )
        return drawings

    def _num_things(self) -> int | None:
        """The number of thing classes if there are stuff classes as well, else None."""
        return self.categories.num_things if self.categories.num_stuff else None


def _true_labels(batch: Batch, index: int) -> Labels:
    """The ground-truth label of each pixel of an image, without the padding, [H, W]."""
    assert batch.semantic is not None
    height, width = batch.sizes[index].tolist()
    return np.asarray(batch.semantic[index, :height, :width].numpy())
