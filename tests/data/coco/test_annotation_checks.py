"""Checks of boxes, areas and crowds: invalid annotations are reported, empty ones dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import SQUARE, cleaned, dataset, errors, rle
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

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
