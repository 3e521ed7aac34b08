"""Keypoints and heatmaps, compared with torchvision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypoints_to_heatmap

from maskseg.ops import keypoints
from maskseg.ops.keypoints import bicubic_weights, locate_keypoints, points_to_cells

SIZE = 56


def test_literal_cells() -> None:
    boxes = torch.tensor([[10.0, 20.0, 66.0, 132.0]])  # cells of 1 x 2 pixels
    points = torch.tensor(
        [
            [
                [10.0, 20.0, 2],
                [10.9, 21.9, 1],
                [11.0, 22.0, 2],
                [66.0, 132.0, 2],
                [66.1, 50.0, 2],
                [9.9, 50.0, 2],
                [30.0, 50.0, 0],
            ]
        ]
    )
    cell, valid = points_to_cells(points, boxes, SIZE)
    assert valid.tolist() == [[True, True, True, True, False, False, False]]
    assert cell[0, :4].tolist() == [0, 0, SIZE + 1, SIZE * SIZE - 1]


def test_cells_equal_torchvision(generator: torch.Generator) -> None:
    boxes = torch.rand((50, 4), generator=generator) * 100
    boxes[:, 2:] += boxes[:, :2] + 1
    points = torch.rand((50, 17, 3), generator=generator) * torch.tensor(
        [220.0, 220.0, 3.0]
    ) - torch.tensor([5.0, 5.0, 1.0])
    points[:, 0, :2] = boxes[:, 2:]
    cell, valid = points_to_cells(points, boxes, SIZE)
    expected, wanted_valid = keypoints_to_heatmap(points, boxes, SIZE)
    assert 50 < int(valid.sum()) < valid.numel() - 50
    assert torch.equal(valid, wanted_valid.bool())
    assert torch.equal(cell * valid, expected)


@pytest.mark.parametrize("length", [1, 2, 7, 55, 56, 57, 300])
def test_weights_equal_interpolate(length: int, generator: torch.Generator) -> None:
    line = torch.randn((1, 1, SIZE, 1), generator=generator)
    weights = bicubic_weights(SIZE, torch.tensor([length, 3]), max(length, 3))
    expected = F.interpolate(line, size=(length, 1), mode="bicubic", align_corners=False)[
        0, 0, :, 0
    ]
    assert torch.allclose(weights[0, :length] @ line[0, 0, :, 0], expected, atol=1e-5)


@pytest.mark.parametrize("budget", [16_000_000, 100])
def test_locations_equal_torchvision(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(keypoints, "_BUDGET", budget)
    boxes = torch.rand((30, 4), generator=generator) * 200
    boxes[:, 2:] = boxes[:, :2] + torch.rand((30, 2), generator=generator) * 150
    boxes[0, 2:] = boxes[0, :2] + 0.3  # smaller than a pixel
    logits = torch.randn((30, 5, 14, 14), generator=generator) * 4
    result = locate_keypoints(logits, boxes)
    expected, scores = heatmaps_to_keypoints(logits, boxes)
    assert torch.allclose(result[..., :2], expected[..., :2], atol=1e-3)
    best = scores - logits.flatten(2).logsumexp(dim=2)
    assert torch.allclose(result[..., 2], best.exp().clamp(max=1), atol=1e-5)


def test_a_point_is_located_in_its_cell() -> None:
    boxes = torch.tensor([[3.0, 5.0, 59.0, 61.0]]).repeat(4, 1)
    points = torch.tensor([[10.2, 20.7], [3.1, 5.1], [58.9, 60.9], [33.5, 40.5]])
    cell, _ = points_to_cells(torch.cat([points, torch.ones(4, 1)], 1)[:, None], boxes, SIZE)
    logits = F.one_hot(cell, SIZE * SIZE).view(4, 1, SIZE, SIZE) * 20.0
    result = locate_keypoints(logits, boxes)[:, 0]
    assert (result[:, :2] - points).abs().max() <= 0.5 + 1e-4  # a pixel is a cell here
    assert (result[:, 2] > 0.99).all()


def test_no_regions() -> None:
    assert locate_keypoints(torch.zeros((0, 17, SIZE, SIZE)), torch.zeros((0, 4))).shape == (
        0,
        17,
        3,
    )
    cell, valid = points_to_cells(torch.zeros((0, 17, 3)), torch.zeros((0, 4)), SIZE)
    assert cell.shape == valid.shape == (0, 17)


def test_autocast_does_not_change_the_locations(generator: torch.Generator) -> None:
    # In bfloat16 the enlarged map would have plateaus, and the maximum would be off by pixels.
    boxes = torch.tensor([[0.0, 0.0, 400.0, 200.0]]).repeat(5, 1)
    peaks = torch.rand((5, 2), generator=generator) * 40 + 8
    cells = torch.arange(SIZE) + 0.5
    logits = (
        -(
            (cells[None] - peaks[:, :1])[:, None] ** 2
            + (cells[None] - peaks[:, 1:])[:, :, None] ** 2
        )[:, None]
        / 50
        + 12
    )
    exact = locate_keypoints(logits, boxes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(locate_keypoints(logits, boxes), exact)
    assert (exact[:, 0, :2] - peaks * torch.tensor([400 / 56, 200 / 56])).abs().max() < 2
