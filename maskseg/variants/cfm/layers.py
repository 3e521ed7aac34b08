"""The fully connected layers of convolutional feature masking, from noise or from those of VGG-16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.backbones.vgg import fc_state
from maskseg.variants.cfm.pyramid import PyramidLinear
from maskseg.variants.cfm.pyramid_ops import wide_linear

VGG16 = (
    512,
    7,
    4096,
    2,
)  # channels of conv5, the side to which regions of it are pooled, width and number of the layers behind it


class Connected(nn.Sequential):
    """Linear layers, the first of which takes the parts of a pyramid of C channels (`PyramidLinear`), to [R, width]; each is followed by ReLU and,
    in training, by dropout of that probability."""

    def __init__(
        self, channels: int, pyramid: Sequence[int], width: int, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        for number in range(layers):
            linear = nn.Linear(width, width) if number else PyramidLinear(channels, pyramid, width)
            nn.init.kaiming_uniform_(linear.weight, a=1)
            nn.init.zeros_(linear.bias)
            self.extend([linear, nn.ReLU(inplace=True)])

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        first, *others = self
        x = cast(Tensor, first(parts))
        for layer in others:
            x = (
                wide_linear(x, layer.weight, layer.bias)
                if isinstance(layer, nn.Linear)
                else layer(x)
            )
            if isinstance(layer, nn.ReLU) and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return x


def connected_paths(
    kinds: Sequence[str],
    channels: int,
    pyramid: Sequence[int],
    width: int,
    layers: int,
    dropout: float,
    weights: str | None,
) -> nn.ModuleDict:
    """`Connected` layers for each kind of path, over C channels pooled to each of `pyramid` bins a side.

    weights: of torchvision's VGG-16, a name or a file, of which every path gets a copy of fc6 and fc7. They need a pyramid that begins with 7, for
    which fc6 was trained. Its columns for further levels are zero: a path then begins as VGG-16's classifier, to which noise from inputs that
    fc6 has never seen would be added otherwise, and their gradient is not zero. Raises UserError for other shapes.
    """
    if not (layers >= 1 and width >= 1 and 0 <= dropout < 1):
        raise UserError(
            f"cfm: width and layers are at least 1 and dropout is in [0, 1), not {width}, {layers} and {dropout}"
        )
    paths = nn.ModuleDict(
        {kind: Connected(channels, pyramid, width, layers, dropout) for kind in kinds}
    )
    if weights is not None:
        if (channels, pyramid[0], width, layers) != VGG16:
            told = f"{channels}, {pyramid[0]}, {width} and {layers}"
            raise UserError(
                f"cfm: weights are those of VGG-16 behind conv5: 512 channels, a pyramid that begins with 7, width 4096 and 2 layers, not {told}"
            )
        state = fc_state(weights)
        for path in paths.values():
            _copy(state, cast(Connected, path))
    return paths


@torch.no_grad()
def _copy(state: dict[str, Tensor], path: Connected) -> None:
    """The state of `vgg.fc_state` into fc6 and fc7; columns of fc6 that it does not have become zero."""
    for number, layer in enumerate(module for module in path if isinstance(module, nn.Linear)):
        weight = state[f"layers.{number}.weight"]
        layer.weight.zero_()
        layer.weight[:, : weight.shape[1]] = weight
        cast(Tensor, layer.bias).copy_(state[f"layers.{number}.bias"])
