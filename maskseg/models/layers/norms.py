"""Norm layers by name, for every stage that has one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from maskseg.errors import UserError

GROUPS = 32  # Group Normalization, section 4.1


def group_norm(channels: int) -> nn.GroupNorm:
    """GN with 32 groups, fewer where `channels` is not a multiple of 32 or has under two channels a group."""
    groups = GROUPS
    while groups > 1 and (channels % groups or channels // groups < 2):
        groups //= 2
    return nn.GroupNorm(groups, channels)


def norm_layer(name: str, eps: float = 1e-5) -> Callable[[int], nn.Module]:
    """A factory channels -> layer. `FrozenBN` has fixed statistics and weights; torchvision's COCO_V1 detectors need it with eps 0."""
    factories: dict[str, Callable[[int], nn.Module]] = {
        "FrozenBN": partial(FrozenBatchNorm2d, eps=eps),
        "BN": partial(nn.BatchNorm2d, eps=eps),
        "SyncBN": partial(nn.SyncBatchNorm, eps=eps),
        "GN": group_norm,
    }
    if name not in factories:
        raise UserError(f"norm must be one of {', '.join(factories)}, not {name!r}")
    return factories[name]


def conv(
    in_channels: int, out_channels: int, kernel: int, norm: str | None = None, relu: bool = False
) -> nn.Sequential:
    """A same-size convolution with an optional norm (then without bias) and ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=norm is None)
    ]
    if norm is not None:
        layers.append(norm_layer(norm)(out_channels))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
