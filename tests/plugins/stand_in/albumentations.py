"""What the tests use of albumentations, for where it is not installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFilter


class GaussianBlur:
    """Blurs with a kernel of a random size."""

    def __init__(self, blur_limit: tuple[int, int], p: float) -> None:
        self.blur_limit = blur_limit
        self.p = p

    def change(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        radius = generator.uniform(*self.blur_limit) / 4
        return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


class RandomBrightnessContrast:
    """Multiplies the values, and adds a number to them."""

    def __init__(self, brightness_limit: float, contrast_limit: float, p: float) -> None:
        self.brightness_limit = brightness_limit
        self.contrast_limit = contrast_limit
        self.p = p

    def change(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        factor = 1 + generator.uniform(-self.contrast_limit, self.contrast_limit)
        offset = 255 * generator.uniform(-self.brightness_limit, self.brightness_limit)
        return (image * factor + offset).clip(0, 255).astype(np.uint8)


class Compose:
    """Applies transforms, each with its probability."""

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms
        self.generator = np.random.default_rng()

    def set_random_seed(self, seed: int | None) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        for transform in self.transforms:
            if self.generator.random() < transform.p:
                image = transform.change(image, self.generator)
        return {"image": image}
