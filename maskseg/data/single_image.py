"""A batch of one image from outside a dataset, prepared as in the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.collate import collate
from maskseg.data.image_files import MAX_PIXELS, load_image
from maskseg.data.sample import Sample
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.structures import Batch

AnyImage = str | Path | Image.Image | NDArray[np.uint8]


class SingleImage:
    """Applies a dataset's test transforms and padding to an image.

    divisor: height and width are padded to a multiple of this; max_pixels: limit for image files.
    """

    def __init__(
        self, transforms: Sequence[Transform] = (), divisor: int = 32, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.transforms = list(transforms)
        self.divisor = divisor
        self.max_pixels = max_pixels

    def read(self, image: AnyImage) -> Tensor:
        """Convert a path, a PIL image or a uint8 RGB array [H, W, 3] to uint8 RGB [3, H, W].

        Raises UserError for any other type, and for a file that cannot be read.
        """
        if isinstance(image, str | Path):
            return load_image(image, self.max_pixels)
        if isinstance(image, Image.Image):
            image = np.array(image.convert("RGB"))
        if not (
            isinstance(image, np.ndarray)
            and image.dtype == np.uint8
            and image.ndim == 3
            and image.shape[2] == 3
            and image.size
        ):
            raise UserError("an image is a path, a PIL image or a uint8 RGB array [H, W, 3]")
        # Copy: the array may be read-only, which torch does not support.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __call__(self, pixels: Tensor, image_id: int = 0, file_name: str = "") -> Batch:
        """Return a batch of one with empty targets; pixels: uint8 RGB [3, H, W]."""
        no_labels = torch.zeros(0, dtype=torch.int64)
        sample = Sample(
            image=pixels,
            boxes=torch.zeros(0, 4),
            labels=no_labels,
            iscrowd=no_labels.bool(),
            masks=None,
            image_id=image_id,
            file_name=file_name,
            original_size=(pixels.shape[1], pixels.shape[2]),
        )
        for transform in self.transforms:
            sample = transform(sample, np.random.default_rng(0))
        return collate([sample], self.divisor)
