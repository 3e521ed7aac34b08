"""Receptive fields, and the plain trunks (stages one after another, no shortcuts) whose levels follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.backbones.resnet import pretrained_state
from maskseg.structures import Features, FeatureSpec

Layer = tuple[int, int, int]  # kernel, stride, padding at each side: of a convolution or a pooling


@dataclass(frozen=True)
class Field:
    """What a map's cells see: cell i sees `size` pixels around centre + i * stride, in continuous pixels."""

    stride: int
    size: int
    centre: float


def receptive_field(layers: Iterable[Layer]) -> Field:
    """That of the last layer's cells, along one axis; without layers, a pixel's own."""
    stride, size, start = 1, 1, 0
    for kernel, step, padding in layers:
        start -= padding * stride
        size += (kernel - 1) * stride
        stride *= step
    return Field(stride, size, start + size / 2)


def smallest_input(layers: Sequence[Layer]) -> int:
    """The shortest side, in pixels, from which every layer makes a cell."""
    side = 1
    for kernel, step, padding in reversed(layers):
        side = max(1, (side - 1) * step + kernel - 2 * padding)
    return side


class Conv(NamedTuple):
    """A convolution with ReLU. source: its name in torchvision's network, where a linear layer may hold its weights."""

    source: str
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0


class Stage(NamedTuple):
    """Convolutions, behind a max pooling of stride 2 with the kernel `pool` (0: none)."""

    pool: int
    convs: tuple[Conv, ...]

    def layers(self) -> list[Layer]:
        """Of the stage, in order."""
        return [(self.pool, 2, 0)] * bool(self.pool) + [
            (c.kernel, c.stride, c.padding) for c in self.convs
        ]

    def build(self, channels: int) -> nn.Sequential:
        """channels: of its input."""
        parts = nn.Sequential()
        if self.pool:
            parts.add_module("pool", nn.MaxPool2d(self.pool, stride=2))
        for i, conv in enumerate(self.convs, 1):
            layer = nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, conv.padding)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, layer.bias))
            parts.add_module(f"conv{i}", layer)
            parts.add_module(f"relu{i}", nn.ReLU(inplace=True))
            channels = conv.channels
        return parts


class PlainTrunk(nn.Module):
    """Images -> the chosen levels, each what a stage gives after its last ReLU; stages behind the last level are not built.

    name: torchvision's network, of which `weights` are: a name of torchvision's, a file with a state dict, or None.
    frozen_stages: the first so many get no gradient.
    """

    def __init__(
        self,
        name: str,
        stages: Mapping[str, Stage],
        levels: Sequence[str],
        weights: str | None,
        frozen_stages: int,
    ) -> None:
        super().__init__()
        unknown = [level for level in levels if level not in stages]
        if unknown or not levels:
            raise UserError(
                f"levels of {name} must be some of {', '.join(stages)}, not {', '.join(unknown) or 'none'}"
            )
        names = list(stages)[: 1 + max(list(stages).index(level) for level in levels)]
        if not 0 <= frozen_stages <= len(names):
            raise UserError(
                f"frozen_stages must be 0 to {len(names)} ({', '.join(names)}), not {frozen_stages}"
            )
        self.stages = nn.ModuleDict()
        self.levels: dict[str, FeatureSpec] = {}
        layers: list[Layer] = []
        channels = 3
        for stage in names:
            self.stages[stage] = stages[stage].build(channels)
            layers += stages[stage].layers()
            channels = stages[stage].convs[-1].channels
            if stage in levels:
                field = receptive_field(layers)
                self.levels[stage] = FeatureSpec(field.stride, field.centre, channels)
        self.least = smallest_input(layers)
        if weights is not None:
            sources = {
                f"stages.{s}.conv{i}": c.source
                for s in names
                for i, c in enumerate(stages[s].convs, 1)
            }
            self.load_state_dict(
                torchvision_state(
                    name, weights, sources, {k: v.shape for k, v in self.state_dict().items()}
                )
            )
        for stage in names[:frozen_stages]:
            self.stages[stage].requires_grad_(False)

    def forward(self, images: Tensor) -> Features:
        """images: f32 [N, 3, H, W] -> maps, finest first. A side shorter than `least` pixels is filled up with zeros, the mean."""
        x = images.to(next(self.parameters()).dtype)
        missing = [max(0, self.least - side) for side in x.shape[-2:]]
        if any(missing):
            x = F.pad(x, (0, missing[1], 0, missing[0]))
        features = {}
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.levels:
                features[name] = x
        return features


def torchvision_state(
    name: str, weights: str, sources: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Our names -> tensors of these `shapes`, out of torchvision's network `name`. sources: our layer -> the one there.

    A linear layer's weights become a convolution's: both have the order channel, row, column. Raises UserError where they do not fit.
    """
    state = pretrained_state(name, weights)
    theirs = {
        ours: f"{sources[ours.rpartition('.')[0]]}.{ours.rpartition('.')[2]}" for ours in shapes
    }
    wrong = f"weights {weights!r} do not fit {name}"
    missing = [key for key in theirs.values() if not isinstance(state.get(key), Tensor)]
    if missing:
        raise UserError(f"{wrong}: {len(missing)} missing ({missing[:3]})")
    for ours, key in theirs.items():
        shape, found = list(shapes[ours]), list(state[key].shape)
        if found != shape and not (len(shape) == 4 and found == [shape[0], prod(shape[1:])]):
            raise UserError(f"{wrong}: {key} is {found}, not {shape}")
        if not torch.isfinite(state[key]).all():
            raise UserError(
                f"weights {weights!r} of {name} have no numbers for {key}: they are not finite"
            )
    return {ours: state[key].reshape(tuple(shapes[ours])) for ours, key in theirs.items()}
