"""Matching and sampling, compared with torchvision's Matcher, brute force and counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher

from maskseg.ops import boxes as box_ops
from maskseg.ops.matching import (
    IGNORED,
    NEGATIVE,
    POSITIVE,
    PaddedTargets,
    match_by_iou,
    max_crowd_ioa,
    pad_targets,
    rank_in_group,
    subsample_labels,
)
from maskseg.ops.random_keys import random_keys

KIND = {-1: NEGATIVE, -2: IGNORED}


def test_pad_targets_literal() -> None:
    boxes = torch.arange(20.0).view(5, 4)
    padded = pad_targets(
        boxes, torch.tensor([0, 2, 2, 0, 2]), torch.tensor([True, True, True, True, False]), 4
    )
    assert padded.valid.tolist() == [[True, True], [False, False], [True, True], [False, False]]
    assert padded.row[0].tolist() == [0, 3]
    assert padded.row[2].tolist() == [1, 2]
    assert torch.equal(padded.boxes[0], boxes[[0, 3]])
    assert torch.equal(padded.boxes[2], boxes[[1, 2]])
    assert padded.boxes[[1, 3]].abs().sum() == 0


def test_pad_targets_without_ground_truth_has_one_empty_slot() -> None:
    padded = pad_targets(
        torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), 3
    )
    assert padded.boxes.shape == (3, 1, 4)
    assert not padded.valid.any()


def test_rank_in_group_equals_a_loop(generator: torch.Generator) -> None:
    group = torch.randint(0, 6, (300,), generator=generator)
    priority = torch.randint(0, 20, (300,), generator=generator)  # with many ties
    result = rank_in_group(group, priority).tolist()
    for i in range(300):
        before = [
            j
            for j in range(300)
            if group[j] == group[i] and (int(priority[j]), j) < (int(priority[i]), i)
        ]
        assert result[i] == len(before)
    assert rank_in_group(group[:0], priority[:0]).tolist() == []


def truths_and_boxes(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, counts: list[int], grid: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ground truths of each image, and boxes with corners on a grid, so that many IoUs tie."""
    boxes = torch.cat(
        [make_boxes(400, 64, 64, generator), make_boxes(100, 64, 64, generator, least=16)]
    )
    truth = make_boxes(sum(counts), 64, 64, generator, least=8)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return (truth / grid).round() * grid, image, (boxes / grid).round() * grid


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.5, 0.5), (0.4, 0.9)])
@pytest.mark.parametrize("grid", [4.0, 0.01])
def test_labels_equal_torchvision(
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    grid: float,
    low: float,
    high: float,
    low_quality: bool,
) -> None:
    counts = [3, 0, 7, 1]
    truth, image, boxes = truths_and_boxes(make_boxes, generator, counts, grid)
    padded = pad_targets(truth, image, torch.ones(len(truth), dtype=torch.bool), len(counts))
    best, label = match_by_iou(padded, boxes, low, high, low_quality)
    for block in (1, 7 * 4 * 33):  # one box at a time; the last block is not full
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                (best, label),
                match_by_iou(padded, boxes, low, high, low_quality, block),
                strict=True,
            )
        )
    assert (label[1] == NEGATIVE).all()
    for i in (0, 2, 3):
        iou = box_ops.iou(truth[image == i], boxes)
        assert (
            iou.max(dim=1).values > 0
        ).all()  # torchvision matches a ground truth that no box touches to all boxes
        matches = Matcher(high, low, low_quality)(iou)
        assert label[i].tolist() == [KIND.get(m, POSITIVE) for m in matches.tolist()]
        assert torch.equal(iou.gather(0, best[i][None])[0], iou.max(dim=0).values)
        assert torch.equal(
            iou.gather(0, best[i][None])[0][matches >= 0],
            iou.gather(0, matches.clamp(min=0)[None])[0][matches >= 0],
        )
        if low_quality and grid == 4.0 and i == 2:
            ties = (iou == iou.max(dim=1, keepdim=True).values).sum(dim=1)
            assert (ties > 1).any()


def row_of(spans: list[tuple[float, float]]) -> Tensor:
    """Boxes one pixel high, which differ only in their columns."""
    return torch.tensor([(x0, 0.0, x1, 1.0) for x0, x1 in spans])


