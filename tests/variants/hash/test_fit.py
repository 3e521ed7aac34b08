"""The tools of the hash layer: fit, evaluate, predict, joint training, and their errors."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.runs import MASKS, SCENES, SMALL, call, lines
from made.tools import assert_refused, done, said
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import maskseg
from maskseg import config as configs
from maskseg.data.coco.file import read_coco
from maskseg.data.datasets.scenes import make_scenes
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.files.outputs import RECORD
from maskseg.masks.base import rle_to_bitmaps
from maskseg.structures import Categories
from maskseg.variants.hash.study import METHODS

pytest.importorskip("cv2")
COUNT = "model.segmenter.superpixels.count=30"
HASH = [
    "experiment=scenes_hash_r18",
    *SMALL,
    *MASKS,
    *SCENES,
    "model.segmenter.superpixels.scale=100.0",
]
STUDY = [
    "experiment=scenes_hash_r18",
    *SCENES,
    "trainer.device=cpu",
    "pictures=1",
    "data.max_images=1",
    "scales=[20,100,400]",
]
FILES = ["metrics.json", "segmentation_iou.png", "table.txt"]
BSDS = ["experiment=hash_bsds", "data.root=bsds", "trainer.device=cpu"]
TINY_NET = [
    "model/backbone=resnet",
    "model.backbone.name=resnet18",
    "model.backbone.weights=null",
    "model.segmenter.level=c4",
]


def make_checkpoint(path: Path, overrides: list[str], categories: Categories) -> None:
    """Save an untrained model as a training would."""
    config = configs.compose("train", overrides)
    configs.set_categories(config, categories)
    torch.manual_seed(0)
    about = {"config": configs.to_yaml(config), "categories": categories.to_dict()}
    save_checkpoint(
        path, {**about, "model": configs.build_model(config).state_dict(), "step": 0, "metrics": {}}
    )


def make_old(path: Path, output: Path) -> None:
    """Save the same checkpoint without the config keys that were added with segments."""
    checkpoint = load_checkpoint(path)
    config = OmegaConf.create(checkpoint["config"])
    for group, key in (
        ("data", "superpixels"),
        ("data", "train_semantic"),
        ("data", "val_semantic"),
        ("model.backbone", "extra_levels"),
    ):
        OmegaConf.select(config, group).pop(key)
    save_checkpoint(output, {**checkpoint, "config": OmegaConf.to_yaml(config)})


def write_bsds(root: Path) -> None:
    """Two images each for train and val: color patches, with one annotator and with two."""
    io_ = pytest.importorskip("scipy.io")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "groundTruth"):
            (root / part / split).mkdir(parents=True)
        for i in range(2):
            truth = np.kron(np.arange(6).reshape(2, 3), np.ones((40, 36), dtype=int))
            picture = rng.integers(0, 256, (6, 3))[truth] + rng.integers(-9, 10, (80, 108, 3))
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
                root / "images" / split / f"{i}.jpg", quality=95
            )
            cells = np.empty((1, i + 1), dtype=object)
            for annotator in range(i + 1):
                cells[0, annotator] = {
                    "Segmentation": (truth // (annotator + 1) + 1).astype(np.uint16)
                }
            io_.savemat(root / "groundTruth" / split / f"{i}.mat", {"groundTruth": cells})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data sets, a model without a hash layer, one with a fitted layer, old checkpoints.

    The old checkpoints lack the config keys that were added with segments.
    """
    folder = tmp_path_factory.mktemp("segmenting")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    write_bsds(folder / "bsds")
    make_checkpoint(
        folder / "plain.pt",
        [*SMALL, *MASKS, *SCENES],
        read_coco(folder / "scenes" / "train.json").categories,
    )
    with contextlib.chdir(folder):
        text = done("fit_hash", "checkpoint=plain.pt", "output=hash", COUNT, "trainer.device=cpu")
    (folder / "said.txt").write_text(text)
    make_old(folder / "hash" / "last.pt", folder / "old.pt")
    make_old(folder / "plain.pt", folder / "old_plain.pt")
    return folder


