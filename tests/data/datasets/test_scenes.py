"""The synthetic dataset: its files are consistent with each other and with pycocotools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.runs import ROOT, alive, children
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from maskseg.data.datasets import scenes
from maskseg.data.datasets import scenes_draw as draw
from maskseg.data.datasets.scenes import (
    JOINTS,
    STUFF,
    THINGS,
    UNLABELLED,
    filled_box_ap,
    make_scenes,
)

NUM_TRAIN, NUM_VAL = 160, 50


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_scenes(folder, num_train=NUM_TRAIN, num_val=NUM_VAL, num_workers=2)
    return folder


@pytest.fixture(scope="module")
def coco(root: Path) -> COCO:
    return COCO(str(root / "train.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def visible(coco: COCO, row: dict[str, Any]) -> np.ndarray:
    return coco.annToMask(row).astype(bool)


def test_files(root: Path) -> None:
    names = {
        f"{split}_{i:06d}"
        for split, n in (("train", NUM_TRAIN), ("val", NUM_VAL))
        for i in range(1, n + 1)
    }
    assert {path.name for path in (root / "images").iterdir()} == {f"{name}.jpg" for name in names}
    assert {path.name for path in (root / "stuff").iterdir()} == {f"{name}.png" for name in names}
    assert [path.name for path in root.parent.iterdir()] == [
        "scenes"
    ]  # no unfinished folder is left
    for name, mode in (("images/train_000001.jpg", "RGB"), ("stuff/val_000001.png", "L")):
        with Image.open(root / name) as image:
            assert (image.mode, image.size) == (mode, (256, 256))


def test_images_depend_neither_on_workers_nor_on_the_number_of_images(
    root: Path, tmp_path: Path
) -> None:
    make_scenes(tmp_path / "one", num_train=30, num_val=10, num_workers=0)
    make_scenes(
        tmp_path / "two", num_train=30, num_val=10, num_workers=2
    )  # 40 images: enough to start two workers
    one, larger = contents(tmp_path / "one"), contents(root)
    assert one == contents(tmp_path / "two")
    assert all(one[name] == larger[name] for name in one if name.endswith(("jpg", "png")))
    few, many = (json.loads(files["train.json"]) for files in (one, larger))
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]


def test_seed_changes_the_images(root: Path, tmp_path: Path) -> None:
    make_scenes(tmp_path / "other", num_train=1, num_val=1, seed=1)
    assert (
        contents(tmp_path / "other")["images/train_000001.jpg"]
        != contents(root)["images/train_000001.jpg"]
    )


def test_categories(coco: COCO) -> None:
    things = {row["name"]: row for row in coco.dataset["categories"]}
    assert {name: row["id"] for name, row in things.items()} == THINGS
    assert sorted(THINGS.values()) != list(range(1, len(THINGS) + 1))  # ids have gaps
    assert {row["name"]: row["id"] for row in coco.dataset["stuff_categories"]} == STUFF
    assert max(THINGS.values()) < min(STUFF.values())
    assert [name for name, row in things.items() if "keypoints" in row] == ["figure"]
    figure = things["figure"]
    assert len(figure["keypoints"]) == len(set(figure["keypoints"])) == 13
    assert {name.replace("left_", "right_") for name in figure["keypoints"]} < set(
        figure["keypoints"]
    )
    assert {joint for bone in figure["skeleton"] for joint in bone} == set(range(1, 14))
    assert {row["category_id"] for row in coco.dataset["annotations"]} == set(THINGS.values())


def test_masks_have_the_stated_area_and_box(coco: COCO) -> None:
    for row in coco.dataset["annotations"]:
        mask = visible(coco, row)
        (y, x), counts = np.nonzero(mask), row["segmentation"]["counts"]
        assert isinstance(counts, list if row["iscrowd"] else str)
        assert row["area"] == mask.sum()
        assert row["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]


def test_sizes(coco: COCO) -> None:
    rows = [row for row in coco.dataset["annotations"] if not row["iscrowd"]]
    sides = np.array([max(row["bbox"][2:]) for row in rows])
    assert sides.max() <= 150
    assert min(row["area"] for row in rows) >= scenes.MIN_VISIBLE_AREA
    assert np.mean(sides < 32) > 0.1
    assert np.mean(sides > 96) > 0.1
    counts = np.bincount([row["image_id"] for row in rows], minlength=NUM_TRAIN + 1)[1:]
    assert set(counts) <= {0, *range(2, 13)}


def test_stuff_map_agrees_with_the_masks_which_do_not_overlap(root: Path, coco: COCO) -> None:
    for image in coco.dataset["images"]:
        labels = np.asarray(Image.open(root / "stuff" / image["file_name"].replace("jpg", "png")))
        times = np.zeros(labels.shape, int)
        for row in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = visible(coco, row)
            times += mask
            assert (labels[mask] == (UNLABELLED if row["iscrowd"] else row["category_id"])).all()
        assert times.max() <= 1
        assert set(np.unique(labels[times == 0])) <= set(STUFF.values())
        assert 2 <= len(np.unique(labels[times == 0])) <= 4


def test_empty_images_and_crowds_occur(coco: COCO) -> None:
    empty = {row["id"] for row in coco.dataset["images"]} - {
        row["image_id"] for row in coco.dataset["annotations"]
    }
    crowded = [row for row in coco.dataset["annotations"] if row["iscrowd"]]
    assert 1 <= len(empty) <= 0.08 * NUM_TRAIN
    assert 1 <= len(crowded) <= 0.12 * NUM_TRAIN


def test_keypoints(coco: COCO) -> None:
    seen = {0: 0, 1: 0, 2: 0}
    for row in coco.dataset["annotations"]:
        assert ("keypoints" in row) == (row["category_id"] == THINGS["figure"])
        if "keypoints" not in row or row["iscrowd"]:
            continue
        mask, points = visible(coco, row), np.array(row["keypoints"]).reshape(len(JOINTS), 3)
        assert row["num_keypoints"] == (points[:, 2] > 0).sum()
        for x, y, v in points:
            seen[v] += 1
            assert (x, y) == (0, 0) if v == 0 else mask[y, x] == (v == 2)
    assert all(seen.values())


def test_run_lengths_are_the_uncompressed_code() -> None:
    mask = np.array([[0, 1, 1], [1, 1, 0]], bool)
    assert scenes.run_lengths(mask) == [1, 4, 1]
    assert scenes.run_lengths(~mask) == [0, 1, 4, 1]
    for some in (mask, ~mask, np.zeros((2, 3), bool), np.ones((2, 3), bool)):
        code = {"size": [2, 3], "counts": scenes.run_lengths(some)}
        assert (rle.decode(rle.frPyObjects(code, 2, 3)) == some).all()


def test_filled_boxes_are_poor_masks(root: Path) -> None:
    assert 0.05 < filled_box_ap(root / "val.json") < 0.45


def test_existing_folders(root: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    make_scenes(root, num_train=NUM_TRAIN, num_val=NUM_VAL)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(
        ValueError, match=r"scenes holds .*: delete the folder or choose another data\.root"
    ):
        make_scenes(root, num_train=NUM_TRAIN + 1, num_val=NUM_VAL)
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        ValueError, match=r"mine exists and is not a finished scenes dataset: delete .* data\.root"
    ):
        make_scenes(tmp_path / "mine")
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "val.json").unlink()
    with pytest.raises(ValueError, match=r"copy lacks val\.json: delete"):
        make_scenes(copy, num_train=NUM_TRAIN, num_val=NUM_VAL)
    assert (copy / "train.json").exists()


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".new.unfinished" / "images").mkdir(parents=True)
    (tmp_path / ".new.unfinished" / "images" / "train_000009.jpg").touch()
    make_scenes(tmp_path / "new", num_train=1, num_val=0)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "new" / "images").iterdir()] == ["train_000001.jpg"]
    assert json.loads((tmp_path / "new" / "val.json").read_text())["images"] == []


MAKE = """
import sys
from maskseg.data.datasets.scenes import make_scenes
from maskseg.errors import Interrupted
try:
    make_scenes(sys.argv[1], num_train=4000, num_val=0, size=128, num_workers=2)