def test_low_quality_literal() -> None:
    # Ground truth 0: boxes 0 and 1 tie (0.2); 1: only box 2 (0.4); 2: no box.
    truth = row_of([(0, 10), (20, 30), (90, 99)])
    boxes = row_of([(0, 2), (8, 10), (26, 30), (50, 60)])
    padded = PaddedTargets(truth[None], torch.ones((1, 3), dtype=torch.bool), torch.arange(3)[None])
    best, label = match_by_iou(padded, boxes, 0.3, 0.7, low_quality=True)
    assert label.tolist() == [[POSITIVE, POSITIVE, POSITIVE, NEGATIVE]]
    assert best[0, :3].tolist() == [0, 0, 1]
    assert match_by_iou(padded, boxes, 0.3, 0.7, low_quality=False)[1].tolist() == [
        [NEGATIVE, NEGATIVE, IGNORED, NEGATIVE]
    ]
    padded.valid[0, 1] = False  # a slot of padding, whatever its overlaps
    assert match_by_iou(padded, boxes, 0.15, 0.7, low_quality=True)[1].tolist() == [
        [POSITIVE, POSITIVE, NEGATIVE, NEGATIVE]
    ]


@pytest.mark.parametrize("low_quality", [True, False])
def test_no_boxes_to_label(low_quality: bool) -> None:
    truth = pad_targets(
        torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([1]), torch.tensor([True]), 2
    )
    best, label = match_by_iou(truth, torch.zeros(0, 4), 0.3, 0.7, low_quality)
    assert best.shape == label.shape == (2, 0)
    assert best.dtype == label.dtype == torch.int64


def test_thresholds_are_inclusive_upwards() -> None:
    padded = PaddedTargets(
        row_of([(0, 10000)])[None],
        torch.ones((1, 1), dtype=torch.bool),
        torch.zeros((1, 1), dtype=torch.int64),
    )
    label = match_by_iou(
        padded, row_of([(0, 2500), (0, 5000), (0, 2499), (0, 4999)]), 0.25, 0.5, low_quality=False
    )[1]
    assert label.tolist() == [[IGNORED, POSITIVE, NEGATIVE, IGNORED]]


def labels_of(
    counts: list[tuple[int, int, int]], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Labels with these numbers of positives, negatives and ignored per image, shuffled."""
    label = torch.cat(
        [
            torch.tensor([POSITIVE] * p + [NEGATIVE] * n + [IGNORED] * i, dtype=torch.int64)
            for p, n, i in counts
        ]
    )
    image = torch.cat([torch.full((sum(c),), i) for i, c in enumerate(counts)])
    order = torch.randperm(len(label), generator=generator)
    return label[order], image[order]


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        # (positives, negatives) sampled per image, at most 20
        (0.25, [(5, 15), (2, 18), (0, 20), (5, 3), (0, 0), (5, 0)]),
        (0.5, [(10, 10), (2, 18), (0, 20), (10, 3), (0, 0), (10, 0)]),
        (1.0, [(20, 0), (2, 18), (0, 20), (20, 0), (0, 0), (20, 0)]),
    ],
)
def test_numbers_of_samples(
    generator: torch.Generator, fraction: float, expected: list[tuple[int, int]]
) -> None:
    label, image = labels_of(
        [(40, 100, 7), (2, 100, 7), (0, 50, 0), (30, 3, 9), (0, 0, 12), (25, 0, 0)], generator
    )
    sampled = subsample_labels(
        label, image, torch.rand(len(label), generator=generator), 6, 20, fraction
    )
    assert sampled.tolist() == sorted(set(sampled.tolist()))
    assert not (label[sampled] == IGNORED).any()
    result = [
        (
            int(((image == i) & (label == POSITIVE))[sampled].sum()),
            int(((image == i) & (label == NEGATIVE))[sampled].sum()),
        )
        for i in range(6)
    ]
    assert result == expected


def test_sampling_is_uniform(generator: torch.Generator) -> None:
    label, image = labels_of([(8, 40, 4), (10, 30, 0)], generator)
    times = torch.zeros(len(label))
    for k in range(1000):
        key = random_keys(torch.tensor([k, 1000 + k])[image], torch.arange(len(label)))
        times[subsample_labels(label, image, key, 2, 10, 0.4)] += 1
    for i, (positives, negatives) in enumerate([(8, 40), (10, 30)]):
        for kind, share in ((POSITIVE, 4 / positives), (NEGATIVE, 6 / negatives)):
            seen = times[(image == i) & (label == kind)] / 1000
            # Five standard deviations of a binomial share.
            assert (seen - share).abs().max() < 5 * (share * (1 - share) / 1000) ** 0.5


def test_sampling_of_no_boxes() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert subsample_labels(empty, empty, empty, 2, 10, 0.5).tolist() == []


def test_max_crowd_ioa_literal() -> None:
    crowds = pad_targets(
        torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 90.0, 40.0]]),
        torch.tensor([0, 0]),
        torch.tensor([True, True]),
        2,
    )
    boxes = torch.tensor([[5.0, 0.0, 15.0, 10.0], [50.0, 0.0, 60.0, 10.0], [5.0, 0.0, 15.0, 10.0]])
    assert max_crowd_ioa(boxes, torch.tensor([0, 0, 1]), crowds).tolist() == [0.5, 1.0, 0.0]
