"""RoIAlign over levels, compared with torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.ops import roi_align as module
from maskseg.ops.roi_align import assign_levels, roi_align_levels, roi_align_levels_torchvision

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
HEIGHT = 512
WIDTH = 704
CLOSE = 5e-6  # the sums are those of torchvision in another order


@pytest.fixture
def features(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        k: torch.randn((2, 8, HEIGHT // s, WIDTH // s), generator=generator)
        for k, s in STRIDES.items()
    }


def boxes_of_all_levels(
    make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    fixed = [
        [0.0, 0.0, 224.0, 224.0],
        [0.0, 0.0, 112.0, 112.0],
        [9.0, 9.0, 9.0, 9.0],
        [0.0, 0.0, WIDTH, HEIGHT],
    ]
    sizes = [(60, 100, 100, 4.0), (60, HEIGHT, WIDTH, 8.0), (20, HEIGHT, WIDTH, 300.0)]
    boxes = torch.cat(
        [*(make_boxes(n, h, w, generator, least) for n, h, w, least in sizes), torch.tensor(fixed)]
    )
    return boxes, torch.randint(0, 2, (len(boxes),), generator=generator)


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_not_aligned_equals_torchvision_multi_scale(
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    features: dict[str, Tensor],
    size: int,
    sampling_ratio: int,
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    expected = MultiScaleRoIAlign(list(STRIDES), size, sampling_ratio)(
        features, [boxes[image == 0], boxes[image == 1]], [(HEIGHT, WIDTH)] * 2
    )
    result = MultiLevelRoIAlign(STRIDES, size, sampling_ratio, aligned=False)(
        features, boxes, image
    )
    assert result.shape == (len(boxes), 8, size, size)
    torch.testing.assert_close(
        torch.cat([result[image == 0], result[image == 1]]), expected, rtol=0, atol=CLOSE
    )


def test_aligned_equals_torchvision_on_each_level(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, features: dict[str, Tensor]
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    result = MultiLevelRoIAlign(STRIDES, 7, 2)(features, boxes, image)
    level = assign_levels(boxes, 2, 5)
    for name, stride in STRIDES.items():
        rows = torch.nonzero(level == int(name[1])).squeeze(1)
        assert len(rows) > 0
        rois = torch.cat([image[rows, None].float(), boxes[rows]], dim=1)
        torch.testing.assert_close(
            result[rows],
            roi_align(features[name], rois, 7, 1 / stride, 2, aligned=True),
            rtol=0,
            atol=CLOSE,
        )


def test_aligned_by_default_reads_a_ramp_exactly() -> None:
    """On a map of the cells' x, RoIAlign gives the x of the bins' centres."""
    ramp = ((torch.arange(64.0) + 0.5) * 4).expand(1, 1, 64, 64)
    result = MultiLevelRoIAlign({"p2": 4}, 4, 2)(
        {"p2": ramp}, torch.tensor([[40.0, 40.0, 120.0, 120.0]]), torch.tensor([0])
    )
    torch.testing.assert_close(result[0, 0], torch.tensor([50.0, 70.0, 90.0, 110.0]).expand(4, 4))


@pytest.mark.parametrize(
    ("side", "level"),
    [
        (0.0, 2),
        (111.9, 2),
        (112.0, 3),
        (223.9, 3),
        (223.9999, 4),
        (224.0, 4),
        (447.9, 4),
        (448.0, 5),
        (5000.0, 5),
    ],
)
def test_level_of_a_box(side: float, level: int) -> None:
    assert assign_levels(torch.tensor([[10.0, 10.0, 10.0 + side, 10.0 + side]]), 2, 5).tolist() == [
        level
    ]


def test_level_of_another_canonical_size() -> None:
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0], [0.0, 0.0, 64.0, 16.0], [0.0, 0.0, 31.0, 31.0]])
    assert assign_levels(boxes, 2, 5, canonical_size=32.0).tolist() == [4, 4, 3]


def test_gradients_reach_only_the_levels_that_are_read(features: dict[str, Tensor]) -> None:
    leaves = {k: v.requires_grad_() for k, v in features.items()}
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [10.0, 10.0, 330.0, 330.0]])
    image = torch.tensor([1, 0])
    MultiLevelRoIAlign(STRIDES, 7, 2)(leaves, boxes, image).sum().backward()
    total = {
        k: [float(g) for g in v.grad.sum(dim=(1, 2, 3))]
        for k, v in leaves.items()
        if v.grad is not None
    }
    # Each bin is a mean of values: each of the 49 bins of 8 channels passes on a gradient of 1.
    assert total == {
        "p2": [0.0, pytest.approx(392.0, rel=1e-4)],
        "p3": [0.0, 0.0],
        "p4": [pytest.approx(392.0, rel=1e-4), 0.0],
        "p5": [0.0, 0.0],
    }


def test_zero_regions_keep_the_graph(features: dict[str, Tensor]) -> None:
    leaves = {k: v.requires_grad_() for k, v in features.items()}
    result = MultiLevelRoIAlign(STRIDES, 7, 2)(
        leaves, torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
    )
    assert result.shape == (0, 8, 7, 7)
    result.sum().backward()
    assert all(v.grad is not None and not v.grad.any() for v in leaves.values())


def test_half_precision_features_do_not_round_the_boxes(generator: torch.Generator) -> None:
    """At x = 1500 float16 has a precision of one pixel: the boxes must stay float32."""
    feature = torch.randn((1, 4, 8, 512), generator=generator)
    boxes = torch.tensor([[1500.4, 4.2, 1530.7, 20.9], [1033.3, 3.3, 1049.6, 30.1]])
    image = torch.zeros(2, dtype=torch.int64)
    level = torch.zeros(2, dtype=torch.int64)
    exact = roi_align_levels([feature], [4], boxes, image, level, 7, 2, True)
    half = roi_align_levels([feature.half()], [4], boxes, image, level, 7, 2, True)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), exact, rtol=0, atol=5e-3)


def odd_boxes(n: int, height: float, width: float, generator: torch.Generator) -> Tensor:
    """Boxes of all sizes, inside and across the borders, and special cases of the kernel."""
    corner = torch.rand((n, 2), generator=generator) * torch.tensor(
        [1.6 * width, 1.6 * height]
    ) - torch.tensor([0.3 * width, 0.3 * height])
    extent = torch.exp(torch.rand((n, 2), generator=generator) * 7 - 1)
    special = [
        [0.0, 0.0, width, height],
        [-4.0, -4.0, width + 4.0, height + 4.0],  # points exactly at -1 and at H are still inside
        [-8.0, -8.0, 0.0, 0.0],
        [width, height, width + 16.0, height + 16.0],
        [-1e4, 3.0, -9e3, 30.0],
        [1e9, 1e9, 1.1e9, 1.1e9],
        [12.0, 12.0, 12.0, 12.0],
        [12.0, 12.0, 12.0, 40.0],
        [40.0, 44.0, 8.0, 4.0],  # inverted
    ]
    return torch.cat([torch.cat([corner, corner + extent], dim=1), torch.tensor(special)])


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("shapes", "images", "channels", "size"),
    [
        ([(61, 83), (31, 42), (16, 21)], 2, 5, 7),
        ([(37, 50)], 3, 16, 14),
        ([(1, 1), (9, 1), (1, 7)], 1, 1, 3),
        ([(20, 30), (10, 15)], 1, 256, 1),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_equal_torchvision(
    shapes: list[tuple[int, int]],
    images: int,
    channels: int,
    size: int,
    ratio: int,
    aligned: bool,
    layout: torch.memory_format,
    generator: torch.Generator,
) -> None:
    maps = [
        torch.randn((images, channels, h, w), generator=generator).contiguous(memory_format=layout)
        for h, w in shapes
    ]
    strides = [4 * 2**i for i in range(len(shapes))]
    boxes = odd_boxes(60, 4.0 * shapes[0][0], 4.0 * shapes[0][1], generator)
    if ratio == 0:
        boxes = boxes[boxes.abs().amax(1) < 1e6]  # torchvision's kernel would need too much memory
    image = torch.randint(0, images, (len(boxes),), generator=generator)
    level = torch.randint(0, len(shapes), (len(boxes),), generator=generator)
    results = []
    for function in (roi_align_levels, roi_align_levels_torchvision):
        leaves = [m.clone().requires_grad_() for m in maps]
        out = function(leaves, strides, boxes, image, level, size, ratio, aligned)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out.detach(), *torch.autograd.grad(out, leaves, towards)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("ratio", [0, 2])
def test_points_at_the_border_equal_torchvision(ratio: int, generator: torch.Generator) -> None:
    """The coordinates equal torchvision's to the last bit.

    A point beyond -1 or H gives 0, and a whole pixel if it is a rounding error before.
    """
    feature = torch.ones((1, 1, 25, 25))
    low = torch.rand((4000, 2), generator=generator) * 8 - 12
    boxes = (
        torch.cat([low, low + torch.rand((4000, 2), generator=generator) * 120], dim=1)
        .mul(8)
        .round()
        .div(8)
    )
    args = (
        [4],
        boxes,
        torch.zeros(4000, dtype=torch.int64),
        torch.zeros(4000, dtype=torch.int64),
        7,
        ratio,
        True,
    )
    torch.testing.assert_close(
        roi_align_levels([feature], *args),
        roi_align_levels_torchvision([feature], *args),
        rtol=0,
        atol=CLOSE,
    )


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_box_that_is_not_finite_does_not_affect_others(
    place: int, value: float, ratio: int, aligned: bool
) -> None:
    """torchvision's kernel reads outside the map for these boxes, and the process may crash."""
    feature = torch.ones((1, 3, 20, 30), requires_grad=True)
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0], [8.0, 8.0, 40.0, 40.0]])
    boxes[0, place] = value
    zeros = torch.zeros(2, dtype=torch.int64)
    out = roi_align_levels([feature], [4], boxes, zeros, zeros, 7, ratio, aligned)
    # Without alignment a box has at least one cell, also if it ends at -inf, as in torchvision.
    assert bool(out[0].any()) == (place >= 2 and value == -math.inf and not aligned)
    torch.testing.assert_close(out[1], torch.ones(3, 7, 7))
    out.sum().backward()
    assert feature.grad is not None
    assert bool(feature.grad.isfinite().all())


