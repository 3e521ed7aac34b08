"""A trained model on one image at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from maskseg.evaluation.coco_results import to_original
from maskseg.masks.base import rle_to_bitmaps
from maskseg.masks.superpixel import SegmentMasks
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops.geometry import Geometry
from maskseg.structures import Batch, Categories, Outputs, Regions


@dataclass(frozen=True)
class Prediction:
    """What was found in an image, in its own pixels, best first.

    boxes: f32 [D, 4] xyxy; scores: f32 [D]; labels: i64 [D]; masks: bool [D, H, W]; names: the D class names; keypoints: of a model that has them,
    f32 [D, P, 3], x, y, score, zeros for points that the class does not have; segments: of a model that cuts images into them, i32 [H, W], the
    number of each pixel's segment, the largest ones first; classes: of a model that labels pixels, i64 [H, W], -1 for none.
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


class Prepare(Protocol):
    """Images as the model was evaluated with them (`data.single.SingleImage`)."""

    def read(self, image: Any) -> Tensor: ...

    def __call__(self, pixels: Tensor, image_id: int = 0, name: str = "") -> Batch: ...


def original_segments(batch: Batch, outputs: Outputs) -> Regions | None:
    """The segments of a batch of one in the pixels of the image's file, None of a model that makes none."""
    if outputs.segments is None:
        return None
    return to_original(
        outputs.segments.to("cpu"), 0, batch.sizes[0].tolist(), batch.original_sizes[0].tolist()
    )


def original_classes(batch: Batch, outputs: Outputs) -> Tensor | None:
    """The label of each pixel of the image's file, i64 [H, W], of a batch of one; None of a model that labels none."""
    if "classes" not in outputs.semantic:
        return None
    (height, width), original = batch.sizes[0].tolist(), batch.original_sizes[0].tolist()
    labels = outputs.semantic["classes"][0, :height, :width].cpu().numpy()
    return torch.from_numpy(Geometry.resize(height, width, *original).sample(labels, -1))


class Predictor:
    """Calls the model as the evaluation does: the same transforms, padding and pasting."""

    def __init__(
        self,
        model: nn.Module,
        categories: Categories,
        prepare: Prepare,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.categories = cast(GeneralizedRCNN, model.to(device).eval()), categories
        self.prepare, self.device = prepare, torch.device(device)

    def __call__(self, image: Any) -> Prediction:
        """image: a path, a PIL image, or uint8 RGB [H, W, 3]. Raises UserError for something else, or a file that cannot be read."""
        batch, outputs = self.outputs(self.prepare.read(image))
        size, original = batch.sizes[0].tolist(), batch.original_sizes[0].tolist()
        found = to_original(outputs.detections.to("cpu"), 0, size, original)
        labels = cast(Tensor, found.labels)
        masks = torch.zeros((len(found), *original), dtype=torch.bool)
        if found.masks is not None and len(found):
            masks = torch.from_numpy(rle_to_bitmaps(found.masks.to_rle()))
        segments = original_segments(batch, outputs)
        cut = (
            None
            if segments is None
            else torch.from_numpy(cast(SegmentMasks, segments.masks).label_maps()[0])
        )
        names = [self.categories.names[i] for i in labels.tolist()]
        return Prediction(
            found.boxes,
            found.scores,
            labels,
            masks,
            names,
            found.keypoints,
            cut,
            original_classes(batch, outputs),
        )

    def outputs(self, pixels: Tensor, image_id: int = 0, name: str = "") -> tuple[Batch, Outputs]:
        """pixels: uint8 RGB [3, H, W] -> the batch of one that the model saw, and what it said."""
        batch = self.prepare(pixels, image_id, name).to(self.device)
        return batch, self.model.predict(batch)
