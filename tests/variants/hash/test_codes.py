"""Binary codes: packing, distances by brute force, what their gradients and statistics are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maskseg.variants.hash.codes import (
    expected_hamming,
    hamming,
    pack_bits,
    statistics,
    straight_through,
    unpack_bits,
)


def random_bits(count: int, bits: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, bits, generator=generator) < 0.5


def test_packing_literals() -> None:
    bits = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 1, 0, 0]]).bool()
    assert pack_bits(bits).tolist() == [[1, 3], [2 + 128, 0]]
    assert unpack_bits(torch.tensor([[5, 255]], dtype=torch.uint8), 10).int().tolist() == [
        [1, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    ]


@pytest.mark.parametrize("bits", range(1, 65))
def test_packing_and_back(bits: int, generator: torch.Generator) -> None:
    for shape in ((0, bits), (7, bits), (2, 3, bits)):
        codes = torch.rand(shape, generator=generator) < 0.5
        packed = pack_bits(codes)
        assert packed.dtype == torch.uint8
        assert packed.shape == (*shape[:-1], math.ceil(bits / 8))
        assert torch.equal(unpack_bits(packed, bits), codes)


@pytest.mark.parametrize("bits", [1, 8, 13, 64])
def test_hamming_by_brute_force(bits: int, generator: torch.Generator) -> None:
    first, second = random_bits(9, bits, generator), random_bits(14, bits, generator)
    found = hamming(pack_bits(first), pack_bits(second))
    assert found.dtype == torch.int64
    assert found.tolist() == [
        [sum(x != y for x, y in zip(a, b, strict=True)) for b in second.tolist()]
        for a in first.tolist()
    ]
    assert hamming(pack_bits(first[:0]), pack_bits(second)).shape == (0, 14)
    assert hamming(pack_bits(first), pack_bits(first)).diagonal().tolist() == [0] * 9


def test_expected_hamming_of_bits_is_hamming(generator: torch.Generator) -> None:
    first, second = random_bits(30, 11, generator), random_bits(30, 11, generator)
    assert (
        expected_hamming(first.float(), second.float()).tolist()
        == hamming(pack_bits(first), pack_bits(second)).diagonal().tolist()
    )


def test_expected_hamming_is_the_mean_over_draws(generator: torch.Generator) -> None:
    first, second = torch.rand(5, 6, generator=generator), torch.rand(5, 6, generator=generator)
    draws = 20_000
    one, other = (
        torch.rand(draws, 5, 6, generator=generator) < chance for chance in (first, second)
    )
    distance = (one != other).sum(dim=-1).double()
    # Five standard deviations of a mean of so many.
    assert (
        (distance.mean(dim=0) - expected_hamming(first, second)).abs()
        < 5 * distance.std(dim=0) / draws**0.5
    ).all()


def test_expected_hamming_is_not_rounded_by_autocast(generator: torch.Generator) -> None:
    first, second = torch.rand(5, 6, generator=generator), torch.rand(5, 6, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = expected_hamming(first, second)
    assert torch.equal(found, expected_hamming(first, second))


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
        ([[0, 1], [1, 0], [1, 0], [0, 1]], 0.5, 1.0, 1.0, 2),  # opposite bits say the same
        ([[1, 1], [1, 1], [1, 0], [0, 0]], 0.375, 1.5, 0.125 / (0.1875**0.5 * 0.5), 3),
        ([[0, 1], [0, 0]], 0.25, 1.0, 1.0, 2),  # a bit that never changes
        ([[1, 1, 1]] * 3, 0.0, 0.0, 1.0, 1),
        ([[0], [1], [1], [1]], 0.25, 2 - 0.75 * math.log2(3), 0.0, 2),  # one bit has no pair
        (
            [[0, 1, 1, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1, 1]],
            1 / 18,
            1.0,
            1.0,
            2,
        ),  # differ in the second byte
    ],
)
def test_statistics_literals(
    bits: list[list[int]], balance: float, entropy: float, correlation: float, codes: int
) -> None:
    found = statistics(torch.tensor(bits).bool())
    assert found == pytest.approx(
        {"balance": balance, "entropy": entropy, "correlation": correlation, "codes": codes}
    )


def test_statistics_of_nothing() -> None:
    assert statistics(torch.zeros((0, 8), dtype=torch.bool)) == {
        "balance": 0.0,
        "entropy": 0.0,
        "correlation": 0.0,
        "codes": 0.0,
    }


def test_statistics_of_even_bits(generator: torch.Generator) -> None:
    found = statistics(random_bits(50_000, 6, generator))
    assert found["codes"] == 64
    assert 5.99 < found["entropy"] <= 6
    assert 0.49 < found["balance"] <= 0.5
    assert found["correlation"] < 0.02