def test_inverted_boxes_with_adaptive_sampling_give_zeros() -> None:
    """With a side of negative length torchvision's kernel runs out of memory."""
    feature = torch.ones((1, 3, 20, 30))
    zeros = torch.zeros(1, dtype=torch.int64)
    assert not roi_align_levels(
        [feature], [4], torch.tensor([[40.0, 0.0, 0.0, 40.0]]), zeros, zeros, 7, 0, True
    ).any()


@pytest.mark.parametrize("ratio", [0, 2])
def test_blocks_and_torchvisions_kernel_give_equal_results(
    ratio: int,
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    features: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    pool = MultiLevelRoIAlign(STRIDES, 7, ratio)
    whole = pool(features, boxes, image)
    monkeypatch.setattr(module, "BLOCK", 10_000)
    assert torch.equal(pool(features, boxes, image), whole)
    monkeypatch.setattr(module, "MAX_SAMPLE_POINTS", 10)
    torch.testing.assert_close(pool(features, boxes, image), whole, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_summed_in_float32(
    dtype: torch.dtype,
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    features: dict[str, Tensor],
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    level = assign_levels(boxes, 2, 5) - 2
    maps = [v.to(dtype) for v in features.values()]
    towards = torch.randn((len(boxes), 8, 7, 7), generator=generator).to(dtype)
    results = []
    for function in (roi_align_levels, roi_align_levels_torchvision):
        leaves = [m.clone().requires_grad_() for m in maps]
        out = function(leaves, list(STRIDES.values()), boxes, image, level, 7, 2, True)
        assert out.dtype == dtype
        results.append([out.detach(), *torch.autograd.grad(out, leaves, towards)])
    one_rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
    for result, expected in zip(*results, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result, expected, rtol=one_rounding, atol=2e-5)


def test_autocast_changes_nothing(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, features: dict[str, Tensor]
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    pool = MultiLevelRoIAlign(STRIDES, 7, 2)
    with torch.autocast("cpu", torch.bfloat16):
        result = pool(features, boxes, image)
    assert torch.equal(result, pool(features, boxes, image))
    assert result.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_equal_for_any_number_of_threads(
    dtype: torch.dtype,
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    features: dict[str, Tensor],
) -> None:
    boxes, image = boxes_of_all_levels(make_boxes, generator)
    boxes = boxes.repeat(20, 1)
    image = image.repeat(20)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 4, 4, 3):
            torch.set_num_threads(n)
            leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in features.items()}
            out = MultiLevelRoIAlign(STRIDES, 7, 2)(leaves, boxes, image)
            towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            results.append(
                [out.detach(), *torch.autograd.grad(out, list(leaves.values()), towards)]
            )
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_level_without_cells_gives_zeros() -> None:
    maps = [torch.ones((1, 2, 8, 8)), torch.ones((1, 2, 0, 4))]
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(2, 1)
    zeros = torch.zeros(2, dtype=torch.int64)
    out = roi_align_levels(maps, [4, 8], boxes, zeros, torch.tensor([0, 1]), 7, 2, True)
    torch.testing.assert_close(out[0], torch.ones(2, 7, 7))
    assert not out[1].any()
