"""The image classifier in the tools: training on objects or labels, evaluation, prediction."""

from __future__ import annotations

import contextlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from made.runs import SCENES, call, lines
from made.tools import done
from PIL import Image

from maskseg import config as configs
from maskseg.annotation.classifier import ImageClassifier
from maskseg.commands import train
from maskseg.config.restore import trained_model
from maskseg.data.datasets.scenes import make_scenes
from maskseg.errors import UserError
from maskseg.files.outputs import RECORD
from maskseg.structures import class_presence

SMALL = [
    "model.head.channels=16",
    "model.head.layers=1",
    "data.num_workers=0",
    "trainer.device=cpu",
    "trainer.log_every=1",
    "batch_size=2",
]
TRAIN = ["experiment=classify_scenes", *SMALL, *SCENES]


def only_labels(path: Path, target: Path) -> None:
    """Write a COCO file with image labels instead of annotations."""
    content: dict[str, Any] = json.loads(path.read_text())
    for image in content["images"]:
        image["category_ids"] = sorted(
            {a["category_id"] for a in content["annotations"] if a["image_id"] == image["id"]}
        )
    target.write_text(json.dumps(content | {"annotations": []}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, its image labels as separate files, and a training run of two steps."""
    folder = tmp_path_factory.mktemp("classify")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    for split in ("train", "val"):
        only_labels(folder / "scenes" / f"{split}.json", folder / f"{split}_labels.json")
    with contextlib.chdir(folder):
        done("train", *TRAIN, "trainer.max_steps=2", "run_dir=run")
    return folder


def test_a_training_scores_images(at_home: Path) -> None:
    assert all("loss/image_class" in line for line in lines(at_home / "run"))
    (metrics,) = lines(at_home / "run", "val")
    assert set(metrics) == {"step", "kind", "classification/mAP", "loss", "loss/image_class"}
    assert 0 < metrics["classification/mAP"] <= 1
    files = {path.name for path in (at_home / "run").iterdir()}
    assert {"best.pt", "cam.png", "results.png", "train_batch_1.png"} <= files
    assert {"pr_curves.png", "validation.png", "worst.png"}.isdisjoint(files)


def test_labels_alone_are_as_good_as_objects(at_home: Path) -> None:
    overrides = [
        "data=custom",
        "data.train_json=train_labels.json",
        "data.val_json=val_labels.json",
        "data.images=scenes/images",
    ]
    overrides += [
        "data.train_transforms=[]",
        "data.test_transforms=[]",
        "trainer.max_steps=1",
        "run_dir=labels",
    ]
    done("train", "experiment=classify_scenes", *SMALL, *overrides)
    assert lines(at_home / "labels", "val")[0]["classification/mAP"] > 0
    shown = []
    for root in ("scenes/train.json", "train_labels.json"):
        config = configs.compose(
            "train", ["experiment=classify_scenes", *SMALL, *overrides, f"data.train_json={root}"]
        )
        source = train.open_data(config)
        batches = list(source.test_loader("train", 8))
        assert batches[0].targets is not None
        shown.append(class_presence(batches[0].targets, 8, 8))
    assert torch.equal(*shown)
    assert shown[0].any()


def test_evaluation(at_home: Path) -> None:
    text = done(
        "evaluate", "checkpoint=run", "output=evaluation", "trainer.device=cpu", "pictures=2"
    )
    metrics = json.loads((at_home / "evaluation" / "metrics.json").read_text())
    assert set(metrics) == {"classification/mAP", "loss", "loss/image_class"}
    assert metrics["classification/mAP"] == pytest.approx(
        lines(at_home / "run", "val")[0]["classification/mAP"], abs=1e-6
    )
    per_class = json.loads((at_home / "evaluation" / "per_class.json").read_text())[
        "classification"
    ]
    assert list(per_class) == [
        "disc",
        "box",
        "triangle",
        "star",
        "ring",
        "crescent",
        "cross",
        "figure",
    ]
    there = [ap for ap in per_class.values() if ap >= 0]
    assert sum(there) / len(there) == pytest.approx(metrics["classification/mAP"])
    assert sorted(p.name for p in (at_home / "evaluation").iterdir()) == [
        RECORD,
        "cam.png",
        "metrics.json",
        "per_class.json",
    ]
    assert "classes of 4 images" in text


def test_prediction(at_home: Path) -> None:
    pictures = sorted((at_home / "scenes" / "images").iterdir())[:2]
    (at_home / "input").mkdir()
    for path in pictures:
        Image.open(path).resize((100, 60)).save(at_home / "input" / f"{path.stem}.png")
    done("predict", "checkpoint=run", "input=input", "output=predictions", "trainer.device=cpu")
    rows = json.loads((at_home / "predictions" / "image_scores.json").read_text())
    assert [Path(row["file_name"]).stem for row in rows] == [p.stem for p in pictures]
    scores = list(rows[0]["scores"].values())
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 8
    assert {p.name for p in (at_home / "predictions").iterdir()} == {
        RECORD,
        "image_scores.json",
        *(f"{p.stem}_cam.png" for p in pictures),
    }
    wide, high = Image.open(at_home / "predictions" / f"{pictures[0].stem}_cam.png").size
    assert wide > 3.5 * high


@pytest.mark.slow
def test_two_processes_evaluate_as_one(at_home: Path) -> None:
    call(
        ["checkpoint=run", "output=two", "trainer.device=cpu", "evaluation.batch=1"],
        at_home,
        ranks=2,
        tool="evaluate",
    )
    done("evaluate", "checkpoint=run", "output=one", "trainer.device=cpu", "evaluation.batch=1")
    assert (at_home / "two" / "metrics.json").read_text() == (
        at_home / "one" / "metrics.json"
    ).read_text()


def test_the_checkpoint_is_a_classifier_with_maps(at_home: Path) -> None:
    model, _, categories = trained_model(at_home / "run", [], "predict")
    assert isinstance(model, ImageClassifier)
    logits, maps = model.activation(torch.randn(1, 3, 64, 96))
    assert maps.shape == (1, len(categories), 8, 12)
    torch.testing.assert_close(maps.mean(dim=(2, 3)) + model.head.classifier.bias, logits)


@pytest.mark.parametrize(
    ("name", "trunk", "images", "finest"),
    [("classify_scenes", "resnet18", 16, "c3"), ("classify_coco_r50", "resnet50", 32, "c4")],
)
def test_the_experiments_build(
    name: str, trunk: str, images: int, finest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The data of COCO are not on this machine.
    module = import_module("maskseg.config.build")
    monkeypatch.setattr(module, "check_data_paths", lambda *_, **__: None)
    overrides = [
        f"experiment={name}",
        "model.backbone.weights=null",
        "data.num_classes=3",
        "trainer.device=cpu",
    ]
    config = configs.compose("train", overrides)
    assert (config.name, config.model.backbone.name, config.batch_size) == (name, trunk, images)
    model = configs.build_model(config)
    assert isinstance(model, ImageClassifier)
    assert model.level == model.backbone.levels[finest]
    assert set(model.head.feature_specs) >= {
        list(model.backbone.levels)[-1]
    }  # DDP needs gradients for all layers
    assert model.head.classifier.out_features == 3
    trainer = configs.build(config.trainer)
    assert trainer.best_metric == "classification/mAP"
    scheduler = configs.build(config.scheduler)(
        configs.build_optimizer(config, trainer, model),
        max_steps=trainer.max_steps,
    )
    assert scheduler.lr_lambdas[0](trainer.max_steps - 1) < 0.02
    source = configs.build_source(config.data)
    assert source.reading.keep_empty  # images without objects are negatives
    assert source.split("train").transforms


def test_a_level_that_is_not_there_is_refused() -> None:
    config = configs.compose("train", ["experiment=classify_scenes", "model.head.levels=[c4,p5]"])
    with pytest.raises(
        UserError, match=r"model\.head\.levels=\['c4', 'p5'\]: the backbone has c2, c3"
    ):
        configs.build_model(config)
