"""A trained model on one image at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from maskseg.data.collate import collate
from maskseg.data.images import MAX_PIXELS, load_image
from maskseg.data.sample import Sample
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.evaluation.rows import to_original
from maskseg.masks import rle_to_bitmaps
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories, Outputs, Regions

AnyImage = str | Path | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Prediction:
    """What was found in an image, in its own pixels, best first.

    boxes: f32 [D, 4] xyxy; scores: f32 [D]; labels: i64 [D]; masks: bool [D, H, W]; names: the D class names.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.boxes)


class Predictor:
    """Calls the model as the evaluation does: the same transforms, padding and pasting."""

    def __init__(
        self,
        model: nn.Module,
        categories: Categories,
        transforms: Sequence[Transform] = (),
        device: torch.device | str = "cpu",
        divisor: int = 32,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.model, self.categories = cast(GeneralizedRCNN, model.to(device).eval()), categories
        self.transforms, self.device, self.divisor, self.max_pixels = list(transforms), torch.device(device), divisor, max_pixels

    def __call__(self, image: AnyImage) -> Prediction:
        """image: a path, a PIL image, or uint8 RGB [H, W, 3]. Raises UserError for something else, or a file that cannot be read."""
        batch, outputs = self.outputs(self._pixels(image))
        size, original = batch.sizes[0].tolist(), batch.original_sizes[0].tolist()
        found: Regions = to_original(outputs.detections.to("cpu"), 0, size, original)
        labels = cast(Tensor, found.labels)
        masks = torch.zeros((len(found), *original), dtype=torch.bool)
        if found.masks is not None and len(found):
            masks = torch.from_numpy(rle_to_bitmaps(found.masks.to_rle()))
        return Prediction(found.boxes, found.scores, labels, masks, [self.categories.names[i] for i in labels.tolist()])

    def outputs(self, pixels: Tensor, image_id: int = 0, name: str = "") -> tuple[Batch, Outputs]:
        """pixels: uint8 RGB [3, H, W] -> the batch of one that the model saw, and what it said."""
        nothing = torch.zeros(0, dtype=torch.int64)
        size = (pixels.shape[1], pixels.shape[2])
        sample = Sample(pixels, torch.zeros(0, 4), nothing, nothing.bool(), None, image_id, name, size)
        for transform in self.transforms:
            sample = transform(sample, np.random.default_rng(0))
        batch = collate([sample], self.divisor).to(self.device)
        return batch, self.model.predict(batch)

    def _pixels(self, image: AnyImage) -> Tensor:
        if isinstance(image, str | Path):
            return load_image(image, self.max_pixels)
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size):
            raise UserError("an image is a path, a PIL image or a uint8 RGB array [H, W, 3]")
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
