"""Masks proposed from the command line: files, kills, processes, the table, the choice of a technique, classifiers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from made.runs import ROOT
from made.tools import assert_refused, done, said
from PIL import Image

from maskseg.data.coco import read_coco
from maskseg.data.scenes import make_scenes
from maskseg.masks import FileMasks, rle_to_bitmaps

pytest.importorskip("cv2")
KILLED = """
import os, signal, sys
from maskseg import annotating
whole, calls = annotating.Proposing.__call__, []
def call(self, job):
    calls.append(job)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, job)
annotating.Proposing.__call__ = call
annotating.annotate(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotate") / "scenes"
    make_scenes(folder, num_train=3, num_val=5, size=128, num_workers=0)
    content = json.loads((folder / "val.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def words(home: Path, output: Path, *more: str, val: str = "boxes.json") -> list[str]:
    return [f"data.val_json={home / val}", f"data.images={home / 'images'}", f"output={output}", "workers=1", "pictures=0", *more]


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


def test_boxes_get_masks(home: Path, tmp_path: Path) -> None:
    before, output = (home / "boxes.json").read_bytes(), tmp_path / "a" / "masks.json"
    told = done("annotate", *words(home, output, "pictures=2"))
    boxes, found = content_of(home / "boxes.json"), content_of(output)
    assert f"{output}: {len(boxes['annotations'])} masks in 5 images (gcellipse 0.8)" in told
    assert (home / "boxes.json").read_bytes() == before
    assert sorted(p.name for p in output.parent.iterdir()) == ["masks.json", "masks_pictures.png"]
    with Image.open(output.with_name("masks_pictures.png")) as sheet:
        assert sheet.width > 4 * 320
    assert {k: found[k] for k in ("images", "categories")} == {k: boxes[k] for k in ("images", "categories")}
    for old, new in zip(boxes["annotations"], found["annotations"], strict=True):
        assert {k: new[k] for k in ("id", "image_id", "category_id", "bbox")} == {k: old[k] for k in ("id", "image_id", "category_id", "bbox")}
        assert new["mask_by"]["thresholds"] == [0, 0.1, 0.8]
    truth, proposed = read_coco(home / "val.json"), read_coco(output)
    ious = []
    for index, record in enumerate(truth.images):
        true, own = (FileMasks.from_file(f.annotations(index).shapes, record.height, record.width) for f in (truth, proposed))
        ious += torch.diagonal(true.iou(own)).tolist()
    assert np.mean(ious) > 0.7
    assert_refused(said("annotate", *words(home, output)), "is there already")


def test_polygons(home: Path, tmp_path: Path) -> None:
    for kind in ("rle", "polygons"):
        done("annotate", *words(home, tmp_path / f"{kind}.json", f"segmentation={kind}", "technique=ellipse"))
    rle, outlines = (read_coco(tmp_path / f"{kind}.json") for kind in ("rle", "polygons"))
    assert isinstance(content_of(tmp_path / "polygons.json")["annotations"][0]["segmentation"], list)
    for index in range(len(rle)):
        first, second = (FileMasks.from_file(f.annotations(index).shapes, 128, 128) for f in (rle, outlines))
        assert torch.diagonal(first.iou(second)).min() > 0.97


def test_a_killed_run_goes_on_and_processes_change_nothing(home: Path, tmp_path: Path) -> None:
    whole, killed, two = (tmp_path / f"{name}.json" for name in ("whole", "killed", "two"))
    done("annotate", *words(home, whole))
    end = subprocess.run([sys.executable, "-c", KILLED, *words(home, killed)], cwd=ROOT, check=False, capture_output=True)
    assert end.returncode == -signal.SIGKILL, end.stderr
    assert not killed.exists()
    journal = tmp_path / ".killed.json.masks"
    assert len(journal.read_text().splitlines()) == 3  # settings and two images
    assert_refused(said("annotate", *words(home, killed, "technique=box")), "technique.name='gcellipse' there, 'box' here")
    done("annotate", *words(home, killed))
    done("annotate", *words(home, two, "workers=2"))
    assert killed.read_bytes() == whole.read_bytes() == two.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_table(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    told = done("annotate", *words(home, output, "technique=all", "thresholds=[0.5,0.8]", "min_area=100", val="val.json"))
    lines = [line.split() for line in told.splitlines()]
    assert [line[0] for line in lines[1:10]] == [
        "box", "ellipse", "grabcut", "gcellipse", "gcellipse", "cam", "gccam_pf_pb", "gccam_f_pf", "gccam_f_pb",
    ]  # fmt: skip
    assert lines[6][1:3] == ["needs", "weights:"]
    rows = content_of(tmp_path / "study_table.json")
    assert [(row["name"], row["threshold"]) for row in rows] == [
        ("box", None),
        ("ellipse", None),
        ("grabcut", None),
        ("gcellipse", 0.5),
        ("gcellipse", 0.8),
    ]
    assert all(0 < row["class_object_IoU"] < 1 for row in rows)
    with Image.open(tmp_path / "study_curves.png") as picture:
        assert picture.width > 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study_curves.png", "study_table.json"]
    assert_refused(said("annotate", *words(home, output, "technique=all")), "boxes.json: there are no masks to compare")


def test_the_best_technique_is_chosen_on_other_images(home: Path, tmp_path: Path) -> None:
    keys = ["technique=auto", f"data.train_json={home / 'train.json'}", "thresholds=[0.8]", "min_area=100", "evaluate=false"]
    told = done("annotate", *words(home, tmp_path / "out.json", *keys))
    best = told.split(" is the best technique on 3 images of ")[0]
    done("annotate", *words(home, tmp_path / "all.json", "technique=all", "thresholds=[0.8]", "min_area=100", val="train.json"))
    rows = content_of(tmp_path / "all_table.json")
    row = max(rows, key=lambda row: row["object_IoU"])
    assert best == (row["name"] if row["threshold"] is None else f"{row['name']} {row['threshold']:g}")
    assert content_of(tmp_path / "out.json")["annotations"][0]["mask_by"]["technique"] == row["name"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SqueezeNet from noise, of as many classes as the scenes have."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(torchvision.models.squeezenet1_1(num_classes=8).state_dict(), path)
    return path


def test_class_activation_maps(home: Path, tmp_path: Path, classifier: Path) -> None:
    classes = len(content_of(home / "val.json")["categories"])
    state = torchvision.models.squeezenet1_1(num_classes=classes).state_dict()
    torch.save(state, classifier)
    keys = ["classifier=squeezenet1_1", f"weights={classifier}", "map_side=128"]
    for by in ("object", "class"):
        for technique in ("cam", "gccam_f_pf"):
            output = tmp_path / f"{by}_{technique}.json"
            done("annotate", *words(home, output, *keys, f"by={by}", f"technique={technique}", "pictures=1"))
            found = content_of(output)["annotations"]
            assert found
            assert all(0 <= a["mask_by"]["score"] <= 1 for a in found)
            assert all(rle_to_bitmaps([a["segmentation"]])[0].sum() == a["area"] > 0 for a in found)
    pairs = [(a["image_id"], a["category_id"]) for a in found]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) <= {(a["image_id"], a["category_id"]) for a in content_of(home / "boxes.json")["annotations"]}
    twice = tmp_path / "twice.json"
    done("annotate", *words(home, twice, *keys, "by=class", "technique=gccam_f_pf", "workers=2"))
    assert twice.read_bytes() == (tmp_path / "class_gccam_f_pf.json").read_bytes()
    told = done("annotate", *words(home, tmp_path / "t.json", *keys, "by=class", "technique=all", "thresholds=[0.5]", val="val.json"))
    assert "needs weights" not in told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["technique=magic"], "technique must be one of"),
        (["technique=cam"], "cam needs a classifier"),
        (["technique=box", "threshold=0.5"], "takes no threshold"),
        (["threshold=1.5"], "threshold must be above"),
        (["thresholds=[0.5,2.0]"], "thresholds must be numbers between"),
        (["by=pixel"], "by must be object or class"),
        (["segmentation=png"], "segmentation must be"),
        (["workers=-1"], "workers must be at least 0"),
        (["checkpoint=a", "classifier=b"], "both set"),
        (["classifier=vgg16"], "vgg16"),
        (["technique=auto"], "no masks to compare techniques with"),
    ],
)
def test_refusals(home: Path, tmp_path: Path, more: list[str], told: str) -> None:
    assert_refused(said("annotate", *words(home, tmp_path / "out.json", *more)), told)
    assert not list(tmp_path.iterdir())
    assert_refused(said("annotate", *words(home, home / "boxes.json")), "is the file that is read")
