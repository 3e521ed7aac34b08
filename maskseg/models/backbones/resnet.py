"""ResNet and ResNeXt trunks: torchvision's, with a choice of norm, weights and frozen stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torchvision
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.files.torch_files import read_torch
from maskseg.models.layers.conv_norm import merge_frozen
from maskseg.models.layers.norms import norm_layer
from maskseg.structures import Features, FeatureSpec

NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d")
STAGES = {"c2": "layer1", "c3": "layer2", "c4": "layer3", "c5": "layer4"}


class ResNet(nn.Module):
    """Images -> {c2, c3, c4, c5} at strides 4, 8, 16, 32 (ResNet, table 1).

    last_level: what is behind that one is not built.
    stride_in_1x1: a stage's first bottleneck strides in its first 1x1 convolution (the paper, and the MSRA weights that detectron2's R50 and R101
    begin with) instead of the 3x3 (torchvision, and detectron2's X101).
    weights: a name of torchvision's weights for this trunk (downloaded once, into torch's cache), a file with a state dict, or None.
    frozen_stages: the first so many of (stem, layer1 .. layer4) get no gradient and keep their statistics (detectron2's FREEZE_AT; 2 is the
    custom with ImageNet weights). torchvision's `trainable_layers` is 5 - frozen_stages.
    """

    def __init__(
        self,
        name: str = "resnet50",
        weights: str | None = None,
        norm: str = "FrozenBN",
        norm_eps: float = 1e-5,
        frozen_stages: int = 0,
        stride_in_1x1: bool = False,
        last_level: str = "c5",
    ) -> None:
        super().__init__()
        if name not in NAMES:
            raise UserError(f"trunk must be one of {', '.join(NAMES)}, not {name!r}")
        if last_level not in STAGES:
            raise UserError(f"last_level must be one of {', '.join(STAGES)}, not {last_level!r}")
        if not 0 <= frozen_stages <= 5:
            raise UserError(f"frozen_stages must be 0 to 5, not {frozen_stages}")
        trunk = getattr(torchvision.models, name)(
            weights=None, norm_layer=norm_layer(norm, norm_eps)
        )
        self.stem = nn.Sequential()
        for part in ("conv1", "bn1", "relu", "maxpool"):
            self.stem.add_module(part, getattr(trunk, part))
        self.stages = {level: stage for level, stage in STAGES.items() if level <= last_level}
        for layer in self.stages.values():
            self.add_module(layer, getattr(trunk, layer))
        if stride_in_1x1:
            self._stride_first(name)
        merge_frozen(self)
        width = trunk.fc.in_features // 8
        # Every stage starts at pixel index 0: kernels and strides are odd and padded by half, so the centre stays at half a pixel.
        self.levels = {
            f"c{i}": FeatureSpec(2**i, 0.5, width * 2 ** (i - 2))
            for i in range(2, 2 + len(self.stages))
        }
        if weights is not None:
            self._load(name, weights)
        self.frozen_stages = frozen_stages
        for stage in self._frozen():
            stage.requires_grad_(False)

    def _stride_first(self, name: str) -> None:
        for stage in list(self.stages.values())[1:]:
            block: Any = getattr(self, stage)[0]
            if not hasattr(block, "conv3"):
                raise UserError(f"stride_in_1x1 needs bottlenecks, which {name} does not have")
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

    def _load(self, name: str, weights: str) -> None:
        state = pretrained_state(name, weights)
        others = (
            "fc.",
            *(f"{stage}." for stage in STAGES.values() if stage not in self.stages.values()),
        )
        renamed = {
            k if k.startswith("layer") else f"stem.{k}": v
            for k, v in state.items()
            if not k.startswith(others)
        }
        try:
            missing, unexpected = self.load_state_dict(renamed, strict=False)
        except RuntimeError as error:
            raise UserError(
                f"weights {weights!r} do not fit {name}: {str(error).splitlines()[1].strip()}"
            ) from error
        unexpected = [k for k in unexpected if not k.endswith("num_batches_tracked")]
        missing = [k for k in missing if not k.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise UserError(
                f"weights {weights!r} do not fit {name} with this norm: {len(missing)} missing ({missing[:3]}), "
                f"{len(unexpected)} left over ({unexpected[:3]}); batch norm weights need norm=FrozenBN, BN or SyncBN"
            )

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, *(getattr(self, stage) for stage in self.stages.values())][
            : self.frozen_stages
        ]

    def train(self, mode: bool = True) -> ResNet:
        """Frozen stages stay in evaluation mode, so that their statistics are kept."""
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def forward(self, images: Tensor) -> Features:
        """images: f32 [N, 3, H, W] -> the maps of all levels, finest first."""
        x = self.stem(images.to(cast(Tensor, self.stem[0].weight).dtype))
        features = {}
        for name, stage in self.stages.items():
            x = features[name] = getattr(self, stage)(x)
        return features


def pretrained_state(name: str, weights: str) -> dict[str, Any]:
    """The state dict of torchvision's trunk `name`, from a file or by the weights' name. Raises UserError where there is neither."""
    if Path(weights).is_file():
        state: dict[str, Any] = read_torch(Path(weights), "a file of weights")
        if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
            raise UserError(f"{weights}: not a state dict of weights but a {type(state).__name__}")
        return state
    choices = torchvision.models.get_model_weights(name)
    if weights not in choices.__members__:
        raise UserError(
            f"weights {weights!r}: no such file, and torchvision has {', '.join(choices.__members__)} for {name}"
        )
    try:
        return dict(
            choices[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
        )
    except Exception as error:
        raise UserError(
            f"weights {weights!r} of {name}: {choices[weights].url} could not be downloaded and read: {error}".splitlines()[
                0
            ]
        ) from error
