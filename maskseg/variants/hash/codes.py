"""Short binary codes: bit packing, the expected Hamming distance, and code statistics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.precision import full_precision


def pack_bits(bits: Tensor) -> Tensor:
    """Pack bits into bytes: bool [..., b] -> uint8 [..., ceil(b / 8)].

    Bit i is bit i % 8 of byte i // 8; the last byte is padded with zeros.
    """
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    groups = padded.reshape(*bits.shape[:-1], padded.shape[-1] // 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (groups << shifts).sum(dim=-1, dtype=torch.uint8)


@full_precision
def expected_hamming(first: Tensor, second: Tensor) -> Tensor:
    """Expected Hamming distance of codes whose bits are independent Bernoulli variables.

    first, second: probability that each bit is 1, f32 [..., b]. Returns f32 [...]; exact for bits
    that are 0 or 1.
    """
    return (first + second - 2 * first * second).sum(dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """Round soft codes to bits (0 or 1) and pass the gradient through to the soft codes.

    The straight-through estimator of Bengio et al., "Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation", 2013, section 2.
    """
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


def code_statistics(bits: Tensor) -> dict[str, float]:
    """Statistics of how well a set of codes, bool [n, b], uses its bits.

    * balance: share of the rarer value of a bit, averaged over the bits (ideal: 0.5);
    * entropy: of the distribution of codes, in bits (at most b);
    * correlation: mean absolute correlation of two bits (ideal: 0; a constant bit counts as 1);
    * codes: number of distinct codes.
    """
    count, length = bits.shape
    if count == 0:
        return {"balance": 0.0, "entropy": 0.0, "correlation": 0.0, "codes": 0.0}
    values = bits.double()
    share = values.mean(dim=0)
    _, counts = torch.unique(pack_bits(bits), dim=0, return_counts=True)
    probability = counts.double() / count

    centred = values - share
    deviation = centred.pow(2).mean(dim=0).sqrt()
    scale = deviation[:, None] * deviation
    covariance = centred.T @ centred / count
    correlation = torch.where(scale > 0, covariance / scale.clamp(min=1e-300), 1.0).abs()
    pairs = length * (length - 1)
    off_diagonal = correlation.sum() - correlation.diagonal().sum()
    return {
        "balance": float(torch.minimum(share, 1 - share).mean()),
        "entropy": float((probability * -probability.log2()).sum()),
        "correlation": float(off_diagonal / pairs) if pairs else 0.0,
        "codes": float(len(counts)),
    }