except Interrupted as stop:
    sys.exit(stop.code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_kill_leaves_no_processes_and_no_finished_dataset(
    tmp_path: Path, number: int, code: int
) -> None:
    root = tmp_path / "scenes"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", MAKE, str(root)], env=environment)
    images = tmp_path / ".scenes.unfinished" / "images"
    end = time.monotonic() + 90
    while not (images.is_dir() and any(images.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(number)
    assert process.wait(30) == code
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < end, "worker processes outlive their parent"
        time.sleep(0.05)
    assert not root.exists()
    make_scenes(root, num_train=1, num_val=1, size=128, num_workers=0)
    assert len(list((root / "images").iterdir())) == 2
    assert not list(tmp_path.glob(".scenes.unfinished"))


@pytest.mark.parametrize("wrong", [{"num_train": -1}, {"num_val": -1}, {"seed": -1}, {"size": 64}])
def test_wrong_arguments(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="want num_train"):
        make_scenes(tmp_path / "new", **wrong)


def test_other_sizes(tmp_path: Path) -> None:
    make_scenes(tmp_path / "new", num_train=12, num_val=0, size=128, num_workers=0)
    rows = json.loads((tmp_path / "new" / "train.json").read_text())
    assert all((image["width"], image["height"]) == (128, 128) for image in rows["images"])
    assert all(max(row["bbox"][2:]) <= 75 for row in rows["annotations"] if not row["iscrowd"])


def test_the_largest_crowd_fits_into_the_smallest_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def largest(_: np.random.Generator) -> draw.Shape:
        level = np.ones((200, 200), np.float32)  # 4 x 4 figures of 36 pixels take 195
        level[60:140, 60:140] = -1
        return draw.Shape(
            "figure", level, np.ones_like(level), np.zeros((0, 2), np.float32), crowd=True
        )

    monkeypatch.setattr(draw, "random_crowd", largest)
    monkeypatch.setattr(scenes, "CROWD_FRACTION", 1.0)
    found = [scenes.draw_scene(np.random.default_rng(seed), 128) for seed in range(12)]
    assert sum(thing.crowd for scene in found for thing in scene.things) >= 8
