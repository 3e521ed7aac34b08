"""What a model says of every pixel, segments and classes: scored and drawn beside the truth, as a part of `Validation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.evaluation.segmentation_iou import SegmentationIoU
from maskseg.evaluation.semantic import SemanticConfusion
from maskseg.inference.pictures import Picture, mosaic, side_by_side
from maskseg.inference.segment_pictures import draw_segments
from maskseg.inference.semantic_pictures import draw_semantic_confusion, semantic_sheet
from maskseg.segment_masks import SegmentMasks
from maskseg.structures import Batch, Categories, Outputs
from maskseg.variants.hash_loss import MIN_STUFF, region_map

_WIDE = 2600  # pixels of a sheet of semantic maps, so that its legend stays readable


@dataclass(frozen=True)
class MapPart:
    """What one batch gave, in plain values: of `SegmentationIoU` and of `SemanticConfusion`."""

    segments: list[list[float]]
    semantic: list[list[int]]


def label_maps(outputs: Outputs) -> list[NDArray[Any]]:
    """The segments of each image of the batch, without its padding, as a label map i32 [H, W]: the number of the row that covers a pixel."""
    assert outputs.segments is not None
    assert isinstance(outputs.segments.masks, SegmentMasks)
    return list(outputs.segments.masks.label_maps())


def class_maps(batch: Batch, outputs: Outputs) -> list[NDArray[Any]]:
    """The label of each pixel of each image, without its padding, i64 [H, W]; -1 for none."""
    maps = outputs.semantic["classes"].cpu().numpy()
    return [maps[i, :height, :width] for i, (height, width) in enumerate(batch.sizes.tolist())]


class MapScores:
    """Collects parts of batches, of several processes in any order, and pictures of the first images."""

    def __init__(self, categories: Categories) -> None:
        self.categories = categories
        self.segments, self.semantic = SegmentationIoU(), SemanticConfusion(max(len(categories), 1))
        self.drawn: dict[str, list[Picture]] = {"segments": [], "semantic": []}

    def part(self, batch: Batch, outputs: Outputs) -> MapPart:
        """What a batch gives; nothing where the model makes no such maps, or the data has none."""
        segments, semantic = SegmentationIoU(), SemanticConfusion(self.semantic.num_classes)
        for i, found in enumerate([] if outputs.segments is None else label_maps(outputs)):
            segments.add(found, [region_map(batch, i, MIN_STUFF)])
        classes = class_maps(batch, outputs) if "classes" in outputs.semantic and batch.semantic is not None else []
        for i, found in enumerate(classes):
            semantic.add(found, self._true_classes(batch, i))
        return MapPart(segments.state(), semantic.state() if classes else [])

    def merge(self, part: MapPart) -> None:
        """Adds what a batch gave."""
        self.segments.merge(part.segments)
        if part.semantic:
            self.semantic.merge(part.semantic)

    def metrics(self) -> dict[str, float]:
        """`segmentation_iou/...` and `semantic/...`, of what there was."""
        found = {f"segmentation_iou/{name}": value for name, value in self.segments.compute().items()} if self.segments.state() else {}
        if self.semantic.matrix.any():
            found |= {f"semantic/{name}": value for name, value in self.semantic.compute(self._things()).items()}
        return found

    def table(self) -> str:
        """The classes of pixels, where there are any."""
        return self.semantic.table(self.categories.names, self._things()) if self.semantic.matrix.any() else ""

    def draw(self, batch: Batch, outputs: Outputs, index: int, image: Picture) -> None:
        """Adds the pictures of one image; `image`: it, without the padding."""
        if outputs.segments is not None:
            truth, found = (draw_segments(image, m) for m in (region_map(batch, index, MIN_STUFF), label_maps(outputs)[index]))
            titles = (f"{batch.names[index]}: true segments", "segments by codes")
            self.drawn["segments"].append(side_by_side(truth, found, titles))
        if "classes" in outputs.semantic and batch.semantic is not None:
            maps = self._true_classes(batch, index), class_maps(batch, outputs)[index]
            self.drawn["semantic"].append(semantic_sheet(image, *maps, self.categories.names))

    def sheets(self) -> dict[str, Picture]:
        """Pictures by name: `segments`, `semantic`, `semantic_confusion`."""
        found = {"segments": mosaic(self.drawn["segments"], columns=2)} if self.drawn["segments"] else {}
        if self.drawn["semantic"]:
            found["semantic"] = mosaic(self.drawn["semantic"], columns=1, cell=_WIDE)
        if self.semantic.matrix.any():
            found["semantic_confusion"] = draw_semantic_confusion(self.semantic.matrix, self.categories.names)
        return found

    def _things(self) -> int | None:
        return self.categories.num_things if self.categories.num_stuff else None

    def _true_classes(self, batch: Batch, index: int) -> NDArray[Any]:
        assert batch.semantic is not None
        height, width = batch.sizes[index].tolist()
        return np.asarray(batch.semantic[index, :height, :width].numpy())
