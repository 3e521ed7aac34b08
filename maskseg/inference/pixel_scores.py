"""What a model says of every pixel (segments, classes) and of an image as a whole: scored and drawn beside the truth, as a part of `Validation`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.data.region_map import MIN_STUFF, region_map
from maskseg.evaluation.classification import ImageClassAP, State
from maskseg.evaluation.segmentation_iou import SegmentationIoU
from maskseg.evaluation.semantic import SemanticConfusion
from maskseg.masks.superpixel import SegmentMasks
from maskseg.structures import Batch, Categories, FeatureSpec, Outputs, present
from maskseg.visualization.cam import cam_sheet
from maskseg.visualization.detections import Picture, mosaic, side_by_side
from maskseg.visualization.segments import draw_segments
from maskseg.visualization.semantic import draw_semantic_confusion, semantic_sheet

_WIDE = 2600  # pixels of a sheet of semantic maps, so that its legend stays readable


@dataclass(frozen=True)
class MapPart:
    """What one batch gave, in plain values: of `SegmentationIoU`, `SemanticConfusion` and `ImageClassAP`."""

    segments: list[list[float]]
    semantic: list[list[int]]
    images: State


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
    """Collects parts of batches, of several processes in any order, and pictures of the first images. level: of the maps of an image's classes."""

    def __init__(self, categories: Categories, level: FeatureSpec | None = None) -> None:
        self.categories, self.level = categories, level
        self.segments, self.semantic = SegmentationIoU(), SemanticConfusion(max(len(categories), 1))
        self.images = ImageClassAP(len(categories))
        self.drawn: dict[str, list[Picture]] = {"segments": [], "semantic": [], "cam": []}

    def part(self, batch: Batch, outputs: Outputs) -> MapPart:
        """What a batch gives; nothing where the model makes no such maps, or the data has none."""
        segments, semantic = SegmentationIoU(), SemanticConfusion(self.semantic.num_classes)
        for i, found in enumerate([] if outputs.segments is None else label_maps(outputs)):
            segments.add(found, [region_map(batch, i, MIN_STUFF)])
        classes = (
            class_maps(batch, outputs)
            if "classes" in outputs.semantic and batch.semantic is not None
            else []
        )
        for i, found in enumerate(classes):
            semantic.add(found, self._true_classes(batch, i))
        images = ImageClassAP(self.images.num_classes)
        if outputs.image_scores is not None and batch.targets is not None:
            images.add(
                outputs.image_scores.cpu(), present(batch.targets, len(batch), images.num_classes)
            )
        return MapPart(segments.state(), semantic.state() if classes else [], images.state())

    def merge(self, part: MapPart) -> None:
        """Adds what a batch gave."""
        self.segments.merge(part.segments)
        if part.semantic:
            self.semantic.merge(part.semantic)
        self.images.merge(part.images)

    def metrics(self) -> dict[str, float]:
        """`segmentation_iou/...`, `semantic/...` and `classification/...`, of what there was."""
        found = (
            {f"segmentation_iou/{name}": value for name, value in self.segments.compute().items()}
            if self.segments.state()
            else {}
        )
        if self.semantic.matrix.any():
            found |= {
                f"semantic/{name}": value
                for name, value in self.semantic.compute(self._things()).items()
            }
        if len(self.images):
            found |= {
                f"classification/{name}": value for name, value in self.images.compute().items()
            }
        return found

    def per_class(self) -> dict[str, dict[str, float]]:
        """{"classification": {name: AP}}, of a classifier of images."""
        rows = self.images.per_class() if len(self.images) else []
        return (
            {
                "classification": {
                    self.categories.names[int(row["label"])]: row["AP"] for row in rows
                }
            }
            if rows
            else {}
        )

    def table(self) -> str:
        """The classes of pixels, and those of images, where there are any."""
        parts = (
            [self.semantic.table(self.categories.names, self._things())]
            if self.semantic.matrix.any()
            else []
        )
        return "\n\n".join(
            parts + ([self.images.table(self.categories.names)] if len(self.images) else [])
        )

    def draw(self, batch: Batch, outputs: Outputs, index: int, image: Picture) -> None:
        """Adds the pictures of one image; `image`: it, without the padding."""
        if outputs.segments is not None:
            truth, found = (
                draw_segments(image, m)
                for m in (region_map(batch, index, MIN_STUFF), label_maps(outputs)[index])
            )
            titles = (f"{batch.names[index]}: true segments", "segments by codes")
            self.drawn["segments"].append(side_by_side(truth, found, titles))
        if "classes" in outputs.semantic and batch.semantic is not None:
            maps = self._true_classes(batch, index), class_maps(batch, outputs)[index]
            self.drawn["semantic"].append(semantic_sheet(image, *maps, self.categories.names))
        if outputs.image_scores is not None and self.level is not None:
            here = (
                present(batch.targets, len(batch), len(self.categories))[index].tolist()
                if batch.targets is not None
                else []
            )
            shown = (
                ", ".join(
                    name for name, there in zip(self.categories.names, here, strict=False) if there
                )
                or "nothing"
            )
            place = outputs, index, self.level, batch.sizes[index].tolist()
            self.drawn["cam"].append(
                cam_sheet(image, *place, self.categories.names, f"{batch.names[index]}: {shown}")
            )

    def sheets(self) -> dict[str, Picture]:
        """Pictures by name: `segments`, `semantic`, `semantic_confusion`, `cam`."""
        found = (
            {"segments": mosaic(self.drawn["segments"], columns=2)}
            if self.drawn["segments"]
            else {}
        )
        if self.drawn["semantic"]:
            found["semantic"] = mosaic(self.drawn["semantic"], columns=1, cell=_WIDE)
        if self.drawn["cam"]:
            found["cam"] = mosaic(self.drawn["cam"], columns=1, cell=_WIDE)
        if self.semantic.matrix.any():
            found["semantic_confusion"] = draw_semantic_confusion(
                self.semantic.matrix, self.categories.names
            )
        return found

    def _things(self) -> int | None:
        return self.categories.num_things if self.categories.num_stuff else None

    def _true_classes(self, batch: Batch, index: int) -> NDArray[Any]:
        assert batch.semantic is not None
        height, width = batch.sizes[index].tolist()
        return np.asarray(batch.semantic[index, :height, :width].numpy())
