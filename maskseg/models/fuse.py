"""The fastest form of a model for inference: fused norms and channels-last weights."""

from __future__ import annotations

import copy
from typing import Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from maskseg.models.layers.conv_norm import channels_last, conv_norm_pairs, fuse_conv_norm

M = TypeVar("M", bound=nn.Module)
_FLOAT_LAYERS = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.GroupNorm


@runtime_checkable
class Fusible(Protocol):
    """A module that has a faster form for inference."""

    def fuse(self) -> nn.Module:
        """Return the form for inference; its output is equal up to rounding.

        It may share the weights of this module and cannot be trained.
        """


def for_inference(model: M, dtype: torch.dtype | None = None) -> M:
    """Return a copy of the model for inference; its outputs are equal up to rounding.

    Norms are fused into the convolutions before them, and the weights get the memory layout of the
    fastest kernels. The copy is in evaluation mode and cannot be trained. The model is unchanged.
    dtype: of convolutions and linear layers, and so of the features. bfloat16 and float16 round
    them; boxes, scores and masks are computed from them in f32.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fused.modules()):
        for conv_name, norm_name in conv_norm_pairs(module):
            norm = getattr(module, norm_name)
            if norm.running_mean is not None:
                setattr(module, conv_name, fuse_conv_norm(getattr(module, conv_name), norm))
                setattr(module, norm_name, nn.Identity())
        for name, child in module.named_children():
            if isinstance(child, Fusible):
                setattr(module, name, child.fuse())
    if isinstance(fused, Fusible):
        fused = cast(M, fused.fuse())
    for module in fused.modules():
        if isinstance(module, _FLOAT_LAYERS):
            module.to(dtype or module.weight.dtype)
    return channels_last(fused)
