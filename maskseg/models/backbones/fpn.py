"""Feature Pyramid Network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.interfaces import Backbone
from maskseg.models.layers.norms import conv
from maskseg.structures import Features, FeatureSpec
from maskseg.values import Size


class FPN(nn.Module):
    """The levels {c2 .. c5} of a trunk -> {p2 .. p6}, all with `channels` (FPN, section 3).

    p6 is p5 subsampled by 2. With a trunk that ends at a finer level, so does the pyramid.

    extra_levels: levels of the trunk that are returned after the pyramid, for stages that read
    them.
    Raises UserError for an extra level that the trunk does not have.
    """

    trunk: Backbone

    def __init__(
        self,
        trunk: Backbone,
        channels: Size = 256,
        norm: str | None = None,
        extra_levels: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.lateral = nn.ModuleDict()
        self.output = nn.ModuleDict()
        self.levels: dict[str, FeatureSpec] = {}
        for trunk_name, spec in trunk.levels.items():
            name = f"p{trunk_name[1:]}"
            self.lateral[name] = conv(spec.channels, channels, 1, norm)
            self.levels[name] = FeatureSpec(spec.stride, spec.centre, channels)
        for name in self.levels:
            self.output[name] = conv(channels, channels, 3, norm)
        for module in [*self.lateral.modules(), *self.output.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last_name, last = list(self.levels.items())[-1]
        self.coarsest = f"p{int(last_name[1:]) + 1}"
        self.levels[self.coarsest] = FeatureSpec(last.stride * 2, last.centre, channels)
        self.extra_levels = list(extra_levels)
        unknown = [name for name in self.extra_levels if name not in trunk.levels]
        if unknown:
            raise UserError(
                f"fpn: extra_levels has {', '.join(unknown)}, "
                f"the trunk has {', '.join(trunk.levels)}"
            )
        for name in self.extra_levels:
            self.levels[name] = trunk.levels[name]

    def forward(self, images: Tensor) -> Features:
        """Return the maps of the pyramid for images f32 [N, 3, H, W], finest first.

        The extra levels follow after them.
        """
        trunk_features = self.trunk(images)
        merged: dict[str, Tensor] = {}
        coarser: Tensor | None = None
        # From the coarsest level to the finest.
        pairs = list(zip(self.lateral.items(), trunk_features.values(), strict=True))
        for (name, lateral), feature in reversed(pairs):
            level: Tensor = lateral(feature)
            if coarser is not None:
                level = level + F.interpolate(coarser, size=level.shape[-2:], mode="nearest")
            merged[name] = level
            coarser = level
        features = {name: layer(merged[name]) for name, layer in self.output.items()}
        coarsest_output = list(features.values())[-1]
        features[self.coarsest] = F.max_pool2d(coarsest_output, kernel_size=1, stride=2)
        return features | {name: trunk_features[name] for name in self.extra_levels}
