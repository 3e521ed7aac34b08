"""The transform that adds superpixels to a sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from maskseg.data.sample import Sample
from maskseg.superpixels.methods import Superpixels


class AddSuperpixels:
    """Adds the superpixels of the transformed image.

    method: maps an image, uint8 RGB [H, W, 3], to a label map, i32 [H, W].
    """

    def __init__(self, method: Superpixels) -> None:
        self.method = method

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:  # noqa: ARG002
        pixels = np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy())
        return replace(sample, superpixels=torch.from_numpy(self.method(pixels)))
