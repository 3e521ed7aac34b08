"""Receptive fields, and plain trunks: stages in sequence, without shortcuts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.backbones.resnet import load_pretrained_state
from maskseg.structures import Features, FeatureSpec

Layer = tuple[int, int, int]  # kernel, stride and padding per side, of a convolution or a pooling


@dataclass(frozen=True)
class ReceptiveField:
    """Input pixels seen by the cells of a feature map, along one axis.

    Cell i sees `size` pixels around centre + i * stride, in continuous pixels.
    """

    stride: int
    size: int
    centre: float


def receptive_field(layers: Iterable[Layer]) -> ReceptiveField:
    """Return the receptive field of the last layer; without layers, that of one pixel."""
    stride = 1
    size = 1
    start = 0
    for kernel, step, padding in layers:
        start -= padding * stride
        size += (kernel - 1) * stride
        stride *= step
    return ReceptiveField(stride, size, start + size / 2)


def min_input_size(layers: Sequence[Layer]) -> int:
    """Return the shortest side, in pixels, for which every layer has at least one cell."""
    side = 1
    for kernel, step, padding in reversed(layers):
        side = max(1, (side - 1) * step + kernel - 2 * padding)
    return side


class Conv(NamedTuple):
    """A convolution with ReLU.

    source: its name in torchvision's network, where it may also be a linear layer.
    """

    source: str
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0


class Stage(NamedTuple):
    """Convolutions after an optional max pooling with stride 2.

    pool: kernel size of the pooling; 0 for none.
    """

    pool: int
    convs: tuple[Conv, ...]

    def layers(self) -> list[Layer]:
        """Return the geometry of the stage's layers, in order."""
        layers = [(self.pool, 2, 0)] if self.pool else []
        return layers + [(conv.kernel, conv.stride, conv.padding) for conv in self.convs]

    def build(self, channels: int) -> nn.Sequential:
        """Build the modules; channels: of the input."""
        modules = nn.Sequential()
        if self.pool:
            modules.add_module("pool", nn.MaxPool2d(self.pool, stride=2))
        for i, conv in enumerate(self.convs, 1):
            layer = nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, conv.padding)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
            modules.add_module(f"conv{i}", layer)
            modules.add_module(f"relu{i}", nn.ReLU(inplace=True))
            channels = conv.channels
        return modules


class PlainTrunk(nn.Module):
    """Images -> the selected levels, each the output of a stage after its last ReLU.

    Stages after the last selected level are not built.

    name: of the network in torchvision.
    weights: a weights name of torchvision, a file with a state dict, or None.
    frozen_stages: number of stages, from the first one, that are not trained.

    Raises UserError for unknown levels, another number of frozen stages, or unsuitable weights.
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
                f"levels of {name} must be some of {', '.join(stages)}, "
                f"not {', '.join(unknown) or 'none'}"
            )
        all_names = list(stages)
        names = all_names[: 1 + max(all_names.index(level) for level in levels)]
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
        self.min_side = min_input_size(layers)
        if weights is not None:
            self._load(name, weights, {stage: stages[stage] for stage in names})
        for stage in names[:frozen_stages]:
            self.stages[stage].requires_grad_(False)

    def _load(self, name: str, weights: str, stages: Mapping[str, Stage]) -> None:
        sources = {}
        for stage_name, stage in stages.items():
            for i, conv in enumerate(stage.convs, 1):
                sources[f"stages.{stage_name}.conv{i}"] = conv.source
        shapes = {key: value.shape for key, value in self.state_dict().items()}
        self.load_state_dict(load_torchvision_state(name, weights, sources, shapes))

    def forward(self, images: Tensor) -> Features:
        """Return the feature maps of images f32 [N, 3, H, W], finest first.

        Sides shorter than `min_side` pixels are padded with zeros (the mean).
        """
        x = images.to(next(self.parameters()).dtype)
        height, width = x.shape[-2:]
        missing_rows = max(0, self.min_side - height)
        missing_columns = max(0, self.min_side - width)
        if missing_rows or missing_columns:
            x = F.pad(x, (0, missing_columns, 0, missing_rows))
        features = {}
        for name, stage in self.stages.items():
            x = stage(x)
            if name in self.levels:
                features[name] = x
        return features


def load_torchvision_state(
    name: str, weights: str, sources: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Load tensors from torchvision's network `name`, under our names and with our `shapes`.

    sources: our layer -> torchvision's layer. The weights of a linear layer become those of a
    convolution: both have the order channel, row, column.
    Raises UserError for missing, misshapen or non-finite tensors.
    """
    state = load_pretrained_state(name, weights)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    source_keys = {}
    for key in shapes:
        layer, _, kind = key.rpartition(".")
        source_keys[key] = f"{sources[layer]}.{kind}"
    mismatch = f"weights {weights!r} do not fit {name}"
    missing = [key for key in source_keys.values() if key not in tensors]
    if missing:
        raise UserError(f"{mismatch}: {len(missing)} missing ({missing[:3]})")
    for key, source_key in source_keys.items():
        shape = list(shapes[key])
        source_shape = list(tensors[source_key].shape)
        fits_linear = len(shape) == 4 and source_shape == [shape[0], prod(shape[1:])]
        if source_shape != shape and not fits_linear:
            raise UserError(f"{mismatch}: {source_key} is {source_shape}, not {shape}")
        if not torch.isfinite(tensors[source_key]).all():
            raise UserError(f"weights {weights!r} of {name}: {source_key} has non-finite values")
    return {key: tensors[source].reshape(tuple(shapes[key])) for key, source in source_keys.items()}
