"""Pictures of segments: colours at known pixels, neighbours that differ, sizes, odd images; what the chart of the IoU shows and leaves on disk."""

from __future__ import annotations

import errno
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskseg.errors import UserError
from maskseg.visualization import detections
from maskseg.visualization import segments as segment_pictures
from maskseg.visualization.curves import rendered
from maskseg.visualization.segments import (
    TILE,
    draw_bits,
    draw_boundaries,
    draw_segments,
    panel,
    plot_segmentation_iou,
    segment_panel,
    step_pictures,
)

GREY = np.full(
    (480, TILE, 3), 90, dtype=np.uint8
)  # drawn as it is: not enlarged, and the size of a picture in a panel
GAP = detections._GAP
RED = (255, 0, 0)
STEPS = [
    "image",
    "feature map",
    "bit planes",
    "binary map",
    "superpixels",
    "codes of the superpixels",
    "merged segments",
]


def halves(shape: tuple[int, int] = GREY.shape[:2], left: int = 0, right: int = 1) -> Any:
    labels = np.full(shape, left, dtype=np.int32)
    labels[:, shape[1] // 2 :] = right
    return labels


def tile(sheet: Any, number: int, columns: int = 4) -> Any:
    """A picture of GREY's size in a sheet of them, without its title."""
    row, column = divmod(number, columns)
    tall = GREY.shape[0] + 45  # the title's line is 1.5 of its 30 pixels
    y, x = GAP + row * (tall + GAP) + 45, GAP + column * (TILE + GAP)
    return sheet[y : y + GREY.shape[0], x : x + TILE]


def test_boundaries_lie_on_the_larger_label() -> None:
    picture = draw_boundaries(GREY, halves(), RED)
    middle = TILE // 2
    assert (picture[:, middle] == RED).all()
    assert (picture[:, middle + 1] == 45).all()  # the rim
    np.testing.assert_array_equal(
        np.delete(picture, (middle, middle + 1), axis=1),
        np.delete(GREY, (middle, middle + 1), axis=1),
    )
    assert (draw_boundaries(GREY, halves())[:, middle] == (255, 255, 0)).all()
    np.testing.assert_array_equal(draw_boundaries(GREY, halves(right=0)), GREY)
    assert (GREY == 90).all()  # the image given is not painted on


@pytest.mark.parametrize(("left", "right"), [(-1, 3), (3, -1)])
def test_nothing_is_drawn_on_negative_labels(left: int, right: int) -> None:
    labels = halves(left=left, right=right)
    for picture in (draw_boundaries(GREY, labels, RED), draw_segments(GREY, labels)):
        changed = (picture != GREY).any(axis=2)
        assert not changed[labels < 0].any()
        assert changed[:, TILE // 2 - (left > right)].all()


@pytest.mark.parametrize("line", [1, 2, 3])
def test_outlines_equal_a_loop(line: int) -> None:
    labels = np.random.default_rng(line).integers(-3, 3, (9, 12)).repeat(2, axis=0)
    found = segment_pictures._outlines(labels, line)
    steps = [
        (dy * k, dx * k)
        for k in range(1, line + 1)
        for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))
    ]
    for (y, x), label in np.ndenumerate(labels):
        near = [
            labels[y + dy, x + dx]
            for dy, dx in steps
            if 0 <= y + dy < labels.shape[0] and 0 <= x + dx < labels.shape[1]
        ]
        assert found[y, x] == (label >= 0 and any(n < label for n in near))


@pytest.mark.parametrize(("side", "line"), [(640, 1), (1000, 1), (1600, 2), (2400, 3)])
def test_outlines_grow_with_the_image(side: int, line: int) -> None:
    picture = draw_boundaries(np.zeros((8, side, 3), np.uint8), halves((8, side)), RED)
    assert (picture == RED).all(axis=2).sum() == 8 * line


