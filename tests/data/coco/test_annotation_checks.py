"""Checks of boxes, areas and crowds: invalid annotations are reported, empty ones dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import SQUARE, cleaned, dataset, errors, rle, write
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskseg.data.coco.file import read_coco

PIXELS = 20 * 30


def test_boxes(tmp_path: Path) -> None:
    boxes = [
        [5, 5, 0, 4],
        [5, 5, 4, -1],
        [600, 5, 1e-7, 1],
        [40, 5, 4, 4],
        [-9, -9, 4, 4],
        [28, 18, 9, 9],
        [1e300, 1, 1e308, 1],
        [-5, -5, 90, 90],
    ]
    file, warnings = cleaned(tmp_path, dataset(*({"bbox": b} for b in boxes)))
    assert warnings == {
        "box without width or height, dropped": 4,
        "annotation outside its image, dropped": 2,
        "bbox that extends beyond its image, clipped": 2,
        "object without a mask, beside objects with masks": 2,
    }
    np.testing.assert_array_equal(file.annotations(1).boxes, [[28, 18, 30, 20], [0, 0, 30, 20]])
    assert [a["bbox"] for a in file.to_dict()["annotations"]][1:] == [
        [28, 18, 2, 2],
        [0, 0, 30, 20],
    ]


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([1, 1, float("nan"), 2], "bbox with NaN or infinity"),
        ([float("inf"), 1, 2, 2], "bbox with NaN or infinity"),
        ([1, 1, 2], "bbox that is not four numbers"),
        ([1, 1, 2, "x"], "bbox that is not four numbers"),
        ([1, 1, 2, None], "bbox that is not four numbers"),
        ("abcd", "bbox that is not four numbers"),
        ({"x": 1}, "bbox that is not four numbers"),
        (7, "bbox that is not four numbers"),
        (None, "annotation with neither bbox nor segmentation"),
    ],
)
def test_invalid_boxes(tmp_path: Path, box: Any, kind: str) -> None:
    assert errors(tmp_path, dataset({"bbox": box})) == {kind: 1}


@pytest.mark.parametrize("area", [None, float("nan"), float("inf"), "x", -1, 0, [1], 10**400])
def test_invalid_areas_are_computed(tmp_path: Path, area: Any) -> None:
    file, _ = cleaned(tmp_path, dataset({"area": area, "segmentation": SQUARE}))
    assert file.to_dict()["annotations"][1]["area"] == 60.0


@pytest.mark.parametrize("crowd", [2, "1", [1], float("nan")])
def test_invalid_crowd_flags(tmp_path: Path, crowd: Any) -> None:
    assert errors(tmp_path, dataset({"bbox": [1, 1, 2, 2], "iscrowd": crowd})) == {
        "iscrowd that is neither 0 nor 1": 1
    }


def test_nothing_to_learn_is_a_warning(tmp_path: Path) -> None:
    content = dataset()
    content["annotations"][0]["iscrowd"] = 1
    assert cleaned(tmp_path, content)[1] == {"only crowds": 1}
    assert cleaned(tmp_path, dataset() | {"annotations": []})[1] == {"no annotations at all": 1}
    empty = dataset() | {"images": [], "annotations": []}
    assert cleaned(tmp_path, empty)[1] == {"no images": 1, "no annotations at all": 1}
    assert errors(tmp_path, empty | {"categories": []}) == {"no categories": 1}


def test_a_dropped_annotation_does_not_affect_others(tmp_path: Path) -> None:
    """Annotations stay aligned with their masks if others before them are dropped."""
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:9, 4:14] = 1
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    bad = [
        {"segmentation": [[1, 1]]},
        {"bbox": [0, 0, 0, 0]},
        {"segmentation": rle([PIXELS])},
        {"segmentation": [[-9, -9, -8, -8, -9, -7]]},
    ]
    good = [
        {"segmentation": rle(text)},
        {"segmentation": SQUARE},
        {"bbox": [4, 3, 10, 6], "segmentation": [[0, 0], *SQUARE]},
    ]
    rng = np.random.default_rng(0)
    drawn = [
        (bad + good)[i] | {"image_id": int(rng.integers(1, 3))} for i in rng.integers(0, 7, 200)
    ]
    file, _ = cleaned(tmp_path, dataset(*drawn))
    coco = COCO()
    coco.dataset = file.to_dict()
    coco.createIndex()
    assert len(coco.anns) == 1 + sum(
        {k: v for k, v in d.items() if k != "image_id"} in good for d in drawn
    )
    for annotation in coco.anns.values():
        assert annotation["bbox"] == [4, 3, 10, 6]
        np.testing.assert_array_equal(coco.annToMask(annotation), mask)


# Boxes and masks of the same annotation

CORNERS = "bbox that is x1, y1, x2, y2 of its mask instead of x, y, width, height"
STATED = "; training uses the bbox as stated"


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([4, 3, 10, 6], None),
        ([3, 2, 12, 8], None),  # rounded outwards
        ([5, 4, 9, 5], None),  # rounded inwards
        ([2, 1, 20, 7], None),  # a loose box, as of an object that is partly hidden
        ([16, 10, 10, 6], "bbox that does not enclose its mask" + STATED),
        ([4, 3, 5, 6], "bbox that does not enclose its mask" + STATED),
        ([4, 3, 14, 9], CORNERS + STATED),
        ([0.2, 0.2, 0.3, 0.4], "bbox in fractions of the image's size instead of pixels" + STATED),
        ([0, 0, 30, 20], "bbox of at least 4 times the area of its mask's box" + STATED),
    ],
)
@pytest.mark.parametrize("encoding", ["polygon", "rle"])
def test_boxes_are_compared_with_their_masks(
    tmp_path: Path, box: list[float], kind: str | None, encoding: str
) -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[3:9, 4:14] = 1
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    shape = SQUARE if encoding == "polygon" else rle(text)
    file, warnings = cleaned(tmp_path, dataset({"bbox": box, "segmentation": shape}))
    assert warnings == ({} if kind is None else {kind: 1})
    assert file.to_dict()["annotations"][1]["bbox"] == box
    if kind:
        assert file.report.warnings[kind].examples == ["annotation 10 (image 2)"]


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([4, 3, 0, 6], "bbox without width or height, taken from its mask"),
        ([4, 3, -10, -6], "bbox without width or height, taken from its mask"),
        ([0, 0, 0, 0], "bbox without width or height, taken from its mask"),
        ([40, 3, 10, 6], "bbox outside its image, taken from its mask"),
    ],
)
def test_a_box_that_is_none_is_taken_from_the_mask(
    tmp_path: Path, box: list[float], kind: str
) -> None:
    file, warnings = cleaned(tmp_path, dataset({"bbox": box, "segmentation": SQUARE}))
    assert warnings == {kind: 1}
    np.testing.assert_array_equal(file.annotations(1).boxes, [[4, 3, 14, 9]])


def boxes_alone(*boxes: list[float]) -> dict[str, Any]:
    content = dataset(*({"bbox": box} for box in boxes))
    return content | {"annotations": content["annotations"][1:]}


def test_boxes_alone_in_other_units(tmp_path: Path) -> None:
    fractions = boxes_alone([0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5])
    assert errors(tmp_path, fractions) == {
        "bbox in fractions of the image's size instead of pixels": 2
    }
    corners = boxes_alone([4, 3, 14, 9], [20, 11, 29, 19], [1, 1, 3, 3])
    kind = "bbox that seems to be x1, y1, x2, y2 instead of x, y, width, height" + STATED
    assert cleaned(tmp_path, corners)[1][kind] == 3
    sizes = boxes_alone([4, 3, 14, 9], [20, 11, 9, 8], [1, 1, 3, 3])
    assert cleaned(tmp_path, sizes)[1] == {}
    polygons = dataset() | {"annotations": []}
    polygons["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 4, "segmentation": [[0.1, 0.1, 0.9, 0.1, 0.5, 0.8]]}
    ]
    assert errors(tmp_path, polygons) == {
        "polygon in fractions of the image's size instead of pixels": 1
    }


# Masks without a pixel, masks that are absent

THIN = [[5, 5.2, 20, 5.2, 20, 5.2]]
TINY = [[7.1, 7.1, 7.2, 7.1, 7.2, 7.2]]
BESIDE = [[-5, 3, 0.1, 3, 0.1, 9, -5, 9]]  # a tenth of a pixel of it is in the image
TWICE = [[2, 2, 12, 2, 12, 12, 2, 12, 2, 2, 12, 2, 12, 12, 2, 12]]  # even-odd: nothing is inside


@pytest.mark.parametrize("parts", [THIN, TINY, BESIDE, TWICE, THIN + TINY])
def test_polygons_without_a_pixel_are_dropped(tmp_path: Path, parts: list[list[float]]) -> None:
    rles = coco_mask.frPyObjects(parts, 20, 30)
    assert coco_mask.area(coco_mask.merge(rles)) == 0
    row = {"bbox": [4, 3, 10, 6], "segmentation": parts}
    file, warnings = cleaned(tmp_path, dataset(row, {**row, "segmentation": parts + SQUARE}))
    assert warnings["annotation whose polygons cover no pixel, dropped"] == 1
    assert file.annotations(1).ids.tolist() == [11]


def test_every_polygon_that_is_kept_has_pixels(tmp_path: Path) -> None:
    """The areas that decide are those of pycocotools, for small polygons of any form."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(3000):
        center = rng.uniform(0, (30, 20))
        points = center + rng.normal(size=(int(rng.integers(3, 8)), 2)) * rng.uniform(0.01, 3, 2)
        points = points.clip(0, (30, 20))
        rows.append({"segmentation": [points.ravel().tolist()]})
    file, _ = cleaned(tmp_path, dataset(*rows))
    written = [a["segmentation"] for a in file.to_dict()["annotations"] if a["image_id"] == 2]
    areas = [int(coco_mask.area(coco_mask.frPyObjects(s, 20, 30))[0]) for s in written]
    assert min(areas) > 0
    kept = {a["id"] for a in file.to_dict()["annotations"]}
    lost = [row["segmentation"] for i, row in enumerate(rows) if 10 + i not in kept]
    assert len(lost) > 100
    assert max(int(coco_mask.area(coco_mask.frPyObjects(s, 20, 30))[0]) for s in lost) == 0


