"""The sequence of batches depends on the seed only, not on processes, workers or the first step."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from maskseg.data.samplers import Item, StepSampler, aspect_groups, repeat_factors


def stream(num_images: int, batch_size: int, stop_step: int, **keys: object) -> list[list[Item]]:
    return list(StepSampler(num_images, batch_size, stop_step, **keys))  # type: ignore[arg-type]


def flat(batches: list[list[Item]]) -> list[Item]:
    return list(chain.from_iterable(batches))


def test_every_image_occurs_once_per_epoch() -> None:
    items = flat(stream(12, 4, 9))  # three epochs of three steps
    assert [epoch for epoch, _, _ in items] == [0] * 12 + [1] * 12 + [2] * 12
    for epoch in range(3):
        assert sorted(i for e, i, _ in items if e == epoch) == list(range(12))
    assert {repetition for _, _, repetition in items} == {0}


def test_no_image_is_lost_if_batches_do_not_divide_epochs() -> None:
    items = flat(stream(7, 3, 14))  # 42 draws, six epochs, batches that span two
    assert Counter(i for _, i, _ in items) == dict.fromkeys(range(7), 6)
    assert [e for e, _, _ in items] == sorted(e for e, _, _ in items)
    assert len(set(items)) == 42


def test_epochs_are_shuffled_differently_and_so_are_seeds() -> None:
    orders = [tuple(i for e, i, _ in flat(stream(50, 5, 30)) if e == epoch) for epoch in range(3)]
    assert len(set(orders)) == 3
    assert tuple(range(50)) not in orders
    assert stream(50, 5, 30, seed=1) != stream(50, 5, 30, seed=0)
    assert stream(50, 5, 30, seed=1) == stream(50, 5, 30, seed=1)


def test_a_dataset_smaller_than_a_batch() -> None:
    batches = stream(3, 8, 6)
    assert [len(batch) for batch in batches] == [8] * 6
    assert Counter(i for _, i, _ in flat(batches)) == dict.fromkeys(range(3), 16)


KEYS = [
    {},
    {"groups": [i % 2 for i in range(23)]},
    {"repeats": [1.0 + (i % 5) * 0.3 for i in range(23)]},
    {"groups": [int(i > 20) for i in range(23)], "repeats": [1.5] * 23},
]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("start", [1, 5, 6, 17, 30])
def test_a_resumed_stream_is_the_tail_of_the_whole(keys: dict[str, object], start: int) -> None:
    whole = stream(23, 4, 30, seed=3, **keys)
    assert stream(23, 4, 30, seed=3, start_step=start, **keys) == whole[start:]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(keys: dict[str, object], world: int) -> None:
    whole = stream(23, 4, 20, seed=3, **keys)
    parts = [
        stream(23, 4, 20, seed=3, rank=rank, world_size=world, **keys) for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert {len(share) for share in shares} == {4 // world}
        assert sorted(flat(shares)) == sorted(batch)
        assert len(set(flat(shares))) == len(set(batch))


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 5 cannot be divided evenly among 2"):
        StepSampler(10, 5, 1, world_size=2)
    with pytest.raises(ValueError, match="at least one image"):
        StepSampler(0, 5, 1)


def test_portrait_and_landscape_never_share_a_batch() -> None:
    groups = aspect_groups([(480, 640) if i % 3 else (640, 480) for i in range(31)])
    batches = stream(31, 4, 200, groups=groups)
    kinds = [{groups[i] for _, i, _ in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert {tuple(kind) for kind in kinds} == {(0,), (1,)}
    # Items of an incomplete batch come later, but are not lost: 800 draws are 25.8 epochs.
    counts = Counter(i for _, i, _ in flat(batches))
    assert set(counts) == set(range(31))
    assert min(counts.values()) >= 24
    assert max(counts.values()) <= 27


def test_aspect_groups() -> None:
    assert aspect_groups([(480, 640), (640, 480), (500, 500), (501, 500)]) == [0, 1, 0, 1]


def test_images_are_repeated_as_often_as_requested_on_average() -> None:
    repeats = [1.0, 1.25, 1.5, 2.0, 2.75, 3.1]
    epochs = 400
    items = [item for item in flat(stream(6, 5, 1000, repeats=repeats)) if item[0] < epochs]
    assert max(e for e, _, _ in items) == epochs - 1
    counts = Counter(i for _, i, _ in items)
    for image, expected in enumerate(repeats):
        assert counts[image] / epochs == pytest.approx(expected, abs=0.1)
    assert counts[0] == epochs
    assert counts[3] == 2 * epochs


def test_repetitions_of_an_image_are_numbered() -> None:
    items = [item for item in flat(stream(4, 2, 40, repeats=[3.0, 1.0, 1.0, 2.0])) if item[0] == 0]
    assert sorted(items) == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 1, 0),
        (0, 2, 0),
        (0, 3, 0),
        (0, 3, 1),
    ]


def test_number_of_steps() -> None:
    assert len(stream(10, 2, 7)) == len(StepSampler(10, 2, 7)) == 7
    assert len(stream(10, 2, 7, start_step=5)) == len(StepSampler(10, 2, 7, start_step=5)) == 2
    assert stream(10, 2, 7, start_step=7) == []
    assert stream(10, 2, 7, start_step=9) == []
    assert len(StepSampler(10, 2, 7, start_step=9)) == 0
    assert stream(10, 2, 12)[:7] == stream(10, 2, 7)  # a longer run has the same beginning


def test_repeat_factors_of_a_literal_case() -> None:
    # Of 10 images, all have class 0, two class 1 (f = 0.2), and one class 2 (f = 0.1).
    labels = [[0], [0, 1], [0, 1, 1, 1], [0, 2], *([[0]] * 6)]
    found = repeat_factors(labels, 0.4)
    expected = [1.0, np.sqrt(0.4 / 0.2), np.sqrt(0.4 / 0.2), np.sqrt(0.4 / 0.1), *([1.0] * 6)]
    np.testing.assert_allclose(found, expected)


def test_repeat_factors_follow_lvis() -> None:
    """Gupta et al., section 4.3: r(c) = max(1, sqrt(t / f(c))), r(i) = max of r(c) in image i."""
    rng = np.random.default_rng(0)
    labels = [
        rng.choice(20, size=rng.integers(0, 6), p=np.arange(1, 21) / 210).tolist()
        for _ in range(300)
    ]
    threshold = 0.1
    share = {c: sum(c in image for image in labels) / len(labels) for c in range(20)}
    expected = [
        max([max(1.0, (threshold / share[c]) ** 0.5) for c in image], default=1.0)
        for image in labels
    ]
    np.testing.assert_allclose(repeat_factors(labels, threshold), expected)
    assert max(expected) > 1.5
    assert repeat_factors(labels, 0.0) == [1.0] * 300


def test_images_without_objects_are_not_repeated() -> None:
    assert repeat_factors([[], [3], []], 1.0) == [1.0, pytest.approx(3**0.5), 1.0]
    assert repeat_factors([[], []], 0.5) == [1.0, 1.0]
