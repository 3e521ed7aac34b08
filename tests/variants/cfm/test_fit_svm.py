"""`tools/fit_svm.py` from the command line: fit, evaluation, prediction and errors."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made.runs import SCENES, assert_equal, lines
from made.tools import assert_refused, done, said
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import maskseg
from maskseg import config as configs
from maskseg.data.datasets.scenes import STUFF, THINGS, make_scenes
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.variants.cfm.svm_classifier import CFMSvm

pytest.importorskip("cv2")
SMALL = [
    "model.backbone.channels=16",
    "model.classifier.mlp.width=64",
    "data.num_workers=0",
    "trainer.device=cpu",
]
# One hierarchy of segments: proposals are not tested here.
METHOD = [
    f"model.proposer.method.{key}"
    for key in ("color_spaces=[lab]", "scales=[60.0]", "similarities=[color]")
]
FOLDERS = ["data.train_segments=segments_train", "data.val_segments=segments_val"]
WORDS = ["experiment=scenes_cfm", *SMALL, *METHOD, *SCENES, *FOLDERS, "data.max_images=6"]
FIT = ["checkpoint=softmax.pt", "fit.C=10.0"]  # enough for few images
NAMES = [*THINGS, *STUFF]
FILES = ["config.yaml", "last.pt", "metrics.jsonl", "results.csv", "tensorboard"]


def make_checkpoint(path: Path, words: list[str]) -> None:
    """Save a checkpoint of an untrained model, with initial norm statistics."""
    config = configs.compose("train", words)
    source = configs.build_source(config.data)
    configs.set_categories(config, source.categories)
    torch.manual_seed(0)
    about = {"config": configs.to_yaml(config), "categories": source.categories.to_dict()}
    save_checkpoint(
        path, {**about, "model": configs.build_model(config).state_dict(), "step": 0, "metrics": {}}
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset, a model with random weights and SVMs that were fitted to it."""
    folder = tmp_path_factory.mktemp("svm")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "os.cpu_count", lambda: 1
        )  # segments are computed in this process: others take seconds to start
        make_checkpoint(folder / "softmax.pt", WORDS)
        (folder / "said.txt").write_text(done("fit_svm", *FIT, "output=svm"))
    return folder


def test_only_the_last_layer_changes(home: Path) -> None:
    assert sorted(path.name for path in (home / "svm").iterdir()) == FILES
    softmax, fitted = (load_checkpoint(home / name) for name in ("softmax.pt", "svm/last.pt"))
    last = [f"classifier.scores.{name}" for name in ("weight", "bias")]
    assert list(fitted["model"]) == list(softmax["model"])
    assert_equal(
        *({k: v for k, v in c["model"].items() if k not in last} for c in (softmax, fitted))
    )
    assert [tuple(fitted["model"][name].shape) for name in last] == [(16, 128), (16,)]
    assert fitted["model"][last[0]].abs().sum() > 0
    assert fitted["categories"] == softmax["categories"]
    assert set(fitted["metrics"]) == {"objective", "error", "missed"}
    config, before = (OmegaConf.create(c["config"]) for c in (fitted, softmax))
    assert "fit" not in config
    assert config.model.classifier._target_ == "maskseg.variants.cfm.svm_classifier.CFMSvm"
    assert config.model.classifier.score_threshold == 0.27
    config.model.classifier = {
        **config.model.classifier,
        "_target_": before.model.classifier._target_,
        "score_threshold": 0.05,
    }
    assert config == before
    assert OmegaConf.load(home / "svm" / "config.yaml").model.classifier.num_classes == 16


