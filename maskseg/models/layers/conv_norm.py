"""Convolutions fused with the norm with fixed statistics that follows them.

The norm scales the small weights instead of the large output.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

M = TypeVar("M", bound=nn.Module)
FixedNorm: TypeAlias = "FrozenBatchNorm2d | nn.BatchNorm2d | nn.SyncBatchNorm"
NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


def conv_norm_pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Return the names of a module's convolutions and of the norms that directly follow them.

    Only direct children of the module are considered.
    """
    candidates: list[tuple[str, str]] = []
    if isinstance(module, BasicBlock | Bottleneck):
        numbers = [i for i in (1, 2, 3) if hasattr(module, f"bn{i}")]
        candidates = [(f"conv{i}", f"bn{i}") for i in numbers]
    elif isinstance(module, nn.Sequential):
        children = list(dict(module.named_children()))
        candidates = list(pairwise(children))
    pairs = []
    for conv, norm in candidates:
        is_conv = isinstance(getattr(module, conv), nn.Conv2d)
        if is_conv and isinstance(getattr(module, norm), NORMS):
            pairs.append((conv, norm))
    return pairs


def fuse_conv_norm(conv: nn.Conv2d, norm: FixedNorm) -> nn.Conv2d:
    """Return one convolution that replaces both layers.

    norm(Wx) = (Wg/s)x + b - mg/s with mean m, deviation s, weight g and bias b, computed in f64.
    norm: a `FrozenBatchNorm2d`, `BatchNorm2d` or `SyncBatchNorm` with statistics.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean = norm.running_mean.double()
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale if conv.bias is None else (conv.bias.double() - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype)
    fused = _conv_without_values(conv)
    fused.weight = nn.Parameter(weight, requires_grad=False)
    fused.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return fused


class ConvWithFrozenNorm(nn.Conv2d):
    """A convolution that also applies the frozen norm after it; its weight can be trained."""

    def __init__(self, conv: nn.Conv2d, norm: AbsorbedNorm) -> None:
        with torch.device("meta"):
            super().__init__(**_conv_arguments(conv), bias=False)
        self.weight = conv.weight
        self.norm = [norm]  # in a list, so that it is not registered as a child here, too

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norm
        scale: Tensor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        out: Tensor = self._conv_forward(
            x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        )
        return out


class AbsorbedNorm(FrozenBatchNorm2d):  # type: ignore[misc] # torchvision has no types
    """A frozen norm that the convolution before it has already applied; it holds the tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def absorb_frozen_norms(module: nn.Module) -> None:
    """Let the convolutions in a module apply the frozen norms that follow them, in place.

    The names in the state dict are unchanged; outputs are equal up to rounding.
    """
    for parent in list(module.modules()):
        for conv_name, norm_name in conv_norm_pairs(parent):
            conv = getattr(parent, conv_name)
            norm = getattr(parent, norm_name)
            if isinstance(norm, FrozenBatchNorm2d) and conv.bias is None:
                absorbed = AbsorbedNorm(len(norm.weight), norm.eps)
                setattr(parent, norm_name, absorbed)
                setattr(parent, conv_name, ConvWithFrozenNorm(conv, absorbed))


def channels_last(module: M) -> M:
    """Lay out the weights of the convolutions as [out, height, width, in] in memory, in place.

    This is the layout of the fastest kernels. Returns the module.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def _conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    names = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )
    return {name: getattr(conv, name) for name in names}


def _conv_without_values(conv: nn.Conv2d) -> nn.Conv2d:
    """Return a convolution of the same shape whose parameters have no memory yet."""
    with torch.device("meta"):
        return nn.Conv2d(**_conv_arguments(conv)).eval()
