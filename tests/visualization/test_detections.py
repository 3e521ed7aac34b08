"""Images of detections: colors at known pixels, sizes, labels that do not overlap, odd images."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskseg.masks.base import encode_rle
from maskseg.visualization import detections, layout
from maskseg.visualization.colours import class_colour, instance_colour
from maskseg.visualization.detections import draw_detections

GREY = np.full((480, 640, 3), 90, dtype=np.uint8)


def rectangle(x0, y0, x1, y1, shape=(480, 640)):
    mask = np.zeros(shape, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def placed_labels(monkeypatch, *arguments, **options):
    """An image and the areas of its labels."""
    areas = []
    is_free = detections._is_free

    def spy(place, taken, boxes):
        free = is_free(place, taken, boxes)
        if free:
            areas.append(place)
        return free

    monkeypatch.setattr(detections, "_is_free", spy)
    image = draw_detections(*arguments, **options)
    return image, areas


def test_positions_of_mask_box_and_label():
    mask = rectangle(200, 150, 300, 250)
    image = draw_detections(GREY, [[200, 150, 300, 250]], [1], [0.9], mask[None], ["cat", "dog"])
    colour = np.array(layout.PALETTE[1])
    assert image.shape == GREY.shape
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[150, 250], colour)  # the frame, on the first row inside
    np.testing.assert_array_equal(image[249, 250], colour)
    fill = 90 + detections._FILL * (colour - 90.0)
    np.testing.assert_allclose(image[200, 250], fill, atol=1)
    np.testing.assert_array_equal(image[260:, :], GREY[260:, :])  # unchanged below the box
    np.testing.assert_array_equal(image[149, 201], colour)  # the label, above the box
    assert (GREY == 90).all()  # the input is not modified


def test_outline_follows_the_mask():
    mask = np.hypot(*np.ogrid[-240:240, -320:320]) < 100
    image = draw_detections(GREY, [[220, 140, 420, 340]], [0], None, mask[None], ["disc"])
    changed = (image == layout.PALETTE[0]).all(axis=2)
    assert changed[240, 221:223].all()  # leftmost pixels of the disc
    assert not changed[240, 230:400].any()


def test_small_images_are_enlarged_with_their_boxes_and_masks():
    small = np.full((256, 256, 3), 50, dtype=np.uint8)
    mask = rectangle(40, 60, 50, 70, (256, 256))
    image = draw_detections(small, [[40, 60, 50, 70]], [0], None, mask[None], ["cell"])
    assert image.shape == (768, 768, 3)
    inside = np.zeros((768, 768), dtype=bool)
    inside[180:210, 120:150] = True
    changed = (image != 50).any(axis=2)
    assert changed[inside].all()
    assert not changed[210:].any()
    assert not changed[:, :120].any()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((256, 256), 3), ((640, 3), 1), ((300, 500), 2), ((1, 1), 8), ((1000, 2000), 1)],
)
def test_enlargement(shape, expected):
    image = draw_detections(np.zeros((*shape, 3), np.uint8), [], [], [], None, ["a"])
    assert image.shape == (shape[0] * expected, shape[1] * expected, 3)


def test_rle_and_bitmaps_give_the_same_image():
    mask = np.hypot(*np.ogrid[-240:240, -320:320]) < 100
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    arguments = GREY, [[220, 140, 420, 340]], [0], [0.5]
    a, b = (
        draw_detections(*arguments, m, ["disc"])
        for m in (mask[None], [{"size": rle["size"], "counts": rle["counts"].decode()}])
    )
    np.testing.assert_array_equal(a, b)


def test_min_score_and_invalid_boxes():
    boxes = [[10, 30, 100, 100], [300, 300, 400, 400], [np.nan, 0, 9, 9]]
    scores = [0.9, 0.2, 0.95]
    image = draw_detections(GREY, boxes, [0, 0, 0], scores, None, ["a"], min_score=0.5)
    np.testing.assert_array_equal(
        image, draw_detections(GREY, boxes[:1], [0], scores[:1], None, ["a"])
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
def test_extreme_sizes(shape):
    image = draw_detections(
        np.zeros((*shape, 3), np.uint8),
        [[0, 0, shape[1], shape[0]]],
        [0],
        [0.5],
        np.ones((1, *shape), bool),
        ["a"],
    )
    assert image.any()


def test_invalid_arguments():
    with pytest.raises(ValueError, match="uint8"):
        draw_detections(GREY[..., 0], [], [], [], None, [])
    with pytest.raises(ValueError, match="mask 0"):
        draw_detections(GREY, [[0, 0, 5, 5]], [0], [1.0], np.ones((1, 5, 5), bool), ["a"])


def frame_colours(boxes, labels):
    """The color of the frame of each box, at the middle of its lower side."""
    boxes = np.array(boxes)
    image = draw_detections(GREY, boxes, labels, None, None, ["a", "b", "c", "d"])
    x = ((boxes[:, 0] + boxes[:, 2]) / 2).astype(int)
    return [
        tuple(image[y - 1, x].tolist()) for x, y in zip(x, boxes[:, 3].astype(int), strict=True)
    ]


def test_a_colour_is_a_class_whatever_stands_beside_it():
    boxes = [[10 + 60 * i, 100, 50 + 60 * i, 200] for i in range(4)]
    assert frame_colours(boxes, [3, 1, 0, 2]) == [class_colour(k) for k in (3, 1, 0, 2)]
    crowded = [[100 + 3 * i, 100 + 3 * i, 200 + 3 * i, 200 + 3 * i] for i in range(4)]
    assert set(frame_colours(crowded, [3, 1, 0, 2])) == {class_colour(k) for k in range(4)}


def test_objects_of_one_class_differ_in_lightness():
    boxes = [[10 + 60 * i, 100, 50 + 60 * i, 200] for i in range(5)]
    colours = frame_colours(boxes, [3] * 5)
    assert len(set(colours)) == 5
    assert set(colours) == {instance_colour(3, shade) for shade in range(5)}


def test_labels_stay_inside_and_do_not_overlap(monkeypatch):
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
    assert detections._label_texts(1, 0.873, ["cat", "dog"], True) == ["dog 0.87", "0.87"]
    assert detections._label_texts(1, None, ["cat", "dog"], True) == ["dog"]
    assert detections._label_texts(0, 0.5, ["cell"], False) == ["0.50"]
    assert detections._label_texts(0, None, ["cell"], False) == []


@pytest.mark.parametrize("shape", [(480, 640), (60, 90)])
def test_run_lengths_are_drawn_as_their_bitmaps(shape):
    height, width = shape
    y, x = np.mgrid[:height, :width]
    masks = np.stack(
        [
            np.hypot(x - 0.3 * width, y - 0.4 * height) < 0.3 * height,
            np.hypot(x - width, y) < 0.5 * height,  # cut by the border
            x < 0,  # empty
        ]
    )
    boxes = [[2, 3, 40, 50], [10, 0, width, 30], [5, 5, 9, 9]]
    image = np.full((*shape, 3), 120, dtype=np.uint8)
    rles = [encode_rle(mask)[0] for mask in masks]
    drawings = [
        draw_detections(image, boxes, [0, 1, 1], None, m, ["a", "b"]) for m in (masks, rles)
    ]
    assert np.array_equal(*drawings)
    assert (drawings[0] != drawings[0][-1, -1]).any()
