"""Layout of images: sizes, positions and titles in pairs, mosaics and panels."""

from typing import Any

import numpy as np
import pytest
from made.label_maps import GREY, tile
from matplotlib.text import Text
from PIL import ImageDraw

from maskseg.evaluation.diagnosis import ImageDiagnosis
from maskseg.evaluation.table import truncate_name
from maskseg.structures import Categories
from maskseg.visualization.diagnosis import draw_confusion, draw_pr_curves, draw_worst
from maskseg.visualization.layout import GAP, TILE_SIDE, arrange_panel, mosaic, side_by_side
from maskseg.visualization.legends import class_texts
from maskseg.visualization.semantic import draw_semantic_confusion, semantic_sheet


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


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that are drawn."""
    drawn: list[str] = []
    draw_text = ImageDraw.ImageDraw.text
    set_text = Text.set_text

    def record_image_text(self: Any, place: Any, text: str, **options: Any) -> None:
        drawn.append(text)
        draw_text(self, place, text, **options)

    def record_plot_text(self: Any, text: Any) -> None:
        drawn.append(str(text))
        set_text(self, text)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_image_text)
    monkeypatch.setattr(Text, "set_text", record_plot_text)
    return drawn


def test_a_class_name_is_truncated_alike_everywhere(texts: list[str]) -> None:
    name = "a name that is longer than most"
    short = "a name that is longer t…"
    assert truncate_name(name) == short
    assert [entry.text for entry in class_texts([0], [name])] == [short]
    draw_confusion(np.eye(2, dtype=np.int64), [name])
    draw_semantic_confusion(np.eye(1, 2, dtype=np.int64), [name])
    assert {short, f"{short} (1)", f"{short} (100.0 %)"} <= set(texts)
    assert not any(name in text for text in texts)


def test_plots_say_ground_truth(texts: list[str]) -> None:
    grey = np.full((300, 400, 3), 90, np.uint8)
    labels = np.zeros((300, 400), np.int64)
    draw_confusion(np.eye(2, dtype=np.int64), ["cat"])
    draw_semantic_confusion(np.eye(1, 2, dtype=np.int64), ["cat"])
    draw_pr_curves({"bbox": {"cat": np.full(101, -1.0)}})
    semantic_sheet(grey, labels, labels, ["cat"])
    draw_worst(grey, ImageDiagnosis(1, ()), Categories(("cat",), (1,)))
    assert texts.count("ground truth") == 2  # titles
    phrases = {text for text in texts if "truth" in text}
    assert phrases == {
        "share of the ground-truth row",
        "ground truth (background: false)",
        "ground truth (share of all pixels)",
        "no ground truth",
        "ground truth",
    }
