"""One image of any kind -> a batch of one, as the evaluation would make it."""

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
    """The test transforms and the padding of a data set, for an image outside of it."""

    def __init__(
        self, transforms: Sequence[Transform] = (), divisor: int = 32, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.transforms, self.divisor, self.max_pixels = list(transforms), divisor, max_pixels

    def read(self, image: AnyImage) -> Tensor:
        """A path, a PIL image, or a uint8 RGB array [H, W, 3] -> uint8 RGB [3, H, W]. Raises UserError for something else, or a bad file."""
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
        return torch.from_numpy(np.array(image)).permute(
            2, 0, 1
        )  # a copy: the array may be read-only

    def __call__(self, pixels: Tensor, image_id: int = 0, name: str = "") -> Batch:
        """pixels: uint8 RGB [3, H, W] -> a batch of one, with empty targets."""
        nothing = torch.zeros(0, dtype=torch.int64)
        size = (pixels.shape[1], pixels.shape[2])
        sample = Sample(
            pixels, torch.zeros(0, 4), nothing, nothing.bool(), None, image_id, name, size
        )
        for transform in self.transforms:
            sample = transform(sample, np.random.default_rng(0))
        return collate([sample], self.divisor)
