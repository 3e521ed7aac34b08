"""Pictures: sizes, colours at known pixels, labels that stay inside and apart, odd images; curves from complete and broken files."""

import itertools
import json
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from maskseg.errors import UserError
from maskseg.visualization import curves, detections
from maskseg.visualization.detections import draw_detections, mosaic, plot_curves, side_by_side

GREY = np.full((480, 640, 3), 90, dtype=np.uint8)


def rectangle(x0, y0, x1, y1, shape=(480, 640)):
    mask = np.zeros(shape, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def placed_labels(monkeypatch, *arguments, **options):
    """The areas of the labels of a picture."""
    areas = []
    is_free = detections._is_free

    def spy(place, taken, boxes):
        free = is_free(place, taken, boxes)
        if free:
            areas.append(place)
        return free

    monkeypatch.setattr(detections, "_is_free", spy)
    picture = draw_detections(*arguments, **options)
    return picture, areas


def test_mask_box_and_label_are_where_they_belong():
    mask = rectangle(200, 150, 300, 250)
    picture = draw_detections(GREY, [[200, 150, 300, 250]], [1], [0.9], mask[None], ["cat", "dog"])
    colour = np.array(detections._PALETTE[1])
    assert picture.shape == GREY.shape
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[150, 250], colour)  # the box, on the first row inside
    np.testing.assert_array_equal(picture[249, 250], colour)
    np.testing.assert_allclose(
        picture[200, 250], 90 + detections._FILL * (colour - 90.0), atol=1
    )  # the fill
    np.testing.assert_array_equal(
        picture[260:, :], GREY[260:, :]
    )  # below the box nothing is touched
    np.testing.assert_array_equal(
        picture[149, 201], colour
    )  # the label's background, above the box
    assert (GREY == 90).all()  # the image given is not painted on


def test_outline_follows_the_mask():
    mask = np.hypot(*np.ogrid[-240:240, -320:320]) < 100
    picture = draw_detections(GREY, [[220, 140, 420, 340]], [0], None, mask[None], ["disc"])
    changed = (picture == detections._PALETTE[0]).all(axis=2)
    assert changed[240, 221:223].all()  # leftmost pixels of the disc
    assert not changed[240, 230:400].any()


def test_small_images_are_enlarged_with_their_boxes_and_masks():
    small = np.full((256, 256, 3), 50, dtype=np.uint8)
    mask = rectangle(40, 60, 50, 70, (256, 256))
    picture = draw_detections(small, [[40, 60, 50, 70]], [0], None, mask[None], ["cell"])
    assert picture.shape == (768, 768, 3)
    inside = np.zeros((768, 768), dtype=bool)
    inside[180:210, 120:150] = True
    changed = (picture != 50).any(axis=2)
    assert changed[inside].all()
    assert not changed[210:].any()
    assert not changed[:, :120].any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((256, 256), 3), ((640, 3), 1), ((300, 500), 2), ((1, 1), 8), ((1000, 2000), 1)],
)
def test_enlargement(shape, expected):
    picture = draw_detections(np.zeros((*shape, 3), np.uint8), [], [], [], None, ["a"])
    assert picture.shape == (shape[0] * expected, shape[1] * expected, 3)


def test_rle_and_bitmaps_give_the_same_picture():
    mask = np.hypot(*np.ogrid[-240:240, -320:320]) < 100
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    arguments = GREY, [[220, 140, 420, 340]], [0], [0.5]
    a, b = (
        draw_detections(*arguments, m, ["disc"])
        for m in (mask[None], [{"size": rle["size"], "counts": rle["counts"].decode()}])
    )
    np.testing.assert_array_equal(a, b)


