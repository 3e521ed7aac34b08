"""The hash layer: CNN features -> short binary codes (Ravanbakhsh et al., "CNN-aware Binary Map for General Semantic Segmentation", 2016)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError

MAX_BITS = 64


class HashLayer(nn.Module):
    """One 1x1 convolution: soft code v = sigmoid(Wx + b), bit = v > 0.5, of the feature vector x of each cell.

    normalise: x is divided by its length first (the paper's normalisation over the depth). The weights come from `ITQ` (no labels, no
    gradients), from a checkpoint, or are learnt like any others.
    """

    def __init__(self, channels: int, bits: int = 8, normalise: bool = True) -> None:
        super().__init__()
        if not 1 <= bits <= MAX_BITS:
            raise UserError(f"hash layer: bits must be 1 to {MAX_BITS}, not {bits}")
        self.bits, self.normalise = bits, normalise
        self.conv = nn.Conv2d(channels, bits, 1)
        # Of a vector of length one, such a projection has a deviation of one: the sigmoid is neither flat nor cut off.
        nn.init.normal_(self.conv.weight, std=1.0 if normalise else channels**-0.5)
        nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> soft codes, f32 [N, bits, h, w] in (0, 1)."""
        return self.logits(features).float().sigmoid()

    def logits(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> Wx + b, [N, bits, h, w]."""
        x = F.normalize(features.float(), dim=1) if self.normalise else features
        return cast(Tensor, self.conv(x.to(self.conv.weight.dtype)))

    def codes(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> the bits, bool [N, bits, h, w]."""
        return self.logits(features) > 0

    def vectors(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> what the convolution sees of each cell, f32 [N * h * w, C]: what W is learnt from."""
        rows = features.float().movedim(1, -1).flatten(0, -2)
        return F.normalize(rows, dim=1) if self.normalise else rows

    @torch.no_grad()
    def set(self, weight: Tensor, bias: Tensor) -> None:
        """weight: [bits, C]; bias: [bits]."""
        self.conv.weight.copy_(weight[:, :, None, None])
        cast(Tensor, self.conv.bias).copy_(bias)
