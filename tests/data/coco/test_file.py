"""Reading COCO files of all variants, and writing them for pycocotools."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskseg.data.coco.file import CocoFile, ImageRecord, read_coco
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks, Polygons, RunLengths
from maskseg.masks.base import rle_to_bitmaps
from maskseg.structures import Categories

SHARED = Path(__file__).parents[4] / "shared" / "data"
HEIGHT, WIDTH = 24, 40
SQUARE = [[4.0, 3.0, 14.0, 3.0, 14.0, 9.0, 4.0, 9.0]]


def bitmap() -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    found[5:12, 20:31] = 1
    found[8, 22:25] = 0
    return found


def rle(compressed: bool, mask: np.ndarray | None = None) -> dict[str, Any]:
    mask = bitmap() if mask is None else mask
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    change = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel(order="F")])))
    return {
        "size": list(mask.shape),
        "counts": np.diff(np.concatenate([[0], change, [mask.size]])).tolist(),
    }


def dataset() -> dict[str, Any]:
    """Every kind of annotation: ids with gaps, missing fields, an image without objects."""
    return {
        "images": [
            {"id": 70, "file_name": "b.png", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "sub/a.png", "height": HEIGHT, "width": WIDTH},
            {"id": 9, "file_name": "none.png", "height": 5, "width": 6},
        ],
        "categories": [
            {"id": 90, "name": "cup"},
            {"id": 7, "name": "cat"},
            {"id": 12, "name": "dog", "supercategory": "x"},
        ],
        "annotations": [
            {
                "id": 5,
                "image_id": 3,
                "category_id": 90,
                "bbox": [4, 3, 10, 6],
                "area": 60.0,
                "iscrowd": 0,
                "segmentation": SQUARE,
            },
            {
                "id": 8,
                "image_id": 70,
                "category_id": 7,
                "bbox": [20, 5, 11, 7],
                "segmentation": rle(True),
            },
            {"image_id": 3, "category_id": 12, "iscrowd": 1, "segmentation": rle(False)},
            {"id": 2, "image_id": 3, "category_id": 7, "bbox": [1.25, 2.5, 3.125, 4.75]},
            {"id": 4, "image_id": 3, "category_id": 7, "iscrowd": None, "segmentation": SQUARE},
        ],
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def pycoco(file: CocoFile) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy(file.to_dict())
    json.dumps(coco.dataset)
    coco.createIndex()
    return coco


def bitmaps(file: CocoFile, index: int) -> np.ndarray:
    image = file.images[index]
    return rle_to_bitmaps(
        AnnotatedMasks.from_file(file.annotations(index).shapes, image.height, image.width).to_rle()
    )


def test_mixed_file(tmp_path: Path) -> None:
    file = read_coco(write(tmp_path / "a.json", dataset()))
    assert not file.report.errors
    assert file.categories == Categories(("cat", "dog", "cup"), (7, 12, 90))
    assert file.images[1] == ImageRecord(3, "sub/a.png", HEIGHT, WIDTH)
    assert [len(file.annotations(i)) for i in range(3)] == [1, 4, 0]
    found = file.annotations(1)
    assert found.labels.tolist() == [2, 1, 0, 0]
    assert found.labels.dtype == np.int64
    assert found.ids.tolist() == [5, 9, 2, 4]  # a missing id is numbered after the largest
    assert found.crowd.tolist() == [False, True, False, False]
    assert found.crowd.dtype == bool
    assert found.boxes.dtype == np.float32
    np.testing.assert_array_equal(
        found.boxes, [[4, 3, 14, 9], [20, 5, 31, 12], [1.25, 2.5, 4.375, 7.25], [4, 3, 14, 9]]
    )
    assert isinstance(found.shapes[0], Polygons)
    assert isinstance(found.shapes[1], RunLengths)
    assert found.shapes[2] is None
    runs = AnnotatedMasks.from_file([found.shapes[1]], HEIGHT, WIDTH).to_rle()
    np.testing.assert_array_equal(rle_to_bitmaps(runs)[0], bitmap())
    np.testing.assert_array_equal(bitmaps(file, 0)[0], bitmap())
    assert file.labels(1) == [2, 0, 0]
    assert file.has_objects().tolist() == [True, True, False]
    none = file.annotations(2)
    assert none.boxes.shape == (0, 4)
    assert none.shapes == ()


def test_pycocotools_reads_the_written_file(tmp_path: Path) -> None:
    file = read_coco(write(tmp_path / "a.json", dataset()))
    coco = pycoco(file)
    assert sorted(coco.anns) == [2, 4, 5, 8, 9]
    assert [c["id"] for c in coco.dataset["categories"]] == [7, 12, 90]
    assert coco.anns[8]["area"] == bitmap().sum()
    assert coco.anns[9]["iscrowd"] == 1
    assert coco.anns[9]["bbox"] == [20, 5, 11, 7]
    assert coco.anns[2]["area"] == 3.125 * 4.75
    assert coco.anns[5]["area"] == 60.0
    assert coco.anns[4]["area"] == 60.0
    for number in (8, 9):
        np.testing.assert_array_equal(coco.annToMask(coco.anns[number]), bitmap())
    # Writing and reading again changes nothing.
    again = read_coco(write(tmp_path / "b.json", file.to_dict()))
    assert again.to_dict() == file.to_dict()


def test_random_masks_in_every_encoding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    content = dataset()
    masks = [(rng.random((HEIGHT, WIDTH)) < rng.random()).astype(np.uint8) for _ in range(60)]
    masks = [m for m in masks if m.any()]
    content["annotations"] = [
        {"id": i + 1, "image_id": 3, "category_id": 7, "segmentation": rle(i % 2 == 0, m)}
        for i, m in enumerate(masks)
    ]
    file = read_coco(write(tmp_path / "a.json", content))
    np.testing.assert_array_equal(bitmaps(file, 1), np.array(masks, dtype=bool))
    coco = pycoco(file)
    for i, mask in enumerate(masks):
        np.testing.assert_array_equal(coco.annToMask(coco.anns[i + 1]), mask)
        rows, columns = np.nonzero(mask)
        low, high = (columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)
        np.testing.assert_array_equal(file.annotations(1).boxes[i], [*low, *high])
        assert coco.anns[i + 1]["area"] == mask.sum()


def test_categories_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", dataset())
    file = read_coco(path, categories=Categories(("dog", "bird", "cup", "cat"), (1, 2, 3, 4)))
    assert file.annotations(1).labels.tolist() == [2, 0, 3, 3]
    assert {a["category_id"] for a in file.to_dict()["annotations"]} == {1, 3, 4}
    assert [c["id"] for c in file.to_dict()["categories"]] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"a\.json(.|\n)*'cup' \(id 90\)"):
        read_coco(path, categories=Categories(("dog", "cat"), (12, 7)))


def test_categories_by_id_where_names_repeat(tmp_path: Path) -> None:
    """The names of an old checkpoint may repeat; those of a file are merged."""
    path = write(tmp_path / "a.json", dataset())
    names = {category["id"]: category["name"] for category in dataset()["categories"]}
    repeated = Categories((*(names[i] for i in (90, 12, 7)), names[7]), (90, 12, 7, 1))
    file = read_coco(path, categories=repeated)
    assert file.annotations(1).labels.tolist() == [0, 1, 2, 2]
    with pytest.raises(UserError, match="category matched by its id has another name"):
        read_coco(path, categories=Categories(("a", "cat", "cat"), (90, 12, 7)))
    with pytest.raises(UserError, match=r"'dog' \(id 12\)"):
        read_coco(path, categories=Categories(("cat", "cat"), (90, 7)))


def test_categories_of_one_name_are_one_class(tmp_path: Path) -> None:
    content = dataset()
    content["categories"][0]["name"] = "cat"
    file = read_coco(write(tmp_path / "a.json", content))
    assert file.categories == Categories(("cat", "dog"), (7, 12))
    assert file.annotations(1).labels.tolist() == [0, 1, 0, 0]
    kind = "category name of more than one id, read as one class"
    assert file.report.warnings[kind].examples == ["'cat': ids 7, 90"]
    assert {a["category_id"] for a in file.to_dict()["annotations"]} == {7, 12}


def test_class_table(tmp_path: Path) -> None:
    file = read_coco(write(tmp_path / "a.json", dataset()))
    assert file.class_counts() == [(2, 3, 0), (1, 0, 1), (1, 1, 0)]
    assert file.class_table().splitlines() == [
        "class  images instances crowds",
        "------------------------------",
        "cat         2         3      0",
        "dog         1         0      1",
        "cup         1         1      0",
        "3 classes, 3 images (1 without objects), 4 instances, 1 crowds",
    ]
    content = dataset()
    content["categories"] += [
        {"id": 100 + i, "name": f"class number {i} {'x' * (i % 30)}"} for i in range(80)
    ]
    lines = read_coco(write(tmp_path / "b.json", content)).class_table().splitlines()
    assert len({len(line) for line in lines[:-2]}) == 1
    assert max(len(line) for line in lines) <= 120
    assert len(lines) < 50
    assert "83 classes" in lines[-1]


def test_the_objects_of_all_images_without_crowds(tmp_path: Path) -> None:
    objects = read_coco(write(tmp_path / "a.json", dataset())).objects()
    images = [objects.image_index == i for i in range(3)]
    assert [int(of_image.sum()) for of_image in images] == [1, 3, 0]
    assert objects.labels[images[0]].tolist() == [0]
    assert objects.boxes[images[0]].tolist() == [[20, 5, 11, 7]]
    assert sorted(objects.labels[images[1]].tolist()) == [0, 0, 2]
    assert objects.image_sizes.tolist() == [[HEIGHT, WIDTH], [HEIGHT, WIDTH], [5, 6]]


def test_no_annotations(tmp_path: Path) -> None:
    content = dataset() | {"annotations": []}
    file = read_coco(write(tmp_path / "a.json", content))
    assert file.class_counts() == [(0, 0, 0)] * 3
    assert (len(file.objects().labels), file.objects().boxes.shape) == (0, (0, 4))
    assert file.to_dict()["annotations"] == []
    assert len(file.annotations(0)) == 0
    assert "3 classes, 3 images (3 without objects)" in file.class_table()
    with pytest.raises(UserError, match="no categories"):
        read_coco(write(tmp_path / "a.json", content | {"categories": []}))


@pytest.mark.skipif(not (SHARED / "coco_tiny").is_dir(), reason="needs ../shared/data/coco_tiny")
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_equals_pycocotools(split: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = SHARED / "coco_tiny" / "annotations" / f"instances_{split}2017.json"
    file = read_coco(path, image_root=SHARED / "coco_tiny" / f"{split}2017")
    assert file.report.text().endswith("no problems found")
    theirs, ours = COCO(str(path)), pycoco(file)
    capsys.readouterr()
    assert list(theirs.anns) != []
    assert set(theirs.anns) == set(ours.anns)
    for number, annotation in theirs.anns.items():
        for key in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            assert ours.anns[number][key] == annotation[key]
        np.testing.assert_array_equal(
            ours.annToMask(ours.anns[number]), theirs.annToMask(annotation)
        )
    for index, image in enumerate(file.images):
        expected = theirs.loadAnns(theirs.getAnnIds([image.id]))
        assert file.annotations(index).ids.tolist() == [a["id"] for a in expected]
        if expected:
            np.testing.assert_array_equal(
                bitmaps(file, index), [theirs.annToMask(a).astype(bool) for a in expected]
            )


@pytest.mark.skipif(not (SHARED / "nuclei").is_dir(), reason="needs ../shared/data/nuclei")
def test_nineteen_thousand_masks_are_read_quickly() -> None:
    start = time.perf_counter()
    file = read_coco(SHARED / "nuclei" / "train.json")
    assert time.perf_counter() - start < 10  # 0.6 s on an idle machine
    assert (len(file), file.num_annotations) == (457, 19142)
    boxes = file.annotations(0).boxes
    x, y, w, h = coco_mask.toBbox(
        AnnotatedMasks.from_file(file.annotations(0).shapes, 256, 320).to_rle()
    ).T
    np.testing.assert_array_equal(boxes, np.stack([x, y, x + w, y + h], axis=1))