def test_min_score_and_broken_boxes():
    boxes, scores = [[10, 30, 100, 100], [300, 300, 400, 400], [np.nan, 0, 9, 9]], [0.9, 0.2, 0.95]
    picture = draw_detections(GREY, boxes, [0, 0, 0], scores, None, ["a"], min_score=0.5)
    np.testing.assert_array_equal(
        picture, draw_detections(GREY, boxes[:1], [0], scores[:1], None, ["a"])
    )
    np.testing.assert_array_equal(
        draw_detections(GREY, boxes, [0, 0, 0], scores, None, ["a"], min_score=2), GREY
    )


def test_boxes_outside_and_unknown_labels():
    boxes = [[-50, -50, 30, 30], [630, 470, 900, 900], [700, 500, 800, 600], [5, 5, 5, 5]]
    assert (
        draw_detections(GREY, boxes, [0, 1, 99, -1], [0.9] * 4, None, ["a", "b"]).shape
        == GREY.shape
    )


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (1, 1), (3, 7)])
def test_odd_images(shape):
    picture = draw_detections(
        np.zeros((*shape, 3), np.uint8),
        [[0, 0, shape[1], shape[0]]],
        [0],
        [0.5],
        np.ones((1, *shape), bool),
        ["a"],
    )
    assert picture.any()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="uint8"):
        draw_detections(GREY[..., 0], [], [], [], None, [])
    with pytest.raises(ValueError, match="mask 0"):
        draw_detections(GREY, [[0, 0, 5, 5]], [0], [1.0], np.ones((1, 5, 5), bool), ["a"])


def test_neighbours_differ_and_a_class_keeps_its_colour():
    boxes = np.array(
        [[10 + 30 * i, 10, 42 + 30 * i, 60] for i in range(8)], dtype=float
    )  # a row of touching boxes
    colours = detections._colours(boxes, [3] * 8)
    assert all(a != b for a, b in itertools.pairwise(colours))
    apart = np.array([[100 * i, 10, 100 * i + 20, 60] for i in range(5)], dtype=float)
    assert set(detections._colours(apart, [3] * 5)) == {detections._PALETTE[3]}
    assert detections._colours(np.zeros((0, 4)), []) == []


def test_labels_stay_inside_and_apart(monkeypatch):
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1, (25, 2)) * (560, 400)
    boxes = np.concatenate([low, low + rng.uniform(20, 120, (25, 2))], axis=1)
    boxes[:4] = [[0, 0, 80, 80], [560, 0, 640, 80], [0, 400, 80, 480], [560, 400, 640, 480]]
    _, areas = placed_labels(
        monkeypatch,
        GREY,
        boxes,
        rng.integers(0, 3, 25),
        rng.random(25),
        None,
        ["person", "motorcycle", "ox"],
    )
    assert len(areas) > 15
    for i, a in enumerate(areas):
        assert 0 <= a.x0 < a.x1 <= 640
        assert 0 <= a.y0 < a.y1 <= 480
        assert not any(a.overlaps(b) for b in areas[:i])


def test_labels_do_not_hide_a_crowd(monkeypatch):
    boxes = np.array(
        [[12 * x, 12 * y, 12 * x + 10, 12 * y + 10] for x in range(53) for y in range(40)],
        dtype=float,
    )
    _, areas = placed_labels(
        monkeypatch, GREY, boxes, [0] * len(boxes), np.ones(len(boxes)), None, ["cell"]
    )
    assert areas == []


def test_texts():
    assert detections._texts(1, 0.873, ["cat", "dog"], True) == ["dog 0.87", "0.87"]
    assert detections._texts(1, None, ["cat", "dog"], True) == ["dog"]
    assert detections._texts(0, 0.5, ["cell"], False) == ["0.50"]
    assert detections._texts(0, None, ["cell"], False) == []


