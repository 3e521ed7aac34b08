"""Feature Pyramid Network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.interfaces import Backbone
from maskseg.models.layers.norms import conv
from maskseg.structures import Features, FeatureSpec


class FPN(nn.Module):
    """A trunk's {c2 .. c5} -> {p2 .. p6}, all with `channels` (FPN, section 3); p6 is p5 at every second cell. Of a trunk that ends sooner the same.

    keep: levels of the trunk that are handed on behind the pyramid, for stages that read them.
    """

    def __init__(
        self,
        trunk: nn.Module,
        channels: int = 256,
        norm: str | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        levels = cast(Backbone, trunk).levels
        self.lateral = nn.ModuleDict(
            {f"p{k[1:]}": conv(v.channels, channels, 1, norm) for k, v in levels.items()}
        )
        self.output = nn.ModuleDict(
            {f"p{k[1:]}": conv(channels, channels, 3, norm) for k in levels}
        )
        for module in [*self.lateral.modules(), *self.output.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.levels = {
            f"p{k[1:]}": FeatureSpec(v.stride, v.centre, channels) for k, v in levels.items()
        }
        name, last = list(self.levels.items())[-1]
        self.coarsest = f"p{int(name[1:]) + 1}"
        self.levels[self.coarsest] = FeatureSpec(last.stride * 2, last.centre, channels)
        self.keep = list(keep)
        if unknown := [name for name in self.keep if name not in levels]:
            raise UserError(
                f"fpn: keep names {', '.join(unknown)}, the trunk has {', '.join(levels)}"
            )
        self.levels |= {name: levels[name] for name in self.keep}

    def forward(self, images: Tensor) -> Features:
        """images: f32 [N, 3, H, W] -> the maps of the pyramid, finest first, and those of `keep`."""
        own = cast(Backbone, self.trunk)(images)
        maps = list(own.values())
        merged: dict[str, Tensor] = {}
        above: Tensor | None = None
        for name, map_ in reversed(list(zip(self.lateral, maps, strict=True))):
            here: Tensor = self.lateral[name](map_)
            if above is not None:
                here = here + F.interpolate(above, size=here.shape[-2:], mode="nearest")
            merged[name] = above = here
        features = {name: layer(merged[name]) for name, layer in self.output.items()}
        features[self.coarsest] = F.max_pool2d(list(features.values())[-1], kernel_size=1, stride=2)
        return features | {name: own[name] for name in self.keep}
