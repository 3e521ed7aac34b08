"""Mask proposals from the command line: files, resuming, table, selection, classifiers."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from made.runs import finish, start
from made.tools import assert_refused, done, said
from omegaconf import OmegaConf
from PIL import Image

from maskseg.annotation import annotate
from maskseg.annotation.classifier import ImageClassHead, ImageClassifier
from maskseg.annotation.study import ScoreTechniques
from maskseg.data.coco.file import read_coco
from maskseg.data.datasets.scenes import make_scenes
from maskseg.errors import UserError
from maskseg.files.outputs import RECORD
from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.base import rle_to_bitmaps
from maskseg.models.backbones.resnet import ResNet
from maskseg.structures import Categories

pytest.importorskip("cv2")
KILLED = """
import os, signal, sys
from maskseg.annotation import annotate
from maskseg.annotation.study import ProposeMasks
propose = ProposeMasks.__call__
calls = []
def call(self, job):
    calls.append(job)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return propose(self, job)
ProposeMasks.__call__ = call
annotate.annotate(sys.argv[1:])
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


def overrides(home: Path, output: Path, *more: str, val: str = "boxes.json") -> list[str]:
    return [
        f"data.val_json={home / val}",
        f"data.images={home / 'images'}",
        f"output={output}",
        "workers=1",
        "pictures=0",
        *more,
    ]


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


def test_boxes_get_masks(home: Path, tmp_path: Path) -> None:
    before, output = (home / "boxes.json").read_bytes(), tmp_path / "a" / "masks.json"
    stdout = done("annotate", *overrides(home, output, "pictures=2"))
    boxes, proposals = content_of(home / "boxes.json"), content_of(output)
    assert f"{output}: {len(boxes['annotations'])} masks in 5 images (gcellipse 0.8)" in stdout
    assert (home / "boxes.json").read_bytes() == before
    files = [RECORD, "masks.json", "masks_pictures.png"]
    assert sorted(p.name for p in output.parent.iterdir()) == files
    with Image.open(output.with_name("masks_pictures.png")) as sheet:
        assert sheet.width > 4 * 320
    assert {k: proposals[k] for k in ("images", "categories")} == {
        k: boxes[k] for k in ("images", "categories")
    }
    for old, new in zip(boxes["annotations"], proposals["annotations"], strict=True):
        assert {k: new[k] for k in ("id", "image_id", "category_id", "bbox")} == {
            k: old[k] for k in ("id", "image_id", "category_id", "bbox")
        }
        assert new["mask_by"]["thresholds"] == [0, 0.1, 0.8]
    truth, proposed = read_coco(home / "val.json"), read_coco(output)
    ious = []
    for index, record in enumerate(truth.images):
        true, own = (
            AnnotatedMasks.from_file(f.annotations(index).shapes, record.height, record.width)
            for f in (truth, proposed)
        )
        ious += torch.diagonal(true.iou(own)).tolist()
    assert np.mean(ious) > 0.7
    assert_refused(said("annotate", *overrides(home, output)), "already exists")


def test_polygons(home: Path, tmp_path: Path) -> None:
    for kind in ("rle", "polygons"):
        done(
            "annotate",
            *overrides(
                home, tmp_path / f"{kind}.json", f"segmentation={kind}", "technique=ellipse"
            ),
        )
    rle, outlines = (read_coco(tmp_path / f"{kind}.json") for kind in ("rle", "polygons"))
    assert isinstance(
        content_of(tmp_path / "polygons.json")["annotations"][0]["segmentation"], list
    )
    for index in range(len(rle)):
        first, second = (
            AnnotatedMasks.from_file(f.annotations(index).shapes, 128, 128) for f in (rle, outlines)
        )
        assert torch.diagonal(first.iou(second)).min() > 0.97


def test_a_killed_run_resumes(home: Path, tmp_path: Path) -> None:
    whole, killed = (tmp_path / f"{name}.json" for name in ("whole", "killed"))
    done("annotate", *overrides(home, whole))
    (tmp_path / "killed.py").write_text(KILLED)
    process = start(overrides(home, killed), tmp_path, tool=str(tmp_path / "killed.py"))
    code, text = finish(process, tmp_path)
    assert code == -signal.SIGKILL, text
    assert not killed.exists()
    journal = tmp_path / ".killed.json.masks"
    assert len(journal.read_text().splitlines()) == 3  # the settings and two images
    assert_refused(
        said("annotate", *overrides(home, killed, "technique=box")),
        "technique.name='gcellipse' there, 'box' here",
    )
    done("annotate", *overrides(home, killed))
    assert killed.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.glob(".*")] == [RECORD]


