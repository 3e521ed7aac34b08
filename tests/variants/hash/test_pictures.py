"""Images of a segmentation by hash codes: bit planes, panels, steps, and the plot of the IoU."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.label_maps import GREY, halves, tile
from PIL import Image

from maskseg.errors import UserError
from maskseg.variants.hash import pictures
from maskseg.variants.hash.pictures import (
    draw_bits,
    plot_segmentation_iou,
    segment_panel,
    step_pictures,
)
from maskseg.visualization import layout
from maskseg.visualization.layout import GAP, TILE_SIDE, render_figure
from maskseg.visualization.segments import draw_boundaries, draw_segments

STEPS = [
    "image",
    "feature map",
    "bit planes",
    "binary map",
    "superpixels",
    "codes of the superpixels",
    "merged segments",
]


def test_no_bits() -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_bits(np.zeros((0, 3, 4)))


def test_bits_are_squares_of_grey() -> None:
    codes = np.array(
        [[[0.0, 1.0], [0.5, 0.2]], [[1.0, 1.0], [1.0, 1.0]], [[-3.0, 9.0], [0.0, 0.0]]]
    )
    sheet = draw_bits(codes, columns=2, cell=100)
    height = 102 + 21  # the frame, and 1.5 times a title of 14 pixels
    assert sheet.shape == (2 * height + 3 * GAP, 2 * 102 + 3 * GAP, 3)
    planes = [
        sheet[GAP + 22 + r * (height + GAP) :, GAP + 1 + c * (102 + GAP) :][:100, :100]
        for r, c in ((0, 0), (0, 1), (1, 0))
    ]
    for plane, expected in zip(planes, ([0, 255, 128, 51], [255] * 4, [0, 255, 0, 0]), strict=True):
        np.testing.assert_array_equal(
            plane[..., 0], np.array(expected).reshape(2, 2).repeat(50, axis=0).repeat(50, axis=1)
        )
    assert (sheet[GAP + 21, GAP : GAP + 102] == layout.FRAME).all()
    assert (sheet[GAP : GAP + 20, GAP : GAP + 102] < 100).any()  # a title
    assert (sheet[height + 2 * GAP :, 110 + GAP :] == 255).all()  # no fourth tile


@pytest.mark.parametrize("columns", [1, 8, 50])
def test_tiles_of_32_bits_do_not_overlap(columns: int) -> None:
    sheet = draw_bits(np.zeros((32, 4, 6), dtype=bool), columns)
    used = min(columns, 32)
    assert sheet.shape[1] == used * (242 + GAP) + GAP
    assert (sheet == 0).all(axis=2).sum() >= 32 * 240 * 160


def test_segment_panel_shows_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    superpixels = np.arange(480 * TILE_SIDE).reshape(480, TILE_SIDE) // 36000
    segments = halves()
    truth = halves(left=-1)
    titles: list[str] = []
    add_title = layout.add_title
    monkeypatch.setattr(
        pictures,
        "add_title",
        lambda image, title, size: titles.append(title) or add_title(image, title, size),
    )
    codes = np.random.default_rng(0).random((16, 30, 45))
    sheet = segment_panel(GREY, superpixels, codes, segments, truth)
    assert titles == [
        "image",
        "10 superpixels",
        "2 merged segments",
        "ground truth: 1 segments",
        *(f"bit {i}" for i in range(16)),
    ]
    drawn = [
        GREY,
        draw_boundaries(GREY, superpixels),
        draw_segments(GREY, segments),
        draw_segments(GREY, truth),
    ]
    for i, image in enumerate(drawn):
        np.testing.assert_array_equal(tile(sheet[GAP:, GAP:], i), image)
    bits = sheet[2 * GAP + GREY.shape[0] + 45 :]
    assert bits.shape[0] < 700  # two rows
    assert (bits < 250).any(axis=(0, 2)).sum() > 0.9 * sheet.shape[1]  # they fill the width
    titles.clear()
    sheet = segment_panel(GREY, superpixels, codes[:2], segments, titles=["a", "b", "c"])
    assert titles == ["a", "b", "c", "bit 0", "bit 1"]
    np.testing.assert_array_equal(tile(sheet[GAP:, GAP:], 2), drawn[2])
    with pytest.raises(ValueError, match="zip"):
        segment_panel(GREY, superpixels, codes, segments, titles=["a", "b", "c", "d"])


def test_panel_of_another_size_keeps_image_and_labels_together() -> None:
    small = np.full((160, 240, 3), 90, dtype=np.uint8)
    sheet = segment_panel(
        small, halves((160, 240)), np.ones((1, 2, 3)), halves((160, 240), left=-1)
    )
    np.testing.assert_array_equal(tile(sheet[GAP:, GAP:], 0), GREY)
    np.testing.assert_array_equal(tile(sheet[GAP:, GAP:], 1), draw_boundaries(GREY, halves()))
    np.testing.assert_array_equal(tile(sheet[GAP:, GAP:], 2), draw_segments(GREY, halves(left=-1)))


def test_steps_show_equal_codes_in_equal_colours() -> None:
    codes = np.zeros((3, 2, 3))
    codes[0, 0] = 0.9
    codes[1, :, 2] = 0.6
    codes[2, 1, 0] = 0.5  # not above the threshold
    superpixels = np.full((480, TILE_SIDE), -1)
    superpixels[:, : TILE_SIDE // 3] = 0
    superpixels[:, TILE_SIDE // 3 : TILE_SIDE // 2] = 1
    superpixels[:240, TILE_SIDE // 2 :] = 2
    superpixel_codes = np.array([[True, True, False], [False, False, False], [True, False, False]])
    features = np.random.default_rng(0).normal(size=(8, 2, 3))
    steps = step_pictures(GREY, features, codes, superpixels, superpixel_codes, halves())
    assert list(steps) == STEPS
    assert {step.shape for step in steps.values()} == {GREY.shape}
    binary = steps["binary map"]
    coloured = steps["codes of the superpixels"]
    cells = {
        (y, x): tuple(binary[240 * y + 120, 240 * x + 120]) for y in range(2) for x in range(3)
    }
    assert (binary[:240, :240] == cells[0, 0]).all()  # a cell is a square
    assert cells[0, 0] == cells[0, 1]
    assert cells[1, 0] == cells[1, 1]
    assert len(set(cells.values())) == 4
    assert tuple(coloured[100, 100]) == cells[0, 2]
    assert tuple(coloured[100, 300]) == cells[1, 0]
    assert tuple(coloured[100, 600]) == cells[0, 0]
    assert (coloured[400, 600] == 255).all()  # no superpixel
    np.testing.assert_array_equal(steps["superpixels"], draw_boundaries(GREY, superpixels))
    np.testing.assert_array_equal(steps["merged segments"], draw_segments(GREY, halves()))
    assert (steps["bit planes"] == 0).all(axis=2).sum() > 30000


def test_a_rare_code_has_a_distinct_colour() -> None:
    codes = np.zeros((16, 40, 60))
    codes[3, 0, 0] = 1
    labels = np.zeros((480, TILE_SIDE), dtype=int)
    binary = step_pictures(GREY, codes, codes, labels, np.zeros((1, 16), dtype=bool), labels)[
        "binary map"
    ]
    assert np.abs(binary[5, 5].astype(int) - binary[300, 300]).max() > 200


def test_principal_colours() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(5000, 3)) * (9, 3, 1)
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0][:, :3]
    colours = pictures._principal_colours(hidden @ rotation.T + 1000)
    for i in range(3):
        assert abs(np.corrcoef(colours[:, i], hidden[:, i])[0, 1]) > 0.98
        assert (colours[:, i] == 0).mean() == pytest.approx(0.01, abs=0.005)
        assert (colours[:, i] == 255).mean() == pytest.approx(0.01, abs=0.005)
    np.testing.assert_array_equal(
        pictures._principal_colours(np.full((7, 5), 1234.567)), np.full((7, 3), 128)
    )
    for channels in (1, 2, 7):  # equal channels: one component, the others are rounding errors
        line = pictures._principal_colours(np.arange(101.0)[:, None] * np.full(channels, 0.1))
        assert line[[0, 50, 100], 0].tolist() == [0, 128, 255]
        assert (line[:, 1:] == 128).all()


def drawn_figure(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    rows: dict[str, list[tuple[float, float]]],
    **options: str,
) -> Any:
    figures: list[Any] = []
    monkeypatch.setattr(
        pictures, "render_figure", lambda figure: figures.append(figure) or render_figure(figure)
    )
    plot_segmentation_iou(rows, path, **options)
    return figures[0]


def test_plot_has_one_line_per_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "iou.png"
    rows = {
        "hash codes": [(400, 0.5), (100, 0.4)],
        "k-means": [(100, 0.3)],
        "nothing": [],
        "graph segmentation, with a long name": [(200, 0.35)],
    }
    figure = drawn_figure(monkeypatch, path, rows, xlabel="superpixels", ylabel="mean IoU")
    axis = figure.axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines == {
        "hash codes": [[100, 0.4], [400, 0.5]],
        "k-means": [[100, 0.3]],
        "graph segmentation, with a long name": [[200, 0.35]],
    }
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("superpixels", "mean IoU")
    legend, box = figure.legends[0].get_window_extent(), figure.bbox
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert legend.x0 >= axis.get_window_extent().x1
    assert legend.x1 <= box.x1
    image = Image.open(path)
    assert image.format == "PNG"
    assert np.asarray(image).std() > 0


def test_many_methods_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn_figure(
        monkeypatch, tmp_path / "iou.png", {f"method {i}": [(100, i / 30)] for i in range(30)}
    )
    lines = figure.axes[0].lines
    assert len({line.get_color() for line in lines[:12]}) == 12
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 30


def test_plot_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"hash": [(100.0, 0.4)]}
    path = tmp_path / "iou.png"
    path.write_text("old")
    with pytest.raises(UserError, match="nothing to plot") as error:
        plot_segmentation_iou({"hash": []}, path)
    assert "iou.png" in str(error.value)
    with pytest.raises(UserError, match="cannot write the image"):
        plot_segmentation_iou(rows, path / "iou.png")

    def full(_: Any, file: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match="No space left"):
            plot_segmentation_iou(rows, path)
    assert [p.name for p in tmp_path.iterdir()] == ["iou.png"]
    assert path.read_text() == "old"
    # Importing pyplot would raise: it holds global state and may need a display.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_segmentation_iou(rows, path)
    assert Image.open(path).format == "PNG"
