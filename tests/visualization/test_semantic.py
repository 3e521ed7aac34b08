"""Images of semantic maps: distinct colors at known pixels, legends, extreme images, confusion."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image, ImageDraw

from maskseg.errors import UserError
from maskseg.visualization import layout, segments
from maskseg.visualization.colours import class_colours, to_oklab
from maskseg.visualization.semantic import (
    draw_legend,
    draw_semantic,
    draw_semantic_confusion,
    semantic_sheet,
)

# As large as an image of a sheet, which is neither enlarged nor shrunk.
GREY = np.full((480, 720, 3), 90, dtype=np.uint8)
GAP = layout.GAP
TITLE = 45  # 1.5 times the 30 pixels of its text
NAMES = [f"class {k}" for k in range(50)]


def halves(left, right, shape=GREY.shape[:2]):
    labels = np.full(shape, left, dtype=np.int16)
    labels[:, shape[1] // 2 :] = right
    return labels


def filled(label, grey=90):
    colour = class_colours(label + 1)[label].astype(float)
    return tuple(np.round(0.6 * colour + 0.4 * (64 + grey / 2)).astype(int).tolist())


def colours_in(picture):
    red, green, blue = np.moveaxis(picture.astype(np.int32), 2, 0)
    return {
        (v >> 16, v >> 8 & 255, v & 255) for v in np.unique(red << 16 | green << 8 | blue).tolist()
    }


def swatches(legend):
    """The colors of the first column of a legend [H, W, 3], from the top."""
    column = legend[:, GAP + 4].tolist()
    return [
        tuple(b)
        for a, b in pairwise(column)
        if a != b and tuple(b) not in ((255, 255, 255), layout.FRAME)
    ]


def test_colours_depend_only_on_the_label():
    colours = class_colours(60)
    assert colours.shape == (60, 3)
    assert colours.dtype == np.uint8
    for count in (0, 1, 9, 40):
        np.testing.assert_array_equal(class_colours(count), colours[:count])
    assert [tuple(c) for c in colours[:9].tolist()] == list(layout.PALETTE)
    many = class_colours(1000)
    num_distinct = len({tuple(c) for c in many.tolist()})
    assert num_distinct > 200
    np.testing.assert_array_equal(many[num_distinct:], many[: 1000 - num_distinct])


def test_40_colours_are_distinguishable():
    def min_distance(colours):
        points = to_oklab(colours)
        return (np.linalg.norm(points[:, None] - points, axis=2) + 9 * np.eye(len(points))).min()

    # The hues that follow the palette for segments are less distinct.
    hues = np.array([segments._numbered_colour(k) for k in range(40)])
    assert min_distance(class_colours(16)) > 0.11
    assert min_distance(class_colours(40)) > 0.08 > 2 * min_distance(hues)


def test_oklab_literals():
    # The published values (lightness, a, b) of white, red and blue.
    oklab = to_oklab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]]))
    expected = [[1, 0, 0], [0.628, 0.225, 0.126], [0.452, -0.032, -0.312], [0, 0, 0]]
    np.testing.assert_allclose(oklab, expected, atol=1.5e-3)


def test_classes_are_filled_in_their_colour():
    labels = halves(3, 0)
    picture = draw_semantic(GREY, labels, NAMES)
    assert picture.dtype == np.uint8
    assert picture.shape[0] == 480 + 2 * GAP
    inner = picture[GAP:-GAP, GAP : GAP + 720]
    assert colours_in(inner[:, :355]) == {filled(3)}
    assert colours_in(inner[:, 364:]) == {filled(0)}
    assert (inner[:, 359] == 255).all()  # the outline, on the larger label
    assert (GREY == 90).all()  # the input is not modified
    bright = draw_semantic(np.full_like(GREY, 250), labels, NAMES)
    assert tuple(bright[100, 100].tolist()) == filled(3, 250)
    coloured = draw_semantic(
        np.broadcast_to(np.array([200, 0, 0], np.uint8), GREY.shape), labels, NAMES
    )
    assert tuple(coloured[100, 100].tolist()) == filled(3, 0.299 * 200)


@pytest.mark.parametrize(("left", "right"), [(-1, 5), (5, -3)])
def test_pixels_without_a_class_are_unchanged(left, right):
    labels = halves(left, right)
    inner = draw_semantic(GREY, labels, NAMES)[GAP:-GAP, GAP : GAP + 720]
    assert (inner[labels < 0] == 90).all()
    assert (inner[labels >= 0] != 90).any(axis=1).all()


def test_legend_has_the_classes_that_occur(monkeypatch):
    texts = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda draw, at, text, **keys: texts.append(text) or write(draw, at, text, **keys),
    )
    picture = draw_semantic(GREY, halves(17, 2), NAMES)
    legend = picture[GAP:, 720 + GAP :]
    assert texts == ["class 2", "class 17"]
    assert swatches(legend) == [filled(2, 128), filled(17, 128)]
    assert swatches(draw_semantic(GREY, halves(-1, 2), NAMES)[GAP:, 720 + GAP :]) == [
        filled(2, 128)
    ]
    ink = (legend < 100).all(axis=2)
    assert ink[:30].sum() > 100  # a name
    assert ink[30:80].sum() > 100
    assert not ink[80:].any()
    without_legend = draw_semantic(GREY, halves(-1, -1), NAMES)
    assert without_legend.shape == (480 + 2 * GAP, 720 + 2 * GAP, 3)


def test_names_are_legible_and_truncated():
    short, long, longer = (
        draw_semantic(GREY, halves(0, 0), [name]).shape[1] for name in ("a", "a" * 80, "a" * 90)
    )
    assert short < long == longer < 720 + 420
    ink = (draw_semantic(GREY, halves(0, 0), ["H"])[GAP:, 720 + GAP :] < 100).all(axis=2)
    assert np.ptp(np.flatnonzero(ink.any(axis=1))) + 1 >= 14  # pixels of a capital letter


@pytest.mark.parametrize("count", [1, 12, 16, 40])
def test_a_legend_of_many_classes_fits(count):
    labels = np.arange(720 * 480).reshape(480, 720) % count
    picture = draw_semantic(GREY, labels, NAMES)
    assert picture.shape[0] == 480 + 2 * GAP
    legend = picture[GAP:-GAP, 720 + 2 * GAP :]
    assert {filled(k, 128) for k in range(count)} <= colours_in(legend)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 7)])
def test_extreme_sizes(shape):
    image = np.full((*shape, 3), 9, np.uint8)
    labels = np.arange(shape[0] * shape[1]).reshape(shape) % 30
    expected = {filled(k, 128) for k in np.unique(labels).tolist()}
    for picture in (
        draw_semantic(image, labels, NAMES),
        semantic_sheet(image, labels, labels, NAMES),
    ):
        assert expected <= colours_in(picture)
        assert picture.shape[0] < shape[0] + 2000
        assert picture.shape[1] < 8 * shape[1] + 3000


def test_small_images_are_enlarged_with_their_labels():
    small = np.full((256, 200, 3), 50, dtype=np.uint8)
    inner = draw_semantic(small, halves(1, 4, (256, 200)), NAMES)[GAP:-GAP, GAP : GAP + 600]
    assert inner.shape == (768, 600, 3)
    assert np.flatnonzero((inner == 255).all(axis=(0, 2))).tolist() == [300]


def test_sheet_has_three_images_and_one_legend():
    truth = halves(0, 7)
    predicted = halves(0, 20)
    sheet = semantic_sheet(GREY, truth, predicted, NAMES)
    tiles = [sheet[GAP + TITLE :, GAP + i * (720 + GAP) :][:480, :720] for i in range(4)]
    np.testing.assert_array_equal(tiles[0], GREY)
    for tile, labels in zip(tiles[1:], (truth, predicted), strict=False):
        np.testing.assert_array_equal(
            tile, draw_semantic(GREY, labels, NAMES)[GAP:-GAP, GAP : GAP + 720]
        )
    assert swatches(sheet[GAP + TITLE :, 3 * (720 + GAP) :]) == [filled(k, 128) for k in (0, 7, 20)]
    for i in range(3):
        assert (sheet[GAP : GAP + TITLE, GAP + i * (720 + GAP) :][:, :200] < 100).any()  # a title
    bare = semantic_sheet(GREY, halves(-1, -1), halves(-1, -1), NAMES, ("", "", ""))
    assert bare.shape == (480 + TITLE + 2 * GAP, 3 * 720 + 4 * GAP, 3)
    assert (bare[: GAP + TITLE] == 255).all()
    for tile in (bare[GAP + TITLE :, GAP + i * (720 + GAP) :][:480, :720] for i in range(3)):
        np.testing.assert_array_equal(tile, GREY)


def test_a_small_image_fills_its_tile():
    small = np.full((160, 240, 3), 90, dtype=np.uint8)
    sheets = [
        semantic_sheet(image, halves(1, 2, image.shape[:2]), halves(2, 1, image.shape[:2]), NAMES)
        for image in (small, GREY)
    ]
    np.testing.assert_array_equal(*sheets)


def test_invalid_arguments():
    with pytest.raises(ValueError, match="label 3 has no name, there are 3"):
        draw_semantic(GREY, halves(0, 3), NAMES[:3])
    with pytest.raises(ValueError, match="label 4 has no name"):
        semantic_sheet(GREY, halves(0, 3), halves(4, 0), NAMES[:4])
    with pytest.raises(ValueError, match="uint8"):
        draw_semantic(GREY.astype(np.float32), halves(0, 1), NAMES)
    with pytest.raises(ValueError, match=r"labels have .*\(3, 4\)"):
        semantic_sheet(GREY, halves(0, 1), np.zeros((3, 4), dtype=int), NAMES)


def shown(monkeypatch):
    """The texts (row, column, text) in the cells, and the shares that the plot shows."""
    texts = []
    shares = []
    draw = Axes.imshow
    text = Axes.text

    def imshow(axis, values, **keys):
        if np.ndim(values) == 2 and "norm" in keys:  # not the color bar
            shares.append(values)
        return draw(axis, values, **keys)

    def write(axis, x, y, string, **keys):
        texts.append((y, x, string))
        return text(axis, x, y, string, **keys)

    monkeypatch.setattr(Axes, "imshow", imshow)
    monkeypatch.setattr(Axes, "text", write)
    return texts, shares


def test_confusion(tmp_path, monkeypatch):
    texts, shares = shown(monkeypatch)
    labels = []
    ticks = Axes.set_yticks
    monkeypatch.setattr(
        Axes,
        "set_yticks",
        lambda axis, at, names=None, **keys: (
            labels.extend(names or []) or ticks(axis, at, names, **keys)
        ),
    )
    matrix = np.array([[3, 1, 0], [0, 0, 0]])
    picture = draw_semantic_confusion(matrix, ["cat", "sky"], tmp_path / "confusion.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "confusion.png")), picture)
    np.testing.assert_allclose(shares[0].filled(-1), [[0.75, 0.25, 0], [-1, -1, -1]])
    assert texts == [(0, 0, "0.75"), (0, 1, "0.25")]
    assert labels == ["cat (100.0 %)", "sky (0.0 %)"]
    draw_semantic_confusion(np.array([[1, 3], [1, 1]]), ["cat", "sky"])
    np.testing.assert_allclose(shares[1].filled(-1), [[0.25, 0.75], [0.5, 0.5]])
    assert labels[2:] == ["cat (66.7 %)", "sky (33.3 %)"]


@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize("count", [1, 20, 21, 60])
def test_confusion_of_more_classes(monkeypatch, count, without):
    texts, _ = shown(monkeypatch)
    lines = []
    line = Axes.axvline
    monkeypatch.setattr(
        Axes, "axvline", lambda axis, x, **keys: lines.append(x) or line(axis, x, **keys)
    )
    picture = draw_semantic_confusion(
        np.eye(count, count + without, dtype=np.int64),
        [f"a class with a long name {i}" for i in range(count)],
    )
    assert len(texts) == (count if count <= 20 else 0)
    assert picture.shape[0] > 20 * count  # pixels per name
    assert lines == [count - 0.5] * without  # before the column of no class
    for border in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):  # nothing is truncated
        assert (border == 255).all()


def test_matrix_of_another_size(tmp_path):
    for shape in ((3, 3), (2, 4), (2,), (4,)):
        with pytest.raises(ValueError, match=r"2 names need a matrix \[2, 2\] or \[2, 3\]"):
            draw_semantic_confusion(np.zeros(shape, np.int64), ["cat", "sky"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the image"):
        draw_semantic_confusion(
            np.eye(1, dtype=np.int64), ["cat"], tmp_path / "file" / "confusion.png"
        )


@pytest.mark.parametrize("count", [1, 3, 40, 41, 80, 1203])
def test_a_legend_of_many_classes_is_cut_and_counts_the_others(monkeypatch, count):
    texts = []
    original = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, place, text, **options: (
            texts.append(text),
            original(self, place, text, **options),
        )[1],
    )
    # Class k has k + 1 pixels.
    labels = np.repeat(np.arange(count), np.arange(count) + 1)[None]
    (legend,) = draw_legend([labels], [f"class {i}" for i in range(count)], 20, 600)
    first = max(count - 40, 0)
    expected = [f"class {i}" for i in range(first, count)]
    assert texts == (expected if count <= 40 else [*expected, f"and {count - 40} more"])
    assert legend.shape[1] < 900
    assert (legend[:, -4:] == 255).all()  # nothing is cut off
