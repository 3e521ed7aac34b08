"""The hash layer: CNN features to short binary codes.

Ravanbakhsh et al., "CNN-aware Binary Map for General Semantic Segmentation", ICIP 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError

MAX_BITS = 64


class HashLayer(nn.Module):
    """A 1x1 convolution that maps the feature vector x of each cell to a binary code.

    The soft code is v = sigmoid(Wx + b), the bits are v > 0.5. normalise: scale x to unit length
    first (the paper's normalization over the depth). The weights come from `ITQ` (no labels, no
    gradients), from a checkpoint, or are trained like any other weights.
    """

    def __init__(self, channels: int, bits: int = 8, normalise: bool = True) -> None:
        super().__init__()
        if not 1 <= bits <= MAX_BITS:
            raise UserError(f"hash layer: bits must be 1 to {MAX_BITS}, not {bits}")
        self.bits = bits
        self.normalise = normalise
        self.conv = nn.Conv2d(channels, bits, 1)
        # Logits of unit standard deviation keep the sigmoid out of its flat and saturated ranges.
        nn.init.normal_(self.conv.weight, std=1.0 if normalise else channels**-0.5)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, C, h, w] -> soft codes in (0, 1), f32 [N, bits, h, w]."""
        return self.logits(features).float().sigmoid()

    def logits(self, features: Tensor) -> Tensor:
        """Features [N, C, h, w] -> Wx + b, [N, bits, h, w]."""
        x = F.normalize(features.float(), dim=1) if self.normalise else features
        logits: Tensor = self.conv(x.to(self.conv.weight.dtype))
        return logits

    def vectors(self, features: Tensor) -> Tensor:
        """Features [N, C, h, w] -> the convolution's input vectors, f32 [N * h * w, C].

        These are the vectors that W is learned from.
        """
        rows = features.float().movedim(1, -1).flatten(0, -2)
        return F.normalize(rows, dim=1) if self.normalise else rows

    @torch.no_grad()
    def set_weights(self, weight: Tensor, bias: Tensor) -> None:
        """Copy weight [bits, C] and bias [bits] into the convolution."""
        self.conv.weight.copy_(weight[:, :, None, None])
        assert self.conv.bias is not None
        self.conv.bias.copy_(bias)