def test_the_table(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    stdout = done(
        "annotate",
        *overrides(
            home, output, "technique=all", "thresholds=[0.5,0.8]", "min_area=100", val="val.json"
        ),
    )
    lines = [line.split() for line in stdout.splitlines()]
    assert [line[0] for line in lines[1:10]] == [
        "box",
        "ellipse",
        "grabcut",
        "gcellipse",
        "gcellipse",
        "cam",
        "gccam_pf_pb",
        "gccam_f_pf",
        "gccam_f_pb",
    ]
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
    best = max(row["any_object_IoU"] for row in rows)
    assert (
        f" has the highest mean IoU of objects of any size, {best:.3f}; class by class:" in stdout
    )
    with Image.open(tmp_path / "study_curves.png") as picture:
        assert picture.width > 1000
    files = [RECORD, "study_curves.png", "study_table.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    assert_refused(
        said("annotate", *overrides(home, tmp_path / "none.json", "technique=all")),
        "boxes.json: there are no masks to compare",
    )


def test_the_best_technique_is_chosen_on_other_images(home: Path, tmp_path: Path) -> None:
    keys = [
        "technique=auto",
        f"data.train_json={home / 'train.json'}",
        "thresholds=[0.8]",
        "min_area=100",
        "evaluate=false",
    ]
    stdout = done("annotate", *overrides(home, tmp_path / "out.json", *keys))
    best = stdout.split(" is the best technique on 3 images of ")[0]
    none = done(
        "annotate", *overrides(home, tmp_path / "none.json", *keys, "min_area=1000000")
    )  # affects only the report
    assert none.startswith(f"{best} is the best technique")
    assert "object_IoU -1.000" in none
    done(
        "annotate",
        *overrides(
            home,
            tmp_path / "all.json",
            "technique=all",
            "thresholds=[0.8]",
            "min_area=100",
            val="train.json",
        ),
    )
    rows = content_of(tmp_path / "all_table.json")
    row = max(rows, key=lambda row: row["any_object_IoU"])
    assert row["name"] != "box"  # the first technique
    assert best == (
        row["name"] if row["threshold"] is None else f"{row['name']} {row['threshold']:g}"
    )
    assert (
        content_of(tmp_path / "out.json")["annotations"][0]["mask_by"]["technique"] == row["name"]
    )


def test_the_best_technique_is_chosen_on_this_split_where_the_other_has_no_masks(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is processed once, for the selection and the table together."""
    calls, whole = [], ScoreTechniques.__call__
    monkeypatch.setattr(
        ScoreTechniques,
        "__call__",
        lambda self, job: calls.append(job.image_id) or whole(self, job),
    )
    keys = [
        "technique=auto",
        f"data.train_json={home / 'boxes.json'}",
        "thresholds=[0.8]",
        "tune_images=2",
        "masks=all",
    ]
    stdout = done("annotate", *overrides(home, tmp_path / "some.json", *keys, val="val.json"))
    assert f"is the best technique on 2 images of {home / 'val.json'}" in stdout
    assert len(calls) == 2
    calls.clear()
    more = done(
        "annotate", *overrides(home, tmp_path / "all.json", *keys, "evaluate=true", val="val.json")
    )
    assert more.splitlines()[0] == stdout.splitlines()[0]
    assert len(calls) == len(set(calls)) == 5
    assert "mean over objects" in more


def test_warnings_about_the_file_are_printed_once(home: Path, tmp_path: Path) -> None:
    content = content_of(home / "val.json")
    content["annotations"][0] |= {"bbox": [500, 500, 20, 20], "segmentation": []}
    (home / "outside.json").write_text(json.dumps(content))
    keys = ["technique=auto", "evaluate=true", "thresholds=[0.8]", "masks=all"]
    stdout = done("annotate", *overrides(home, tmp_path / "out.json", *keys, val="outside.json"))
    assert stdout.count("outside.json: 1 warning") == 1
    assert f"annotation {content['annotations'][0]['id']} (image 1)" in stdout
    assert content_of(tmp_path / "out.json")["annotations"][0] == content["annotations"][0]


def test_side_outputs_overwrite_no_input(home: Path, tmp_path: Path) -> None:
    boxes = (home / "boxes.json").read_bytes()
    (tmp_path / "new_table.json").write_bytes(boxes)
    given = [
        f"data.val_json={tmp_path / 'new_table.json'}",
        f"data.images={home / 'images'}",
        "workers=1",
    ]
    for more in (["technique=all"], ["evaluate=true"]):
        stdout = said("annotate", *given, f"output={tmp_path / 'new.json'}", *more)
        assert_refused(stdout, f"{tmp_path / 'new_table.json'} is an input file")
    images = tmp_path / "images"
    shutil.copytree(home / "images", images)
    content = json.loads(boxes)
    (images / content["images"][0]["file_name"]).rename(images / "new_pictures.png")
    content["images"][0]["file_name"] = "new_pictures.png"
    (tmp_path / "new_table.json").write_text(json.dumps(content))
    given[1], before = f"data.images={images}", (images / "new_pictures.png").read_bytes()
    assert_refused(
        said("annotate", *given, f"output={images / 'new.json'}"),
        "new_pictures.png already exists",
    )
    assert (images / "new_pictures.png").read_bytes() == before
    done("annotate", *given, f"output={images / 'new.json'}", "pictures=0")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SqueezeNet with random weights and as many classes as the scenes."""
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
            done(
                "annotate",
                *overrides(home, output, *keys, f"by={by}", f"technique={technique}", "pictures=1"),
            )
            proposals = content_of(output)["annotations"]
            assert proposals
            assert all(0 <= a["mask_by"]["score"] <= 1 for a in proposals)
            assert all(
                rle_to_bitmaps([a["segmentation"]])[0].sum() == a["area"] > 0 for a in proposals
            )
    pairs = [(a["image_id"], a["category_id"]) for a in proposals]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) <= {
        (a["image_id"], a["category_id"]) for a in content_of(home / "boxes.json")["annotations"]
    }
    twice = tmp_path / "twice.json"
    done(
        "annotate", *overrides(home, twice, *keys, "by=class", "technique=gccam_f_pf", "workers=2")
    )
    assert twice.read_bytes() == (tmp_path / "class_gccam_f_pf.json").read_bytes()
    stdout = done(
        "annotate",
        *overrides(
            home,
            tmp_path / "t.json",
            *keys,
            "by=class",
            "technique=all",
            "thresholds=[0.5]",
            val="val.json",
        ),
    )
    assert "needs weights" not in stdout


def test_classes_that_imagenet_lacks_have_no_map(home: Path, tmp_path: Path) -> None:
    content, weights = content_of(home / "val.json"), tmp_path / "weights.pt"
    torch.save(torchvision.models.squeezenet1_1(num_classes=1000).state_dict(), weights)
    names = {
        1: "dog",
        2: "giraffe",
        4: "cat",
        5: "kite",
        7: "zebra",
        9: "cow",
        10: "sheep",
        13: "person",
    }
    for category in content["categories"]:
        category["name"] = names[category["id"]]
    for val, shown in (("animals.json", set(names)), ("none.json", {2, 5})):
        rows = [a for a in content["annotations"] if a["category_id"] in shown]
        (home / val).write_text(json.dumps({**content, "annotations": rows}))
    keys = [
        "classifier=squeezenet1_1",
        f"weights={weights}",
        "map_side=64",
        "thresholds=[0.5]",
        "min_area=0",
    ]
    for by in ("object", "class"):
        stdout = done(
            "annotate",
            *overrides(
                home,
                tmp_path / f"{by}_all.json",
                *keys,
                "technique=all",
                f"by={by}",
                val="animals.json",
            ),
        )
        assert stdout.count("warning") == 1
        assert (
            "the classifier does not know giraffe, kite: no class activation maps for them"
            in stdout
        )
        assert "gccam_f_pb" in stdout
    stdout = done(
        "annotate",
        *overrides(
            home,
            tmp_path / "a.json",
            *keys,
            "technique=gccam_f_pf",
            "masks=all",
            val="animals.json",
        ),
    )
    unknown = [
        a for a in content_of(tmp_path / "a.json")["annotations"] if a["category_id"] in (2, 5)
    ]
    ids = ", ".join(str(a["id"]) for a in unknown[:5])
    count = f"{len(unknown)} of {len(content['annotations'])} masks"
    assert f"{count}: no class map, the ellipse is used instead (annotations {ids}" in stdout
    assert {a["mask_by"]["fallback"] for a in unknown} == {"no class map"}
    assert all("score" not in a["mask_by"] and a["area"] > 0 for a in unknown)
    stdout = done(
        "annotate",
        *overrides(
            home,
            tmp_path / "c.json",
            *keys,
            "technique=gccam_f_pf",
            "by=class",
            "masks=all",
            val="animals.json",
        ),
    )
    images = ", ".join(map(str, list(dict.fromkeys(a["image_id"] for a in unknown))[:5]))
    assert f"masks: no class map, there is no mask (images {images}" in stdout
    assert {a["category_id"] for a in content_of(tmp_path / "c.json")["annotations"]}.isdisjoint(
        {2, 5}
    )
    refused = said(
        "annotate", *overrides(home, tmp_path / "n.json", *keys, "technique=all", val="none.json")
    )
    assert_refused(refused, "ImageNet has no class for giraffe, kite: train a classifier")


def test_a_checkpoint_is_read_once_and_need_not_know_all_classes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, backbone = [], ResNet("resnet18", norm="GN")
    model = ImageClassifier(
        backbone, ImageClassHead(2, ("c5",), backbone.levels, 16, 1, "GN")
    ).eval()

    def read(path: Path, *_: Any) -> Any:
        calls.append(path)
        return model, None, Categories(("star", "disc"), (1, 2))

    monkeypatch.setattr(annotate, "trained_model", read)
    run = tmp_path / "run.pt"
    run.write_bytes(b"one")
    keys = [
        f"checkpoint={run}",
        "technique=auto",
        "evaluate=true",
        "thresholds=[0.5]",
        "map_side=64",
        "masks=all",
        f"data.train_json={home / 'train.json'}",
    ]
    stdout = done("annotate", *overrides(home, tmp_path / "out.json", *keys, val="val.json"))
    assert calls == [run]
    shown = {
        a["category_id"]
        for name in ("train.json", "val.json")
        for a in content_of(home / name)["annotations"]
    }
    unknown = [
        c["name"]
        for c in content_of(home / "val.json")["categories"]
        if c["id"] in shown and c["name"] not in ("star", "disc")
    ]
    assert unknown
    assert all(stdout.split("is the best")[0].count(name) == 1 for name in unknown)
    run.write_bytes(b"two")
    done("annotate", *overrides(home, tmp_path / "again.json", *keys, val="val.json"))
    assert calls == [run, run]
    content = content_of(home / "val.json")
    rows = [a for a in content["annotations"] if a["category_id"] in (1, 5)]
    for category in content["categories"]:
        category["name"] = f"no {category['name']}"
    (home / "others.json").write_text(json.dumps({**content, "annotations": rows}))
    assert_refused(
        said(
            "annotate",
            *overrides(home, tmp_path / "no.json", keys[0], "technique=cam", val="others.json"),
        ),
        "does not know no disc, no star",
    )


@pytest.mark.parametrize(
    ("transforms", "side"), [([], None), ([{"sizes": [448], "max_size": 746}], (448, 746))]
)
def test_the_input_size_of_a_trained_classifier(
    transforms: list[dict[str, Any]],
    side: tuple[int, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [
        {"_target_": "maskseg.data.transforms.ResizeShortestEdge", **keys} for keys in transforms
    ]
    backbone = ResNet("resnet18", norm="GN")
    model = ImageClassifier(
        backbone, ImageClassHead(2, ("c5",), backbone.levels, 16, 1, "GN")
    ).eval()
    config = OmegaConf.create({"data": {"test_transforms": steps}})
    monkeypatch.setattr(
        annotate, "trained_model", lambda *_: (model, config, Categories(("star", "disc"), (1, 2)))
    )
    assert annotate.TrainedClassifier(str(tmp_path), str(side)).side() == side


def test_an_interrupted_run_resumes_with_the_same_files_only(
    home: Path, tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal of an interrupted run is valid only for the same weights and images."""

    def stop(*_: Any) -> None:
        raise UserError("stopped")

    classes = len(content_of(home / "val.json")["categories"])
    torch.save(torchvision.models.squeezenet1_1(num_classes=classes).state_dict(), classifier)
    given = overrides(
        home,
        tmp_path / "out.json",
        "classifier=squeezenet1_1",
        f"weights={classifier}",
        "map_side=64",
        "technique=cam",
    )
    with monkeypatch.context() as patch:
        patch.setattr(annotate, "write_annotations", stop)
        assert_refused(said("annotate", *given), "stopped")
    shutil.copytree(home / "images", tmp_path / "images")
    other = [
        word if not word.startswith("data.images") else f"data.images={tmp_path / 'images'}"
        for word in given
    ]
    assert_refused(said("annotate", *other), f"images='{home / 'images'}' there")
    before = classifier.read_bytes()
    torch.save(torchvision.models.squeezenet1_1(num_classes=classes).state_dict(), classifier)
    assert_refused(said("annotate", *given), "content of weights='")
    classifier.write_bytes(before)
    done("annotate", *given)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["technique=magic"], "technique must be one of"),
        (["technique=cam"], "cam needs a classifier"),
        (["technique=box", "threshold=0.5"], "takes no threshold"),
        (["threshold=1.5"], "threshold=1.5: expected a number from 0 to 1 or null"),
        (["threshold=0.0"], "threshold must be above"),
        (["thresholds=[0.5,2.0]"], "thresholds=[0.5, 2.0]: expected a list"),
        (["threshold=abc"], "threshold='abc': expected a number from 0 to 1 or null"),
        (["threshold=true"], "threshold=True: expected a number from 0 to 1 or null"),
        (
            ["thresholds=[a]"],
            "thresholds=['a']: expected a list of at least 1 value, each a number",
        ),
        (["thresholds=[]"], "thresholds=[]: expected a list of at least 1 value"),
        (["thresholds=0.5"], "expected a list"),
        (["iterations=1.5"], "expected a whole number"),
        (["map_side=wide"], "map_side='wide': expected a whole number from 32"),
        (["map_side=31"], "map_side=31: expected a whole number from 32 to 65536 or null"),
        (["checkpoint=none.pt"], "none.pt: cannot be read"),
        (["by=pixel"], "by must be object or class"),
        (["segmentation=png"], "segmentation must be"),
        (["workers=-1"], "workers=-1: expected a whole number from 0"),
        (["checkpoint=a", "classifier=b"], "both set"),
        (["classifier=vgg16"], "vgg16"),
        (["technique=auto"], "no masks to compare techniques with"),
    ],
)
def test_refusals(home: Path, tmp_path: Path, more: list[str], message: str) -> None:
    assert_refused(said("annotate", *overrides(home, tmp_path / "out.json", *more)), message)
    assert not list(tmp_path.iterdir())
    assert_refused(said("annotate", *overrides(home, home / "boxes.json")), "is an input file")


@pytest.mark.parametrize("by", ["object", "class"])
def test_drawn_masks_are_kept(home: Path, tmp_path: Path, by: str) -> None:
    # Guards against: the masks that an annotator has drawn are replaced by proposals
    content = content_of(home / "val.json")
    drawn = content["annotations"][0]
    for annotation in content["annotations"][1:]:
        del annotation["segmentation"]
    (home / "mixed.json").write_text(json.dumps(content))
    keys = [f"by={by}", "technique=box"]
    output = tmp_path / "out.json"
    done("annotate", *overrides(home, output, *keys, val="mixed.json"))
    rows = {row["id"]: row for row in content_of(output)["annotations"]}
    assert rows[drawn["id"]]["segmentation"] == drawn["segmentation"]
    assert "mask_by" not in rows[drawn["id"]]
    made = [row for row in rows.values() if "mask_by" in row]
    assert len(made) == len(rows) - 1 > 1
    assert len(rows) == len(content_of(output)["annotations"])
    done("annotate", *overrides(home, tmp_path / "all.json", *keys, "masks=all", val="mixed.json"))
    assert all("mask_by" in row for row in content_of(tmp_path / "all.json")["annotations"])
    assert_refused(
        said("annotate", *overrides(home, tmp_path / "none.json", *keys, val="val.json")),
        f"there is no {by} without a mask",
        "masks=all",
    )
    assert not (tmp_path / "none.json").exists()