def test_fit_hash_writes_a_model_with_a_hash_layer(home: Path) -> None:
    assert sorted(p.name for p in (home / "hash").iterdir()) == [
        "last.pt",
        "metrics.jsonl",
        "results.csv",
        "tensorboard",
    ]
    plain, hashed = (load_checkpoint(home / name) for name in ("plain.pt", "hash/last.pt"))
    added = {k: v for k, v in hashed["model"].items() if k not in plain["model"]}
    assert {k: tuple(v.shape) for k, v in added.items()} == {
        "segmenter.layer.conv.weight": (8, 64, 1, 1),
        "segmenter.layer.conv.bias": (8,),
    }
    assert all(torch.equal(hashed["model"][k], v) for k, v in plain["model"].items())
    assert hashed["categories"] == plain["categories"]
    assert set(hashed["metrics"]) == {
        "quantisation_error",
        "balance",
        "entropy",
        "correlation",
        "codes",
    }
    assert hashed["metrics"]["codes"] > 8
    errors = [line["quantisation_error"] for line in lines(home / "hash")]
    assert len(errors) == 50
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))
    text = (home / "said.txt").read_text()
    assert "quantisation_error" in text
    assert "written to hash: last.pt" in text
    events = EventAccumulator(str(home / "hash" / "tensorboard"))
    events.Reload()
    assert {"train/quantisation_error", "val/entropy"} <= set(events.Tags()["scalars"])
    assert "fit:" not in hashed["config"]
    assert "checkpoint:" not in hashed["config"]


