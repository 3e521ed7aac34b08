"""Applies a trained model to one image at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from maskseg.data.single_image import AnyImage
from maskseg.evaluation.coco_results import to_original
from maskseg.masks.superpixel import SegmentMasks
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.structures import Batch, Categories, Outputs, Regions


@dataclass(frozen=True)
class Prediction:
    """The detections of an image in its own pixels, by falling score.

    boxes: f32 [D, 4] xyxy; scores: f32 [D]; labels: i64 [D]; masks: bool [D, H, W]; names: the D
    class names; keypoints: f32 [D, P, 3], x, y, score, zeros for keypoints that the class does not
    have; segments: i32 [H, W], the segment of each pixel, the largest first; classes: i64 [H, W],
    the label of each pixel, -1 for none. The last three are None for models without them.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
    names: list[str]
    keypoints: Tensor | None = None
    segments: Tensor | None = None
    classes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@runtime_checkable
class PredictingModel(Protocol):
    """A model that makes predictions, with or without losses."""

    def predict(self, batch: Batch) -> Outputs: ...


class Prepare(Protocol):
    """Loads and transforms images as in the evaluation (`data.single_image.SingleImage`)."""

    def read(self, image: AnyImage) -> Tensor: ...

    def __call__(self, pixels: Tensor, image_id: int = 0, file_name: str = "") -> Batch: ...


def original_segments(batch: Batch, outputs: Outputs) -> Regions | None:
    """The segments of a batch of one image, in the frame of its file; None for models without."""
    if outputs.segments is None:
        return None
    size = batch.sizes[0].tolist()
    return to_original(outputs.segments.to("cpu"), 0, size, batch.original_sizes[0].tolist())


def original_classes(batch: Batch, outputs: Outputs) -> Tensor | None:
    """The semantic labels of a batch of one image, in the frame of its file, i64 [H, W].

    None for models without them.
    """
    if "classes" not in outputs.semantic:
        return None
    height, width = batch.sizes[0].tolist()
    original_height, original_width = batch.original_sizes[0].tolist()
    labels = outputs.semantic["classes"][0, :height, :width].cpu().numpy()
    resize = AxisAlignedTransform.resize(height, width, original_height, original_width)
    return torch.from_numpy(resize.sample(labels, -1))


class Predictor:
    """Applies a model as the evaluation does: with the same transforms, padding and pasting."""

    def __init__(
        self,
        model: nn.Module,
        categories: Categories,
        prepare: Prepare,
        device: torch.device | str = "cpu",
    ) -> None:
        model = model.to(device).eval()
        if not isinstance(model, PredictingModel):
            raise TypeError(f"a {type(model).__name__} makes no predictions")
        self.model: PredictingModel = model
        self.categories = categories
        self.prepare = prepare
        self.device = torch.device(device)

    def __call__(self, image: AnyImage) -> Prediction:
        """Predict on one image.

        image: a path, a PIL image, or uint8 RGB [H, W, 3]. Raises UserError for other types and
        for files that cannot be read.
        """
        batch, outputs = self.outputs(self.prepare.read(image))
        size = batch.sizes[0].tolist()
        original_size = batch.original_sizes[0].tolist()
        detections = to_original(outputs.detections.to("cpu"), 0, size, original_size)
        assert detections.labels is not None
        masks = torch.zeros((len(detections), *original_size), dtype=torch.bool)
        if detections.masks is not None and len(detections):
            masks = torch.from_numpy(detections.masks.to_bitmaps())
        return Prediction(
            detections.boxes,
            detections.scores,
            detections.labels,
            masks,
            [self.categories.names[label] for label in detections.labels.tolist()],
            detections.keypoints,
            _segment_map(original_segments(batch, outputs)),
            original_classes(batch, outputs),
        )

    def outputs(
        self, pixels: Tensor, image_id: int = 0, file_name: str = ""
    ) -> tuple[Batch, Outputs]:
        """Run the model on one image.

        pixels: uint8 RGB [3, H, W]. -> the batch of that image as the model saw it, the outputs.
        """
        batch = self.prepare(pixels, image_id, file_name).to(self.device)
        return batch, self.model.predict(batch)


def _segment_map(segments: Regions | None) -> Tensor | None:
    """The segment of each pixel, i32 [H, W]; None without segments."""
    if segments is None:
        return None
    assert isinstance(segments.masks, SegmentMasks)
    return torch.from_numpy(segments.masks.label_maps()[0])
