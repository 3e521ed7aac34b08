"""A model's fastest form for inference, of equal output: norms folded into the convolutions before them, weights in the layout of the kernels."""

from __future__ import annotations

import copy
from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from maskseg.models.layers.conv_norm import channels_last, folded, pairs

M = TypeVar("M", bound=nn.Module)
_LAYERS = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.GroupNorm


@runtime_checkable
class Fusible(Protocol):
    """A module that has a faster form for inference."""

    def fused(self) -> nn.Module:
        """The form for inference, of equal output to rounding. It may share the weights of this module and cannot be trained."""


def for_inference(model: M, dtype: torch.dtype | None = None) -> M:
    """A copy in evaluation mode whose outputs equal the model's to rounding; the model stays as it is. The copy cannot be trained on.

    dtype: of convolutions and linear layers, and so of the features: bfloat16 and float16 round them (boxes, scores and masks are computed
    from them in f32).
    """
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(copied.modules()):
        for first, second in pairs(module):
            norm = getattr(module, second)
            if norm.running_mean is not None:
                setattr(module, first, folded(getattr(module, first), norm))
                setattr(module, second, nn.Identity())
        for name, child in module.named_children():
            if isinstance(child, Fusible):
                setattr(module, name, child.fused())
    if isinstance(copied, Fusible):
        copied = cast(M, copied.fused())
    for module in copied.modules():
        if isinstance(module, _LAYERS):
            module.to(dtype or module.weight.dtype)
    return channels_last(copied)
