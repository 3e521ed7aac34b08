"""Layout of images: sizes, positions and titles in pairs, mosaics and panels."""

import numpy as np
import pytest
from made.label_maps import GREY, tile

from maskseg.visualization.layout import GAP, TILE_SIDE, arrange_panel, mosaic, side_by_side


def test_side_by_side_and_mosaic():
    small = np.full((50, 80, 3), 10, np.uint8)
    wide = np.full((40, 200, 3), 20, np.uint8)
    sheet = side_by_side(
        small, wide, ("truth", "a title that is far too long for the picture below it")
    )
    assert sheet.shape[1] == 80 + 200 + 3 * GAP
    assert (sheet == 10).all(axis=2).sum() == 50 * 80
    assert (sheet == 20).all(axis=2).sum() == 40 * 200
    assert side_by_side(small, wide).shape[0] == 50 + 2 * GAP
    sheet = mosaic([small, wide, small], 2)
    assert sheet.shape == (50 + 50 + 3 * GAP, 80 + 200 + 3 * GAP, 3)
    assert (sheet == 10).all(axis=2).sum() == 2 * 50 * 80
    assert mosaic([wide], 5, cell=100).shape == (20 + 2 * GAP, 100 + 2 * GAP, 3)
    with pytest.raises(ValueError, match="at least one"):
        mosaic([], 2)


def test_panel_titles() -> None:
    large = np.zeros((960, 2 * TILE_SIDE, 3), dtype=np.uint8)
    sheet = arrange_panel({"one": GREY, "M" * 100: GREY, "": large}, 2)
    assert sheet.shape == (2 * (480 + 45) + 3 * GAP, 2 * TILE_SIDE + 3 * GAP, 3)
    np.testing.assert_array_equal(tile(sheet, 1, 2), GREY)
    assert not tile(sheet, 2, 2).any()  # shrunk to fit
    title = sheet[GAP : GAP + 45]
    assert (title[:, GAP : GAP + 100] < 100).any()
    assert (title[:, TILE_SIDE + GAP : TILE_SIDE + 2 * GAP] == 255).all()
    assert (title[:, -GAP:] == 255).all()
    assert (title[10:22, -GAP - 90 :] < 100).any()
    assert (
        title[:22, -GAP - 10 :] == 255
    ).all()  # it ends with an ellipsis, not with half a letter
    assert (sheet[480 + 45 + 2 * GAP :][:40] == 255).all()