def test_small_images_are_enlarged_with_their_labels() -> None:
    small = np.full((256, 200, 3), 50, dtype=np.uint8)
    assert draw_segments(small, halves((256, 200))).shape == (768, 600, 3)
    picture = draw_boundaries(small, halves((256, 200)), RED)
    assert np.flatnonzero((picture == RED).all(axis=(0, 2))).tolist() == [300]


def test_segments_are_half_filled() -> None:
    labels = halves(left=70, right=12)  # numbers with gaps
    picture = draw_segments(GREY, labels)
    left, right = picture[100, 100], picture[100, TILE - 100]
    share = segment_pictures._FILL
    palette = np.round(90 * (1 - share) + share * np.array(detections._PALETTE))
    assert sum(np.array_equal(left, colour) for colour in palette) == 1
    assert sum(np.array_equal(right, colour) for colour in palette) == 1
    assert not np.array_equal(left, right)
    assert (picture[:, TILE // 2 - 1] == 255).all()
    np.testing.assert_array_equal(draw_segments(GREY, halves(left=-1, right=-7)), GREY)


@pytest.mark.parametrize(
    ("count", "shape"), [(4, (3, 5)), (30, (12, 12)), (200, (20, 30)), (12, (12, 40))]
)
def test_touching_segments_differ(count: int, shape: tuple[int, int]) -> None:
    labels = np.random.default_rng(count).integers(
        -1, count, shape
    )  # scattered: a segment touches many others
    _, index = np.unique(np.append(-1, labels), return_inverse=True)
    index = index[1:].reshape(shape) - 1
    colours = segment_pictures._colours(index)
    assert len(colours) == index.max() + 1
    for (y, x), label in np.ndenumerate(index):
        for near in index[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].ravel():
            assert label < 0 or near < 0 or near == label or colours[near] != colours[label]


def test_more_colours_than_the_palette_has() -> None:
    pairs = list(itertools.combinations(range(40), 2))  # each touches each other
    labels = np.full((3 * len(pairs), 2), -1)
    labels[::3] = pairs
    colours = segment_pictures._colours(labels)
    assert len(set(colours)) == 40
    assert set(detections._PALETTE) <= set(colours)


def test_those_that_touch_most_choose_first() -> None:
    labels = np.zeros((60, 3), dtype=np.int64)  # one segment around 20 others
    labels[1::3, 1] = np.arange(1, 21)
    assert set(segment_pictures._colours(labels)) == set(detections._PALETTE)


def test_the_palette_is_used_alike() -> None:
    labels = np.arange(18)[:, None] * np.ones((1, 4), dtype=np.int64)
    colours = segment_pictures._colours(labels)
    assert all(colours.count(colour) == 2 for colour in detections._PALETTE)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
def test_odd_images(shape: tuple[int, int]) -> None:
    image, labels = (
        np.full((*shape, 3), 9, np.uint8),
        np.arange(shape[0] * shape[1]).reshape(shape) // 2,
    )
    codes = np.linspace(0, 1, 3 * labels.size).reshape(3, *shape)
    assert (draw_segments(image, labels) != 9).any()
    assert draw_boundaries(image, labels).shape == draw_segments(image, labels).shape
    assert segment_panel(image, labels, codes, labels, labels).any()
    steps = step_pictures(
        image, codes, codes, labels, np.zeros((labels.max() + 1, 3), dtype=bool), labels
    )
    assert len({step.shape for step in steps.values()}) == 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="uint8"):
        draw_boundaries(GREY.astype(np.float32), halves())
    with pytest.raises(ValueError, match=r"labels have .*\(3, 4\)"):
        draw_segments(GREY, np.zeros((3, 4), dtype=int))
    with pytest.raises(ValueError, match=r"labels have .*\(900, 900\)"):
        segment_panel(GREY, halves(), np.zeros((2, 3, 4)), halves((900, 900)))
    with pytest.raises(ValueError, match="at least one"):
        draw_bits(np.zeros((0, 3, 4)))


def test_bits_are_squares_of_grey() -> None:
    codes = np.array(
        [[[0.0, 1.0], [0.5, 0.2]], [[1.0, 1.0], [1.0, 1.0]], [[-3.0, 9.0], [0.0, 0.0]]]
    )
    sheet = draw_bits(codes, columns=2, cell=100)
    tall = 102 + 21  # the frame, and 1.5 of a title of 14 pixels
    assert sheet.shape == (2 * tall + 3 * GAP, 2 * 102 + 3 * GAP, 3)
    planes = [
        sheet[GAP + 22 + r * (tall + GAP) :, GAP + 1 + c * (102 + GAP) :][:100, :100]
        for r, c in ((0, 0), (0, 1), (1, 0))
    ]
    for plane, wanted in zip(planes, ([0, 255, 128, 51], [255] * 4, [0, 255, 0, 0]), strict=True):
        np.testing.assert_array_equal(
            plane[..., 0], np.array(wanted).reshape(2, 2).repeat(50, axis=0).repeat(50, axis=1)
        )
    assert (sheet[GAP + 21, GAP : GAP + 102] == segment_pictures._FRAME).all()
    assert (sheet[GAP : GAP + 20, GAP : GAP + 102] < 100).any()  # a title
    assert (sheet[tall + 2 * GAP :, 110 + GAP :] == 255).all()  # no fourth tile


@pytest.mark.parametrize("columns", [1, 8, 50])
def test_32_bits_stand_apart(columns: int) -> None:
    sheet = draw_bits(np.zeros((32, 4, 6), dtype=bool), columns)
    used = min(columns, 32)
    assert sheet.shape[1] == used * (242 + GAP) + GAP
    assert (sheet == 0).all(axis=2).sum() >= 32 * 240 * 160


def test_panel_titles() -> None:
    large = np.zeros((960, 2 * TILE, 3), dtype=np.uint8)
    sheet = panel({"one": GREY, "M" * 100: GREY, "": large}, 2)
    assert sheet.shape == (2 * (480 + 45) + 3 * GAP, 2 * TILE + 3 * GAP, 3)
    np.testing.assert_array_equal(tile(sheet, 1, 2), GREY)
    assert not tile(sheet, 2, 2).any()  # shrunk to fit
    title = sheet[GAP : GAP + 45]
    assert (title[:, GAP : GAP + 100] < 100).any()
    assert (title[:, TILE + GAP : TILE + 2 * GAP] == 255).all()
    assert (title[:, -GAP:] == 255).all()
    assert (title[10:22, -GAP - 90 :] < 100).any()
    assert (title[:22, -GAP - 10 :] == 255).all()  # it ends with dots, not with half a letter
    assert (sheet[480 + 45 + 2 * GAP :][:40] == 255).all()


def test_segment_panel_shows_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    superpixels, segments, truth = (
        np.arange(480 * TILE).reshape(480, TILE) // 36000,
        halves(),
        halves(left=-1),
    )
    titles: list[str] = []
    titled = segment_pictures._titled
    monkeypatch.setattr(
        segment_pictures,
        "_titled",
        lambda p, title, size: titles.append(title) or titled(p, title, size),
    )
    codes = np.random.default_rng(0).random((16, 30, 45))
    sheet = segment_panel(GREY, superpixels, codes, segments, truth)
    assert titles == [
        "image",
        "10 superpixels",
        "2 merged segments",
        "truth: 1 segments",
        *(f"bit {i}" for i in range(16)),
    ]
    drawn = [
        GREY,
        draw_boundaries(GREY, superpixels),
        draw_segments(GREY, segments),
        draw_segments(GREY, truth),
    ]
    for i, picture in enumerate(drawn):
        np.testing.assert_array_equal(tile(sheet[GAP:, GAP:], i), picture)
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
    codes[2, 1, 0] = 0.5  # not above it: 0
    superpixels = np.full((480, TILE), -1)
    (
        superpixels[:, : TILE // 3],
        superpixels[:, TILE // 3 : TILE // 2],
        superpixels[:240, TILE // 2 :],
    ) = 0, 1, 2
    superpixel_codes = np.array([[True, True, False], [False, False, False], [True, False, False]])
    features = np.random.default_rng(0).normal(size=(8, 2, 3))
    steps = step_pictures(GREY, features, codes, superpixels, superpixel_codes, halves())
    assert list(steps) == STEPS
    assert {step.shape for step in steps.values()} == {GREY.shape}
    binary, spots = steps["binary map"], steps["codes of the superpixels"]
    cells = {
        (y, x): tuple(binary[240 * y + 120, 240 * x + 120]) for y in range(2) for x in range(3)
    }
    assert (binary[:240, :240] == cells[0, 0]).all()  # a cell is a square
    assert cells[0, 0] == cells[0, 1]
    assert cells[1, 0] == cells[1, 1]
    assert len(set(cells.values())) == 4
    assert tuple(spots[100, 100]) == cells[0, 2]
    assert tuple(spots[100, 300]) == cells[1, 0]
    assert tuple(spots[100, 600]) == cells[0, 0]
    assert (spots[400, 600] == 255).all()  # no superpixel
    np.testing.assert_array_equal(steps["superpixels"], draw_boundaries(GREY, superpixels))
    np.testing.assert_array_equal(steps["merged segments"], draw_segments(GREY, halves()))
    assert (steps["bit planes"] == 0).all(axis=2).sum() > 30000


def test_a_rare_code_has_a_colour_of_its_own() -> None:
    codes = np.zeros((16, 40, 60))
    codes[3, 0, 0] = 1
    labels = np.zeros((480, TILE), dtype=int)
    binary = step_pictures(GREY, codes, codes, labels, np.zeros((1, 16), dtype=bool), labels)[
        "binary map"
    ]
    assert np.abs(binary[5, 5].astype(int) - binary[300, 300]).max() > 200


def test_principal_colours() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(5000, 3)) * (9, 3, 1)
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0][:, :3]
    colours = segment_pictures._principal_colours(hidden @ rotation.T + 1000)
    for i in range(3):
        assert abs(np.corrcoef(colours[:, i], hidden[:, i])[0, 1]) > 0.98
        assert (colours[:, i] == 0).mean() == pytest.approx(0.01, abs=0.005)
        assert (colours[:, i] == 255).mean() == pytest.approx(0.01, abs=0.005)
    np.testing.assert_array_equal(
        segment_pictures._principal_colours(np.full((7, 5), 1234.567)), np.full((7, 3), 128)
    )
    for channels in (1, 2, 7):  # all alike: there is one component, the others are rounding
        line = segment_pictures._principal_colours(
            np.arange(101.0)[:, None] * np.full(channels, 0.1)
        )
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
        segment_pictures, "rendered", lambda figure: figures.append(figure) or rendered(figure)
    )
    plot_segmentation_iou(rows, path, **options)
    return figures[0]


def test_chart_has_a_line_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert np.asarray(picture).std() > 0


def test_many_methods_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn_figure(
        monkeypatch, tmp_path / "iou.png", {f"method {i}": [(100, i / 30)] for i in range(30)}
    )
    lines = figure.axes[0].lines
    assert len({line.get_color() for line in lines[:12]}) == 12
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 30


def test_chart_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"hash": [(100.0, 0.4)]}
    path = tmp_path / "iou.png"
    path.write_text("old")
    with pytest.raises(UserError, match="nothing to draw") as nothing:
        plot_segmentation_iou({"hash": []}, path)
    assert "iou.png" in str(nothing.value)
    with pytest.raises(UserError, match="cannot write the picture"):
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
    monkeypatch.setitem(
        sys.modules, "matplotlib.pyplot", None
    )  # its import would raise; it holds global state and may want a display
    plot_segmentation_iou(rows, path)
    assert Image.open(path).format == "PNG"
