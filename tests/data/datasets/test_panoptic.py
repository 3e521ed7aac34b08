"""COCO's panoptic files: class maps from JSON and PNGs, and one report of all inconsistencies."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.tools import assert_refused, done, said
from omegaconf import DictConfig
from PIL import Image

from maskseg import config as configs
from maskseg.data.datasets.panoptic import PanopticSource
from maskseg.errors import UserError

HEIGHT, WIDTH = 64, 80
GRASS, DOG, CROWD, SKY = (
    5,
    300,
    70_000,
    256 * 256 * 256 - 1,
)  # segment ids of one, two and three bytes
CLASS = {GRASS: 193, DOG: 18, CROWD: 1, SKY: 187}
IDS = (1, 18, 187, 193)


def segments() -> np.ndarray:
    """The segment id of each pixel, 0 for none."""
    ids = np.full((HEIGHT, WIDTH), GRASS)
    ids[:20], ids[60:] = SKY, 0
    ids[20:40, 10:30], ids[45:50] = DOG, CROWD
    return ids


def labels() -> np.ndarray:
    """The expected labels: crowds and pixels without a segment are unlabelled."""
    label = {0: -1, CROWD: -1, **{number: IDS.index(CLASS[number]) for number in (GRASS, DOG, SKY)}}
    return np.vectorize(label.__getitem__)(segments())


def write_png(path: Path, ids: np.ndarray) -> None:
    Image.fromarray(
        np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
    ).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's layout with two images per split."""
    notes = tmp_path / "annotations"
    things = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    whole = [{**thing, "isthing": 1} for thing in things] + [
        {"id": 187, "name": "sky", "isthing": 0},
        {"id": 193, "name": "grass", "isthing": 0},
    ]
    infos = [
        {
            "id": n,
            "category_id": CLASS[n],
            "iscrowd": int(n == CROWD),
            "area": int((segments() == n).sum()),
        }
        for n in (SKY, DOG, GRASS, CROWD)
    ]
    for split in ("train2017", "val2017"):
        (notes / f"panoptic_{split}").mkdir(parents=True)
        (tmp_path / split).mkdir()
        images = [
            {"id": i, "file_name": f"{i:012d}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in (7, 9)
        ]
        dog = {
            "id": 1,
            "image_id": 7,
            "category_id": 18,
            "bbox": [10, 20, 20, 20],
            "segmentation": [[10, 20, 30, 20, 30, 40, 10, 40]],
        }
        (notes / f"instances_{split}.json").write_text(
            json.dumps({"images": images, "annotations": [dog], "categories": things})
        )
        rows = [{"image_id": 9, "file_name": "000000000009.png", "segments_info": infos[2:3]}]
        rows.append({"image_id": 7, "file_name": "000000000007.png", "segments_info": infos})
        (notes / f"panoptic_{split}.json").write_text(
            json.dumps({"images": images, "annotations": rows, "categories": whole})
        )
        write_png(notes / f"panoptic_{split}" / "000000000007.png", segments())
        write_png(notes / f"panoptic_{split}" / "000000000009.png", np.full((HEIGHT, WIDTH), GRASS))
        for i in (7, 9):
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / split / f"{i:012d}.jpg")
    return tmp_path


@lru_cache
def composed(*words: str) -> DictConfig:
    return configs.compose("train", ["data=coco_panoptic", "data.num_workers=0", *words])


def source(root: Path, *words: str) -> PanopticSource:
    config = composed(*words).copy()
    config.data.root = str(root)
    found = configs.build_source(config.data)
    assert isinstance(found, PanopticSource)
    return found


def test_classes_of_pixels_from_colours(root: Path) -> None:
    data = source(root, "data.test_transforms=[]")
    assert data.categories.ids == IDS
    assert (data.categories.num_things, data.categories.names[2:]) == (2, ("sky", "grass"))
    (batch,) = data.test_loader("val", 2)
    assert batch.semantic is not None
    assert np.array_equal(batch.semantic[0, :HEIGHT, :WIDTH].numpy(), labels())
    assert (batch.semantic[1, :HEIGHT, :WIDTH] == IDS.index(193)).all()


def test_without_classes_of_stuff_maps_have_ids(root: Path) -> None:
    maps = source(root, "data.stuff_json=null").semantic_maps("train")
    assert maps is not None
    found = maps.load("000000000007.jpg", HEIGHT, WIDTH).numpy()
    assert np.array_equal(found, np.array([*IDS, -1])[labels()])


def test_ids_that_a_map_cannot_hold_are_refused(root: Path) -> None:
    for split in ("train2017", "val2017"):
        path = root / "annotations" / f"panoptic_{split}.json"
        path.write_text(path.read_text().replace("193", "40000"))
    assert source(root).categories.ids[-1] == 40000
    maps = source(root).semantic_maps("train")  # with labels, large ids fit
    assert maps is not None
    assert np.array_equal(maps.load("000000000007.jpg", HEIGHT, WIDTH).numpy(), labels())
    with pytest.raises(
        UserError,
        match=r"data\.train_semantic=.*panoptic_train2017: "
        r"category id 40000 of the panoptic maps is above 32767",
    ):
        source(root, "data.stuff_json=null").semantic_maps("train")


def test_a_validation_with_the_trainings_own_images(root: Path) -> None:
    data = source(root, "debug=overfit", "data.test_transforms=[]", "data.stuff_json=null")
    (root / "annotations" / "panoptic_val2017.json").unlink()
    assert len(data.val) == 2
    assert data.semantic_maps("val") is not None


