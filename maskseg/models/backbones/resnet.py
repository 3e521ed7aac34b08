"""ResNet and ResNeXt trunks from torchvision, with a choice of norm, weights and frozen stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from maskseg.errors import UserError
from maskseg.files.downloads import fetch, is_address
from maskseg.files.torch_files import read_torch
from maskseg.models.layers.conv_norm import absorb_frozen_norms
from maskseg.models.layers.norms import norm_layer
from maskseg.structures import Features, FeatureSpec
from maskseg.values import Fraction, Range

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")
STAGES = {"c2": "layer1", "c3": "layer2", "c4": "layer3", "c5": "layer4"}
COUNTER = "num_batches_tracked"  # of a batch norm; some files lack it, and it is not needed


class ResNet(nn.Module):
    """Images -> {c2, c3, c4, c5} at strides 4, 8, 16, 32 (ResNet, table 1).

    out_level: the last level; stages after it are not built.
    stride_in_1x1: in a stage's first bottleneck, the first 1x1 convolution has the stride (the
    paper, and the MSRA weights that detectron2's R50 and R101 start from) instead of the 3x3
    convolution (torchvision, and detectron2's X101).
    weights: a weights name of torchvision (downloaded once, to torch's cache), a file with a state
    dict, its address, or None.
    frozen_stages: number of stages, counted from the stem (stem, layer1 .. layer4), that are not
    trained and keep their statistics. It is detectron2's FREEZE_AT, where 2 is common with ImageNet
    weights; torchvision's `trainable_layers` is 5 - frozen_stages.

    Raises UserError for an unknown name, level or norm, or unsuitable weights.
    """

    def __init__(
        self,
        name: str = "resnet50",
        weights: str | None = None,
        norm: str = "FrozenBN",
        norm_eps: Fraction = 1e-5,
        frozen_stages: Annotated[int, Range(ge=0, le=5)] = 0,
        stride_in_1x1: bool = False,
        out_level: str = "c5",
    ) -> None:
        super().__init__()
        check_name(name)
        if out_level not in STAGES:
            raise UserError(f"out_level must be one of {', '.join(STAGES)}, not {out_level!r}")
        if not 0 <= frozen_stages <= 5:
            raise UserError(f"frozen_stages must be 0 to 5, not {frozen_stages}")
        resnet = getattr(torchvision.models, name)(
            weights=None, norm_layer=norm_layer(norm, norm_eps)
        )
        self.stem = nn.Sequential()
        for part in ("conv1", "bn1", "relu", "maxpool"):
            self.stem.add_module(part, getattr(resnet, part))
        self.stages = {level: stage for level, stage in STAGES.items() if level <= out_level}
        for stage in self.stages.values():
            self.add_module(stage, getattr(resnet, stage))
        if stride_in_1x1:
            self._move_strides(name)
        absorb_frozen_norms(self)
        self.levels = _level_specs(len(self.stages), resnet.fc.in_features // 8)
        if weights is not None:
            self._load(name, weights)
        self.frozen_stages = frozen_stages
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def _move_strides(self, name: str) -> None:
        """Move the stride of each later stage from the 3x3 to the first 1x1 convolution."""
        for stage in list(self.stages.values())[1:]:
            block = getattr(self, stage)[0]
            if not isinstance(block, Bottleneck):
                raise UserError(f"stride_in_1x1 needs bottlenecks, which {name} does not have")
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

    def _load(self, name: str, weights: str) -> None:
        missing_stages = [stage for stage in STAGES.values() if stage not in self.stages.values()]
        unused = ("fc.", *(f"{stage}." for stage in missing_stages))
        state = {}
        for key, tensor in load_pretrained_state(name, weights).items():
            if not key.startswith(unused):
                state[key if key.startswith("layer") else f"stem.{key}"] = tensor
        try:
            missing, unexpected = self.load_state_dict(state, strict=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"weights {weights!r} do not fit {name}: {reason}") from error
        missing = [key for key in missing if not key.endswith(COUNTER)]
        unexpected = [key for key in unexpected if not key.endswith(COUNTER)]
        if missing or unexpected:
            raise UserError(
                f"weights {weights!r} do not fit {name} with this norm: "
                f"{len(missing)} missing ({missing[:3]}), "
                f"{len(unexpected)} left over ({unexpected[:3]}); "
                "batch norm weights need norm=FrozenBN, BN or SyncBN"
            )

    def _frozen_modules(self) -> list[nn.Module]:
        modules = [self.stem, *(getattr(self, stage) for stage in self.stages.values())]
        return modules[: self.frozen_stages]

    def train(self, mode: bool = True) -> ResNet:
        """Set the training mode; frozen stages stay in evaluation mode to keep their statistics."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, images: Tensor) -> Features:
        """Return the maps of all levels for images f32 [N, 3, H, W], finest first."""
        first = self.stem[0]
        assert isinstance(first, nn.Conv2d)
        x = self.stem(images.to(first.weight.dtype))
        features = {}
        for name, stage in self.stages.items():
            x = getattr(self, stage)(x)
            features[name] = x
        return features


def check_name(name: str) -> None:
    """Raise UserError for a name that is no trunk."""
    if name not in NAMES:
        raise UserError(f"trunk must be one of {', '.join(NAMES)}, not {name!r}")


def _level_specs(num_stages: int, channels: int) -> dict[str, FeatureSpec]:
    """Return the levels c2, c3, ...; channels: of c2."""
    levels = {}
    for i in range(2, 2 + num_stages):
        # Every stage starts at pixel index 0: kernels are odd and padded by half, so the first cell
        # stays centred at half a pixel.
        levels[f"c{i}"] = FeatureSpec(2**i, 0.5, channels * 2 ** (i - 2))
    return levels


def load_pretrained_state(name: str, weights: str) -> dict[str, object]:
    """Load the state dict of torchvision's network `name`.

    weights: a file, a weights name of torchvision, or the address of a file
    (`maskseg.files.downloads`). Raises UserError if it is none of these, and for what cannot be
    downloaded or read.
    """
    if Path(weights).is_file():
        return _read_state(Path(weights))
    address = weights if is_address(weights) else published_address(name, weights)
    path = fetch(address)
    return _read_state(path)


def published_address(name: str, weights: str) -> str:
    """The address of weights of torchvision. Raises UserError for a name that it does not have."""
    choices = torchvision.models.get_model_weights(name)
    if weights not in choices.__members__:
        names = ", ".join(choices.__members__)
        raise UserError(
            f"weights {weights!r}: no such file, and torchvision has {names} for {name}"
        )
    return str(choices[weights].url)


def _read_state(path: Path) -> dict[str, object]:
    state = read_torch(path, "a file of weights")
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: not a state dict of weights but a {type(state).__name__}")
    return state
