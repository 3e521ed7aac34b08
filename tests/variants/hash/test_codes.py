"""Binary codes: packing against numpy, expected distances, gradients and statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.variants.hash.codes import (
    code_statistics,
    expected_hamming,
    pack_bits,
    straight_through,
)


def random_bits(count: int, bits: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, bits, generator=generator) < 0.5


def test_packing_literals() -> None:
    bits = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]]).bool()
    assert pack_bits(bits).tolist() == [[1, 3], [2 + 128, 0]]


@pytest.mark.parametrize("bits", range(1, 65))
def test_packing_matches_numpy(bits: int, generator: torch.Generator) -> None:
    for shape in ((0, bits), (7, bits), (2, 3, bits)):
        codes = torch.rand(shape, generator=generator) < 0.5
        packed = pack_bits(codes)
        assert packed.dtype == torch.uint8
        assert packed.shape == (*shape[:-1], math.ceil(bits / 8))
        expected = np.packbits(codes.numpy(), axis=-1, bitorder="little")
        np.testing.assert_array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("bits", [1, 8, 11, 13, 64])
def test_expected_hamming_of_bits_is_hamming(bits: int, generator: torch.Generator) -> None:
    first, second = random_bits(30, bits, generator), random_bits(30, bits, generator)
    distances = expected_hamming(first.float(), second.float())
    assert distances.tolist() == (first != second).sum(dim=1).tolist()
    assert expected_hamming(first.float(), first.float()).tolist() == [0] * 30


def test_expected_hamming_is_the_mean_over_draws(generator: torch.Generator) -> None:
    first, second = torch.rand(5, 6, generator=generator), torch.rand(5, 6, generator=generator)
    draws = 20_000
    one, other = (
        torch.rand(draws, 5, 6, generator=generator) < chance for chance in (first, second)
    )
    distance = (one != other).sum(dim=-1).double()
    # Five standard deviations of a mean over this many draws.
    assert (
        (distance.mean(dim=0) - expected_hamming(first, second)).abs()
        < 5 * distance.std(dim=0) / draws**0.5
    ).all()


def test_expected_hamming_is_not_rounded_by_autocast(generator: torch.Generator) -> None:
    first, second = torch.rand(5, 6, generator=generator), torch.rand(5, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        result = expected_hamming(first, second)
    assert torch.equal(result, expected_hamming(first, second))


def test_straight_through() -> None:
    soft = torch.tensor([0.0, 0.3, 0.5, 0.500001, 0.9, 1.0], requires_grad=True)
    bits = straight_through(soft)
    assert bits.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    weights = torch.arange(6.0)
    (bits * weights).sum().backward()
    assert soft.grad is not None
    assert torch.equal(soft.grad, weights)


@pytest.mark.parametrize(
    ("bits", "balance", "entropy", "correlation", "codes"),
    [
        ([[0, 0], [0, 1], [1, 0], [1, 1]], 0.5, 2.0, 0.0, 4),
        ([[0, 0], [1, 1], [0, 0], [1, 1]], 0.5, 1.0, 1.0, 2),
        ([[0, 1], [1, 0], [1, 0], [0, 1]], 0.5, 1.0, 1.0, 2),  # inverted bits are redundant
        ([[1, 1], [1, 1], [1, 0], [0, 0]], 0.375, 1.5, 0.125 / (0.1875**0.5 * 0.5), 3),
        ([[0, 1], [0, 0]], 0.25, 1.0, 1.0, 2),  # a constant bit
        ([[1, 1, 1]] * 3, 0.0, 0.0, 1.0, 1),
        ([[0], [1], [1], [1]], 0.25, 2 - 0.75 * math.log2(3), 0.0, 2),  # one bit has no pair
        (
            [[0, 1, 1, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1, 1]],
            1 / 18,
            1.0,
            1.0,
            2,
        ),  # the codes differ in the second byte
    ],
)
def test_statistics_literals(
    bits: list[list[int]], balance: float, entropy: float, correlation: float, codes: int
) -> None:
    result = code_statistics(torch.tensor(bits).bool())
    assert result == pytest.approx(
        {"balance": balance, "entropy": entropy, "correlation": correlation, "codes": codes}
    )


def test_statistics_of_nothing() -> None:
    assert code_statistics(torch.zeros((0, 8), dtype=torch.bool)) == {
        "balance": 0.0,
        "entropy": 0.0,
        "correlation": 0.0,
        "codes": 0.0,
    }


def test_statistics_of_even_bits(generator: torch.Generator) -> None:
    result = code_statistics(random_bits(50_000, 6, generator))
    assert result["codes"] == 64
    assert 5.99 < result["entropy"] <= 6
    assert 0.49 < result["balance"] <= 0.5
    assert result["correlation"] < 0.02
