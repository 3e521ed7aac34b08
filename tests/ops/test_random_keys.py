"""Hashed random numbers, compared with SplitMix64 in Python integers."""

from __future__ import annotations

import torch

from maskseg.ops.random_keys import hash_boxes, random_keys

MODULUS = 2**64


def mix(bits: int) -> int:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % MODULUS
    return bits ^ (bits >> 31)


def test_published_numbers_of_splitmix64() -> None:
    # The reference implementation with state 1234567 (https://prng.di.unimi.it/splitmix64.c).
    state = 1234567
    result = []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % MODULUS
        result.append(mix(state))
    assert result == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keys_are_splitmix64_of_seeds_and_places() -> None:
    seeds = torch.tensor([0, 0, 7, 2**61 + 12345, -5])
    places = torch.tensor([0, 5, 0, 10**6, 2**62])
    expected = [
        mix((s + (p + 1) * 0x9E3779B97F4A7C15) % MODULUS)
        for s, p in zip(seeds.tolist(), places.tolist(), strict=True)
    ]
    assert [v % MODULUS for v in random_keys(seeds, places).tolist()] == expected


def test_all_bits_are_uniform() -> None:
    for keys in (
        random_keys(torch.tensor(3), torch.arange(20000)),
        hash_boxes(torch.randint(0, 800, (20000, 4)).float()),
    ):
        assert len(torch.unique(keys)) == 20000
        ones = torch.stack([((keys >> bit) & 1).double().mean() for bit in range(64)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 20000**0.5


def test_hash_boxes_depends_on_the_coordinates() -> None:
    boxes = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0], [-1.0, 2.0, 3.0, 4.0]]
    )
    assert len(torch.unique(hash_boxes(boxes))) == 4
    assert torch.equal(hash_boxes(boxes + 1e-4), hash_boxes(boxes))
    assert not (
        hash_boxes(boxes + 0.25) == hash_boxes(boxes)
    ).any()  # a quarter of a pixel changes the hash
    assert torch.equal(hash_boxes(boxes[[3, 1]]), hash_boxes(boxes)[[3, 1]])
    assert hash_boxes(torch.zeros(0, 4)).tolist() == []
