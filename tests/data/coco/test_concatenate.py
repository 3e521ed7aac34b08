"""Several COCO files are read as one dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import SQUARE, dataset, rle

from maskseg.data.coco.file import CocoFile, read_coco
from maskseg.errors import UserError

OUTSIDE = [[-5.0, 3.0, 14.0, 3.0, 14.0, 9.0, -5.0, 9.0]]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def second() -> dict[str, Any]:
    """A dataset with ids of the first, other names, and masks of each kind."""
    content = dataset(
        {"id": 1, "image_id": 1, "category_id": 4, "segmentation": rle([100, 50, 450])},
        {"id": 3, "image_id": 7, "category_id": 2, "segmentation": OUTSIDE},
    )
    del content["annotations"][0]
    content["images"] = [
        {"id": i, "file_name": f"second{i}.png", "height": 20, "width": 30} for i in (1, 7)
    ]
    content["categories"] = [{"id": 4, "name": "dog"}, {"id": 2, "name": "cat"}]
    return content


def described(file: CocoFile, index: int) -> list[Any]:
    """What the images show, apart from ids."""
    truth = file.annotations(index)
    names = [file.categories.names[label] for label in truth.labels]
    masks = [str(shape) for shape in truth.shapes]
    return [file.images[index].file_name, names, truth.boxes.tolist(), masks]


def test_files_are_read_as_one(tmp_path: Path) -> None:
    first_path = write(tmp_path / "a.json", dataset({"bbox": [1, 1, 2, 2], "iscrowd": 1}))
    second_path = write(tmp_path / "b.json", second())
    file = read_coco([first_path, second_path])
    parts = [read_coco(first_path), read_coco(second_path)]
    assert [described(file, i) for i in range(4)] == [
        described(part, i) for part in parts for i in range(2)
    ]
    assert file.categories.names == ("cat", "dog")
    assert file.categories.ids == (4, 5)
    assert [image.id for image in file.images] == [1, 2, 8, 7]
    written = file.to_dict()["annotations"]
    ids = [annotation["id"] for annotation in written]
    assert len(set(ids)) == 4
    assert ids[:2] == [1, 10]
    assert [a["image_id"] for a in written] == [1, 2, 8, 7]
    warnings = {kind: finding.count for kind, finding in file.report.warnings.items()}
    assert warnings["image id that an earlier file uses, renumbered"] == 1
    assert warnings["annotation id that an earlier file uses, renumbered"] == 1
    assert f"{second_path}: annotation 3 (image 7)" in file.report.text()
    assert file.name == f"{first_path}, {second_path}"
    assert sum(file.class_counts()[0][1:]) == 3


def test_a_second_reading_of_the_written_file_is_the_same(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.json", dataset()), write(tmp_path / "b.json", second())]
    file = read_coco(paths)
    again = read_coco(write(tmp_path / "c.json", file.to_dict()))
    assert again.to_dict() == file.to_dict()


def test_keypoints_follow_their_class(tmp_path: Path) -> None:
    content = second()
    content["categories"][1]["keypoints"] = ["a", "b"]
    content["annotations"][1]["keypoints"] = [1, 2, 2, 3, 4, 1]
    paths = [write(tmp_path / "a.json", dataset()), write(tmp_path / "b.json", content)]
    file = read_coco(paths)
    assert file.categories.keypoints == (("a", "b"), ())
    points = file.annotations(3).keypoints
    np.testing.assert_array_equal(points, [[[1.5, 2.5, 2], [3.5, 4.5, 1]]])
    assert file.annotations(0).keypoints.tolist() == [[[0, 0, 0], [0, 0, 0]]]


def test_problems_name_their_file(tmp_path: Path) -> None:
    bad = second()
    bad["annotations"][0]["image_id"] = 99
    paths = [write(tmp_path / "a.json", dataset()), write(tmp_path / "b.json", bad)]
    with pytest.raises(UserError, match=r"b\.json: annotation 1 \(image 99\)"):
        read_coco(paths)
    paths[0].write_text("{")
    with pytest.raises(UserError, match=r"a\.json: Expecting(.|\n)*b\.json: annotation 1"):
        read_coco(paths)


def test_an_image_of_both_files_is_a_warning(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.json", dataset()), write(tmp_path / "b.json", dataset())]
    file = read_coco(paths)
    kind = "file name of images of several files: each has its own file's annotations only"
    assert file.report.warnings[kind].count == 2
    assert SQUARE in [a["segmentation"] for a in file.to_dict()["annotations"]]
