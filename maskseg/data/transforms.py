"""Changes of a sample. Each is called with the sample and a random generator that is a function of (seed, epoch, index)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from maskseg.data.rgbx import flip, resize
from maskseg.data.sample import Sample
from maskseg.errors import UserError
from maskseg.ops.geometry import Geometry


class Transform(Protocol):
    """Sample -> sample."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample: ...


class Flip:
    """Left-right and up-down flips, with a probability each."""

    def __init__(self, horizontal: float = 0.5, vertical: float = 0.0) -> None:
        self.horizontal, self.vertical = horizontal, vertical

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        across, down = rng.random(2)
        if across < self.horizontal:
            sample = sample.move(flip(sample.image, -1), Geometry.flip_x(*sample.size))
        if down < self.vertical:
            sample = sample.move(flip(sample.image, -2), Geometry.flip_y(*sample.size))
        return sample


class ResizeShortestEdge:
    """The shorter side becomes one of `sizes` (drawn), the longer at most `max_size`, in pixels (Faster R-CNN's custom).

    method: `antialias` (torchvision's bilinear with antialiasing, the fastest), `pillow` (the same filter in Pillow's arithmetic, one grey level
    off in one value of ten thousand: what detectron2's models saw), or `plain` (bilinear without antialiasing, sizes rounded down: what
    torchvision's detection models saw).
    """

    def __init__(
        self, sizes: Sequence[int] = (800,), max_size: int = 1333, method: str = "antialias"
    ) -> None:
        if not sizes or min(sizes) < 1 or max_size < max(sizes):
            raise UserError(
                f"resize: sizes must be positive and at most max_size, got {list(sizes)} and {max_size}"
            )
        if method not in _RESIZES:
            raise UserError(f"resize: method must be one of {', '.join(_RESIZES)}, not {method!r}")
        self.sizes, self.max_size, self.method = list(sizes), max_size, method

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.size
        short = self.sizes[int(rng.integers(len(self.sizes)))]
        scale = min(short / min(height, width), self.max_size / max(height, width))
        up = (
            0.0 if self.method == "plain" else 0.5
        )  # halves are rounded up, as in detectron2 and mmdetection
        return _resize(
            sample, math.floor(height * scale + up), math.floor(width * scale + up), self.method
        )


class ScaleJitterCrop:
    """Large scale jitter (Ghiasi et al., "Simple Copy-Paste", section 3): the image is scaled to fit `size` x `size`, times a factor drawn from
    `scale`, and where it is larger than that a window of `size` is cut out; a smaller one is padded when it is batched."""

    def __init__(
        self, size: int = 1024, scale: tuple[float, float] = (0.1, 2.0), min_pixels: float = 1.0
    ) -> None:
        self.size, self.scale, self.crop = (
            size,
            (float(scale[0]), float(scale[1])),
            RandomCrop(size, min_pixels),
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.size
        factor = float(rng.uniform(*self.scale)) * min(self.size / height, self.size / width)
        return self.crop(_resize(sample, round(height * factor), round(width * factor)), rng)


class RandomCrop:
    """A window of `size` x `size` at the image's own scale, the whole side where it is shorter. Objects of which fewer than `min_pixels`
    are left go."""

    def __init__(self, size: int, min_pixels: float = 1.0) -> None:
        self.size, self.min_pixels = size, min_pixels

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = (min(side, self.size) for side in sample.size)
        top = int(rng.integers(sample.size[0] - height + 1))
        left = int(rng.integers(sample.size[1] - width + 1))
        if (height, width) == sample.size:
            return sample
        image = sample.image[:, top : top + height, left : left + width]
        return sample.move(image, Geometry.crop(left, top, height, width), self.min_pixels)


class ColorJitter:
    """Brightness, contrast and saturation by a factor from 1 - x to 1 + x, hue by a turn from -x to x, in a drawn order."""

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ) -> None:
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise UserError("color jitter: strengths must not be negative, and hue is at most 0.5")
        self.brightness, self.contrast, self.saturation, self.hue = (
            brightness,
            contrast,
            saturation,
            hue,
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample.image.contiguous()  # a mean over it must not depend on the layout
        around_one = (
            (F.adjust_brightness, self.brightness),
            (F.adjust_contrast, self.contrast),
            (F.adjust_saturation, self.saturation),
            (F.adjust_hue, self.hue),
        )
        for i in rng.permutation(len(around_one)):
            change, strength = around_one[i]
            if strength:
                middle = 0.0 if change is F.adjust_hue else 1.0
                low = middle - strength if middle == 0 else max(0.0, 1.0 - strength)
                image = change(image, float(rng.uniform(low, middle + strength)))
        return replace(sample, image=image)


def _pillow(image: Tensor, height: int, width: int) -> Tensor:
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()


_RESIZES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "antialias": resize,
    "pillow": _pillow,
    "plain": lambda image, height, width: (
        F.resize(image.contiguous().float(), [height, width], antialias=False)
        .round()
        .to(torch.uint8)
    ),
}


def _resize(sample: Sample, height: int, width: int, method: str = "antialias") -> Sample:
    height, width = max(height, 1), max(width, 1)
    if (height, width) == sample.size:
        return sample
    return sample.move(
        _RESIZES[method](sample.image, height, width), Geometry.resize(*sample.size, height, width)
    )
