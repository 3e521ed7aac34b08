"""RoIAlign over levels against torchvision's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from maskseg.modules.pooling import MultiLevelRoIAlign
from maskseg.ops.roi_align import assign_levels, roi_align_levels

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
HEIGHT, WIDTH = 512, 704


@pytest.fixture
def features(generator: torch.Generator) -> dict[str, Tensor]:
    return {k: torch.randn((2, 8, HEIGHT // s, WIDTH // s), generator=generator) for k, s in STRIDES.items()}


def boxes_of_all_levels(make_boxes: Callable[..., Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    fixed = [[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 112.0, 112.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, WIDTH, HEIGHT]]
    sizes = [(60, 100, 100, 4.0), (60, HEIGHT, WIDTH, 8.0), (20, HEIGHT, WIDTH, 300.0)]
    boxes = torch.cat([*(make_boxes(n, h, w, generator, least) for n, h, w, least in sizes), torch.tensor(fixed)])
    return boxes, torch.randint(0, 2, (len(boxes),), generator=generator)


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_not_aligned_equals_torchvision_multi_scale(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, features: dict[str, Tensor], size: int, sampling_ratio: int
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    wanted = MultiScaleRoIAlign(list(STRIDES), size, sampling_ratio)(features, [boxes[image == 0], boxes[image == 1]], [(HEIGHT, WIDTH)] * 2)
    found = MultiLevelRoIAlign(STRIDES, size, sampling_ratio, aligned=False)(features, boxes, image)
    assert found.shape == (len(boxes), 8, size, size)
    assert torch.equal(torch.cat([found[image == 0], found[image == 1]]), wanted)


def test_aligned_equals_torchvision_on_each_level(make_boxes: Callable[..., Tensor], generator: torch.Generator, features: dict[str, Tensor]) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    found = MultiLevelRoIAlign(STRIDES, 7, 2)(features, boxes, image)
    level = assign_levels(boxes, 2, 5)
    for name, stride in STRIDES.items():
        rows = torch.nonzero(level == int(name[1])).squeeze(1)
        assert len(rows) > 0
        rois = torch.cat([image[rows, None].float(), boxes[rows]], dim=1)
        assert torch.equal(found[rows], roi_align(features[name], rois, 7, 1 / stride, 2, aligned=True))


def test_aligned_by_default_reads_a_ramp_exactly() -> None:
    """A map whose cells hold the x of their centres: RoIAlign of a box gives the x of the bins' centres."""
    ramp = ((torch.arange(64.0) + 0.5) * 4).expand(1, 1, 64, 64)
    found = MultiLevelRoIAlign({"p2": 4}, 4, 2)({"p2": ramp}, torch.tensor([[40.0, 40.0, 120.0, 120.0]]), torch.tensor([0]))
    torch.testing.assert_close(found[0, 0], torch.tensor([50.0, 70.0, 90.0, 110.0]).expand(4, 4))


@pytest.mark.parametrize(
    ("side", "level"), [(0.0, 2), (111.9, 2), (112.0, 3), (223.9, 3), (223.9999, 4), (224.0, 4), (447.9, 4), (448.0, 5), (5000.0, 5)]
)
def test_level_of_a_box(side: float, level: int) -> None:
    assert assign_levels(torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side]]), 2, 5).tolist() == [level]


def test_level_of_another_canonical_size() -> None:
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 64.0, 16.0], [0.0, 0.0, 31.0, 31.0]])
    assert assign_levels(boxes, 2, 5, canonical_size=32.0).tolist() == [4, 4, 3]


def test_gradients_reach_the_levels_that_were_read(features: dict[str, Tensor]) -> None:
    leaves = {k: v.requires_grad_() for k, v in features.items()}
    boxes, image = torch.tensor([[8.0, 8.0, 40.0, 40.0], [10.0, 10.0, 330.0, 330.0]]), torch.tensor([1, 0])
    MultiLevelRoIAlign(STRIDES, 7, 2)(leaves, boxes, image).sum().backward()
    total = {k: [float(g) for g in v.grad.sum(dim=(1, 2, 3))] for k, v in leaves.items() if v.grad is not None}
    # Each bin is a mean of values: every one of the 49 bins of 8 channels hands on a gradient of one.
    assert total == {"p2": [0.0, pytest.approx(392.0, rel=1e-4)], "p3": [0.0, 0.0], "p4": [pytest.approx(392.0, rel=1e-4), 0.0], "p5": [0.0, 0.0]}


def test_zero_regions_keep_the_graph(features: dict[str, Tensor]) -> None:
    leaves = {k: v.requires_grad_() for k, v in features.items()}
    found = MultiLevelRoIAlign(STRIDES, 7, 2)(leaves, torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0, 8, 7, 7)
    found.sum().backward()
    assert all(v.grad is not None and not v.grad.any() for v in leaves.values())


def test_half_precision_features_do_not_round_the_boxes(generator: torch.Generator) -> None:
    """At x = 1500 a half float is exact to one pixel only: the boxes must stay float32."""
    feature = torch.randn((1, 4, 8, 512), generator=generator)
    boxes = torch.tensor([[1500.4, 4.2, 1530.7, 20.9], [1033.3, 3.3, 1049.6, 30.1]])
    image, level = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    exact = roi_align_levels([feature], [4], boxes, image, level, 7, 2, True)
    half = roi_align_levels([feature.half()], [4], boxes, image, level, 7, 2, True)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=5e-3)
