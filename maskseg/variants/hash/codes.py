"""Short binary codes: packed into bytes, compared, and what is said of how good they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.ops.precision import full_precision


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., b] -> uint8 [..., ceil(b / 8)]; bit i is bit i % 8 of byte i // 8, missing ones are zeros."""
    padded = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8))
    bytes_ = padded.reshape(*bits.shape[:-1], padded.shape[-1] // 8, 8)
    return (bytes_ << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        dim=-1, dtype=torch.uint8
    )


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """uint8 [..., bytes] -> bool [..., count]: the inverse of `pack_bits`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(-2)[..., :count].bool()


def hamming(first: Tensor, second: Tensor) -> Tensor:
    """In how many bits each code of one set differs from each of another: uint8 [n, bytes], uint8 [m, bytes] -> i64 [n, m]."""
    ones = torch.tensor([i.bit_count() for i in range(256)], device=first.device)
    return ones[(first[:, None] ^ second[None]).long()].sum(dim=-1)


@full_precision
def expected_hamming(first: Tensor, second: Tensor) -> Tensor:
    """In how many bits two codes differ where each bit is one with the given probability: f32 [..., b] each -> [...]; exact for bits of 0 and 1."""
    return (first + second - 2 * first * second).sum(dim=-1)


def straight_through(soft: Tensor) -> Tensor:
    """Bits of 0 and 1 whose gradient is that of the soft codes (Bengio et al., "Estimating or Propagating Gradients", section 2)."""
    return soft + ((soft > 0.5).to(soft.dtype) - soft).detach()


def statistics(bits: Tensor) -> dict[str, float]:
    """How well codes, bool [n, b], use their bits.

    balance: the mean over the bits of the share of ones, folded to at most 0.5 (the ideal); entropy: of the codes as a whole, in bits (at most b);
    correlation: the mean size of the correlation of two bits (0 is ideal; of a bit that never changes it is taken as 1); codes: how many
    different ones there are.
    """
    count, length = bits.shape
    if count == 0:
        return {"balance": 0.0, "entropy": 0.0, "correlation": 0.0, "codes": 0.0}
    values = bits.double()
    share = values.mean(dim=0)
    _, counts = torch.unique(pack_bits(bits), dim=0, return_counts=True)
    chance = counts.double() / count
    centred = values - share
    spread = centred.pow(2).mean(dim=0).sqrt()
    scale = spread[:, None] * spread
    related = torch.where(
        scale > 0, (centred.T @ centred / count) / scale.clamp(min=1e-300), 1.0
    ).abs()
    pairs = length * (length - 1)
    return {
        "balance": float(torch.minimum(share, 1 - share).mean()),
        "entropy": float((chance * -chance.log2()).sum()),
        "correlation": float((related.sum() - related.diagonal().sum()) / pairs) if pairs else 0.0,
        "codes": float(len(counts)),
    }
