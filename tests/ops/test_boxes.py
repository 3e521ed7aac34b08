"""Box operations, compared with torchvision and with literal values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from maskseg.ops import boxes as box_ops

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_encode_equals_torchvision(
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    weights: tuple[float, float, float, float],
) -> None:
    truth = make_boxes(200, 300, 400, generator)
    anchors = make_boxes(200, 300, 400, generator)
    torch.testing.assert_close(
        box_ops.encode(truth, anchors, weights), BoxCoder(weights).encode([truth], [anchors])[0]
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_equals_torchvision(
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    weights: tuple[float, float, float, float],
) -> None:
    anchors = make_boxes(200, 300, 400, generator)
    deltas = (
        torch.randn((200, 3, 4), generator=generator) * 8
    )  # far beyond the limit of the log-scale
    expected = BoxCoder(weights).decode(deltas.flatten(1), [anchors])
    result = box_ops.decode(deltas, anchors[:, None], weights)
    assert result.shape == (200, 3, 4)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        box_ops.decode(deltas[:, 1], anchors, weights), expected[:, 1], rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decode_inverts_encode(
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    weights: tuple[float, float, float, float],
) -> None:
    truth = make_boxes(200, 300, 400, generator)
    anchors = make_boxes(200, 300, 400, generator, least=20)
    torch.testing.assert_close(
        box_ops.decode(box_ops.encode(truth, anchors, weights), anchors, weights),
        truth,
        rtol=0,
        atol=1e-3,
    )


def test_encode_literal() -> None:
    # Centre (5, 10) -> (15, 10): one anchor width to the right; twice as wide, as tall.
    deltas = box_ops.encode(
        torch.tensor([[5.0, 0.0, 25.0, 20.0]]),
        torch.tensor([[0.0, 0.0, 10.0, 20.0]]),
        (10.0, 10.0, 5.0, 5.0),
    )
    torch.testing.assert_close(deltas, torch.tensor([[10.0, 0.0, 5 * math.log(2), 0.0]]))


def test_decode_is_float32_and_limits_the_growth() -> None:
    anchor = torch.tensor([[100.0, 100.0, 116.0, 116.0]])
    result = box_ops.decode(
        torch.tensor([[0.0, 0.0, 50.0, 0.0]], dtype=torch.float16),
        anchor.half(),
        (1.0, 1.0, 1.0, 1.0),
    )
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result, torch.tensor([[108.0 - 500, 100.0, 108.0 + 500, 116.0]]), rtol=0, atol=1e-2
    )


def test_iou_equals_torchvision(
    make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    first = make_boxes(60, 100, 100, generator)
    second = make_boxes(40, 100, 100, generator)
    torch.testing.assert_close(box_ops.iou(first, second), torchvision.ops.box_iou(first, second))
    torch.testing.assert_close(box_ops.area(first), torchvision.ops.box_area(first))


def test_iou_of_batches_broadcasts(
    make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    truth = make_boxes(12, 100, 100, generator).view(3, 4, 4)
    anchors = make_boxes(40, 100, 100, generator)
    result = box_ops.iou(truth, anchors)
    assert result.shape == (3, 4, 40)
    for image in range(3):
        torch.testing.assert_close(result[image], torchvision.ops.box_iou(truth[image], anchors))


def test_iou_and_ioa_of_empty_boxes_are_zero() -> None:
    empty = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert box_ops.iou(empty, torch.cat([empty, box])).tolist() == [[0.0, 0.0]]
    assert box_ops.ioa(empty, torch.cat([empty, box])).tolist() == [[0.0, 0.0]]
    assert box_ops.iou(torch.zeros((0, 4)), box).shape == (0, 1)


def test_ioa_literal() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 40.0, 10.0]])
    others = torch.tensor([[5.0, 0.0, 100.0, 100.0], [20.0, 20.0, 30.0, 30.0]])
    assert box_ops.ioa(boxes, others).tolist() == [[0.5, 0.0], [0.875, 0.0]]


def test_clip_equals_torchvision_for_each_image(generator: torch.Generator) -> None:
    boxes = torch.rand((40, 4), generator=generator) * 400 - 100
    image = torch.randint(0, 2, (40,), generator=generator)
    sizes = torch.tensor([[100, 200], [150, 50]])
    result = box_ops.clip(boxes, sizes[image])
    for i in range(2):
        torch.testing.assert_close(
            result[image == i],
            torchvision.ops.clip_boxes_to_image(boxes[image == i], tuple(sizes[i].tolist())),
        )


def test_clip_literal() -> None:
    result = box_ops.clip(
        torch.tensor([[-5.0, -5.0, 500.0, 500.0], [10.0, 20.0, 30.0, 40.0]]),
        torch.tensor([[100, 200], [100, 200]]),
    )
    assert result.tolist() == [[0.0, 0.0, 200.0, 100.0], [10.0, 20.0, 30.0, 40.0]]
