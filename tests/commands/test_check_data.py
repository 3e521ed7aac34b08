"""check_data and the checks before a training: what is refused, what is repaired, what trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made.coco_files import SQUARE, dataset
from made.runs import MASKS, SMALL
from made.tools import assert_refused
from made.tools import said as here
from PIL import Image

TRAIN = [
    "experiment=scenes_r18",
    *SMALL,
    *MASKS,
    "data=custom",
    "data.train_transforms=[]",
    "data.test_transforms=[]",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / name)
    return tmp_path


def write(name: str, content: Any) -> str:
    Path(name).write_text(json.dumps(content))
    return name


def good(**changes: Any) -> dict[str, Any]:
    """A file that can be trained on; `changes` are made to its second object."""
    return dataset({"segmentation": SQUARE, "bbox": [4, 3, 10, 6], **changes})


def check(train: str, *words: str) -> Any:
    return here(
        "check_data", "data=custom", f"data.train_json={train}", "data.images=images", *words
    )


def train(*words: str) -> Any:
    return here("train", *TRAIN, "data.images=images", "run_dir=run", "trainer.max_steps=1", *words)


# Before the first step


@pytest.mark.usefixtures("folder")
def test_batch_norm_of_a_single_value_is_one_line() -> None:
    # The last map of an image of 32 x 32 pixels has one cell.
    words = ["model.backbone.trunk.out_level=c5", "batch_size=1"]
    anchors = "model.proposer.anchors.sizes=[[16],[32],[64],[128],[256]]"
    assert_refused(
        train(f"data.train_json={write('a.json', good())}", *words, anchors),
        "batch_size=1: batch normalization cannot be trained on a single value per channel",
        "or another norm, such as GN",
    )


@pytest.mark.usefixtures("folder")
def test_both_files_are_judged_before_the_first_step() -> None:
    write("train.json", good())
    write("bare.json", good(segmentation=[]))
    write("empty.json", good() | {"categories": [], "annotations": []})
    crowds = good(iscrowd=1)
    crowds["annotations"][0]["iscrowd"] = 1
    write("crowds.json", crowds)
    files = ["data.train_json=train.json", "data.val_json=train.json"]
    bare = "bare.json: 1 of 2 objects have no mask, which the model needs (annotations 10)"
    assert_refused(train(files[0], "data.val_json=bare.json"), bare)
    assert_refused(train("data.train_json=bare.json", files[1]), bare)
    for words in ((files[0], "data.val_json=empty.json"), ("data.train_json=empty.json",)):
        said = train(*words)
        assert said.code == 2
        assert "empty.json: 1 error\n  1 x no categories" in said.err
    assert_refused(
        train("data.train_json=crowds.json", files[1]),
        "crowds.json: no training image has an object to learn from; 2 annotations have iscrowd=1: "
        "data.crowds=objects reads them as objects",
    )
    nothing = good() | {"annotations": []}
    write("nothing.json", nothing)
    assert_refused(train("data.train_json=nothing.json"), "no training image has an object")
    assert not Path("run").exists()


@pytest.mark.usefixtures("folder")
def test_odd_but_usable_files_are_trained_on() -> None:
    """Crowds without masks, crowds as objects, a list of files, names of another spelling."""
    content = good(iscrowd=1, segmentation=None)
    content["images"][1]["category_ids"] = [4]
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"].append({**content["annotations"][0], "id": 2, "iscrowd": 0})
    write("a.json", content)
    said = train("data.train_json=[a.json,a.json]", "data.val_json=[a.json]")
    assert said.code == 0, said
    assert "1 classes, 4 images" in said.out
    said = check("[a.json,a.json]", "data.crowds=objects")
    assert said.code == 0, said
    assert "6 instances, 0 crowds" in said.out


@pytest.mark.usefixtures("folder")
def test_keys_that_are_refused() -> None:
    write("a.json", good())
    assert_refused(check("a.json", "data.crowds=none"), "data.crowds")
    assert_refused(check("[a.json,3]"), "data.train_json")
    Path("damaged.json").write_text("{")
    for name in ("damaged.json", "absent.json"):
        assert "fix=" not in check(name).err


# Repaired copies


@pytest.mark.usefixtures("folder")
def test_a_repaired_copy_is_checked_and_trained_on() -> None:
    content = good(bbox=[4, 3, 14, 9])
    content["images"][1] |= {"file_name": "C:\\data\\2.png", "own": float("nan")}
    content["images"].append({"id": 3, "file_name": "3.png", "height": 20, "width": 30})
    content["annotations"].append({**content["annotations"][1], "image_id": 3})
    content["categories"][0]["name"] = "c\ud800t"
    before = Path(write("a.json", content)).read_bytes()
    said = check("a.json")
    assert said.code == 2
    assert "fix=OUT.json writes a repaired copy" in said.err
    said = check("a.json", "fix=b.json")
    assert said.code == 0, said
    assert "a.json: 3 errors" in said.out
    assert "a.json, changes: 5 changes" in said.out
    for change in (
        "image whose file cannot be used, dropped with its annotations",
        "annotation without an image, dropped",
        "file name mended",
        "category name mended",
        "bbox that contradicts its mask, replaced by the mask's box",
    ):
        assert f"1 x {change}" in said.out
    assert "1 classes, 2 images (0 without objects), 2 instances, 0 crowds" in said.out
    assert Path("a.json").read_bytes() == before
    repaired = json.loads(Path("b.json").read_text())
    assert repaired["images"][1]["own"] is None
    said = check("b.json")
    assert said.code == 0
    assert "warning" not in said.out
    said = train("data.train_json=b.json", "data.val_json=b.json")
    assert said.code == 0, said


@pytest.mark.usefixtures("folder")
def test_a_good_file_needs_no_change() -> None:
    write("a.json", good(area=60))
    said = check("a.json", "fix=b.json")
    assert said.code == 0
    assert "nothing had to be changed" in said.out
    assert json.loads(Path("b.json").read_text())["images"] == good()["images"]


def test_a_repair_never_replaces_a_file(folder: Path) -> None:
    write("a.json", good(bbox=[4, 3, 14, 9]))
    write("other.json", good())
    (folder / "link.json").symlink_to("nowhere.json")
    before = {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
    for name in ("a.json", "./a.json"):
        assert_refused(check("a.json", f"fix={name}"), "fix=a.json is an input file")
    for name in ("other.json", "images", "link.json", "images/1.png"):
        for key in ("overwrite=false", "overwrite=true"):
            refused = check("a.json", f"fix={name}", key)
            assert_refused(refused, f"fix: {name} already exists", "choose another name or delete")
    assert_refused(check("a.json", "fix=absent/b.json"), "there is no folder absent")
    assert_refused(check("a.json", "data.val_json=other.json", "fix=b.json"), "repairs one file")
    assert_refused(check("[a.json,other.json]", "fix=b.json"), "exactly one file, not 2")
    write("none.json", good() | {"images": []})
    said = check("none.json", "fix=b.json")
    assert said.code == 2
    assert "nothing is left to train on" in said.err
    assert not Path("b.json").exists()
    assert {p: p.read_bytes() for p in before} == before
