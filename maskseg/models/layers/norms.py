"""Normalization layers by name, and convolutions with an optional norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from maskseg.errors import UserError

GROUPS = 32  # Group Normalization, section 4.1


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with 32 groups.

    It has fewer if `channels` is not a multiple of 32 or a group would have less than two channels.
    """
    groups = GROUPS
    while groups > 1 and (channels % groups or channels // groups < 2):
        groups //= 2
    return nn.GroupNorm(groups, channels)


def norm_layer(name: str, eps: float = 1e-5) -> Callable[[int], nn.Module]:
    """Return a factory channels -> layer for `FrozenBN`, `BN`, `SyncBN` or `GN`.

    `FrozenBN` has fixed statistics and weights; torchvision's COCO_V1 detectors need it with eps 0.
    Raises UserError for another name.
    """
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
    """Return a same-size convolution with optional norm and ReLU; with a norm it has no bias."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=norm is None)
    ]
    if norm is not None:
        layers.append(norm_layer(norm)(out_channels))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def conv_stack(
    in_channels: int, channels: int, layers: int, norm: str | None = None
) -> nn.Sequential:
    """Return `layers` 3x3 convolutions with optional norm and ReLU, each to `channels` channels."""
    stack = nn.Sequential()
    for _ in range(layers):
        stack.append(conv(in_channels, channels, 3, norm, relu=True))
        in_channels = channels
    return stack


def init_convs(module: nn.Module) -> None:
    """Initialize all (transposed) convolutions of a module: Kaiming normal weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
