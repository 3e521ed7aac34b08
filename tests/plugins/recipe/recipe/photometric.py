"""Transforms of albumentations that change the colors alone."""

from __future__ import annotations

from dataclasses import replace

import albumentations
import numpy as np
import torch

from maskseg.data.sample import Sample
from maskseg.plugins import register


@register("transform")
class Photometric:
    """Blurs an image and changes its brightness and contrast, with a probability each.

    Boxes and masks stay as they are, so that the transforms must not move pixels. The constructor
    takes plain numbers and not the names of transforms: the config of a checkpoint may call it.

    blur_limit: largest kernel of the blur, in pixels, an odd number;
    brightness, contrast: largest relative change; probability: of each of the two transforms.
    """

    def __init__(
        self,
        blur_limit: int = 7,
        brightness: float = 0.2,
        contrast: float = 0.2,
        probability: float = 0.5,
    ) -> None:
        self.pipeline = albumentations.Compose(
            [
                albumentations.GaussianBlur(blur_limit=(3, blur_limit), p=probability),
                albumentations.RandomBrightnessContrast(
                    brightness_limit=brightness, contrast_limit=contrast, p=probability
                ),
            ]
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        # The generator depends on (seed, epoch, index) alone, and so do the draws of the pipeline.
        self.pipeline.set_random_seed(int(rng.integers(2**32)))
        pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        changed = self.pipeline(image=pixels)["image"]
        return replace(sample, image=torch.from_numpy(changed).permute(2, 0, 1).contiguous())
