"""A damaged COCO file is repaired: what cannot be mended is dropped, and every change is listed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import SQUARE, dataset, rle, write
from PIL import Image

from maskseg.data.coco.file import CocoFile, read_coco
from maskseg.data.coco.repair import RepairOptions, repair_coco, without_nan
from maskseg.errors import UserError

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("1.png", "2.png", "sub/3.png"):
        Image.new("RGB", (30, 20)).save(root / name)
    return root


def content() -> dict[str, Any]:
    """Two images with three objects, and fields that are not part of the format."""
    made = dataset(
        {"segmentation": SQUARE, "bbox": [4, 3, 10, 6], "score": 0.5, "attributes": {"a": [1]}},
        {"segmentation": rle([100, 50, 450]), "bbox": [5, 0, 3, 20]},
    )
    made["info"] = {"year": 2020}
    return made


def repaired(
    tmp_path: Path, images: Path, made: dict[str, Any], **options: Any
) -> tuple[CocoFile, dict[str, Any], dict[str, int]]:
    """Return the repaired file, which must be free of errors, its JSON, and the changes by kind."""
    path = write(tmp_path, json.dumps(made))
    before = path.read_bytes()
    result, changes = repair_coco(path, RepairOptions(images, **options))
    assert path.read_bytes() == before
    target = tmp_path / "repaired.json"
    target.write_text(json.dumps(without_nan(result), allow_nan=False))
    file = read_coco(target, image_root=images, check_images=options.get("check_images", True))
    again, changes_again = repair_coco(target, RepairOptions(images))
    assert again == json.loads(target.read_text())
    assert not changes_again.warnings
    return file, result, {kind: entry.count for kind, entry in changes.warnings.items()}


def test_a_good_file_is_not_changed(tmp_path: Path, images: Path) -> None:
    made = content()
    for annotation in made["annotations"]:
        annotation |= {"area": 60, "iscrowd": 0}
    _, result, changes = repaired(tmp_path, images, made)
    assert changes == {}
    assert result == made


def set_annotation(index: int, **values: Any) -> Edit:
    return lambda made: made["annotations"][index].update(values)


def set_image(index: int, **values: Any) -> Edit:
    return lambda made: made["images"][index].update(values)


def string_ids(made: dict[str, Any]) -> None:
    for image in made["images"]:
        image["id"] = f"x{image['id']}"
    for annotation in made["annotations"]:
        annotation["image_id"] = f"x{annotation['image_id']}"
        annotation["id"] = f"y{annotation['id']}"


def large_ids(made: dict[str, Any]) -> None:
    made["categories"][0]["id"] = 2**70
    for annotation in made["annotations"]:
        annotation["category_id"] = 2**70
        annotation["id"] += 2**64


def all_crowds(made: dict[str, Any]) -> None:
    for annotation in made["annotations"]:
        annotation["iscrowd"] = 1


def no_categories(made: dict[str, Any]) -> None:
    made["categories"] = []


def numbers_as_text(made: dict[str, Any]) -> None:
    for annotation in made["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])


@pytest.mark.parametrize(
    ("edit", "kinds", "count"),
    [
        (string_ids, ["image renumbered", "annotation renumbered"], 3),
        (large_ids, ["category renumbered", "annotation renumbered"], 3),
        (numbers_as_text, [], 3),
        (all_crowds, ["iscrowd set"], 3),
        (no_categories, ["category added"], 3),
        (set_annotation(1, id=1), ["annotation renumbered"], 3),
        (set_annotation(1, id=None), ["annotation renumbered"], 3),
        (set_annotation(1, bbox=[14, 9, 10, 6]), ["bbox that contradicts its mask"], 3),
        (set_annotation(1, bbox=[4, 3, 14, 9]), ["bbox that contradicts its mask"], 3),
        (set_annotation(1, bbox=[0.1, 0.1, 0.3, 0.3]), ["bbox that contradicts its mask"], 3),
        (set_annotation(1, bbox=[4, 3, 0, 0]), ["taken from its mask"], 3),
        (set_annotation(1, bbox=[1, float("nan"), 2, 2]), ["bbox that is not four numbers"], 3),
        (set_annotation(1, bbox="x"), ["bbox that is not four numbers"], 3),
        (set_annotation(1, bbox=None), [], 3),
        (set_annotation(1, segmentation=SQUARE[0]), ["put into a list"], 3),
        (set_annotation(1, segmentation=[[4, 3], [14, 3], [14, 9], [4, 9]]), ["into a list"], 3),
        (set_annotation(1, segmentation=[*SQUARE, [1, 2, 3]]), ["cannot be read, removed"], 3),
        (set_annotation(1, segmentation=[*SQUARE, [1, 2]]), ["fewer than 3 points"], 3),
        (set_annotation(1, segmentation=[[5, 5.2, 20, 5.2, 20, 5.2]]), ["cover no pixel"], 2),
        (set_annotation(1, segmentation=rle([600])), ["empty mask"], 2),
        (set_annotation(1, segmentation=rle([3])), ["do not sum"], 2),
        (set_annotation(1, segmentation=[]), ["marked as a crowd"], 3),
        (set_annotation(1, iscrowd="1"), ["iscrowd set"], 3),
        (set_annotation(1, iscrowd=[7]), ["iscrowd set"], 3),
        (set_annotation(1, keypoints=[1, 2]), ["keypoints that cannot be read"], 3),
        (set_annotation(1, image_id=99), ["without an image"], 2),
        (set_annotation(1, category_id=99), ["without a category"], 2),
        (set_image(1, file_name="/data/x/2.png"), ["file name mended"], 3),
        (set_image(1, file_name="images/2.png"), ["file name mended"], 3),
        (set_image(1, file_name="sub\\3.png"), ["file name mended"], 3),
        (set_image(1, file_name="C:\\x\\sub\\3.png"), ["file name mended"], 3),
        (set_image(1, file_name="../2.png"), ["file name mended"], 3),
        (set_image(1, file_name=None, coco_url="http://x/y/2.png"), ["file name mended"], 3),
        (set_image(1, file_name="absent.png"), ["whose file cannot be used"], 1),
        (set_image(1, file_name="a\ud800.png"), ["whose file cannot be used"], 1),
        (set_image(1, file_name=None), ["without a file_name"], 1),
        (set_image(1, height=30, width=20), ["size taken from the file"], 3),
        (set_image(1, height=None), ["size taken from the file"], 3),
        (set_image(1, height=40, width=60), ["whose file has another size"], 1),
        (set_image(1, id=1), ["whose id names several files"], None),
        (set_image(1, id=None), ["without an id"], 1),
        (lambda made: made["images"].append(made["images"][0]), ["listed twice"], 3),
        (lambda made: made["images"].append(7), ["no object"], 3),
        (lambda made: made["annotations"].append("x"), ["no object"], 3),
        (lambda made: made["categories"].append(None), ["no object"], 3),
        (lambda made: made["categories"].append({"id": 4, "name": "dog"}), ["renumbered"], 3),
        (lambda made: made["categories"].append({"id": 5, "name": "cat"}), ["merged"], 3),
        (lambda made: made["categories"][0].update(name="c\ud800t"), ["name mended"], 3),
        (lambda made: made["categories"][0].update(name=" "), ["name mended"], 3),
        (lambda made: made["categories"][0].update(keypoints=7), ["cannot be read, removed"], 3),
    ],
)
def test_repairs(
    tmp_path: Path, images: Path, edit: Edit, kinds: list[str], count: int | None
) -> None:
    made = content()
    edit(made)
    if count is None:
        with pytest.raises(UserError, match="nothing is left to train on"):
            repaired(tmp_path, images, made)
        return
    file, result, changes = repaired(tmp_path, images, made)
    for kind in kinds:
        assert any(kind in change for change in changes), changes
    assert bool(changes) == bool(kinds)
    assert file.num_annotations == count
    assert result["info"] == {"year": 2020}
    assert not {kind for kind in file.report.warnings if kind != "class with crowds only"}
    assert len(file.has_objects().nonzero()[0]) > 0


def test_values_of_repaired_annotations(tmp_path: Path, images: Path) -> None:
    made = content()
    made["annotations"][1] |= {"bbox": [4, 3, 14, 9], "area": 1}
    made["annotations"][2] |= {"bbox": None, "area": None}
    made["annotations"].append(
        {"id": 3, "image_id": 2, "category_id": 4, "segmentation": [[-5, 3, 14, 3, 14, 9, -5, 9]]}
    )
    result = repaired(tmp_path, images, made)[1]["annotations"]
    assert [a["bbox"] for a in result] == [
        [4, 3, 10, 6],
        [4, 3, 10, 6],
        [5, 0, 3, 20],
        [0, 3, 14, 6],
    ]
    assert [a["area"] for a in result] == [60, 60, 50, 84]
    assert result[1]["attributes"] == {"a": [1]}
    assert result[2]["segmentation"] == rle([100, 50, 450])
    assert np.min(result[3]["segmentation"]) == 0


def test_boxes_alone_in_other_units(tmp_path: Path, images: Path) -> None:
    made = content()
    made["annotations"] = [
        {"id": i + 1, "image_id": 2, "category_id": 4, "bbox": box}
        for i, box in enumerate([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 0.5, 0.5]])
    ]
    file, _, changes = repaired(tmp_path, images, made)
    np.testing.assert_allclose(file.annotations(1).boxes, [[3, 4, 12, 12], [15, 10, 30, 20]])
    assert list(changes) == ["bbox in fractions of the image's size instead of pixels, converted"]
    corners = [[4, 3, 14, 9], [20, 11, 29, 19], [1, 1, 3, 3]]
    for annotation, box in zip(made["annotations"], corners, strict=False):
        annotation["bbox"] = box
    file, _, changes = repaired(tmp_path, images, made)
    np.testing.assert_allclose(file.annotations(1).boxes, corners[:2])
    assert sum(changes.values()) == 2


def test_polygons_in_fractions(tmp_path: Path, images: Path) -> None:
    made = content()
    made["annotations"] = [
        {
            "id": 1,
            "image_id": 2,
            "category_id": 4,
            "bbox": [0.1, 0.2, 0.4, 0.4],
            "segmentation": [[0.1, 0.2, 0.5, 0.2, 0.5, 0.6, 0.1, 0.6]],
        }
    ]
    file = repaired(tmp_path, images, made)[0]
    np.testing.assert_allclose(file.annotations(1).boxes, [[3, 4, 15, 12]])


def test_keypoints(tmp_path: Path, images: Path) -> None:
    made = content()
    made["categories"][0] |= {"keypoints": ["a", "b"], "skeleton": [[0, 1]]}
    made["annotations"][0] |= {"keypoints": [1, 1, 2, 2, 2, 2], "num_keypoints": 2}
    made["annotations"][1] |= {"keypoints": [1, 1, 7, 2, 2, 2], "num_keypoints": 2}
    file, result, changes = repaired(tmp_path, images, made)
    assert result["categories"][0]["skeleton"] == [[1, 2]]
    assert file.categories.skeletons == (((0, 1),),)
    assert "keypoints" not in result["annotations"][1]
    assert set(changes) == {"skeleton counted from 1", "keypoints that cannot be read, removed"}


def test_images_are_kept_without_a_look_at_their_files(tmp_path: Path, images: Path) -> None:
    made = content()
    made["images"][1]["file_name"] = "absent.png"
    _, result, changes = repaired_without_files(tmp_path, images, made)
    assert changes == {}
    assert len(result["images"]) == 2


def repaired_without_files(
    tmp_path: Path, images: Path, made: dict[str, Any]
) -> tuple[CocoFile, dict[str, Any], dict[str, int]]:
    path = write(tmp_path, json.dumps(made))
    result, changes = repair_coco(path, RepairOptions(images, check_images=False))
    (tmp_path / "repaired.json").write_text(json.dumps(result))
    file = read_coco(tmp_path / "repaired.json")
    return file, result, {kind: entry.count for kind, entry in changes.warnings.items()}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"images": []}'])
def test_what_is_no_dataset_cannot_be_repaired(tmp_path: Path, images: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"not JSON|not a COCO dataset"):
        repair_coco(write(tmp_path, text), RepairOptions(images))


VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 2**70, float("nan"), float("inf"), "", "x", "\ud800", [], [[]], {},
    [1], [1, 2, 3, 4], [[1, 2, 3, 4, 5, 6]], {"size": [20, 30]}, [None], 1e308,
]  # fmt: skip


def test_random_damage(tmp_path: Path, images: Path) -> None:
    """Whatever a field holds, the result is a file without errors, or a clear message."""
    rng = np.random.default_rng(0)
    original = content()
    original["categories"][0] |= {"keypoints": ["a", "b"], "skeleton": [[1, 2]]}
    outcomes = set()
    for _ in range(60):
        made = copy.deepcopy(original)
        for _ in range(int(rng.integers(1, 4))):
            entries = made[str(rng.choice(["images", "annotations", "categories"]))]
            entry = entries[int(rng.integers(len(entries)))]
            keys = [*entry, "iscrowd", "ignore", "keypoints", "segmentation", "category_ids"]
            entry[str(rng.choice(keys))] = VALUES[int(rng.integers(len(VALUES)))]
        message = ""
        try:
            repaired(tmp_path, images, made)
        except UserError as error:
            message = str(error).rpartition("\n")[2]
        outcomes.add(message)
    assert outcomes == {"", "nothing is left to train on, so no file is written"}
