"""Images of class activation maps: colors at known pixels, the classes drawn, sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.structures import Batch, Categories, FeatureSpec, Outputs, Regions
from maskseg.visualization import cam
from maskseg.visualization.cam import cam_overlay, cam_sheet, overlay_heat_map, score_row
from maskseg.visualization.layout import RGBImage

NAMES = ("a", "b", "c", "d")
LEVEL = FeatureSpec(16, 8.0, 1)
NONE = Regions(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def outputs(scores: list[float], maps: Tensor | None = None) -> Outputs:
    maps = torch.zeros((1, len(scores), 4, 6)) if maps is None else maps
    return Outputs(NONE, image_scores=torch.tensor([scores]), image_maps=maps)


def test_colours() -> None:
    image = np.full((1, 4, 3), (30, 60, 90), dtype=np.uint8)  # 60 in gray
    colours = overlay_heat_map(image, torch.tensor([[-5.0, 0.0, 1.0, 2.0]])).astype(int)
    assert np.abs(colours[0, :2] - 24).max() <= 2  # 0.4 of the gray, below black
    red, green, blue = colours[0, 3].tolist()
    assert red > 150
    assert green > 150
    assert blue < red  # yellow
    assert colours[0, 1].sum() < colours[0, 2].sum() < colours[0, 3].sum()


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_map_without_activation_is_dark_and_finite(value: float) -> None:
    image = overlay_heat_map(np.full((3, 3, 3), 100, dtype=np.uint8), torch.full((3, 3), value))
    assert np.abs(image.astype(int) - 40).max() <= 2


def test_the_most_likely_classes_are_drawn_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[tuple[int, ...], float]] = []

    def record(image: RGBImage, activation: Tensor) -> RGBImage:
        drawn.append((tuple(activation.shape), float(activation.mean())))
        return image

    monkeypatch.setattr(cam, "overlay_heat_map", record)
    maps = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 4, 6)
    cam_sheet(
        np.zeros((32, 48, 3), dtype=np.uint8),
        outputs([0.1, 0.9, 0.3, 0.8], maps),
        0,
        LEVEL,
        (64, 96),
        NAMES,
    )
    assert drawn == [((480, 720), pytest.approx(k)) for k in (1.0, 3.0, 2.0)]


def test_position_of_a_maximum() -> None:
    maps = torch.zeros((1, 1, 4, 6))
    maps[0, 0, 1, 4] = 1.0  # the center of the cell is at (72, 24) of the input of 96 x 64 pixels
    sheet = cam_sheet(
        np.full((128, 192, 3), 120, dtype=np.uint8),
        outputs([0.7], maps),
        0,
        LEVEL,
        (64, 96),
        ("a",),
    )
    right = sheet[-480 - 8 : -8, -720 - 8 : -8].astype(int).sum(axis=2)
    y, x = np.unravel_index(int(right.argmax()), right.shape)
    assert (y, x) == (pytest.approx(24 * 7.5, abs=1), pytest.approx(72 * 7.5, abs=1))


def test_overlay_of_a_resized_image() -> None:
    sizes = torch.tensor([[64, 96]])
    batch = Batch(
        torch.zeros((1, 3, 64, 96), dtype=torch.uint8),
        sizes,
        torch.tensor([[640, 960]]),
        [1],
        ["x.jpg"],
    )
    sheet = cam_overlay(
        torch.zeros((3, 640, 960), dtype=torch.uint8),
        batch,
        outputs([0.7, 0.2]),
        LEVEL,
        Categories(NAMES[:2], (1, 2)),
    )
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == 3 * 720 + 4 * 8  # the image and both classes


def test_scores_by_name() -> None:
    row = score_row(outputs([0.25, 0.75, 0.5, 0.75]), 0, Categories(NAMES, (1, 2, 3, 4)))
    assert row == {"scores": {"b": 0.75, "d": 0.75, "c": 0.5, "a": 0.25}}
    assert list(row["scores"]) == ["b", "d", "c", "a"]
