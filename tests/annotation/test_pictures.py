"""Images of proposed masks: checks of pixel values and sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from maskseg.annotation.grabcut import FOREGROUND
from maskseg.annotation.metrics import COLUMNS
from maskseg.annotation.pictures import (
    TRIMAP_COLOURS,
    Example,
    contact_sheet,
    draw_trimap,
    plot_thresholds,
)

IMAGE = np.full((40, 60, 3), 100, dtype=np.uint8)
MASK = np.zeros((40, 60), dtype=bool)
MASK[10:30, 20:40] = True


def test_a_trimap_has_four_colours() -> None:
    trimap = np.array([[0, 1, 2, 3]], dtype=np.uint8)
    drawn = draw_trimap(np.full((1, 4, 3), 100, dtype=np.uint8), trimap)
    assert len({tuple(pixel) for pixel in drawn[0].tolist()}) == 4
    assert drawn[0, 1].tolist() == [
        round(0.4 * 100 + 0.6 * value) for value in TRIMAP_COLOURS[FOREGROUND]
    ]


def test_empty_columns_are_dropped() -> None:
    plain = contact_sheet([Example("a", IMAGE, MASK)])
    trimap, heat = MASK.astype(np.uint8), MASK.astype(np.float32)
    full = contact_sheet(
        [
            Example("a", IMAGE, MASK, (1, 2, 30, 40), heat, trimap, MASK, "note"),
            Example("b", IMAGE, MASK),
        ]
    )
    assert plain.shape[1] < 0.5 * full.shape[1]
    assert full.shape[0] > 1.7 * plain.shape[0]
    red = (full[..., 0].astype(int) - full[..., 1] > 40).mean()
    assert red > 0.02


def test_curves(tmp_path: Path) -> None:
    means = dict.fromkeys(COLUMNS, 0.5)
    path = tmp_path / "a" / "curves.png"
    plot_thresholds(
        [("box", None, means), ("cam", 0.9, means), ("cam", 0.1, dict.fromkeys(COLUMNS, 0.7))], path
    )
    with Image.open(path) as picture:
        assert picture.size == (1430, 704)
