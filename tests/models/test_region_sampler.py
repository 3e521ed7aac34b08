"""Sampling of the proposals that the heads are trained on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maskseg.models.region_sampler import RegionSampler
from maskseg.structures import Regions, Samples, Targets

K = 5
EVERYTHING = 10**6
SEEDS = torch.arange(3)
SIZES = [(100, 100), (100, 100)]


def regions(boxes: list[tuple[float, ...]], image: list[int]) -> Regions:
    return Regions(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(image, dtype=torch.int64),
        torch.ones(len(boxes)),
    )


def test_literal_case(make_targets: Callable[..., Targets]) -> None:
    targets = make_targets(
        [[(0, 0, 10, 10, 3)], [(50, 50, 60, 60, 1), (0, 0, 20, 20, 4), (70, 70, 80, 80, 0, True)]],
        SIZES,
    )
    proposals = regions(
        [
            (0, 0, 10, 9),
            (0, 0, 10, 4),
            (0, 0, 20, 20),
            (0, 0, 10, 10),
            (50, 50, 60, 55),
            (50, 50, 60, 54.9),
            (70, 70, 79, 79),
        ],
        [0, 0, 0, 1, 1, 1, 1],
    )
    samples = RegionSampler(K, EVERYTHING, 0.5)(proposals, targets, SEEDS[:2])
    # The last proposal lies in the crowd. The ground truth boxes except crowds are appended.
    assert torch.equal(samples.boxes, torch.cat([proposals.boxes[:6], targets.boxes[:3]]))
    assert samples.image_index.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 1]
    assert samples.labels.tolist() == [3, K, K, K, 1, K, 3, 1, 4]
    assert samples.matched_gt.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 2]
    assert samples.num_classes == K
    assert samples.targets is targets
    alone = RegionSampler(K, EVERYTHING, 0.5, append_truth=False)(proposals, targets, SEEDS[:2])
    assert alone.labels.tolist() == [3, K, K, K, 1, K]
    strict = RegionSampler(K, EVERYTHING, 0.5, positive_iou=0.95, append_truth=False)(
        proposals, targets, SEEDS[:2]
    )
    assert strict.labels.tolist() == [K] * 6


def test_a_region_stands_for_the_truth_it_overlaps_most(
    make_targets: Callable[..., Targets],
) -> None:
    targets = make_targets([[(0, 0, 10, 10, 0), (1, 0, 11, 10, 1), (0, 0, 10, 8, 2)]], SIZES[:1])
    proposals = regions([(0.9, 0, 11, 10), (0, 0, 10, 8.5), (0, 0, 10, 9.9)], [0, 0, 0])
    samples = RegionSampler(K, EVERYTHING, 1.0, append_truth=False)(proposals, targets, SEEDS[:1])
    assert samples.matched_gt.tolist() == [1, 2, 0]
    assert samples.labels.tolist() == [1, 2, 0]


def test_quotas_of_each_image(
    make_targets: Callable[..., Targets],
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
) -> None:
    targets = make_targets([[(10, 10, 60, 60, 2)], [], [(0, 0, 50, 50, 1)]], [*SIZES, (100, 100)])
    near = targets.boxes[:1] + torch.rand((40, 4), generator=generator) * 4
    far = make_boxes(100, 100, 100, generator) * 0.05
    boxes, image = (
        torch.cat([near, far, far, near[:5], far[:7]]),
        torch.tensor([0] * 140 + [1] * 100 + [2] * 12),
    )
    samples = RegionSampler(K, 32, 0.25)(Regions(boxes, image, torch.ones(252)), targets, SEEDS[:3])
    counts = [
        (int(own.sum()), int((samples.labels[own] < K).sum()))
        for own in (samples.image_index == i for i in range(3))
    ]
    # The proposals of the third image are far from its ground truth, the only positive.
    assert counts == [(32, 8), (32, 0), (13, 1)]
    first = RegionSampler(K, 32)(Regions(boxes, image, torch.ones(252)), targets, SEEDS[:3])
    assert torch.equal(
        RegionSampler(K, 32)(Regions(boxes, image, torch.ones(252)), targets, SEEDS).boxes,
        first.boxes,
    )
    assert not torch.equal(
        RegionSampler(K, 32)(Regions(boxes, image, torch.ones(252)), targets, SEEDS + 1).boxes,
        first.boxes,
    )


def test_crowds_never_give_negatives_nor_truths(make_targets: Callable[..., Targets]) -> None:
    targets = make_targets(
        [[(0, 0, 50, 100, 2, True), (10, 10, 20, 20, 1)], [(60, 60, 90, 90, 0)]], SIZES
    )
    boxes = [
        (0, 0, 50, 100),
        (5, 5, 40, 40),
        (40, 0, 60, 20),
        (40, 0, 61, 20),
        (39, 0, 60, 20),
        (10, 10, 20, 19),
        (80, 80, 99, 99),
    ]
    samples = RegionSampler(K, EVERYTHING, 0.5, append_truth=False)(
        regions(boxes * 2, [0] * 7 + [1] * 7), targets, SEEDS[:2]
    )
    first = samples.boxes[samples.image_index == 0].tolist()
    # Up to half covered is background, more is ignored; crowds of other images do not count.
    assert first == [list(map(float, boxes[i])) for i in (2, 3, 5, 6)]
    assert samples.labels[samples.image_index == 0].tolist() == [K, K, 1, K]
    assert int((samples.image_index == 1).sum()) == 7
    twin = make_targets([[(10, 10, 20, 20, 2, True), (10, 10, 20, 20, 1)]], SIZES[:1])
    assert RegionSampler(K)(regions([], []), twin, SEEDS[:1]).matched_gt.tolist() == [
        1
    ]  # the box of the crowd is not appended
    loose = RegionSampler(K, EVERYTHING, 0.5, append_truth=False, crowd_overlap=1.0)(
        regions(boxes, [0] * 7), targets, SEEDS[:2]
    )
    assert len(loose) == 7


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize(
    "truth", [[[], []], [[(0, 0, 100, 100, 0, True)], []], [[], [(5, 5, 60, 60, 1)]]]
)
def test_zero_proposals(
    make_targets: Callable[..., Targets], truth: list[list[tuple[float, ...]]], append: bool
) -> None:
    targets = make_targets(truth, SIZES)
    samples = RegionSampler(K, append_truth=append)(regions([], []), targets, SEEDS[:2])
    assert isinstance(samples, Samples)
    assert samples.labels.tolist() == ([1] if append and truth[1] else [])
    assert samples.boxes.shape == (len(samples), 4)
    assert samples.foreground().boxes.shape == (len(samples), 4)


def test_images_without_objects_give_background(make_targets: Callable[..., Targets]) -> None:
    for truth in ([[], []], [[(90, 90, 95, 95, 0, True)], []]):
        samples = RegionSampler(K)(
            regions([(0, 0, 10, 10), (5, 5, 9, 9)], [0, 1]), make_targets(truth, SIZES), SEEDS[:2]
        )
        assert samples.labels.tolist() == [K, K]
        assert samples.matched_gt.tolist() == [0, 0]


def test_a_truth_without_area_is_background_to_itself(make_targets: Callable[..., Targets]) -> None:
    samples = RegionSampler(K)(
        regions([], []), make_targets([[(5, 5, 5, 9, 1)]], SIZES[:1]), SEEDS[:1]
    )
    assert samples.labels.tolist() == [K]


def test_what_is_drawn_of_an_image_does_not_depend_on_the_batch(
    make_targets: Callable[..., Targets],
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
) -> None:
    # Guards against processes that sample other regions than one process with the same images.
    truth = [[(10, 10, 60, 60, 2)], [(0, 0, 50, 50, 1), (20, 20, 90, 90, 0)]]
    boxes, image = make_boxes(400, 100, 100, generator), torch.arange(400) // 200
    both = RegionSampler(K, 32)(
        Regions(boxes, image, torch.ones(400)), make_targets(truth, SIZES), SEEDS[:2]
    )
    for i in range(2):
        own = Regions(
            boxes[image == i].flip(0), torch.zeros(200, dtype=torch.int64), torch.ones(200)
        )  # also in another order
        alone = RegionSampler(K, 32)(
            own, make_targets(truth[i : i + 1], SIZES[:1]), SEEDS[i : i + 1]
        )
        assert sorted(alone.boxes.tolist()) == sorted(both.boxes[both.image_index == i].tolist())
