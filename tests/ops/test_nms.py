"""NMS and top k within groups, compared with one torchvision call per group."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from maskseg.ops.nms import nms_per_group, top_k_with_ties, top_per_group


@pytest.mark.parametrize("count", [200, 3000])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms_equals_one_call_per_group(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, count: int, threshold: float
) -> None:
    boxes = make_boxes(count, 200, 200, generator, least=40)
    scores = torch.rand(count, generator=generator)
    group = torch.randint(0, 5, (count,), generator=generator)
    kept = nms_per_group(boxes, scores, group, threshold)
    assert (scores[kept].diff() <= 0).all()
    assert len(kept) < count
    for g in range(5):
        rows = torch.nonzero(group == g).squeeze(1)
        expected = rows[torchvision.ops.nms(boxes[rows], scores[rows], threshold)]
        assert kept[group[kept] == g].tolist() == expected.tolist()


def test_nms_does_not_depend_on_the_number_of_the_group(
    make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    """Boxes of a high group number keep their precision when groups are shifted apart.

    A batch of 16 images and 80 classes has groups up to 1279.
    """
    boxes = make_boxes(900, 60, 60, generator, least=6) + 1200
    scores = torch.rand(900, generator=generator)
    first = nms_per_group(boxes, scores, torch.zeros(900, dtype=torch.int64), 0.5)
    last = nms_per_group(boxes, scores, torch.full((900,), 1279), 0.5)
    assert first.tolist() == last.tolist()


@pytest.mark.parametrize("count", [40, 1200])
def test_groups_stay_apart_wherever_the_boxes_are(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, count: int
) -> None:
    """Groups do not overlap for negative coordinates.

    They would if they were shifted by the largest coordinate.
    """
    for trial in range(50):
        shift = torch.tensor([-300.0, -40.0, 1e4, -1e5])[trial % 4]
        boxes = make_boxes(count, 100, 100, generator, least=20) + shift
        scores = torch.rand(count, generator=generator)
        group = torch.randint(0, 8, (count,), generator=generator)
        kept = nms_per_group(boxes, scores, group, 0.5)
        for g in range(8):
            rows = torch.nonzero(group == g).squeeze(1)
            expected = rows[torchvision.ops.nms(boxes[rows].double(), scores[rows].double(), 0.5)]
            assert kept[group[kept] == g].tolist() == expected.tolist()


def test_many_small_groups(make_boxes: Callable[..., Tensor], generator: torch.Generator) -> None:
    boxes = make_boxes(4000, 100, 100, generator, least=30)
    scores = torch.rand(4000, generator=generator).mul(50).round() / 50
    group = torch.randint(0, 1500, (4000,), generator=generator) * 7
    assert set(torch.bincount(group // 7).tolist()) >= {0, 1, 2, 5}
    kept = nms_per_group(boxes, scores, group, 0.4)
    assert len(kept) < 4000
    assert (scores[kept].diff() <= 0).all()
    assert sorted(kept.tolist()) == sorted(
        torchvision.ops.boxes.batched_nms(boxes.double(), scores.double(), group, 0.4).tolist()
    )


def test_top_k_includes_ties() -> None:
    scores = torch.tensor([0.5, 0.9, 0.2, 0.5, 0.5, 0.1])
    assert top_k_with_ties(scores, 1).tolist() == [1]
    assert top_k_with_ties(scores, 2).tolist() == [0, 1, 3, 4]
    assert top_k_with_ties(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert top_k_with_ties(scores, 9).tolist() == [0, 1, 2, 3, 4, 5]
    assert top_k_with_ties(scores[:0], 9).tolist() == []


def test_nms_literal() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],
            [0.0, 0.0, 10.0, 5.0],
            [0.0, 0.0, 10.0, 6.0],
            [0.0, 0.0, 10.0, 10.0],
        ]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    # An IoU of exactly the threshold survives, and so does a box of another group.
    assert nms_per_group(boxes, scores, torch.tensor([0, 0, 0, 1]), 0.5).tolist() == [0, 1, 3]
    assert (
        nms_per_group(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.int64), 0.5).tolist() == []
    )


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_top_per_group_equals_topk_of_each_group(generator: torch.Generator, k: int) -> None:
    scores = torch.rand(300, generator=generator)
    group = torch.randint(0, 6, (300,), generator=generator)
    group[group == 3] = 4  # one group is empty
    expected = []
    for g in range(6):
        rows = torch.nonzero(group == g).squeeze(1)
        expected += rows[scores[rows].topk(min(k, len(rows))).indices].tolist()
    assert top_per_group(scores, group, k).tolist() == expected
    assert top_per_group(scores[:0], group[:0], k).tolist() == []


def test_top_per_group_keeps_the_order_of_ties() -> None:
    assert top_per_group(
        torch.tensor([0.5, 0.5, 0.9, 0.5]), torch.tensor([1, 0, 1, 1]), 2
    ).tolist() == [1, 2, 0]