def test_metrics_events_and_table(home: Path) -> None:
    metrics = lines(home / "svm")
    assert [line["step"] for line in metrics] == list(range(len(metrics)))
    assert all(
        later["objective"] <= earlier["objective"] for earlier, later in itertools.pairwise(metrics)
    )
    parts = {f"{part}/{name}" for part in ("objective", "error", "missed") for name in NAMES}
    assert set(metrics[-1]) == {"step", "kind", "objective", *parts}
    assert sum(metrics[-1][f"objective/{name}"] for name in NAMES) == pytest.approx(
        metrics[-1]["objective"]
    )
    events = EventAccumulator(str(home / "svm" / "tensorboard"))
    events.Reload()
    assert {"train/objective", "train/error/disc", "train/missed/water"} <= set(
        events.Tags()["scalars"]
    )
    text = (home / "said.txt").read_text()
    assert "segments seen" in text
    assert "written to svm: last.pt, config.yaml, metrics.jsonl, tensorboard, results.csv" in text
    table = {
        line.split()[0]: int(line.split()[1])
        for line in text.splitlines()
        if line.split()[0] in NAMES
    }
    truth = json.loads((home / "scenes" / "train.json").read_text())
    images = {image["id"] for image in truth["images"][:6]}
    labels = [
        a["category_id"]
        for a in truth["annotations"]
        if a["image_id"] in images and not a["iscrowd"]
    ]
    assert {name: table[name] for name in THINGS} == {
        name: labels.count(number) for name, number in THINGS.items()
    }
    assert sum(table[name] for name in STUFF) > 0
    for name, positives in table.items():
        assert (f"no positives for {name};" in text) == (positives == 0)


@pytest.mark.usefixtures("at_home")
def test_fitted_svms_are_evaluated(tmp_path: Path) -> None:
    done("evaluate", "checkpoint=svm", f"output={tmp_path / 'svm'}", "split=train", "pictures=1")
    metrics = json.loads((tmp_path / "svm" / "metrics.json").read_text())
    assert metrics["semantic/mIoU_stuff"] > 0.3  # a softmax with random weights has almost 0
    assert 0 <= metrics["loss/segment_class"] < 16


@pytest.mark.slow
def test_prediction(at_home: Path, tmp_path: Path) -> None:
    image = at_home / "scenes" / "images" / "train_000001.jpg"
    done(
        "predict",
        "checkpoint=svm",
        f"input={image}",
        f"output={tmp_path / 'out'}",
        "trainer.device=cpu",
        "model.classifier.score_threshold=0.5",
    )
    assert (tmp_path / "out" / "train_000001.jpg_classes.png").is_file()
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert all(row["score"] > 0.5 for row in rows)
    predictor = maskseg.load("svm", device="cpu")
    assert isinstance(predictor.model.classifier, CFMSvm)
    classes = predictor(image).classes
    assert classes is not None
    assert len(np.unique(classes.numpy())) > 1


