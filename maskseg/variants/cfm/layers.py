"""Fully connected layers of convolutional feature masking, from scratch or from VGG-16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.backbones.vgg import load_fc_state
from maskseg.variants.cfm.pyramid import PyramidLinear
from maskseg.variants.cfm.pyramid_ops import wide_linear
from maskseg.variants.cfm.settings import MLPSettings

# Of VGG-16: channels of conv5, bins per side to which conv5 is pooled, width and number of the
# fully connected layers.
VGG16_SHAPE = (512, 7, 4096, 2)


class FullyConnected(nn.Sequential):
    """Linear layers over the parts of a pyramid: `PyramidLinear` first, to [R, width].

    Each layer is followed by ReLU and, in training, by dropout with probability `dropout`.
    """

    def __init__(
        self, channels: int, pyramid: Sequence[int], width: int, layers: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        for index in range(layers):
            if index == 0:
                linear: nn.Linear = PyramidLinear(channels, pyramid, width)
            else:
                linear = nn.Linear(width, width)
            nn.init.kaiming_uniform_(linear.weight, a=1)
            nn.init.zeros_(linear.bias)
            self.extend([linear, nn.ReLU(inplace=True)])

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        first, *rest = self
        x: Tensor = first(parts)
        for layer in rest:
            if isinstance(layer, nn.Linear):
                x = wide_linear(x, layer.weight, layer.bias)
            else:
                x = layer(x)
            if isinstance(layer, nn.ReLU) and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
        return x


def build_paths(
    kinds: Sequence[str], channels: int, pyramid: Sequence[int], settings: MLPSettings
) -> nn.ModuleDict:
    """Build `FullyConnected` layers for each path, over C channels pooled to the pyramid's bins.

    kinds: names of the paths, the keys of the result.
    channels, pyramid: see `FullyConnected`.
    settings: with `weights` of VGG-16, every path gets a copy of its fc6 and fc7. The pyramid must
        begin with 7, for which fc6 was trained. The columns of fc6 for further levels start at
        zero, so that a path starts as VGG-16's classifier: random columns would add noise from
        inputs that fc6 has never seen. Their gradient is not zero, so they learn.

    Raises UserError for shapes that do not fit the weights.
    """
    width = settings.width
    layers = settings.layers
    paths = {
        kind: FullyConnected(channels, pyramid, width, layers, settings.dropout) for kind in kinds
    }
    if settings.weights is not None:
        if (channels, pyramid[0], width, layers) != VGG16_SHAPE:
            raise UserError(
                "cfm: weights of VGG-16 need its shape: 512 channels (conv5), a pyramid that begins"
                " with 7, width 4096 and 2 layers, not"
                f" {channels}, {pyramid[0]}, {width} and {layers}"
            )
        state = load_fc_state(settings.weights)
        for path in paths.values():
            _copy_weights(state, path)
    return nn.ModuleDict(paths)


@torch.no_grad()
def _copy_weights(state: dict[str, Tensor], path: FullyConnected) -> None:
    """Copy the state of `vgg.load_fc_state` into the layers; columns that fc6 lacks become zero."""
    linears = [module for module in path if isinstance(module, nn.Linear)]
    for index, layer in enumerate(linears):
        weight = state[f"layers.{index}.weight"]
        layer.weight.zero_()
        layer.weight[:, : weight.shape[1]] = weight
        layer.bias.copy_(state[f"layers.{index}.bias"])
