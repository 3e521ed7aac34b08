"""A convolution and the norm with fixed statistics behind it, as one: the norm scales the small weights instead of the large output."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

M = TypeVar("M", bound=nn.Module)
NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)


def pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of the convolutions among a module's own children and of the norms that directly follow them."""
    names: list[tuple[str, str]] = []
    if isinstance(module, BasicBlock | Bottleneck):
        names = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(module, f"bn{i}")]
    elif isinstance(module, nn.Sequential):
        children = list(dict(module.named_children()))
        names = list(pairwise(children))
    return [
        (a, b)
        for a, b in names
        if isinstance(getattr(module, a), nn.Conv2d) and isinstance(getattr(module, b), NORMS)
    ]


def folded(conv: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """One convolution for both: norm(Wx) = (Wg/s)x + b - mg/s with mean m, deviation s, weight g, bias b, computed in f64.

    norm: a `FrozenBatchNorm2d`, `BatchNorm2d` or `SyncBatchNorm` with statistics.
    """
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -mean * scale if conv.bias is None else (conv.bias.double() - mean) * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    one = _like(conv)
    one.weight = nn.Parameter(
        (conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype),
        requires_grad=False,
    )
    one.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return one


class ConvWithFrozenNorm(nn.Conv2d):
    """A convolution that applies the frozen norm behind it too, and can be learnt."""

    def __init__(self, conv: nn.Conv2d, norm: Any) -> None:
        with torch.device("meta"):
            super().__init__(**_arguments(conv), bias=False)
        self.weight = conv.weight
        self.norm = [norm]  # in a list: it is no child of this one too

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norm
        scale: Tensor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        out: Tensor = self._conv_forward(
            x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        )
        return out


class AppliedNorm(FrozenBatchNorm2d):  # type: ignore[misc] # torchvision has no types
    """A frozen norm that the convolution before it has applied; it keeps the tensors."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def merge_frozen(module: nn.Module) -> None:
    """Lets the convolutions below a module apply the frozen norms behind them. Names of tensors stay; so does the output, to rounding."""
    for part in list(module.modules()):
        for first, second in pairs(part):
            conv, norm = getattr(part, first), getattr(part, second)
            if isinstance(norm, FrozenBatchNorm2d) and conv.bias is None:
                applied = AppliedNorm(len(norm.weight), norm.eps)
                setattr(part, second, applied)
                setattr(part, first, ConvWithFrozenNorm(conv, applied))


def channels_last(module: M) -> M:
    """The module, the weights of its convolutions in the layout of the fastest kernels: [out, height, width, in] in memory."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def _arguments(conv: nn.Conv2d) -> dict[str, Any]:
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


def _like(conv: nn.Conv2d) -> nn.Conv2d:
    """Without values yet."""
    with torch.device("meta"):
        return nn.Conv2d(**_arguments(conv)).eval()
