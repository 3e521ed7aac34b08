"""A gray image with label maps, and the tiles of a panel of such images."""

from __future__ import annotations

from typing import Any

import numpy as np

from maskseg.visualization.layout import GAP, TILE_SIDE

# As large as an image of a panel, which is neither enlarged nor shrunk.
GREY = np.full((480, TILE_SIDE, 3), 90, dtype=np.uint8)
_TITLE_HEIGHT = 45  # 1.5 times the 30 pixels of its text


def halves(shape: tuple[int, int] = GREY.shape[:2], left: int = 0, right: int = 1) -> Any:
    """A label map [H, W] of two labels."""
    labels = np.full(shape, left, dtype=np.int32)
    labels[:, shape[1] // 2 :] = right
    return labels


def tile(sheet: Any, number: int, columns: int = 4) -> Any:
    """An image of the size of GREY in a panel, without its title."""
    row, column = divmod(number, columns)
    y = GAP + row * (GREY.shape[0] + _TITLE_HEIGHT + GAP) + _TITLE_HEIGHT
    x = GAP + column * (TILE_SIDE + GAP)
    return sheet[y : y + GREY.shape[0], x : x + TILE_SIDE]