def test_objects_without_a_mask_are_named(tmp_path: Path) -> None:
    box = {"bbox": [1, 1, 5, 5]}
    rows = [box, {**box, "segmentation": []}, {**box, "segmentation": [[]]}]
    file, warnings = cleaned(tmp_path, dataset(*rows, {**box, "iscrowd": 1}))
    assert warnings == {"object without a mask, beside objects with masks": 3}
    assert file.objects_without_masks() == [10, 11, 12]
    assert not file.has_masks()
    assert cleaned(tmp_path, boxes_alone([1, 1, 5, 5]))[1] == {}


# Crowds


def test_crowds_need_no_mask(tmp_path: Path) -> None:
    crowd = {"bbox": [1, 1, 5, 5], "iscrowd": 1}
    file, warnings = cleaned(tmp_path, dataset(crowd))
    assert warnings == {}
    assert file.has_masks()
    # pycocotools evaluates masks against a mask of every crowd.
    assert file.to_dict()["annotations"][1]["segmentation"] == [[1, 1, 6, 1, 6, 6, 1, 6]]
    alone = dataset(crowd) | {"annotations": dataset(crowd)["annotations"][1:]}
    assert not cleaned(tmp_path, alone)[0].has_masks()


def test_crowds_can_be_read_as_objects(tmp_path: Path) -> None:
    rows = [{"segmentation": SQUARE, "iscrowd": 1}, {"segmentation": SQUARE, "ignore": 1}]
    path = write(tmp_path, dataset(*rows))
    file = read_coco(path)
    assert file.annotations(1).crowd.tolist() == [True, True]
    file = read_coco(path, crowds="objects")
    assert file.annotations(1).crowd.tolist() == [False, True]
    assert {k: v.count for k, v in file.report.warnings.items()} == {
        "annotation with ignore=1, read as a crowd": 1
    }


def test_classes_with_crowds_only_are_named(tmp_path: Path) -> None:
    content = dataset({"segmentation": SQUARE, "iscrowd": 1, "category_id": 9})
    content["categories"].append({"id": 9, "name": "dog"})
    file, warnings = cleaned(tmp_path, content)
    assert warnings == {"class with crowds only": 1}
    assert "'dog'" in file.report.text()
    assert "data.crowds=objects" in file.report.text()


@pytest.mark.parametrize("ignore", [0, None, False, "no", [1]])
def test_other_values_of_ignore_are_not_read(tmp_path: Path, ignore: Any) -> None:
    file, warnings = cleaned(tmp_path, dataset({"segmentation": SQUARE, "ignore": ignore}))
    assert warnings == {}
    assert not file.annotations(1).crowd.any()


def test_ids_are_assigned_beside_the_largest_possible_one(tmp_path: Path) -> None:
    largest = 2**63 - 1
    annotations = [{"bbox": [1, 1, 5, 5], "id": number} for number in (largest, 0, 2, None)]
    file, _ = cleaned(tmp_path, dataset(*annotations))
    assert file.annotations(0).ids.tolist() == [1]
    assert file.annotations(1).ids.tolist() == [largest, 3, 2, 4]
