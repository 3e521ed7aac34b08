"""The trunk: torchvision's ConvNeXt without its classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.convnext import ConvNeXt as TorchvisionConvNeXt

from maskseg.errors import UserError
from maskseg.models.backbones.resnet import load_pretrained_state
from maskseg.plugins import register
from maskseg.structures import Features, FeatureSpec


@register("part")
class ConvNeXt(nn.Module):
    """Images -> {c2, c3, c4, c5} at strides 4, 8, 16, 32.

    channels, depths: of the four stages; the defaults are those of ConvNeXt-T.
    weights: a weights name of torchvision's convnext_tiny, a file with a state dict, or None.
    """

    def __init__(
        self,
        channels: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 9, 3),
        stochastic_depth: float = 0.1,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != 4 or len(depths) != 4:
            raise UserError("convnext: channels and depths need four numbers, one for each stage")
        outputs = [*channels[1:], None]
        stages = [CNBlockConfig(*row) for row in zip(channels, outputs, depths, strict=True)]
        network = TorchvisionConvNeXt(stages, stochastic_depth, num_classes=1)
        # The stem, then stages and downsampling layers in turn.
        self.features = network.features
        # Patches of 4 and 2 pixels do not overlap: the first cell has its centre in their middle.
        self.levels = {
            f"c{i}": FeatureSpec(stride=2**i, centre=2 ** (i - 1), channels=count)
            for i, count in enumerate(channels, start=2)
        }
        if weights is not None:
            self._load(weights)

    def _load(self, weights: str) -> None:
        state = load_pretrained_state("convnext_tiny", weights)
        trunk = {key: value for key, value in state.items() if key.startswith("features.")}
        try:
            self.load_state_dict(trunk)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"weights {weights!r} do not fit this ConvNeXt: {reason}") from error

    def forward(self, images: Tensor) -> Features:
        """Return the maps of all levels for images f32 [N, 3, H, W], finest first."""
        x = images.to(next(self.parameters()).dtype)
        features = {}
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i % 2 == 1:  # a stage
                features[f"c{2 + i // 2}"] = x
        return features
