"""Data augmentation and other transforms of samples.

A transform is called with the sample and a random generator whose state depends only on (seed,
epoch, index, repetition).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from maskseg.data.rgbx import flip, resize
from maskseg.data.sample import Sample
from maskseg.errors import UserError
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.values import Fraction, Length, NonNegativeFloat, Range, Size

# Range of a strength: 100 already makes an image white or black.
JitterStrength = Annotated[float, Range(ge=0, le=100)]
ResizeFactor = Annotated[float, Range(gt=0, le=100)]
MAX_RATIO = 5 / 3  # of the longer to the shorter side of a resized image: 1333 to 800
JitterScale = Annotated[float, Range(gt=0, le=100)]


class Transform(Protocol):
    """Sample -> sample."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample: ...


class Flip:
    """Flips left-right and up-down at random, with a probability each."""

    def __init__(self, horizontal: Fraction = 0.5, vertical: Fraction = 0.0) -> None:
        self.horizontal = horizontal
        self.vertical = vertical

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        draw_horizontal, draw_vertical = rng.random(2)
        if draw_horizontal < self.horizontal:
            geometry = AxisAlignedTransform.flip_x(*sample.size)
            sample = sample.transform(flip(sample.image, -1), geometry)
        if draw_vertical < self.vertical:
            geometry = AxisAlignedTransform.flip_y(*sample.size)
            sample = sample.transform(flip(sample.image, -2), geometry)
        return sample


class ResizeShortestEdge:
    """Resizes the shorter side to one of `sizes`, drawn at random (as in Faster R-CNN).

    The longer side is limited to `max_size`. All in pixels.

    method:
    `antialias`: torchvision's bilinear filter with antialiasing, the fastest;
    `pillow`: the same filter in Pillow's arithmetic, which detectron2 uses in training; it differs
    by one gray level in one value of ten thousand;
    `plain`: bilinear without antialiasing, sizes rounded down, as torchvision's detection models.
    """

    def __init__(
        self,
        sizes: Annotated[Sequence[Size], Length(1)] = (800,),
        max_size: Size = 1333,
        method: str = "antialias",
    ) -> None:
        if not sizes or min(sizes) < 1 or max_size < max(sizes):
            raise UserError(
                "resize: sizes must be positive and at most max_size, "
                f"got {list(sizes)} and {max_size}"
            )
        if method not in _RESIZES:
            raise UserError(f"resize: method must be one of {', '.join(_RESIZES)}, not {method!r}")
        self.sizes = list(sizes)
        self.max_size = max_size
        self.method = method

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.size
        short = self.sizes[int(rng.integers(len(self.sizes)))]
        scale = min(short / min(height, width), self.max_size / max(height, width))
        # Halves are rounded up, as in detectron2 and mmdetection; torchvision rounds down.
        rounding = 0.0 if self.method == "plain" else 0.5
        new_height = math.floor(height * scale + rounding)
        new_width = math.floor(width * scale + rounding)
        return _resize_sample(sample, new_height, new_width, self.method)


class Resize:
    """Resizes the shorter side to `size` times one of `factors`, drawn at random.

    The longer side is limited to 5/3 of `size`. In pixels.

    method: as of `ResizeShortestEdge`.
    """

    def __init__(
        self,
        size: Size,
        factors: Annotated[Sequence[ResizeFactor], Length(1)] = (1.0,),
        method: str = "antialias",
    ) -> None:
        sides = [max(1, round(size * factor)) for factor in factors]
        self.resize = ResizeShortestEdge(sides, max(int(size * MAX_RATIO), *sides), method)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return self.resize(sample, rng)


class ScaleJitterCrop:
    """Large-scale jitter (Ghiasi et al., "Simple Copy-Paste", CVPR 2021, section 3).

    Scales the image to fit into `size` x `size` pixels, times a factor drawn from `scale`. A larger
    image is cropped to `size` at random; a smaller one is padded when it is batched.

    min_pixels: objects with fewer pixels left are dropped.
    """

    def __init__(
        self,
        size: Size = 1024,
        scale: tuple[JitterScale, JitterScale] = (0.1, 2.0),
        min_pixels: NonNegativeFloat = 1.0,
    ) -> None:
        self.size = size
        self.scale = (float(scale[0]), float(scale[1]))
        self.crop = RandomCrop(size, min_pixels)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.size
        factor = float(rng.uniform(*self.scale)) * min(self.size / height, self.size / width)
        sample = _resize_sample(sample, round(height * factor), round(width * factor))
        return self.crop(sample, rng)


class RandomCrop:
    """Crops a random window of `size` x `size` pixels without resizing.

    A side that is shorter than `size` is kept whole. Objects with fewer than `min_pixels` left are
    dropped.
    """

    def __init__(self, size: Size, min_pixels: NonNegativeFloat = 1.0) -> None:
        self.size = size
        self.min_pixels = min_pixels

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = (min(side, self.size) for side in sample.size)
        # The draws come before the early return: later transforms then see the same random stream.
        top = int(rng.integers(sample.size[0] - height + 1))
        left = int(rng.integers(sample.size[1] - width + 1))
        if (height, width) == sample.size:
            return sample
        image = sample.image[:, top : top + height, left : left + width]
        geometry = AxisAlignedTransform.crop(left, top, height, width)
        return sample.transform(image, geometry, self.min_pixels)


class ColorJitter:
    """Changes brightness, contrast, saturation and hue at random, in random order.

    Brightness, contrast and saturation are multiplied by a factor from 1 - x to 1 + x; hue is
    shifted by -x to x of the color circle.
    """

    def __init__(
        self,
        brightness: JitterStrength = 0.0,
        contrast: JitterStrength = 0.0,
        saturation: JitterStrength = 0.0,
        hue: Annotated[float, Range(ge=0, le=0.5)] = 0.0,
    ) -> None:
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise UserError("color jitter: strengths must not be negative, and hue is at most 0.5")
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample.image.contiguous()  # a mean over the image must not depend on its strides
        adjustments = (
            (F.adjust_brightness, self.brightness),
            (F.adjust_contrast, self.contrast),
            (F.adjust_saturation, self.saturation),
            (F.adjust_hue, self.hue),
        )
        for i in rng.permutation(len(adjustments)):
            adjust, strength = adjustments[i]
            if not strength:
                continue
            if adjust is F.adjust_hue:
                value = rng.uniform(-strength, strength)
            else:
                value = rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength)
            image = adjust(image, float(value))
        return replace(sample, image=image)


def _resize_with_pillow(image: Tensor, height: int, width: int) -> Tensor:
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    resized = pixels.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def _resize_plain(image: Tensor, height: int, width: int) -> Tensor:
    values: Tensor = F.resize(image.contiguous().float(), [height, width], antialias=False)
    return values.round().to(torch.uint8)


_RESIZES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "antialias": resize,
    "pillow": _resize_with_pillow,
    "plain": _resize_plain,
}


def _resize_sample(sample: Sample, height: int, width: int, method: str = "antialias") -> Sample:
    """Resize to height x width pixels, at least 1 x 1."""
    height = max(height, 1)
    width = max(width, 1)
    if (height, width) == sample.size:
        return sample
    image = _RESIZES[method](sample.image, height, width)
    return sample.transform(image, AxisAlignedTransform.resize(*sample.size, height, width))
