"""The drawing of the steps of feature masking: positions and contents of the tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskseg.structures import FeatureSpec
from maskseg.variants.cfm.pictures import FeatureMap, _draw_cells, draw_steps

AT = FeatureSpec(8, 4.0, 3)


def drawn(inside: np.ndarray, cells: torch.Tensor, classes: np.ndarray) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    feature = torch.rand((3, 6, 8), generator=torch.Generator().manual_seed(0)) + 1
    feature_map = FeatureMap(feature, AT, "p3")
    return draw_steps(image, inside, cells, feature_map, classes, ["one", "two"], "one 0.90")


def test_all_steps_are_drawn() -> None:
    inside = np.zeros((48, 64), dtype=bool)
    inside[8:32, 16:48] = True
    cells = torch.zeros(6, 8)
    cells[1:4, 2:6] = 1
    classes = np.where(inside, 1, -1)
    picture = drawn(inside, cells, classes)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 3 * 720
    assert picture.shape[0] > 2 * 540
    grey = (picture == 128).all(axis=2).sum()  # the masked feature map outside the mask
    assert 0.6 * 720 * 540 < grey < 0.8 * 720 * 540
    fewer = (drawn(inside, torch.zeros(6, 8), classes) == 128).all(axis=2).sum()
    assert 0.9 * 720 * 540 < fewer < 1.01 * 720 * 540


def test_no_mask_no_class() -> None:
    picture = drawn(np.zeros((48, 64), dtype=bool), torch.zeros(6, 8), np.full((48, 64), -1))
    assert picture.shape[0] > 2 * 540


def test_cells_are_filled_at_their_position() -> None:
    cells = np.zeros((6, 8), dtype=bool)
    cells[2, 3] = True
    tile = _draw_cells(
        np.full((48, 64, 3), 100, dtype=np.uint8), cells, AT, np.zeros((48, 64), dtype=bool)
    )
    coloured = np.argwhere(
        tile.max(axis=2).astype(int) - tile.min(axis=2) > 75
    )  # half of the color, because enlarging is smooth
    scale = 720 / 64
    assert coloured.min(axis=0).tolist() == pytest.approx([16 * scale, 24 * scale], abs=3)
    assert coloured.max(axis=0).tolist() == pytest.approx([24 * scale, 32 * scale], abs=3)


def test_a_label_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="label 2 has no name"):
        drawn(np.zeros((48, 64), dtype=bool), torch.zeros(6, 8), np.full((48, 64), 2))
