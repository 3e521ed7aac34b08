"""Linear layers that compute only some of their outputs, or run faster on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# From this many rows on, a convolution on a CPU is faster than a matrix product.
MIN_CONV_ROWS = 256


def flatten_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute F.linear of the flattened rows of x: [R, C, H, W] -> [R, width].

    weight: [width, C * H * W]; bias: [width].
    """
    is_plain_cpu = (
        x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    )
    if len(x) < MIN_CONV_ROWS or not is_plain_cpu:
        return F.linear(x.flatten(1), weight, bias)
    # The same sum as a convolution: oneDNN's kernels are up to three times as fast as BLAS on
    # processors that are not Intel's.
    return F.conv2d(x, weight.view(-1, *x.shape[1:]), bias).flatten(1)


def class_linear(x: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> Tensor:
    """Apply to each row the weights of its class: [n, C, P] -> [n, q, P].

    weight: [K, q, C]; bias: [K, q], for q outputs per class; label: i64 [n], in 0..K-1.
    The outputs of all K classes would need K times the work and memory.
    """
    # F.embedding sums its gradient in a fixed order; indexing does not, with several threads.
    row_weight = F.embedding(label, weight.flatten(1)).view(len(label), *weight.shape[1:])
    row_bias = F.embedding(label, bias)[..., None]
    return torch.baddbmm(row_bias.to(x.dtype), row_weight.to(x.dtype), x)
