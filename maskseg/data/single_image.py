"""Batches of images from outside a dataset, prepared as in the evaluation.

An image is given as one of these:

- the path of an image file, read as in `maskseg.data.image_files`;
- a PIL image, converted like a file. Its pixels are taken as they are: a camera's EXIF orientation
  is not applied (`PIL.ImageOps.exif_transpose` does that);
- a numpy array or a torch tensor of shape [H, W] (gray), [H, W, C] or [C, H, W], with C = 1 (gray),
  3 (RGB) or 4 (RGBA). The values are uint8 (0..255), uint16 (0..65535, divided by 257), bool
  (0 and 255) or floating point (0..1).

Gray is repeated and alpha is dropped. The channels are the dimension of size 3 or 4, the first or
the last one. If neither is 3 or 4, the image is gray and its channel is the dimension of size 1.
A shape with channels at both ends, such as [3, H, 3], is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.collate import collate, round_up
from maskseg.data.image_files import MAX_PIXELS, load_image, to_8_bits, to_rgb
from maskseg.data.rgbx import from_pillow
from maskseg.data.sample import Sample
from maskseg.data.transforms import Transform
from maskseg.errors import UserError, join_lines
from maskseg.structures import Batch

AnyImage = str | Path | Image.Image | NDArray[np.generic] | Tensor

_COLOUR_CHANNELS = (3, 4)  # RGB, RGBA


class SingleImage:
    """Applies a dataset's test transforms and padding to images.

    divisor: height and width are padded to a multiple of this; max_pixels: limit for image files.
    """

    def __init__(
        self, transforms: Sequence[Transform] = (), divisor: int = 32, max_pixels: int = MAX_PIXELS
    ) -> None:
        self.transforms = list(transforms)
        self.divisor = divisor
        self.max_pixels = max_pixels

    def read(self, image: AnyImage) -> Tensor:
        """Convert an image (see the module) to uint8 RGB [3, H, W]. Raises UserError."""
        return read_image(image, self.max_pixels)

    def transform(self, pixels: Tensor, image_id: int = 0, file_name: str = "") -> Sample:
        """Apply the transforms to an image, uint8 RGB [3, H, W]; the sample has no objects."""
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
        return sample

    def padded_size(self, sample: Sample) -> tuple[int, int]:
        """Height and width of the batch that holds only this sample."""
        height, width = sample.size
        return round_up(height, self.divisor), round_up(width, self.divisor)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad samples to one size and make a batch of them."""
        return collate(samples, self.divisor)

    def __call__(self, pixels: Tensor, image_id: int = 0, file_name: str = "") -> Batch:
        """Return a batch of one with empty targets; pixels: uint8 RGB [3, H, W]."""
        return self.collate([self.transform(pixels, image_id, file_name)])


def read_image(image: AnyImage, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Convert an image (see the module) to uint8 RGB [3, H, W].

    max_pixels: limit for image files. Raises UserError for other values, for an ambiguous
    shape, and for a file that cannot be read.
    """
    if isinstance(image, str | Path):
        return load_image(image, max_pixels)
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        # numpy has no bfloat16
        return _from_array(values.float().numpy() if values.is_floating_point() else values.numpy())
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise UserError(
        f"an image is a path, a PIL image, an array or a tensor, not a {type(image).__name__}"
    )


def _from_pil(image: Image.Image) -> Tensor:
    name = getattr(image, "filename", "") or "a PIL image"
    if 0 in image.size:
        raise UserError(f"{name}: an image of {image.height} x {image.width} has no pixels")
    try:
        return from_pillow(to_rgb(image, name)).contiguous()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a file that was opened but not decoded yet may be damaged
        raise UserError(f"{name}: the image cannot be read ({join_lines(error)})") from error


def _from_array(values: NDArray[np.generic]) -> Tensor:
    """values: any array. -> uint8 [3, H, W], a copy."""
    pixels = _to_bytes(_channels_last(values))
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    # Copy: the array may be read-only or have negative strides, which torch does not support.
    return torch.from_numpy(np.array(pixels[..., :3], order="C")).permute(2, 0, 1)


def _channels_last(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """The view [H, W, C] of an image array. Raises UserError for any other or ambiguous shape."""
    shape = list(values.shape)
    if values.ndim == 2 and values.size:
        return values[..., None]
    if values.ndim != 3 or not values.size:
        hint = "; a batch is a list of images" if values.ndim == 4 else ""
        raise UserError(
            f"an image is an array of shape [H, W], [H, W, C] or [C, H, W], not {shape}{hint}"
        )
    for sizes in (_COLOUR_CHANNELS, (1,)):
        first = shape[0] in sizes
        last = shape[2] in sizes
        if first and last:
            raise UserError(
                f"an image of shape {shape} may be [H, W, C] or [C, H, W]: make it a PIL image"
            )
        if last:
            return values
        if first:
            return values.transpose(1, 2, 0)
    raise UserError(
        f"an image of shape {shape} has no dimension of 1 (gray), 3 (RGB) or 4 (RGBA) channels: "
        "the first or the last one"
    )


def _to_bytes(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Convert the values of an image to 0..255. Raises UserError for a dtype without a range."""
    if values.dtype == np.uint8:
        return values.view(np.uint8)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        converted = to_8_bits(values.view(np.uint16))
        assert converted is not None  # all values of 16 bits are in range
        return converted
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(
            f"an image of {values.dtype} has no agreed range: make it uint8 (0..255), uint16 "
            "(0..65535), bool or floating point (0..1)"
        )
    floats = values.astype(np.float32)
    if not (floats.min() >= 0 and floats.max() <= 1):  # not so for NaN, either
        raise UserError(
            f"an image of {values.dtype} has values from {floats.min():g} to {floats.max():g}, "
            "instead of 0..1: divide it, or make it uint8 (0..255)"
        )
    return (floats * 255).round().astype(np.uint8)
