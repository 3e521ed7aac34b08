"""The linear layer behind spatial pyramid pooling (He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks", ECCV 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from maskseg.variants.cfm.pyramid_ops import FEWEST_CELLS, flattened, wide_linear


class PyramidLinear(nn.Linear):
    """Parts of `pooled_pyramid` over C channels, [R, C, side, side] for each of `sides` -> [R, width]: linear in all of them, flattened."""

    def __init__(self, channels: int, sides: Sequence[int], width: int) -> None:
        super().__init__(channels * sum(side * side for side in sides), width)
        self.channels, self.sides = channels, tuple(sides)

    def fused(self) -> FoldedPyramidLinear:
        """The layer for inference."""
        return FoldedPyramidLinear(self)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:  # type: ignore[override] # several tensors
        return wide_linear(flattened(parts), self.weight, self.bias)


class FoldedPyramidLinear(nn.Module):
    """`PyramidLinear` for inference, of equal output to rounding: reads channels_last parts where they lie. It cannot be trained on."""

    def __init__(self, layer: PyramidLinear) -> None:
        super().__init__()
        self.convs, rest = nn.ModuleDict(), list[Tensor]()
        ends = accumulate((layer.channels * side * side for side in layer.sides), initial=0)
        for place, (side, (start, end)) in enumerate(zip(layer.sides, pairwise(ends), strict=True)):
            weight = layer.weight.detach()[:, start:end].view(-1, layer.channels, side, side)
            if side * side < FEWEST_CELLS:
                rest.append(weight.permute(0, 2, 3, 1).flatten(1))
                continue
            with torch.device("meta"):
                conv = nn.Conv2d(layer.channels, len(weight), side, bias=not self.convs)
            conv.weight = nn.Parameter(
                weight.contiguous(memory_format=torch.channels_last), requires_grad=False
            )
            if not self.convs:
                conv.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
            self.convs[str(place)] = conv
        self.rest = (
            None
            if not rest
            else _linear(torch.cat(rest, dim=1), None if self.convs else layer.bias.detach())
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """As `PyramidLinear`'s."""
        found = [conv(parts[int(place)]).flatten(1) for place, conv in self.convs.items()]
        if self.rest is not None:
            others = [
                part.permute(0, 2, 3, 1).flatten(1)
                for place, part in enumerate(parts)
                if str(place) not in self.convs
            ]
            found.append(wide_linear(torch.cat(others, dim=1), self.rest.weight, self.rest.bias))
        return cast(Tensor, sum(found[1:], found[0]))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