@pytest.mark.slow
def test_fits_are_deterministic_and_flips_change_them(tmp_path: Path, at_home: Path) -> None:
    first = (at_home / "said.txt").read_text()
    text = done(
        "fit_svm", *FIT, f"output={tmp_path / 'again'}", "data.num_workers=2", "evaluation.batch=3"
    )
    one, other = (
        load_checkpoint(folder / "last.pt")["model"]
        for folder in (at_home / "svm", tmp_path / "again")
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert text.splitlines()[:-1] == first.splitlines()[1:-1]  # the segments exist
    mirrored = done(
        "fit_svm",
        *FIT,
        f"output={tmp_path / 'mirrored'}",
        "fit.flip=true",
        "fit.max_samples=100",
        "model.classifier.score_threshold=0.5",
    )
    seen = [
        int(line.split()[0])
        for t in (first, mirrored)
        for line in t.splitlines()
        if "segments seen" in line
    ]
    assert seen[1] > 1.5 * seen[0]
    assert ", 100 kept" in mirrored
    assert (
        OmegaConf.load(tmp_path / "mirrored" / "config.yaml").model.classifier.score_threshold
        == 0.5
    )
    # SVMs are fitted again, and keep their threshold
    done(
        "fit_svm",
        f"checkpoint={tmp_path / 'mirrored'}",
        "fit.C=10.0",
        f"output={tmp_path / 'refitted'}",
    )
    assert (
        OmegaConf.load(tmp_path / "refitted" / "config.yaml").model.classifier.score_threshold
        == 0.5
    )
    torch.testing.assert_close(
        load_checkpoint(tmp_path / "refitted" / "last.pt")["model"], one, rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_images_that_cannot_be_read(at_home: Path, tmp_path: Path) -> None:
    image = at_home / "scenes" / "images" / "train_000002.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    try:
        assert_refused(said("fit_svm", *FIT, f"output={tmp_path / 'no'}"), "train_000002.jpg")
        assert not (tmp_path / "no" / "last.pt").exists()
        text = done("fit_svm", *FIT, f"output={tmp_path / 'skipped'}", "data.skip_bad=1")
        assert "warning: " in text
        assert "train_000002.jpg" in text
    finally:
        image.write_bytes(whole)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint=softmax.pt", "output=svm"], "output=svm already holds a checkpoint"),
        (["checkpoint=softmax.pt", "output=mine"], "mine/results.csv already exists"),
        pytest.param(["checkpoint=softmax.pt"], "output=... is missing", marks=pytest.mark.slow),
        pytest.param(["output=OUT"], "checkpoint=... is missing", marks=pytest.mark.slow),
        pytest.param(["checkpoint=absent.pt", "output=OUT"], "absent.pt", marks=pytest.mark.slow),
        (
            ["checkpoint=boxes.pt", "output=OUT"],
            "boxes.pt: the model does not classify segments; SVMs need a model of model=cfm",
        ),
        pytest.param(
            [*FIT, "output=OUT", "data.segment_sampler=null"],
            "data.segment_sampler is not set",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*FIT, "output=OUT", "data.train_segments=null"],
            "data.train_segments is not set",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*FIT, "output=OUT", "data.train_json=absent.json"],
            "absent.json",
            marks=pytest.mark.slow,
        ),
        (
            [*FIT, "output=OUT", "fit.negative_below=0.9"],
            "fit.negative_below above 0 and at most 0.5",
        ),
        ([*FIT, "output=OUT", "fit.C=0.0"], "fit.C=0.0: expected a number above 0"),
        pytest.param(
            [*FIT, "output=OUT", "fit.max_samples=1"],
            "fit.max_samples=1: expected a whole number from 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*FIT, "output=OUT", "fit.cost=1"], "no such key 'fit.cost'", marks=pytest.mark.slow
        ),
        pytest.param(
            [*FIT, "output=OUT", "evaluation.batch=0"],
            "evaluation.batch=0: expected a whole number from 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_errors(at_home: Path, tmp_path: Path, words: list[str], message: str) -> None:
    if not (at_home / "boxes.pt").exists():
        small = [
            "model.backbone.channels=16",
            "model.classifier.mlp.width=16",
            "~model/heads@model.heads.mask",
            "trainer.device=cpu",
        ]
        make_checkpoint(at_home / "boxes.pt", ["experiment=scenes_r18", *small, *SCENES])
    (at_home / "mine").mkdir(exist_ok=True)
    (at_home / "mine" / "results.csv").write_text("the user's")
    before = sorted(path for path in at_home.rglob("*") if path.is_file())
    assert_refused(
        said("fit_svm", *(w.replace("OUT", str(tmp_path / "out")) for w in words)), message
    )
    assert not (tmp_path / "out").exists()
    assert sorted(path for path in at_home.rglob("*") if path.is_file()) == before


@pytest.mark.usefixtures("at_home")
def test_multiple_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_refused(said("fit_svm", *FIT, "output=other"), "start it with python, not with torchrun")


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_svms_cannot_be_trained() -> None:
    words = [
        *WORDS,
        "model/classifier=cfm_svm",
        "trainer.max_steps=1",
        "trainer.evaluate_every=0",
        "data.val_json=null",
        "batch_size=1",
    ]
    assert_refused(
        said("train", *words, "run_dir=trained"),
        "model.classifier is not trained by gradients",
        "tools/fit_svm.py checkpoint=...",
    )
    assert not Path("trained").exists()
