"""Images of errors and plots of metrics: colors at known pixels, texts, sizes, extreme images."""

import sys

import numpy as np
import pytest
from PIL import Image

from maskseg.errors import UserError
from maskseg.evaluation.coco_entries import compressed_rle
from maskseg.evaluation.confidence import Matches, merge_matches, score_curves
from maskseg.evaluation.diagnosis import diagnose, worst
from maskseg.structures import Categories
from maskseg.visualization import detections, layout
from maskseg.visualization import diagnosis as diagnosis_images
from maskseg.visualization.colours import as_hex, class_colour, line_colour
from maskseg.visualization.diagnosis import (
    draw_confusion,
    draw_pr_curves,
    draw_score_curves,
    draw_worst,
    draw_worst_images,
    merge_rare_classes,
)

ANIMALS = Categories(("cat", "dog"), (3, 7))
CAT, DOG = 3, 7
HEIGHT = 360
WIDTH = 720  # the size that images are scaled to: not resized
GREY = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
COLOURS = {CAT: class_colour(0), DOG: class_colour(1), None: diagnosis_images._GREY}


def shape(x, y, w, h):
    return compressed_rle([[x, y, x + w, y, x + w, y + h, x, y + h]], HEIGHT, WIDTH)


def truth(category, x, y, w, h, *, mask=True, image=1):
    return {
        "id": 1,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "iscrowd": 0,
        "segmentation": shape(x, y, w, h) if mask else [],
    }


def row(category, x, y, w, h, score, mask=None, image=1):
    result = {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "score": score}
    if mask is not False:
        result["segmentation"] = shape(*(mask or (x, y, w, h)))
    return result


TRUTHS = [
    truth(CAT, 50, 60, 80, 80),
    truth(CAT, 250, 60, 80, 80),
    truth(DOG, 450, 60, 80, 80),
    truth(DOG, 50, 220, 80, 80),
]
ROWS = [
    row(CAT, 50, 60, 80, 80, 0.9),
    row(DOG, 250, 60, 80, 80, 0.7),
    row(DOG, 450, 60, 80, 80, 0.8, mask=(450, 60, 80, 24)),
    row(CAT, 600, 220, 80, 80, 0.83),
]


def one(truths=TRUTHS, rows=ROWS, categories=ANIMALS):
    (diagnosis,) = diagnose(truths, rows, categories, image_ids=[1])
    return diagnosis


def sides(picture, height=HEIGHT, width=WIDTH):
    """The two images of a pair, without headings and margins."""
    gap = layout.GAP
    bottom = picture.shape[0] - gap
    rows = picture[bottom - height : bottom]
    return rows[:, gap : gap + width], rows[:, 2 * gap + width : 2 * (gap + width)]


def label_texts(monkeypatch, *arguments):
    """The candidate texts of the labels of each side, in the order in which they choose places."""
    sides = []
    draw_labels = detections.draw_labels
    monkeypatch.setattr(
        diagnosis_images,
        "draw_labels",
        lambda draw, size, labels: (
            sides.append([t for _, t, _ in labels]),
            draw_labels(draw, size, labels),
        ),
    )
    draw_worst(*arguments)
    return sides


def has(picture, category):
    """Where a picture has the color of a class; None: that of what is right."""
    return (picture == COLOURS[category]).all(axis=2)