def test_without_maps_the_panoptic_files_are_not_needed(root: Path) -> None:
    words = [
        "data.train_semantic=null",
        "data.val_semantic=null",
        "data.train_panoptic=absent.json",
    ]
    data = source(root, *words)
    assert data.semantic_maps("train") is None
    assert len(data.train) == 2


def test_a_class_that_the_training_does_not_have_is_unlabelled(root: Path) -> None:
    path = root / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    content["categories"] = content["categories"][:3]  # the training does not have the class grass
    path.write_text(json.dumps(content))
    maps = source(root, "data.val_panoptic=${data.train_panoptic}").semantic_maps("val")
    assert maps is not None
    assert np.array_equal(
        maps.load("000000000007.jpg", HEIGHT, WIDTH).numpy(), np.where(labels() == 3, -1, labels())
    )


def first(tree: Any) -> Any:
    return tree["annotations"][1]


def change(key: str, value: object) -> Callable[[Any], None]:
    return lambda tree: first(tree).__setitem__(key, value)


def change_segment(key: str, value: object) -> Callable[[Any], None]:
    return lambda tree: first(tree)["segments_info"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (change("image_id", 8), "image_id of no image"),
        (change("image_id", "7"), "annotation without an integer image_id"),
        (change("image_id", 9), "image with more than one annotation"),
        (change("file_name", "../7.png"), "file name that is not safe"),
        (change("file_name", None), "file name that is not safe"),
        (change("file_name", "8.png"), "panoptic map that does not exist"),
        (change("segments_info", None), "annotation without a list segments_info"),
        (change_segment("category_id", 4), "segment with the category_id of no category"),
        (change_segment("id", 0), "segment id that is not within 1 .. 16777215"),
        (change_segment("id", 1 << 24), "segment id that is not within 1 .. 16777215"),
        (change_segment("id", DOG), "segment id that is used more than once in an image"),
        (change_segment("iscrowd", 2), "iscrowd that is neither 0 nor 1"),
        (lambda tree: tree["annotations"].pop(), "image without a panoptic annotation"),
        (lambda tree: tree["annotations"].insert(0, 3), "annotation without an integer image_id"),
        (lambda tree: tree.pop("categories"), "not a panoptic dataset"),
        (
            lambda tree: tree["categories"].append({"id": 1, "name": "x"}),
            "category id that is used more than once",
        ),
    ],
)
def test_inconsistencies_are_reported(root: Path, damage: Callable[[Any], None], kind: str) -> None:
    path = root / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        _ = source(root).val
    assert str(raised.value).startswith(f"{path}: ")
    assert f"1 x {kind}\n" in f"{raised.value}\n"


def damage_png(path: Path, how: str) -> None:
    if how == "size":
        write_png(path, segments()[1:])
    elif how == "mode":
        Image.new("L", (WIDTH, HEIGHT)).save(path)
    else:
        path.write_bytes(b"none")


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("size", "whose size differs from its image's"),
        ("mode", "that is not RGB"),
        ("none", "that cannot be read"),
    ],
)
def test_invalid_maps_are_reported(root: Path, how: str, kind: str) -> None:
    path = root / "annotations" / "panoptic_train2017" / "000000000009.png"
    damage_png(path, how)
    with pytest.raises(UserError, match=f"1 x panoptic map {kind}"):
        _ = source(root).train
    maps = source(root, "data.check_images=false").semantic_maps("train")
    assert maps is not None
    with pytest.raises(UserError, match=str(path)):
        maps.load("000000000009.jpg", HEIGHT, WIDTH)


def test_a_colour_without_a_segment_is_named(root: Path) -> None:
    path = root / "annotations" / "panoptic_train2017" / "000000000009.png"
    for strange in (1, DOG, GRASS + 256):
        write_png(
            path, np.where(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) == 77, strange, GRASS)
        )
        with pytest.raises(
            UserError,
            match=rf"000000000009\.png: the id {strange} of a pixel is not one of the image's "
            "segments",
        ):
            source(root).semantic_maps("train").load("000000000009.jpg", HEIGHT, WIDTH)  # type: ignore[union-attr]


def test_links_that_lead_out_of_the_folder(root: Path) -> None:
    path = root / "annotations" / "panoptic_train2017" / "000000000009.png"
    path.rename(root / "elsewhere.png")
    path.symlink_to(root / "elsewhere.png")
    with pytest.raises(UserError, match="1 x file name that is not safe"):
        _ = source(root).train


def test_keys_that_are_missing(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_panoptic is not set"):
        _ = source(root, "data.train_panoptic=null").train
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        _ = source(root, "data.train_panoptic=absent.json").train
    with pytest.raises(
        UserError, match=r"data\.train_semantic=absent: no such folder of panoptic maps"
    ):
        _ = source(root, "data.train_semantic=absent").train
    (root / "annotations" / "panoptic_train2017.json").write_text('{"annotations": [')
    with pytest.raises(UserError, match="not JSON"):
        _ = source(root).train


def test_the_report_of_the_tool(root: Path) -> None:
    words = ["data=coco_panoptic", f"data.root={root}"]
    assert "2 classes, 2 images" in done("check_data", *words)
    path = root / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    first(content)["segments_info"] += [{"id": 1000 + i, "category_id": 77} for i in range(14)]
    path.write_text(json.dumps(content))
    found = said("check_data", *words)
    assert found.code == 2
    assert "14 x segment with the category_id of no category" in found.err
    assert found.err.count("segment 10") == 10
    assert "... and 4 more" in found.err
    (root / "annotations" / "instances_val2017.json").unlink()
    assert_refused(said("check_data", *words), "cannot be read")
