"""Hashed random numbers, against SplitMix64 in Python's own integers."""

from __future__ import annotations

import torch

from maskseg.ops.random_keys import box_places, random_keys

WHOLE = 2**64


def mixed(bits: int) -> int:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % WHOLE
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % WHOLE
    return bits ^ (bits >> 31)


def test_the_known_first_numbers_of_splitmix64() -> None:
    # The reference implementation from state 1234567 (https://prng.di.unimi.it/splitmix64.c)
    state, found = 1234567, []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) % WHOLE
        found.append(mixed(state))
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_keys_are_splitmix64_of_seed_and_place() -> None:
    seeds, places = (
        torch.tensor([0, 0, 7, 2**61 + 12345, -5]),
        torch.tensor([0, 5, 0, 10**6, 2**62]),
    )
    wanted = [
        mixed((s + (p + 1) * 0x9E3779B97F4A7C15) % WHOLE)
        for s, p in zip(seeds.tolist(), places.tolist(), strict=True)
    ]
    assert [v % WHOLE for v in random_keys(seeds, places).tolist()] == wanted


def test_no_bit_leans() -> None:
    for keys in (
        random_keys(torch.tensor(3), torch.arange(20000)),
        box_places(torch.randint(0, 800, (20000, 4)).float()),
    ):
        assert len(torch.unique(keys)) == 20000
        ones = torch.stack([((keys >> bit) & 1).double().mean() for bit in range(64)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 20000**0.5


def test_places_are_those_of_the_coordinates() -> None:
    boxes = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0], [-1.0, 2.0, 3.0, 4.0]]
    )
    assert len(torch.unique(box_places(boxes))) == 4
    assert torch.equal(box_places(boxes + 1e-4), box_places(boxes))
    assert not (
        box_places(boxes + 0.25) == box_places(boxes)
    ).any()  # a quarter of a pixel is another place
    assert torch.equal(box_places(boxes[[3, 1]]), box_places(boxes)[[3, 1]])
    assert box_places(torch.zeros(0, 4)).tolist() == []