def test_colours_and_positions_of_outcomes():
    """A color is a class; what is right is gray, what is missed has a dashed frame."""
    left, right = sides(draw_worst(GREY, one(), ANIMALS, "a.jpg"))
    assert has(left, None)[60, 50:130].all()  # thin: only the first row of the box
    assert not has(left, None)[61, 51:129].any()
    assert has(right, None)[60, 50:130].all()
    # a cat that is taken for a dog; the frame is thick, outside the box
    assert has(left, CAT)[57:60, 250:330].all()
    assert has(right, DOG)[57:60, 250:330].all()
    for side in (left, right):
        assert has(side, DOG)[57:60, 450:530].all()  # the bad mask
        np.testing.assert_array_equal(side[90, 90], [90, 90, 90])  # correct objects are not filled
    missed = has(left, DOG)[218, 46:134]
    assert 0.4 < missed.mean() < 0.7  # dashes
    assert (right[210:310, 40:140] == 90).all()
    assert has(right, CAT)[217:220, 600:680].all()  # the false detection
    assert (left[210:310, 590:690] == 90).all()
    expected = 90 + detections._FILL * (np.array(COLOURS[DOG]) - 90.0)
    # The predicted mask ends at y = 84, the true one at 140.
    np.testing.assert_allclose(right[75, 490], expected, atol=1)
    np.testing.assert_allclose(left[120, 490], expected, atol=1)
    np.testing.assert_array_equal(right[120, 490], [90, 90, 90])
    assert (GREY == 90).all()  # the input is not modified


def test_texts(monkeypatch):
    left, right = label_texts(monkeypatch, GREY, one(), ANIMALS)
    assert [texts[0] for texts in left] == ["dog", "cat", "missed dog"]
    assert [texts[0] for texts in right] == ["false cat 0.83", "bad mask 0.30", "dog, is cat 0.70"]


@pytest.mark.parametrize(
    ("count", "missed", "false"),
    [(30, ["missed cell", "cell"], ["false cell 0.75", "cell 0.75", "0.75"]), (31, None, ["0.75"])],
)
def test_many_errors_of_the_only_class_are_labelled_by_scores(monkeypatch, count, missed, false):
    cells = Categories(("cell",), (1,))
    truths = [truth(1, 20 * i, 40, 10, 10) for i in range(count)]
    rows = [row(1, 20 * i, 200, 10, 10, 0.75) for i in range(count)]
    left, right = label_texts(monkeypatch, GREY, one(truths, rows, cells), cells)
    assert left == ([missed] * count if missed else [])
    assert right == [false] * count


