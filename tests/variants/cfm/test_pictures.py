"""The steps of feature masking as one picture: tiles where they should be, with what they should show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskseg.structures import FeatureSpec
from maskseg.variants.cfm.pictures import _on_cells, step_pictures

AT = FeatureSpec(8, 4.0, 3)


def drawn(inside: np.ndarray, cells: torch.Tensor, classes: np.ndarray) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    feature = torch.rand((3, 6, 8), generator=torch.Generator().manual_seed(0)) + 1
    return step_pictures(
        image, inside, cells, feature, AT, classes, ["one", "two"], "p3", "one 0.90"
    )


def test_all_steps_are_there() -> None:
    inside = np.zeros((48, 64), dtype=bool)
    inside[8:32, 16:48] = True
    cells = torch.zeros(6, 8)
    cells[1:4, 2:6] = 1
    classes = np.where(inside, 1, -1)
    picture = drawn(inside, cells, classes)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 3 * 720
    assert picture.shape[0] > 2 * 540
    grey = (picture == 128).all(axis=2).sum()  # of the masked feature map, outside of the mask
    assert 0.6 * 720 * 540 < grey < 0.8 * 720 * 540
    fewer = (drawn(inside, torch.zeros(6, 8), classes) == 128).all(axis=2).sum()
    assert 0.9 * 720 * 540 < fewer < 1.01 * 720 * 540


def test_no_mask_no_class() -> None:
    picture = drawn(np.zeros((48, 64), dtype=bool), torch.zeros(6, 8), np.full((48, 64), -1))
    assert picture.shape[0] > 2 * 540


def test_cells_are_filled_where_they_look() -> None:
    cells = np.zeros((6, 8), dtype=bool)
    cells[2, 3] = True
    tile = _on_cells(
        np.full((48, 64, 3), 100, dtype=np.uint8), cells, AT, np.zeros((48, 64), dtype=bool)
    )
    coloured = np.argwhere(
        tile.max(axis=2).astype(int) - tile.min(axis=2) > 75
    )  # half of the colour: pixels are enlarged smoothly
    scale = 720 / 64
    assert coloured.min(axis=0).tolist() == pytest.approx([16 * scale, 24 * scale], abs=3)
    assert coloured.max(axis=0).tolist() == pytest.approx([24 * scale, 32 * scale], abs=3)


def test_a_label_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="label 2 has no name"):
        drawn(np.zeros((48, 64), dtype=bool), torch.zeros(6, 8), np.full((48, 64), 2))