@pytest.mark.parametrize("checkpoint", ["old.pt", pytest.param("hash", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("at_home")
def test_evaluate_gives_segmentation_iou(tmp_path: Path, checkpoint: str) -> None:
    assert ("val_semantic" in load_checkpoint(Path("old.pt"))["config"]) is False
    overrides = [
        "data.val_semantic=scenes/stuff",
        "data.max_images=2",
        "trainer.device=cpu",
        "data.num_workers=0",
    ]
    done("evaluate", f"checkpoint={checkpoint}", f"output={tmp_path / 'out'}", *overrides)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 < metrics["segmentation_iou/segments"] < 1
    assert metrics["segmentation_iou/images_counted"] == 2
    assert {
        "segmentation_iou/images",
        "segmentation_iou/best_annotator",
        "segmentation_iou/covering",
        "segm/AP",
    } <= set(metrics)
    assert min(Image.open(tmp_path / "out" / "segments.png").size) > 100


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_a_hash_layer_changes_no_detection(tmp_path: Path) -> None:
    done(
        "fit_hash",
        "checkpoint=old_plain.pt",
        f"output={tmp_path / 'hash'}",
        COUNT,
        "trainer.device=cpu",
        "fit.max_images=2",
    )
    for name, checkpoint in (("plain", "old_plain.pt"), ("hashed", tmp_path / "hash")):
        overrides = [
            f"checkpoint={checkpoint}",
            f"output={tmp_path / name}",
            "data.val_semantic=scenes/stuff",
            "trainer.device=cpu",
        ]
        done("evaluate", *overrides, "data.num_workers=0")
    plain, hashed = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("plain", "hashed")
    )
    assert {
        k: v for k, v in hashed.items() if not k.startswith("segmentation_iou")
    } == pytest.approx(plain)
    assert not any(k.startswith("segmentation_iou") for k in plain)
    one, other = ((tmp_path / name / "detections.json").read_text() for name in ("plain", "hashed"))
    assert one == other


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["sweep=[10,20]"], [10, 20]),
        pytest.param(
            ["base=egs", "sweep=[100,300]", "scales=[50,400]", "data.max_images=null"],
            [100, 300],
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.usefixtures("at_home")
def test_the_study_of_a_checkpoint(tmp_path: Path, overrides: list[str], values: list[int]) -> None:
    text = done("evaluate", *STUDY, "checkpoint=hash", f"output={tmp_path / 'out'}", *overrides)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*FILES, RECORD, "001_val_000001.png", "001_val_000001_steps.png"]
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for method in METHODS:
        for value in values:
            assert 0 < metrics[f"segmentation_iou/{method}/{value}"] < 1
            assert metrics[f"segmentation_iou/{method}/{value}/num_segments"] >= 1
    for value in values:
        merged, before = (
            metrics[f"segmentation_iou/{method}/{value}/num_segments"]
            for method in ("hash", "superpixels")
        )
        assert merged <= before
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in text
    assert len(table.splitlines()) == 1 + len(METHODS) * len(values)
    for name in ("segmentation_iou.png", "001_val_000001.png", "001_val_000001_steps.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 100


def test_predict_draws_segments(at_home: Path, tmp_path: Path) -> None:
    Image.open(at_home / "scenes/images/val_000001.jpg").crop((0, 0, 128, 100)).save(
        tmp_path / "a.png"
    )
    done(
        "predict",
        "checkpoint=hash",
        f"input={tmp_path / 'a.png'}",
        f"output={tmp_path / 'out'}",
        "trainer.device=cpu",
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        RECORD,
        "a.png",
        "a_segments.png",
        "predictions.json",
        "segments.json",
    ]
    assert min(Image.open(tmp_path / "out" / "a_segments.png").size) >= 100
    rows = json.loads((tmp_path / "out" / "segments.json").read_text())
    assert {tuple(row) for row in rows} == {
        ("image_id", "bbox", "score", "segmentation", "file_name")
    }
    bitmaps = rle_to_bitmaps([row["segmentation"] for row in rows])
    assert bitmaps.shape[1:] == (100, 128)
    assert (bitmaps.sum(axis=0) == 1).all()
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(bitmaps.mean(axis=(1, 2)).tolist())
    for row, mask in zip(rows, bitmaps, strict=True):
        y, x = np.nonzero(mask)
        assert row["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
    result = maskseg.load("hash", device="cpu")(tmp_path / "a.png")
    assert result.segments is not None
    assert np.array_equal(result.segments.numpy(), bitmaps.argmax(axis=0))


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_another_level_and_other_superpixels(tmp_path: Path) -> None:
    overrides = [
        "model.segmenter.level=p3",
        "model.segmenter.bits=12",
        "model/superpixels@model.segmenter.superpixels=egs",
    ]
    overrides += [
        "model.segmenter.superpixels.scale=310",
        "fit.max_images=1",
        "fit.iterations=3",
        "trainer.device=cpu",
    ]
    done("fit_hash", "checkpoint=plain.pt", f"output={tmp_path / 'p3'}", *overrides)
    checkpoint = load_checkpoint(tmp_path / "p3" / "last.pt")
    assert checkpoint["model"]["segmenter.layer.conv.weight"].shape == (12, 32, 1, 1)
    assert len(lines(tmp_path / "p3")) == 3
    segmenter = maskseg.load(tmp_path / "p3", device="cpu").model.segmenter
    assert (segmenter.level, segmenter.feature_spec.stride, segmenter.superpixels.scale) == (
        "p3",
        8,
        310,
    )  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_a_layer_is_fitted_again(tmp_path: Path) -> None:
    # A model with a hash layer keeps the layer's settings; the same images give the same weights.
    overrides = ["checkpoint=hash", "trainer.device=cpu"]
    done("fit_hash", *overrides, f"output={tmp_path / 'again'}")
    done("fit_hash", *overrides, f"output={tmp_path / 'other'}", "seed=1")
    runs = (Path("hash"), tmp_path / "again", tmp_path / "other")
    first, again, other = (
        load_checkpoint(run / "last.pt")["model"]["segmenter.layer.conv.weight"] for run in runs
    )
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)


def test_a_network_without_classes(at_home: Path, tmp_path: Path) -> None:
    text = done(
        "evaluate",
        *BSDS,
        *TINY_NET,
        f"output={tmp_path / 'out'}",
        "sweep=[12]",
        "scales=[100]",
        "pictures=1",
    )
    assert "2 images" in text
    result = {p.name for p in (tmp_path / "out").iterdir()}
    assert result == {*FILES, RECORD, "hash.pt", "001_0.png", "001_0_steps.png"}
    assert (
        json.loads((tmp_path / "out" / "metrics.json").read_text())["segmentation_iou/hash/12"]
        > 0.1
    )
    overrides = [f"checkpoint={tmp_path / 'out/hash.pt'}", "trainer.device=cpu"]
    done(
        "predict",
        *overrides,
        f"input={at_home / 'bsds/images/val/1.jpg'}",
        f"output={tmp_path / 'drawn'}",
    )
    rows = json.loads((tmp_path / "drawn" / "segments.json").read_text())
    assert (rle_to_bitmaps([row["segmentation"] for row in rows]).sum(axis=0) == 1).all()
    assert json.loads((tmp_path / "drawn" / "predictions.json").read_text()) == []
    assert_refused(
        said("evaluate", *overrides, f"output={tmp_path / 'no'}"),
        "finds segments and no objects",
        "experiment=...",
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_evaluate_fits_the_same_layer_as_fit_hash(tmp_path: Path) -> None:
    study = [*BSDS, "sweep=[12]", "pictures=0"]
    done("evaluate", *study, *TINY_NET, f"output={tmp_path / 'out'}")
    done("fit_hash", *BSDS, *TINY_NET, f"output={tmp_path / 'fitted'}")
    one, other = (
        load_checkpoint(tmp_path / name)["model"]["segmenter.layer.conv.weight"]
        for name in ("out/hash.pt", "fitted/last.pt")
    )
    torch.testing.assert_close(one, other)
    # A checkpoint's own layer is evaluated; fit_hash fits it again.
    done(
        "evaluate", *study, f"checkpoint={tmp_path / 'out/hash.pt'}", f"output={tmp_path / 'again'}"
    )
    metrics = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("out", "again")
    )
    assert next(metrics) == pytest.approx(next(metrics))
    assert not (tmp_path / "again" / "hash.pt").exists()
    done(
        "fit_hash",
        f"checkpoint={tmp_path / 'out/hash.pt'}",
        "data.root=bsds",
        f"output={tmp_path / 'refitted'}",
        "trainer.device=cpu",
    )


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_the_papers_network(tmp_path: Path) -> None:
    done("fit_hash", *BSDS, "model.backbone.weights=null", f"output={tmp_path / 'fitted'}")
    checkpoint = load_checkpoint(tmp_path / "fitted" / "last.pt")
    assert checkpoint["model"]["segmenter.layer.conv.weight"].shape == (8, 4096, 1, 1)
    done(
        "evaluate",
        *BSDS,
        f"checkpoint={tmp_path / 'fitted'}",
        f"output={tmp_path / 'out'}",
        "sweep=[12]",
        "data.split=train",
    )


NO = "OUT"  # placeholder of a folder that must not be created


@pytest.mark.parametrize(
    ("tool", "overrides", "message"),
    [
        (
            "fit_hash",
            ["checkpoint=plain.pt", "output=hash"],
            "output=hash already holds a checkpoint",
        ),
        (
            "fit_hash",
            ["checkpoint=plain.pt", "output=mine"],
            "mine/results.csv already exists",
        ),
        pytest.param(
            "fit_hash", ["checkpoint=plain.pt"], "output=... is missing", marks=pytest.mark.slow
        ),
        pytest.param(
            "fit_hash",
            ["checkpoint=absent.pt", f"output={NO}"],
            "absent.pt",
            marks=pytest.mark.slow,
        ),
        (
            "fit_hash",
            ["checkpoint=plain.pt", f"output={NO}", "model.segmenter.level=c9"],
            "model.segmenter.level=c9: the backbone has",
        ),
        (
            "fit_hash",
            ["checkpoint=plain.pt", f"output={NO}", "model.segmenter.bits=0"],
            "model.segmenter.bits=0: expected a whole number from 1 to 64",
        ),
        pytest.param(
            "fit_hash",
            ["checkpoint=plain.pt", f"output={NO}", "model.segmenter.scope=far"],
            "scope must be neighbours or anywhere",
            marks=pytest.mark.slow,
        ),
        ("fit_hash", ["checkpoint=plain.pt", f"output={NO}", "split=test"], "split=test"),
        (
            "fit_hash",
            ["checkpoint=plain.pt", f"output={NO}", "fit.max_samples=0"],
            "fit.max_samples=0: expected a whole number from 2",
        ),
        pytest.param(
            "fit_hash",
            ["checkpoint=plain.pt", f"output={NO}", "fit.max_sample=3"],
            "did you mean 'fit.max_samples'?",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fit_hash",
            ["checkpoint=plain.pt", f"output={NO}", "data=bsds", "data.root=absent"],
            "data.root=absent: no such folder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fit_hash",
            [f"output={NO}", "experiment=scenes_hash_r18", *SCENES],
            "has to be trained first: name it with checkpoint=...",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "fit_hash",
            [f"output={NO}", "experiment=scenes_r18", *SCENES],
            "no segmenter; model=hash_net has one",
            marks=pytest.mark.slow,
        ),
        (
            "evaluate",
            [*STUDY, "checkpoint=plain.pt", f"output={NO}"],
            "no hash layer: tools/fit_hash.py",
        ),
        (
            "evaluate",
            [*STUDY, "checkpoint=hash", f"output={NO}", "base=kmeans"],
            "base must be slic or egs",
        ),
        pytest.param(
            "evaluate",
            [*STUDY, "checkpoint=hash", f"output={NO}", "sweep=[]"],
            "sweep=[]: expected a list of at least 1 value",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "evaluate",
            [*STUDY, "checkpoint=hash", f"output={NO}", "split=test"],
            "split=test",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "evaluate", [*STUDY, "checkpoint=hash"], "output=... is missing", marks=pytest.mark.slow
        ),
        ("evaluate", [*STUDY, f"output={NO}"], "has to be trained first"),
        ("evaluate", ["experiment=scenes_r18", *SCENES, f"output={NO}"], "no segmenter"),
        ("evaluate", [*BSDS, "data.split=test", "checkpoint=hash", f"output={NO}"], "split=test: "),
        (
            "evaluate",
            ["checkpoint=hash", f"output={NO}", "data.val_semantic=absent"],
            "data.val_semantic=absent: no such folder",
        ),
        (
            "train",
            ["model=hash_net", *TINY_NET, *SCENES, "run_dir=OUT"],
            "the model finds no objects: tools/fit_hash.py",
        ),
        (
            "train",
            ["experiment=hash_bsds", "data=scenes", *TINY_NET, *SCENES, "run_dir=OUT"],
            "the model finds no objects: tools/fit_hash.py",
        ),
        ("train", [*BSDS, *TINY_NET, "run_dir=OUT"], "tools/fit_hash.py"),
    ],
)
def test_errors(
    at_home: Path, tmp_path: Path, tool: str, overrides: list[str], message: str
) -> None:
    (at_home / "mine").mkdir(exist_ok=True)
    (at_home / "mine" / "results.csv").write_text("the user's")
    before = sorted(p for p in at_home.rglob("*") if p.is_file())
    assert_refused(said(tool, *(w.replace(NO, str(tmp_path / "out")) for w in overrides)), message)
    assert not (tmp_path / "out").exists()
    assert sorted(p for p in at_home.rglob("*") if p.is_file()) == before


@pytest.mark.parametrize("tested", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("at_home")
def test_joint_training_of_the_codes(tmp_path: Path, tested: bool) -> None:
    overrides = [
        "data.max_images=2",
        "trainer.max_steps=2",
        "trainer.checkpoint_every=0",
        *(["trainer.plots=true"] if tested else ["data.val_json=null"]),
    ]
    text = done("train", *HASH, f"run_dir={tmp_path / 'run'}", *overrides)
    result = lines(tmp_path / "run")
    assert [line["step"] for line in result] == [1, 2]
    for line in result:
        assert line["loss/hash_together"] > 0
        assert line["loss/hash_apart"] >= 0
    weight = load_checkpoint(tmp_path / "run" / "last.pt")["model"]["segmenter.layer.conv.weight"]
    assert weight.shape == (12, 32, 1, 1)
    if tested:
        (values,) = lines(tmp_path / "run", "val")
        assert 0 < values["segmentation_iou/segments"] < 1
        assert values["segmentation_iou/images_counted"] == 2
        assert {"loss/hash_together", "loss/hash_apart"} <= set(values)
        assert (tmp_path / "run" / "segments.png").is_file()
        assert "AP50" in text


@pytest.mark.slow
def test_a_fitted_layer_is_trained_further(at_home: Path, tmp_path: Path) -> None:
    fitted = [
        "model.segmenter.level=c2",
        "model.segmenter.bits=8",
        "trainer.init=hash",
        "data.val_json=null",
        "trainer.max_steps=2",
    ]
    text = done("train", *HASH, *fitted, f"run_dir={tmp_path / 'run'}")
    assert "started from hash" in text
    assert "do not fit" not in text
    name = "segmenter.layer.conv.weight"
    before, after = (
        load_checkpoint(path)["model"][name]
        for path in (at_home / "hash" / "last.pt", tmp_path / "run" / "last.pt")
    )
    assert 0 < float((after - before).abs().max()) < 0.1


@pytest.mark.usefixtures("at_home")
def test_codes_without_a_loss_are_refused(tmp_path: Path) -> None:
    result = said("train", *HASH, "model.segmenter.loss_weight=0.0", f"run_dir={tmp_path / 'run'}")
    assert_refused(result, "model.segmenter.loss_weight is 0", "tools/fit_hash.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_workers_and_resuming_change_nothing(tmp_path: Path) -> None:
    overrides = [*HASH, "data.val_json=null", "trainer.max_steps=4"]
    for name, more in {"whole": [], "workers": ["data.num_workers=2"]}.items():
        done("train", *overrides, f"run_dir={tmp_path / name}", *more)
    done(
        "train",
        *overrides,
        f"run_dir={tmp_path / 'resumed'}",
        f"trainer.resume={tmp_path / 'whole' / 'step_0000002.pt'}",
    )
    expected = load_checkpoint(tmp_path / "whole" / "last.pt")["model"]
    for name in ("workers", "resumed"):
        result = load_checkpoint(tmp_path / name / "last.pt")["model"]
        assert [k for k, v in expected.items() if not torch.equal(v, result[k])] == [], name


@pytest.mark.slow
def test_in_separate_processes(home: Path, tmp_path: Path) -> None:
    overrides = ["checkpoint=plain.pt", f"output={tmp_path / 'hash'}", COUNT, "trainer.device=cpu"]
    assert "written to" in call(overrides, home, tool="fit_hash")
    assert "AP50" in call(
        [f"checkpoint={tmp_path / 'hash'}", f"output={tmp_path / 'out'}", "trainer.device=cpu"],
        home,
        tool="evaluate",
    )


@pytest.mark.parametrize("tool", ["fit_hash", "evaluate"])
def test_help(tool: str) -> None:
    result: Any = said(tool, "--help")
    assert (result.code, result.err) == (0, "")
    assert "experiment=hash_bsds" in result.out