def test_side_by_side_and_mosaic():
    small, wide = np.full((50, 80, 3), 10, np.uint8), np.full((40, 200, 3), 20, np.uint8)
    sheet = side_by_side(
        small, wide, ("truth", "a title that is far too long for the picture below it")
    )
    gap = detections._GAP
    assert sheet.shape[1] == 80 + 200 + 3 * gap
    assert (sheet == 10).all(axis=2).sum() == 50 * 80
    assert (sheet == 20).all(axis=2).sum() == 40 * 200
    assert side_by_side(small, wide).shape[0] == 50 + 2 * gap
    sheet = mosaic([small, wide, small], 2)
    assert sheet.shape == (50 + 50 + 3 * gap, 80 + 200 + 3 * gap, 3)
    assert (sheet == 10).all(axis=2).sum() == 2 * 50 * 80
    assert mosaic([wide], 5, cell=100).shape == (20 + 2 * gap, 100 + 2 * gap, 3)
    with pytest.raises(ValueError, match="at least one"):
        mosaic([], 2)


def lines(steps=60):
    rows = []
    for step in range(1, steps + 1):
        terms = {"loss/box": 1 / step, "loss/mask": 2 / step}
        rows.append(
            {
                "step": step,
                "kind": "train",
                "loss": 3 / step,
                **terms,
                "lr": 0.01,
                "images_per_second": 9.0,
            }
        )
        if step % 20 == 0:
            rows.append(
                {
                    "step": step,
                    "kind": "val",
                    "bbox/AP": 0.1,
                    "segm/AP": 0.2,
                    "segm/AP50": 0.4,
                    "segm/APl": -1.0,
                    "loss/box": 1.0,
                }
            )
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        lines(),
        [r for r in lines() if r["kind"] == "train"],
        [r for r in lines() if r["kind"] == "val"],
        lines()[:1],
        [{"step": 5, "kind": "val", "bbox/AP": -1.0, "segm/AP": 0.0}],
        [
            {"step": 1, "kind": "train", "loss": float("nan"), "lr": 0.0},
            {"step": 2, "kind": "train", "loss": float("inf"), "lr": None},
        ],
    ],
    ids=["both", "no validation", "only validation", "one line", "nothing found", "not finite"],
)
def test_plot_curves(tmp_path, rows):
    source, output = tmp_path / "metrics.jsonl", tmp_path / "new" / "results.png"
    source.write_text("\n".join(json.dumps(r) for r in rows) + '\n{"step": 61, "ki')
    plot_curves(source, output)
    assert np.asarray(Image.open(output)).std() > 0


def test_panels():
    rows = lines()
    rows.append({"step": 60, "kind": "train", "loss": 7.0})  # the step again, after a resume
    train = {
        k: {r["step"]: r[k] for r in rows if r["kind"] == "train" and k in r}
        for k in ("loss", "loss/box", "loss/mask", "lr")
    }
    val = {
        k: {r["step"]: r[k] for r in rows if r["kind"] == "val"}
        for k in ("bbox/AP", "segm/AP", "segm/AP50", "segm/APl", "loss/box")
    }
    panels = dict(curves._panels(train, val))
    assert list(panels) == ["loss", "loss: box", "loss: mask", "learning rate", "average precision"]
    assert [line[0] for line in panels["loss"]] == ["train", "validation"]
    assert panels["loss"][0][1][60] == 7.0
    assert [line[0] for line in panels["average precision"]] == ["bbox AP", "segm AP", "segm AP50"]


def test_read_takes_the_later_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "kind": "train", "loss": 1}\nnot json\n[1]\n{"step": 1, "kind": "train", "loss": 2}\n{"kind": "val"}\n'
    )
    assert curves.read_metrics(path) == ({"loss": {1: 2.0}}, {})


def test_curves_of_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        plot_curves(tmp_path / "missing.jsonl", tmp_path / "results.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no training or validation numbers"):
        plot_curves(tmp_path / "empty.jsonl", tmp_path / "results.png")


def test_running_mean():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(curves._running_mean(values, 2), [1, 2, 3, 5, 6])


def test_no_pyplot(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "matplotlib.pyplot", None
    )  # its import would raise; it holds global state and may want a display
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines()[0]))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "results.png")