def test_tiny_objects_are_visible():
    left, _ = sides(draw_worst(GREY, one([truth(CAT, 300, 300, 1, 1, mask=False)], []), ANIMALS))
    # The last row of the frame of 9 pixels around it, below its label.
    assert has(left, CAT)[303, 296:305].all()
    assert not has(left, CAT)[303, [295, 305]].any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((90, 45), (720, 360)),
        ((100, 1440), (50, 720)),
        ((3000, 2000), (720, 480)),
        ((10, 20), (80, 160)),
    ],
)
def test_images_are_scaled_to_one_size(shape, expected):
    height, width = shape
    box = [0.25 * width, 0.25 * height, 0.5 * width, 0.5 * height]
    x, y, w, h = box
    mask = compressed_rle([[x, y, x + w, y, x + w, y + h, x, y + h]], height, width)
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": CAT,
        "bbox": box,
        "iscrowd": 0,
        "segmentation": mask,
    }
    image = np.full((*shape, 3), 90, dtype=np.uint8)
    left, right = sides(draw_worst(image, one([annotation], []), ANIMALS), *expected)
    assert left.shape[:2] == right.shape[:2] == expected
    assert (right == 90).all()
    filled = (left != 90).all(axis=2)
    assert filled[expected[0] // 2, round(0.3 * expected[1]) : round(0.7 * expected[1])].all()
    assert not filled[expected[0] // 2, : round(0.2 * expected[1])].any()


def test_boxes_without_masks_boxes_outside_and_no_errors():
    truths = [truth(CAT, 700, 350, 90, 90, mask=False)]
    rows = [row(DOG, -50, -50, 90, 90, 0.9, mask=False)]
    left, right = sides(draw_worst(GREY, one(truths, rows), ANIMALS))
    assert has(left, CAT).any()
    assert has(right, DOG).any()
    left, right = sides(draw_worst(GREY, one([], []), ANIMALS))
    assert (left == 90).all()
    assert (right == 90).all()


def test_the_title_is_never_truncated(monkeypatch):
    texts = []
    monkeypatch.setattr(
        diagnosis_images,
        "add_heading",
        lambda heading, image, size, add=diagnosis_images.add_heading: (
            texts.extend(heading),
            add(heading, image, size),
        )[1],
    )
    tower = np.full((720, 20, 3), 90, dtype=np.uint8)
    picture = draw_worst(tower, one([], []), ANIMALS, "a_very_long_name_of_a_narrow_picture.jpg")
    assert texts[0].text == "a_very_long_name_of_a_narrow_picture.jpg: no errors"
    assert picture.shape[1] > layout.load_font(diagnosis_images._TITLE_SIZE).getlength(
        texts[0].text
    )
    draw_worst(GREY, one(), ANIMALS)
    assert texts[1].text == "image 1: missed 1, false 1, wrong class 1, bad mask 1"


def test_legend_is_on_top(tmp_path):
    loaded = []

    def load_image(image_id):
        loaded.append(image_id)
        return GREY

    truths = [
        truth(CAT, 50, 60 + 20 * i, 80, 10, image=image)
        for image in range(25)
        for i in range(1 + image % 3)
    ]
    diagnoses = worst(diagnose(truths, [], ANIMALS), 25)
    path = tmp_path / "new" / "worst.png"
    sheet = draw_worst_images(diagnoses, ANIMALS, load_image, path, file_names={2: "two.jpg"})
    np.testing.assert_array_equal(np.asarray(Image.open(path)), sheet)
    assert loaded == [d.image_id for d in diagnoses[:20]]
    assert sheet.shape[1] == 2 * (2 * WIDTH + 3 * layout.GAP) + 3 * layout.GAP
    assert sheet.shape[0] > 10 * HEIGHT
    assert has(sheet[:60], CAT).sum() > 300
    assert not has(sheet[:60], DOG).any()  # the legend has the classes that are drawn


def test_legend_of_one_narrow_image_has_several_lines():
    narrow = np.full((720, 40, 3), 90, dtype=np.uint8)
    sheet = draw_worst_images(
        [one([truth(CAT, 5, 5, 20, 20, mask=False)], [])], ANIMALS, lambda _: narrow
    )
    dark = np.flatnonzero((sheet[:240, :, 0] < 100).any(axis=1))
    lines = 1 + int((np.diff(dark) > 4).sum())
    assert has(sheet[:60], CAT).sum() > 200
    assert lines >= 4
    assert (sheet[:240, -4:] == 255).all()  # nothing is truncated


def test_the_legend_names_at_most_24_classes_and_the_number_of_the_others(monkeypatch):
    texts = []
    monkeypatch.setattr(
        diagnosis_images,
        "add_heading",
        lambda heading, image, size, add=diagnosis_images.add_heading: (
            texts.append([entry.text for entry in heading]),
            add(heading, image, size),
        )[1],
    )
    count = 1203
    many = Categories(tuple(f"class {i}" for i in range(count)), tuple(range(1, count + 1)))
    truths = [
        truth(1 + i, 4 * (i % 170), 10 + 40 * (i // 170), 3, 3, mask=False) for i in range(count)
    ]
    draw_worst_images([one(truths, [], many)], many, lambda _: GREY)
    legend = texts[-1]
    assert legend[:24] == [f"class {i}" for i in range(24)]
    assert legend[24] == "and 1,179 more classes"


def test_no_image_with_an_error(monkeypatch):
    texts = []
    monkeypatch.setattr(
        diagnosis_images, "add_heading", lambda heading, image, _: (texts.extend(heading), image)[1]
    )
    draw_worst_images([], ANIMALS, lambda _: GREY)
    assert texts[-1].text == "no image has an error"


def curve(height, reach):
    return np.where(np.linspace(0, 1, 101) <= reach, height, 0.0)


@pytest.mark.parametrize("count", [0, 1, 2, 12, 13, 80])
def test_pr_curves(tmp_path, monkeypatch, count):
    from matplotlib.axes import Axes

    legends = []
    legend = Axes.legend
    monkeypatch.setattr(
        Axes,
        "legend",
        lambda self, **options: (
            legends.append([h.get_label() for h in options["handles"]]),
            legend(self, **options),
        )[1],
    )
    classes = {f"class {i}": curve(0.9, (i + 1) / 100) for i in range(count)} | {
        "without truth": np.full(101, -1.0)
    }
    picture = draw_pr_curves({"bbox": classes, "segm": classes}, tmp_path / "pr.png")
    assert picture.dtype == np.uint8
    assert picture.shape == (528, 1584, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pr.png")), picture)
    assert len(legends) == (2 if count else 0)
    if count == 1:
        assert legends[0] == ["0.02  class 0"]
    elif count:
        assert legends[0][0].endswith(f"mean of {count}")
        assert len(legends[0]) == min(count, 12) + 1 + (count > 12)
        best, last = legends[0][1], legends[0][-1]
        assert best == f"{0.9 * (count + 1) / 101:.2f}  class {count - 1}"
        assert last == "0.02  class 0"
    if count == 80:
        assert legends[0][7] == "…  68 others"


def spy_on_lines(monkeypatch):
    """The labels and colors of all lines that are plotted."""
    from matplotlib.axes import Axes

    lines = []
    plot = Axes.plot

    def spy(self, *values, **options):
        lines.append((options.get("label"), options["color"]))
        return plot(self, *values, **options)

    monkeypatch.setattr(Axes, "plot", spy)
    return lines


def test_curves_have_the_colours_of_their_classes(monkeypatch):
    lines = spy_on_lines(monkeypatch)
    names = [f"class {i}" for i in range(40)]
    # The last class has the highest curve, and so the first place in the legend.
    classes = {name: curve(0.5 + i / 100, 1.0) for i, name in enumerate(names)}
    draw_pr_curves({"bbox": classes})
    colours = {label.split("  ")[1]: colour for label, colour in lines if label}
    assert colours["class 39"] == as_hex(line_colour(39))
    assert colours["class 0"] == as_hex(line_colour(0))
    assert "class 20" not in colours


@pytest.mark.parametrize("count", [1, 3, 80, 1203])
def test_score_curves(tmp_path, monkeypatch, count):
    lines = spy_on_lines(monkeypatch)
    names = [f"class {i}" for i in range(count)]
    scores = np.array([0.9, 0.8, 0.4])
    matches = {}
    for i, name in enumerate(names):
        matches[name] = Matches(scores, np.array([True, i % 2 == 0, False]), 2)
    curves = {"": score_curves(merge_matches(list(matches.values())))}
    curves |= {name: score_curves(part) for name, part in matches.items()}
    image = draw_score_curves(curves, names, tmp_path / "confidence.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "confidence.png")), image)
    assert image.shape == (528, 1815, 3)
    for border in (image[0], image[-1], image[:, 0], image[:, -1]):  # nothing is cut off
        assert (border == 255).all()
    labels = [label for label, _ in lines if label]
    best = curves[""].f1.max()
    assert labels.count(f"{best:.2f}  all detections") == 3
    named = {label for label in labels if "class " in label}
    assert len(named) == (0 if count == 1 else min(count, 12))
    if count > 1:
        assert dict(lines)["1.00  class 0"] == as_hex(line_colour(0))


def test_score_curves_without_a_detection():
    nothing = Matches(np.zeros(0), np.zeros(0, dtype=bool), 3)
    curves = {"": score_curves(nothing), "cat": score_curves(nothing)}
    assert draw_score_curves(curves, ["cat", "dog"]).shape == (528, 1815, 3)


def test_pr_curves_of_one_kind_at_another_threshold():
    assert draw_pr_curves({"bbox": {"cat": curve(1.0, 1)}}, iou=0.75).shape == (528, 792, 3)
    assert draw_pr_curves({}).shape == (528, 792, 3)


def shown(monkeypatch):
    """The texts and the shares that the plot of a matrix shows."""
    from matplotlib.axes import Axes

    texts, shares = [], []
    text, imshow = Axes.text, Axes.imshow
    monkeypatch.setattr(
        Axes,
        "text",
        lambda self, x, y, s, **o: (texts.append((y, x, s)), text(self, x, y, s, **o))[1],
    )
    monkeypatch.setattr(
        Axes,
        "imshow",
        lambda self, values, **o: (shares.append(values), imshow(self, values, **o))[1],
    )
    return texts, shares


def test_confusion(tmp_path, monkeypatch):
    texts, shares = shown(monkeypatch)
    matrix = np.array([[3, 1, 0], [0, 0, 0], [1, 4, 0]])
    picture = draw_confusion(matrix, ["cat", "dog"], tmp_path / "confusion.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "confusion.png")), picture)
    np.testing.assert_allclose(shares[0].filled(-1), [[0.75, 0.25, 0], [-1, -1, -1], [0.2, 0.8, 0]])
    assert texts == [(0, 0, "0.75"), (0, 1, "0.25"), (2, 0, "0.20"), (2, 1, "0.80")]


@pytest.mark.parametrize("count", [0, 1, 20, 21, 80])
def test_confusion_of_more_classes(monkeypatch, count):
    texts, _ = shown(monkeypatch)
    picture = draw_confusion(
        np.eye(count + 1, dtype=np.int64), [f"a class with a long name {i}" for i in range(count)]
    )
    assert len(texts) == (count + 1 if count <= 20 else 0)
    assert picture.shape[0] > 20 * (count + 1)  # pixels per name
    for border in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):  # nothing is truncated
        assert (border == 255).all()


def test_matrix_of_another_size():
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        draw_confusion(np.zeros((2, 2), np.int64), ["cat", "dog"])


def test_an_image_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the image"):
        draw_confusion(np.eye(2, dtype=np.int64), ["cat"], tmp_path / "file" / "confusion.png")


def test_no_pyplot(monkeypatch):
    # Importing pyplot would raise: it holds global state and may need a display.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    draw_confusion(np.eye(2, dtype=np.int64), ["cat"])
    draw_pr_curves({"bbox": {"cat": curve(1.0, 1)}})


def test_a_confusion_matrix_of_many_classes_is_bounded() -> None:
    # Guards against: the plot of the 1203 classes of LVIS takes 12 GB
    count = 1203
    matrix = np.zeros((count + 1, count + 1), dtype=np.int64)
    matrix[7, 7] = 5
    matrix[9, 1000] = 4
    matrix[1100, count] = 1
    merged, names = merge_rare_classes(matrix, [f"c{i}" for i in range(count)])
    assert merged.shape == (202, 202)
    assert names[-1] == "1003 others"
    assert merged.sum() == 10
    assert merged[names.index("c7"), names.index("c7")] == 5
    assert merged[names.index("c9"), 200] == 4
    assert merged[names.index("c1100"), 201] == 1
    few = matrix[:5, :5]
    same, names = merge_rare_classes(few, ["a"] * 4)
    assert same is few
    assert len(names) == 4


def test_names_with_dollars_are_no_mathematics() -> None:
    # Guards against: matplotlib raises for "$\\frac$", and shows "$5$" in italics
    names = ["$\\frac$", "_hidden", "cost $5"]
    matrix = np.eye(4, dtype=np.int64)
    assert draw_confusion(matrix, names).ndim == 3
    curves = {"bbox": dict.fromkeys(names, np.linspace(1, 0, 101))}
    assert draw_pr_curves(curves).ndim == 3
