"""The linear layer after spatial pyramid pooling.

Source: He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
ECCV 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from maskseg.variants.cfm.pyramid_ops import MIN_WINDOW_CELLS, flatten_parts, wide_linear


class PyramidLinear(nn.Linear):
    """Linear layer over the flattened parts of `pool_pyramid`.

    [R, C, side, side] for each of `sides` -> [R, width].
    """

    def __init__(self, channels: int, sides: Sequence[int], width: int) -> None:
        super().__init__(channels * sum(side * side for side in sides), width)
        self.channels = channels
        self.sides = tuple(sides)

    def fuse(self) -> FusedPyramidLinear:
        """Return the form for inference."""
        return FusedPyramidLinear(self)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        return wide_linear(flatten_parts(parts), self.weight, self.bias)


class FusedPyramidLinear(nn.Module):
    """`PyramidLinear` for inference. Outputs are equal to rounding; it cannot be trained.

    Large parts are read by convolutions, channels_last and in place. Parts of fewer than
    MIN_WINDOW_CELLS cells, for which a convolution is slow, are joined for one linear layer.
    """

    def __init__(self, layer: PyramidLinear) -> None:
        super().__init__()
        self.convs = nn.ModuleDict()
        small_weights: list[Tensor] = []
        ends = accumulate((layer.channels * side * side for side in layer.sides), initial=0)
        for index, (side, (start, end)) in enumerate(zip(layer.sides, pairwise(ends), strict=True)):
            weight = layer.weight.detach()[:, start:end].view(-1, layer.channels, side, side)
            if side * side < MIN_WINDOW_CELLS:
                small_weights.append(weight.permute(0, 2, 3, 1).flatten(1))
                continue
            # Only one of all products may add the bias.
            bias = None if self.convs else layer.bias.detach()
            self.convs[str(index)] = _frozen_conv(weight, bias)
        self.rest: nn.Linear | None = None
        if small_weights:
            bias = None if self.convs else layer.bias.detach()
            self.rest = _frozen_linear(torch.cat(small_weights, dim=1), bias)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Compute what `PyramidLinear` computes."""
        terms = [conv(parts[int(index)]).flatten(1) for index, conv in self.convs.items()]
        if self.rest is not None:
            small_parts = [
                part.permute(0, 2, 3, 1).flatten(1)
                for index, part in enumerate(parts)
                if str(index) not in self.convs
            ]
            x = torch.cat(small_parts, dim=1)
            terms.append(wide_linear(x, self.rest.weight, self.rest.bias))
        total: Tensor = sum(terms[1:], terms[0])
        return total


def _frozen_conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Build a convolution with this weight [width, C, side, side] and bias [width]."""
    with torch.device("meta"):
        conv = nn.Conv2d(weight.shape[1], len(weight), weight.shape[2], bias=bias is not None)
    conv.weight = nn.Parameter(
        weight.contiguous(memory_format=torch.channels_last), requires_grad=False
    )
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


def _frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Build a linear layer with this weight [width, inputs] and bias [width]."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
