"""Sampling of segments: overlaps by pixels, segment pursuit by hand, synthetic images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.variants.cfm import sampling
from maskseg.variants.cfm.sampling import (
    IGNORE_LABEL,
    SegmentGroundTruth,
    SegmentSampler,
    append_ground_truth,
    assign_proposal_labels,
    mask_overlaps,
    match_segments,
    proposal_overlaps,
    segment_areas,
    segment_pursuit,
    stuff_purity,
    thing_ious,
)
from maskseg.variants.cfm.settings import SamplerSettings

Array = np.ndarray
Span = tuple[int, int, int]  # first column, last column (exclusive), label
THINGS, CLASSES = 3, 7  # stuff is 3..6, background 7
SIZES = [(17, 23), (1, 1), (1, 40), (31, 1)]


def random_image(
    height: int, width: int, seed: int = 0
) -> tuple[SegmentProposals, SegmentGroundTruth]:
    """Blocks with noise and pixels without a superpixel.

    The last three proposals have all superpixels, none, and one without pixels.

    The ground truth has things that overlap, one without a pixel, and one crowd; its map has all
    labels and unlabeled pixels.
    """
    rng = np.random.default_rng(seed)
    blocks = (
        rng.integers(-1, 8, (height // 4 + 1, width // 5 + 1))
        .repeat(4, 0)
        .repeat(5, 1)[:height, :width]
    )
    labels = np.where(
        rng.random((height, width)) < 0.1, rng.integers(-1, 8, (height, width)), blocks
    ).astype(np.int32)
    members = rng.random((40, 9)) < rng.random((40, 1))
    members[-3:] = [[True] * 9, [False] * 9, [False] * 8 + [True]]
    masks = rng.random((5, height, width)) < 0.3
    masks[1] = np.isin(labels, np.flatnonzero(members[0]))
    masks[2] = False
    semantic = (
        rng.integers(-1, CLASSES, (height // 6 + 1, width // 6 + 1))
        .repeat(6, 0)
        .repeat(6, 1)[:height, :width]
        .astype(np.int16)
    )
    truth = SegmentGroundTruth(
        masks, np.array([2, 0, 1, 1, 2]), np.array([False, False, False, True, False]), semantic
    )
    return SegmentProposals(labels, members), truth


def bitmaps_of(proposals: SegmentProposals) -> Array:
    """Bitmaps by the definition, bool [R, H, W]."""
    rows = [
        np.isin(proposals.labels, np.flatnonzero(superpixels)) for superpixels in proposals.members
    ]
    return np.array(rows, dtype=bool).reshape(len(rows), *proposals.labels.shape)


def iou(first: Array, second: Array) -> float:
    return float((first & second).sum() / max((first | second).sum(), 1))


def strips(*rows: tuple[int, int], width: int = 100) -> SegmentProposals:
    """Proposals from a first to a last column (exclusive) of an image one pixel high.

    Each pixel is a superpixel.
    """
    column = np.arange(width)
    members = np.array(
        [(column >= first) & (column < last) for first, last in rows], dtype=bool
    ).reshape(len(rows), width)
    return SegmentProposals(column[None].astype(np.int32), members)


def truth_of(
    things: list[Span], stuff: Sequence[Span] = (), crowds: Sequence[int] = (), width: int = 100
) -> SegmentGroundTruth:
    """Ground truth of things and stuff as spans. crowds: indices of things that are crowds."""
    column = np.arange(width)
    semantic = np.full((1, width), -1, dtype=np.int16)
    masks = np.array(
        [[(column >= first) & (column < last)] for first, last, _ in things], dtype=bool
    ).reshape(-1, 1, width)
    for first, last, label in [*stuff, *things]:
        semantic[0, first:last] = label
    crowd = np.isin(np.arange(len(things)), crowds)
    return SegmentGroundTruth(
        masks, np.array([label for *_, label in things], dtype=np.int64), crowd, semantic
    )


def pursue(
    proposals: SegmentProposals,
    purity: list[float] | None = None,
    seed: int | None = None,
    **keys: Any,
) -> list[int]:
    scores = np.ones(len(proposals)) if purity is None else np.array(purity)
    areas = segment_areas(proposals.labels, proposals.members)
    rng = None if seed is None else np.random.default_rng(seed)
    return segment_pursuit(
        scores,
        areas,
        proposal_overlaps(proposals.labels, proposals.members, areas),
        rng=rng,
        **keys,
    ).tolist()


def draw(
    sampler: SegmentSampler, proposals: SegmentProposals, truth: SegmentGroundTruth, seed: int = 0
) -> list[tuple[int, int]]:
    """Sample rows and labels."""
    rows, labels = sampler(proposals, truth, np.random.default_rng(seed))
    assert rows.dtype == labels.dtype == np.int64
    assert all(a < b for a, b in pairwise(rows))
    return list(zip(rows.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_overlaps_equal_bitmaps(size: tuple[int, int]) -> None:
    proposals, truth = random_image(*size)
    labels = proposals.labels
    members = proposals.members
    bitmaps = bitmaps_of(proposals)
    assert truth.semantic is not None
    areas = segment_areas(labels, members)
    assert areas.tolist() == bitmaps.sum(axis=(1, 2)).tolist()
    assert mask_overlaps(labels, members, truth.masks).tolist() == [
        [(b & m).sum() for m in truth.masks] for b in bitmaps
    ]
    for result, count in (
        (mask_overlaps(labels, members, truth.semantic, 9), 9),
        (mask_overlaps(labels, members, truth.semantic, 2), 2),
    ):
        assert result.tolist() == [
            [(b & (truth.semantic == k)).sum() for k in range(count)] for b in bitmaps
        ]
    assert mask_overlaps(labels, members, truth.semantic).shape == (
        len(members),
        truth.semantic.max() + 1,
    )
    assert thing_ious(labels, members, areas, truth.masks).tolist() == [
        [iou(b, m) for m in truth.masks] for b in bitmaps
    ]
    overlaps = proposal_overlaps(labels, members, areas)
    for row in (0, 7, -1, -2):
        assert overlaps(row).tolist() == [iou(bitmaps[row], b) for b in bitmaps]


@pytest.mark.parametrize("size", SIZES)
def test_purity_equals_bitmaps(size: tuple[int, int]) -> None:
    proposals, truth = random_image(*size)
    assert truth.semantic is not None
    areas = segment_areas(proposals.labels, proposals.members)
    result = stuff_purity(
        proposals.labels, proposals.members, areas, truth.semantic, THINGS, CLASSES
    )
    for row, bitmap in enumerate(bitmaps_of(proposals)):
        frame = np.zeros_like(bitmap)
        if bitmap.any():
            y, x = np.nonzero(bitmap)
            frame[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
        assert result[row].tolist() == [
            iou(bitmap, frame & (truth.semantic == label)) for label in range(THINGS, CLASSES)
        ]


def test_purity_literal() -> None:
    # Stuff 3 has the left four columns of six. An L-shaped part of it has 4 of the 6 stuff pixels
    # in its box; half of a bar is stuff, and it has all stuff in its box.
    semantic = np.array([[3, 3, 3, 3, 0, 0]] * 2 + [[3, 3, 3, 3, -1, -1]])
    labels = np.arange(18, dtype=np.int32).reshape(3, 6)
    members = np.zeros((3, 18), dtype=bool)
    members[0, [0, 6, 12, 13]] = True
    members[1, 2:6] = True
    assert stuff_purity(labels, members, np.array([4.0, 4.0, 0.0]), semantic, 3, 5).tolist() == [
        [4 / 6, 0],
        [0.5, 0],
        [0, 0],
    ]


def test_regions_of_another_size_are_refused() -> None:
    proposals, truth = random_image(4, 6)
    for regions in (
        np.zeros((2, 6, 4), dtype=bool),
        np.zeros((4, 5), dtype=int),
        np.zeros((4, 6), dtype=bool),
        np.zeros((1, 4, 6), dtype=int),
    ):
        with pytest.raises(ValueError, match="regions must be bool"):
            mask_overlaps(proposals.labels, proposals.members, regions)
    with pytest.raises(ValueError, match="has the label 6, there are 5"):
        match_segments(
            proposals,
            SegmentGroundTruth(truth.masks, truth.labels, truth.iscrowd, np.full((4, 6), 6)),
            THINGS,
            5,
        )
    with pytest.raises(ValueError, match=r"labels 0..2, there are 2"):
        match_segments(proposals, truth, 2, CLASSES)


def test_pursuit_selects_the_largest_and_drops_overlapping_candidates() -> None:
    assert pursue(strips((60, 80), (90, 100), (0, 30))) == [2, 0]  # 10 is below the mean of 20
    assert pursue(strips((0, 30), (0, 6), (40, 43))) == [0]  # 3 is below the mean of 13
    assert pursue(strips((0, 10), (0, 2), (50, 60), (50, 55), (5, 10), (70, 80))) == [0, 2, 5]
    assert pursue(strips((0, 10), (8, 18), (16, 26))) == [0, 1, 2]  # 2 of 18 shared
    assert pursue(strips((0, 10), (6, 16), (16, 26))) == [0, 2]  # 4 of 16
    assert pursue(strips((0, 10), (9, 19), (19, 29)), overlap=0.05) == [0, 2]  # 1 of 19


def test_pursuit_meets_its_thresholds_exactly() -> None:
    assert pursue(strips((0, 6), (4, 10), (50, 55)), overlap=0.2) == [
        0,
        1,
    ]  # 2 of 10, the IoU itself stays; 5 is below the mean
    assert pursue(strips((0, 6), (4, 10)), overlap=0.19) == [0]
    assert pursue(strips((0, 6), (0, 6), (0, 5)), overlap=1.0) == [
        0,
        1,
    ]  # nothing is dropped, each is selected once
    assert pursue(strips((0, 6), (10, 16), (20, 26))) == [0, 1, 2]  # all equal the mean
    assert pursue(strips((0, 6), (10, 16), (20, 26)), [0.6, 0.59, 1.0], min_purity=0.6) == [0, 2]


def test_pursuit_counts_the_mean_of_the_initial_candidates() -> None:
    # The mean of 40, 30, 8 and 6 is 21; without the first two, 8 would be above the mean.
    assert pursue(strips((0, 40), (50, 80), (85, 93), (94, 100))) == [0, 1]
    # Proposals without purity or without pixels have no effect.
    assert pursue(strips((0, 8), (10, 16), (20, 100), (5, 5)), [1, 1, 0.5, 1]) == [0]


def test_pursuit_of_nothing() -> None:
    assert pursue(strips()) == pursue(strips(), seed=0) == []
    assert (
        pursue(strips((0, 5), (3, 3)), [0.1, 1.0])
        == pursue(strips((0, 5), (3, 3)), [0.1, 1.0], seed=0)
        == []
    )
    assert pursue(strips((4, 5))) == pursue(strips((4, 5)), seed=3) == [0]


def test_stochastic_pursuit_draws_by_area() -> None:
    areas = [5, 10, 20, 40]
    proposals = strips((0, 5), (5, 15), (15, 35), (35, 75))
    runs = [pursue(proposals, seed=seed) for seed in range(3000)]
    first = np.bincount([run[0] for run in runs], minlength=4)
    expected = 3000 * np.array(areas) / sum(areas)
    assert (
        (first - expected) ** 2 / expected
    ).sum() < 16.3  # chi-square, 3 degrees of freedom: 1 in 1000
    second = np.bincount(
        [run[1] for run in runs if run[0] == 0], minlength=4
    )  # in proportion among the remaining ones
    expected = second.sum() * np.array([0, 10, 20, 40]) / 70
    assert second[0] == 0
    assert ((second - expected)[1:] ** 2 / expected[1:]).sum() < 13.8  # 2 degrees of freedom
    for run in runs:  # the mean is 18.75: stops after both larger ones, not before
        assert {2, 3} <= set(run)
        assert run[-1] in (2, 3)
    assert {len(run) for run in runs} == {2, 3, 4}


def test_stochastic_pursuit_drops_overlapping_candidates() -> None:
    proposals = strips((0, 30), (0, 20), (10, 30), (60, 90), (0, 12))
    runs = [pursue(proposals, seed=seed) for seed in range(200)]
    overlaps = proposal_overlaps(
        proposals.labels, proposals.members, segment_areas(proposals.labels, proposals.members)
    )
    assert all(overlaps(a)[b] <= 0.2 for run in runs for a in run for b in run if a != b)
    assert all(3 in run for run in runs)
    assert len({tuple(run) for run in runs}) > 4


def test_labels_literal() -> None:
    # A thing of label 1 has columns 10..29, the crowd 60..79; stuff 4 has 30..59, stuff 5 has 0..9;
    # 80.. are unlabeled.
    truth = truth_of([(10, 30, 1), (60, 80, 0)], [(30, 60, 4), (0, 10, 5)], crowds=[1])
    rows = {
        (10, 30): 1,
        (10, 20): 1,  # IoU exactly 0.5
        (10, 19): IGNORE_LABEL,  # 0.45: neither
        (10, 16): IGNORE_LABEL,  # exactly 0.3 is not a negative
        (10, 15): 7,
        (10, 12): 7,  # exactly 0.1
        (10, 11): IGNORE_LABEL,  # 0.05
        (30, 60): 4,
        (30, 34): 4,  # has all stuff in its box: pure, whatever its size
        (27, 33): IGNORE_LABEL,  # half stuff
        (24, 33): IGNORE_LABEL,  # IoU 6 / 23, but a third of it is stuff
        (0, 10): 5,
        (22, 32): IGNORE_LABEL,  # IoU 8 / 22
        (60, 80): IGNORE_LABEL,  # the crowd itself
        (80, 100): IGNORE_LABEL,  # far from all things
        (20, 100): IGNORE_LABEL,  # IoU 10 / 90, but purity 30 / 80
        (50, 50): IGNORE_LABEL,
    }
    sampler = SegmentSampler(THINGS, CLASSES)
    matches = sampler.match(strips(*rows), truth)
    assert dict(zip(rows, sampler.assign_labels(matches).tolist(), strict=True)) == rows
    classes = assign_proposal_labels(matches, THINGS, CLASSES).tolist()
    assert classes == [label if label != IGNORE_LABEL else CLASSES for label in rows.values()]


def test_keys_of_stuff() -> None:
    truth = truth_of([(10, 30, 1)], [(30, 60, 4)])
    proposals = strips(
        (24, 32), (30, 45), (35, 50), (20, 42)
    )  # a quarter is stuff, at a thing's IoU of 6 / 22; two at an IoU of 0.5; 12 of 22
    for purity, label in ((0.25, IGNORE_LABEL), (0.26, 7)):
        sampler = SegmentSampler(THINGS, CLASSES, SamplerSettings(max_negative_purity=purity))
        assert sampler.assign_labels(sampler.match(proposals, truth)).tolist() == [
            label,
            4,
            4,
            IGNORE_LABEL,
        ]
    for keys, selected in (({}, [1]), ({"overlap": 0.5}, [1, 2]), ({"min_purity": 0.5}, [3])):
        sampler = SegmentSampler(THINGS, CLASSES, SamplerSettings(**keys))
        matches = sampler.match(proposals, truth)
        assert (
            sampler.sample_stuff(proposals, matches, sampler.assign_labels(matches)).tolist()
            == selected
        )


def test_a_thing_is_not_stuff() -> None:
    # Stuff where the mask of the thing is: both match, the thing wins, and the proposal is no
    # candidate for segment pursuit.
    truth = truth_of([(0, 30, 1)], [(0, 40, 4)])
    assert truth.semantic is not None
    truth.semantic[0, :30] = 4
    proposals = strips((0, 30), (0, 40), (32, 40))
    sampler = SegmentSampler(THINGS, CLASSES, SamplerSettings(append_truth=False))
    assert draw(sampler, proposals, truth) == [
        (0, 1),
        (1, 1),
        (2, 4),
    ]  # the only candidate: the mean is its area
    sampler = SegmentSampler(THINGS, CLASSES, SamplerSettings(append_truth=False, positive_iou=0.9))
    assert draw(sampler, proposals, truth) == [(0, 1), (1, 4)]


def test_the_best_match_gives_the_label() -> None:
    truth = truth_of([(0, 10, 2), (2, 10, 0), (0, 12, 1)])
    matches = match_segments(
        strips((0, 10), (2, 10), (0, 12), (1, 10), (40, 50)), truth, THINGS, CLASSES
    )
    assert assign_proposal_labels(matches, THINGS, CLASSES).tolist() == [2, 0, 1, 2, 7]
    assert assign_proposal_labels(matches, THINGS, CLASSES, positive_iou=0.95).tolist() == [
        2,
        0,
        1,
        7,
        7,
    ]


def test_nothing_inside_a_crowd_is_a_negative() -> None:
    # Two pixels of the thing and six of the crowd: a negative by its IoU of 2 / 16 alone.
    things = [(0, 10, 0), (10, 20, 1)]
    proposals = strips((8, 16), (6, 10), (8, 12), (10, 20), (0, 9))
    assert draw(
        SegmentSampler(THINGS, CLASSES, SamplerSettings(append_truth=False)),
        proposals,
        truth_of(things, crowds=[1]),
    ) == [(2, 7), (4, 0)]
    assert (0, 7) in draw(
        SegmentSampler(THINGS, CLASSES, SamplerSettings(append_truth=False, crowd_overlap=0.8)),
        proposals,
        truth_of(things, crowds=[1]),
    )
    assert draw(
        SegmentSampler(THINGS, CLASSES, SamplerSettings(append_truth=False)),
        proposals,
        truth_of(things),
    ) == [(0, 1), (2, 7), (3, 1), (4, 0)]
    only = truth_of([(0, 100, 0)], crowds=[0])
    assert draw(SegmentSampler(THINGS, CLASSES), proposals, only) == []
    beside = truth_of([(50, 100, 0)], crowds=[0])  # crowds do not count as things nearby
    assert draw(SegmentSampler(THINGS, CLASSES), proposals, beside) == [
        (row, 7) for row in range(5)
    ]


def test_images_of_stuff_only() -> None:
    sampler = SegmentSampler(THINGS, CLASSES)
    halves = truth_of([], [(0, 50, 3), (50, 100, 6)])
    assert draw(sampler, strips((0, 50), (50, 100), (40, 60)), halves) == [
        (0, 3),
        (1, 6),
    ]  # a proposal with half of each is neither stuff nor negative
    runs = [
        draw(sampler, strips((0, 50), (45, 100), (50, 100)), halves, seed) for seed in range(50)
    ]
    assert {tuple(run) for run in runs} == {
        ((0, 3), (1, 6)),
        ((0, 3), (2, 6)),
    }  # one of two that overlap, which one depends on the call
    half = truth_of([], [(0, 50, 3)])
    assert draw(sampler, strips((0, 50), (40, 60), (50, 100), (70, 90)), half) == [
        (0, 3),
        (2, 7),
        (3, 7),
    ]


def test_images_without_ground_truth_give_negatives() -> None:
    proposals = strips((0, 50), (20, 30), (5, 5))
    nothing = truth_of([])
    assert draw(SegmentSampler(THINGS, CLASSES), proposals, nothing) == [(0, 7), (1, 7)]
    assert draw(
        SegmentSampler(THINGS, CLASSES),
        proposals,
        SegmentGroundTruth(nothing.masks, nothing.labels, nothing.iscrowd),
    ) == [(0, 7), (1, 7)]
    assert (
        draw(
            SegmentSampler(THINGS, CLASSES, SamplerSettings(negative_iou=(0, 0))),
            proposals,
            nothing,
        )
        == []
    )
    assert draw(SegmentSampler(THINGS, THINGS), proposals, nothing) == [
        (0, 3),
        (1, 3),
    ]  # no stuff at all
    # A thing without pixels after a crop does not count.
    assert draw(SegmentSampler(THINGS, CLASSES), proposals, truth_of([(4, 4, 0)])) == [
        (0, 7),
        (1, 7),
    ]


def test_no_proposals() -> None:
    truth = truth_of([(0, 10, 1), (20, 30, 2), (40, 50, 0)], [(10, 20, 4)], crowds=[1])
    assert draw(SegmentSampler(THINGS, CLASSES), strips(), truth) == [(0, 1), (2, 0)]
    assert (
        draw(SegmentSampler(THINGS, CLASSES, SamplerSettings(append_truth=False)), strips(), truth)
        == []
    )
    assert draw(SegmentSampler(THINGS, CLASSES), strips(), truth_of([])) == []
    nothing = SegmentProposals(np.full((1, 100), -1, dtype=np.int32), np.zeros((2, 0), dtype=bool))
    assert draw(SegmentSampler(THINGS, CLASSES), nothing, truth) == [(2, 1), (4, 0)]


def test_rows_of_appended_ground_truth() -> None:
    truth = truth_of([(0, 10, 1), (10, 20, 2), (4, 4, 0), (40, 60, 0)], crowds=[1])
    proposals = strips((0, 9), (80, 90))
    drawn = draw(SegmentSampler(THINGS, CLASSES), proposals, truth)
    assert drawn == [(0, 1), (2, 1), (5, 0)]
    assert np.array_equal(
        bitmaps_of(append_ground_truth(proposals, truth.masks))[[2, 5]], truth.masks[[0, 3]]
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [0, 1, 5, 19])
def test_append_ground_truth_equals_bitmaps(size: tuple[int, int], count: int) -> None:
    proposals, _ = random_image(*size)
    masks = np.random.default_rng(count).random((count, *size)) < 0.2
    result = append_ground_truth(proposals, masks)
    assert np.array_equal(bitmaps_of(result), np.concatenate([bitmaps_of(proposals), masks]))
    assert (result.labels.dtype, result.members.dtype) == (np.int32, np.bool_)
    assert np.array_equal(result.labels == -1, (proposals.labels == -1) & ~masks.any(axis=0))
    if count:  # each superpixel has pixels
        assert np.unique(result.labels[result.labels >= 0]).tolist() == list(
            range(result.members.shape[1])
        )


def many() -> tuple[SegmentProposals, SegmentGroundTruth]:
    """At least a hundred proposals of each kind.

    Candidates for stuff have one size and do not overlap.
    """
    things = [(first, first + 40) for first in range(0, 11)]
    negatives = [(0, 8 + i % 3) for i in range(60)]
    stuff = [(50 + 5 * i, 55 + 5 * i) for i in range(30)]
    return strips(*things, *negatives, *stuff, width=200), truth_of(
        [(0, 40, 2)], [(50, 200, 5)], width=200
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_samples": 128}, (12, 30, 60)),  # all that exist
        ({"num_samples": 20}, (5, 5, 10)),
        ({"num_samples": 20, "thing_fraction": 0.5, "stuff_fraction": 0.5}, (10, 10, 0)),
        ({"num_samples": 20, "thing_fraction": 0.0, "stuff_fraction": 0.1}, (0, 2, 18)),
        ({"num_samples": 60, "thing_fraction": 0.5}, (12, 15, 33)),  # negatives fill the rest
        (
            {
                "num_samples": 20,
                "append_truth": False,
                "thing_fraction": 0.9,
                "stuff_fraction": 0.0,
            },
            (11, 0, 9),
        ),
        ({"num_samples": 1}, (0, 0, 1)),
    ],
)
def test_shares(keys: dict[str, Any], expected: tuple[int, int, int]) -> None:
    labels = [
        label
        for _, label in draw(SegmentSampler(THINGS, CLASSES, SamplerSettings(**keys)), *many())
    ]
    assert (labels.count(2), labels.count(5), labels.count(7)) == expected
    assert len(labels) == sum(expected)


def test_samples_follow_the_seed_and_are_uniform() -> None:
    proposals, truth = many()
    sampler = SegmentSampler(THINGS, CLASSES, SamplerSettings(20))
    assert draw(sampler, proposals, truth, 5) == draw(sampler, proposals, truth, 5)
    runs = [draw(sampler, proposals, truth, seed) for seed in range(600)]
    assert len({tuple(run) for run in runs}) > 590
    times = np.bincount([row for run in runs for row, _ in run], minlength=len(proposals) + 1)
    for rows, share in (
        (times[:11], 5 / 12),
        (times[11:71], 10 / 60),
        (times[71:101], 5 / 30),
        (times[101:], 5 / 12),
    ):
        # Five standard deviations of a binomial share.
        assert np.abs(rows / 600 - share).max() < 5 * (share * (1 - share) / 600) ** 0.5


def test_random_samples_the_same_number_as_pursuit_uniformly() -> None:
    # Of stuff 3, one large and nine small candidates, of which pursuit rarely selects a small one;
    # of stuff 4, a single one.
    truth = truth_of([], [(0, 80, 3), (80, 100, 4)])
    proposals = strips((0, 60), *((60 + i, 61 + i) for i in range(9)), (80, 100))
    selected = {
        rule: [
            draw(
                SegmentSampler(THINGS, CLASSES, SamplerSettings(stuff_rule=rule)),
                proposals,
                truth,
                seed,
            )
            for seed in range(300)
        ]
        for rule in ("pursuit", "random")
    }
    assert all((0, 3) in run and (10, 4) in run for run in selected["pursuit"])
    assert all((10, 4) in run for run in selected["random"])
    counts = {
        rule: np.bincount([len(run) for run in runs], minlength=12)
        for rule, runs in selected.items()
    }
    assert counts["pursuit"].tolist() == counts["random"].tolist()
    extra = sum(len(run) - 1 for run in selected["random"])
    share = sum((0, 3) in run for run in selected["random"]) / extra
    assert 0.05 < share < 0.16  # a tenth


def test_stuff_without_a_generator_is_the_same_for_both_rules() -> None:
    proposals = strips((0, 30), (20, 50), (50, 55), (60, 100), (60, 95), (0, 20))
    truth = truth_of([], [(0, 55, 3), (60, 100, 6)])
    for rule in ("pursuit", "random"):
        sampler = SegmentSampler(THINGS, CLASSES, SamplerSettings(stuff_rule=rule))
        matches = sampler.match(proposals, truth)
        assert sampler.sample_stuff(
            proposals, matches, sampler.assign_labels(matches)
        ).tolist() == [0, 1, 3]


def test_a_call_computes_overlaps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = dict.fromkeys(("segment_areas", "assign_proposal_labels", "proposal_overlaps"), 0)

    def counting(name: str) -> Callable[..., Any]:
        function = getattr(sampling, name)

        def called(*given: Any) -> Any:
            counted[name] += 1
            return function(*given)

        return called

    for name in counted:
        monkeypatch.setattr(sampling, name, counting(name))
    proposals = strips((0, 10), (10, 20), (40, 50))
    draw(SegmentSampler(THINGS, CLASSES), proposals, truth_of([(0, 10, 1)], [(40, 60, 3)]))
    assert counted == {"segment_areas": 1, "assign_proposal_labels": 1, "proposal_overlaps": 1}
    draw(
        SegmentSampler(THINGS, CLASSES), proposals, truth_of([(0, 10, 1)])
    )  # without stuff, pursuit does not run
    assert counted == {"segment_areas": 2, "assign_proposal_labels": 2, "proposal_overlaps": 1}


@pytest.mark.parametrize("seed", range(5))
def test_samples_of_random_images_have_valid_labels(seed: int) -> None:
    proposals, truth = random_image(29, 37, seed)
    sampler = SegmentSampler(
        THINGS,
        CLASSES,
        SamplerSettings(30, negative_iou=(0.05, 0.4), positive_iou=0.4, min_purity=0.35),
    )
    allowed = sampler.assign_labels(sampler.match(proposals, truth))
    drawn = draw(sampler, proposals, truth, seed)
    assert drawn
    appended = {
        len(proposals) + i: label for i, label in enumerate([2, 0, 1, 1, 2]) if i in (0, 1, 4)
    }
    assert all(
        label == (allowed[row] if row < len(proposals) else appended[row]) for row, label in drawn
    )
    assert IGNORE_LABEL not in [label for _, label in drawn]
    bitmaps = bitmaps_of(proposals)
    for row, label in drawn:
        if label == CLASSES:
            best = max(iou(bitmaps[row], mask) for mask in truth.masks[[0, 1, 2, 4]])
            assert 0.05 <= best < 0.4
            assert (bitmaps[row] & truth.masks[3]).sum() <= 0.5 * bitmaps[row].sum()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stuff_rule": "evenly"}, "stuff_rule must be one of pursuit, random, not evenly"),
        ({"num_samples": 0}, "segment_sampler.num_samples=0: expected a whole number from 1"),
        (
            {"thing_fraction": 0.6, "stuff_fraction": 0.5},
            r"sum of thing_fraction and stuff_fraction must be at most 1, not 0\.6 \+ 0\.5",
        ),
        ({"thing_fraction": float("nan")}, "thing_fraction=nan: expected a number from 0 to 1"),
        ({"negative_iou": (0.1, 0.6)}, "negative_iou and positive_iou must ascend"),
        (
            {"negative_iou": (0.0, 0.0), "positive_iou": 0.0},
            "positive_iou=0.0: expected a number above 0 and at most 1",
        ),
        ({"min_purity": 0.2}, "max_negative_purity must be at most min_purity"),
        ({"overlap": 1.5}, r"\.overlap=1.5: expected a number from 0 to 1"),
        ({"crowd_overlap": -0.5}, "crowd_overlap=-0.5: expected a number from 0 to 1"),
    ],
)
def test_invalid_arguments(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SegmentSampler(THINGS, CLASSES, SamplerSettings(**keys))
