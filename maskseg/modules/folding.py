"""A model's fastest form for inference, of equal output: norms folded into the convolutions before them, weights in the layout of the kernels."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import nn

from maskseg.modules.box_head import FCTrunk
from maskseg.modules.conv_norm import channels_last, folded, pairs
from maskseg.modules.pyramid import FoldedPyramidLinear, PyramidLinear

M = TypeVar("M", bound=nn.Module)
_LAYERS = nn.Conv2d | nn.ConvTranspose2d | nn.Linear | nn.GroupNorm


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
        if isinstance(module, FCTrunk):
            module.layers[0] = _as_convolution(module)
        for name, child in module.named_children():
            if isinstance(child, PyramidLinear):
                setattr(module, name, FoldedPyramidLinear(child))
    for module in copied.modules():
        if isinstance(module, _LAYERS):
            module.to(dtype or module.weight.dtype)
    return channels_last(copied)


def _as_convolution(trunk: FCTrunk) -> nn.Conv2d:
    """The first linear layer as a convolution over all cells: it reads channels-last features where they lie."""
    linear = cast(nn.Linear, trunk.layers[0])
    channels, size = trunk.inputs
    with torch.device("meta"):
        conv = nn.Conv2d(channels, linear.out_features, size).eval()
    conv.weight = nn.Parameter(linear.weight.view_as(conv.weight), requires_grad=False)
    conv.bias = linear.bias
    return conv
