"""Mistakes on the command line: each gets one line that names what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made.tools import said
from PIL import Image

from maskseg import config as configs
from maskseg.config.compose import keys_of
from maskseg.config.foreign_names import find_advice, find_key, names
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.structures import Categories

# The smallest model that the configs allow, on no data.
MODEL = [
    "data=custom",
    "model.backbone.channels=32",
    "model.backbone.trunk.name=resnet18",
    "model.backbone.trunk.weights=null",
    "model.classifier.mlp.width=32",
    "model.heads.mask.channels=16",
    "model.heads.mask.layers=1",
]
CATEGORY = {"id": 7, "name": "cell"}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 7,
            "bbox": [8, 8, 20, 20],
            "area": 400,
            "iscrowd": 0,
            "segmentation": [[8, 8, 28, 8, 28, 28, 8, 28]],
        }
    ],
    "categories": [CATEGORY],
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a JSON file, images, a data.yaml of ultralytics and runs."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "photos").mkdir()
    Image.new("RGB", (64, 48)).save(folder / "photos" / "a.png")
    (folder / "train.json").write_text(json.dumps(COCO))
    (folder / "my train.json").write_text(json.dumps(COCO))
    (folder / "data.yaml").write_text("path: coco8\ntrain: images/train\nnames: {0: person}\n")
    config = configs.compose("train", MODEL)
    categories = Categories.from_dict({"names": ["cell"], "ids": [7]})
    configs.set_categories(config, categories)
    checkpoint = {
        "config": configs.to_yaml(config),
        "categories": categories.to_dict(),
        "model": configs.build_model(config, pretrained=False).state_dict(),
        "step": 0,
        "metrics": {},
    }
    for name in ("first", "second"):
        run = folder / "runs" / "cells" / name
        run.mkdir(parents=True)
        save_checkpoint(run / "last.pt", checkpoint)
    (folder / "runs" / "cells" / "first" / "metrics.jsonl").touch()
    return folder


@pytest.fixture
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(desk)
    return desk


CUSTOM = "data=custom data.train_json=train.json data.images=photos"
RUN = "checkpoint=runs/cells/second"
IN = "input=photos output=out"
# The tool, its arguments (separated by blanks), and parts of the line that says what to do.
MISTAKES = [
    # Names of other frameworks.
    ("train", "imgsz=640", ["no such key 'imgsz'", "'data.size'"]),
    ("train", "epochs=100", ["no such key 'epochs'", "'trainer.epochs'"]),
    ("train", "batch=16", ["'batch_size'"]),
    ("train", "device=0", ["'trainer.device'"]),
    ("train", "trainer.device=0", ["write trainer.device=cuda:0"]),
    ("train", "lr0=0.01", ["'optimizer.lr'"]),
    ("train", "optimizer.learningrate=0.1", ["'optimizer.lr'"]),
    ("train", "workers=4", ["'data.num_workers'"]),
    ("train", "weights=x.pt", ["'trainer.init'"]),
    ("train", "amp=true", ["trainer.precision=bf16"]),
    ("train", "cos_lr=true", ["scheduler=cosine"]),
    ("train", "project=out", ["'run_dir'"]),
    ("train", "work_dir=out", ["'run_dir'"]),
    ("train", "train_cfg.max_epochs=12", ["'trainer.epochs'"]),
    ("train", "SOLVER.BASE_LR=0.01", ["'optimizer.lr'"]),
    ("train", "SOLVER.BASE_LR 0.01", ["write optimizer.lr=0.01"]),
    ("train", "MODEL.WEIGHTS model.pth", ["write trainer.init=model.pth"]),
    ("train", "--epochs 100", ["--epochs 100", "without dashes", "write trainer.epochs=100"]),
    ("train", "--batch-size=4", ["write batch_size=4"]),
    ("train", "--config-file x.yaml", ["experiment=NAME"]),
    ("train", "--num-gpus 2", ["torchrun"]),
    ("train", "--cfg-options optimizer.lr=1", ["key=value key=value"]),
    ("train", "--resume", ["write trainer.resume="]),
    ("train", "--eval-only", ["tools/evaluate.py"]),
    ("evaluate", f"{RUN} output=out conf=0.3", ["'model.classifier.score_threshold'"]),
    ("predict", f"{RUN} {IN} conf=0.3", ["'min_score'"]),
    ("predict", f"{RUN} {IN} iou=0.5", ["'model.classifier.nms_threshold'"]),
    ("predict", f"{RUN} source=photos", ["'input'"]),
    ("predict", f"model=best.pt {IN}", ["checkpoint"]),
    ("predict", f"{RUN} {IN} model=best.pt", ["checkpoint=best.pt"]),
    ("predict", "--conf 0.4", ["write min_score=0.4"]),
    # The form of an argument.
    ("train", "experiment = scenes_r18", ["write experiment=scenes_r18, without blanks"]),
    ("train", "experiment= scenes_r18", ["write experiment=scenes_r18, without blanks"]),
    ("train", "experiment =scenes_r18", ["write experiment=scenes_r18, without blanks"]),
    ("train", "scenes_r18", ["write experiment=scenes_r18"]),
    ("train", "trainer.max_steps 100", ["write trainer.max_steps=100"]),
    ("train", "trainer.max_steps:100", ["write trainer.max_steps=100"]),
    ("train", "=5", ["there is no key before the '='"]),
    ("train", "+batch_size=3", ["write batch_size=... without '+'"]),
    ("train", "batch_size=2,4", ["tools/sweep.py --multirun", "'batch_size=[2,4]'"]),
    ("train", "batch_size=(2", ["quote the value"]),
    ("train", "--multirun batch_size=2,4", ["tools/sweep.py --multirun"]),
    ("train", "-cfg job", ["write --cfg job"]),
    ("train", "hydra.run.dir=x", ["run_dir=..."]),
    ("check_data", "train.json", ["write data.train_json=train.json"]),
    (
        "check_data",
        "data=custom data.train_json=my train.json",
        ["'data.train_json=my train.json'"],
    ),
    ("evaluate", "runs/cells/first", ["write checkpoint=runs/cells/first"]),
    ("predict", "best.pt photo.jpg", ["write checkpoint=best.pt"]),
    ("predict", f"{RUN} photo.jpg", ["write input=photo.jpg"]),
    ("review", "train.json", ["write file=train.json"]),
    ("annotate", "train.json", ["write data.val_json=train.json"]),
    ("convert", "model.pth output=x.pt", ["write weights=model.pth"]),
    ("compare", "--output x.png runs/cells/first", ["without dashes", "output"]),
    ("compare", "runs/cells/first output = x.png", ["write output=x.png"]),
    ("compare", "run=x", ["the only keys are output"]),
    # Keys and choices that do not exist.
    ("train", "trainer.max_step=3", ["'trainer.max_steps'"]),
    ("train", "experiment=scene_r18", ["did you mean 'scenes_r18'?"]),
    ("train", "experiment=configs/experiment/nuclei_r18.yaml", ["write experiment=nuclei_r18"]),
    ("train", "optimizer=AdamW", ["did you mean 'adamw'?"]),
    ("train", "model=yolov8n-seg.pt", ["trainer.init=yolov8n-seg.pt"]),
    ("train", "data=data.yaml", ["data=custom data.train_json=", "not read"]),
    ("train", "data=train.json", ["data=custom data.train_json=train.json"]),
    ("train", "data=photos", ["data=custom", "data.images=photos"]),
    ("train", "data.train_json=train.json data.images=photos", ["data=custom has it"]),
    ("check_data", "data=custom train_json=train.json", ["'data.train_json'"]),
    ("predict", f"{RUN} {IN} experiment=scenes_r18", ["a config of its own"]),
    (
        "annotate",
        "data.val_json=train.json data.images=photos output=o.json technique=sam",
        ["box"],
    ),
    ("sweep", "optimizer.lr=1,2", ["needs --multirun"]),
    ("sweep", "-m optimizer.lrr=1,2", ["'optimizer.lr'"]),
    ("benchmark", "suite=speed", ["suite"]),
    ("convert", "source=torch weights=x.pth output=y.pt", ["torchvision, detectron2 or maskseg"]),
    # Values of another type.
    ("train", "batch_size=ten", ["expected a whole number from 1"]),
    ("train", "batch_size=2.5", ["expected a whole number from 1"]),
    ("train", "trainer.ema=true", ["expected a number of at least 0 and below 1"]),
    ("train", "trainer.precision=amp", ["fp32, bf16, fp16"]),
    ("train", "trainer.plots=maybe", ["expected true or false"]),
    ("predict", f"{RUN} {IN} min_score=high", ["expected a number from 0 to 1"]),
    ("review", "file=train.json images=photos port=http", ["expected a whole number"]),
    # Files and folders.
    (
        "check_data",
        "data=custom data.train_json=photos data.images=train.json",
        ["write data.train_json=train.json data.images=photos"],
    ),
    (
        "check_data",
        "data=custom data.train_json=photos data.images=photos",
        ["is a folder: write data.train_json="],
    ),
    (
        "train",
        "trainer.device=cpu data=custom data.train_json=data.yaml data.images=photos",
        ["data.train_json=data.yaml is no COCO JSON file", "export the labels as COCO"],
    ),
    (
        "check_data",
        "data=custom data.train_json=photos/a.png data.images=photos",
        ["data.train_json=photos/a.png is no COCO JSON file"],
    ),
    (
        "check_data",
        "data=custom data.train_json=tran.json data.images=photos",
        ["did you mean train.json?"],
    ),
    (
        "check_data",
        "data=custom data.train_json=train.json data.images=photo",
        ["there is no such folder; did you mean photos?"],
    ),
    (
        "check_data",
        "data=custom data.train_json=train.json data.images=train.json",
        ["data.images=train.json is a file: name the folder"],
    ),
    ("check_data", "data=custom", ["set data.train_json or data.val_json"]),
    ("check_data", "data=coco data.root=absent", ["data.root=absent: there is no such folder"]),
    ("predict", f"checkpoint=runs/cells {IN}", ["runs/cells/second", "runs/cells/latest"]),
    ("predict", f"checkpoint=runs {IN}", ["runs/cells/first", "runs/latest"]),
    ("predict", f"checkpoint=runs/cells/best.pt {IN}", ["no such checkpoint", "runs/cells/first"]),
    ("predict", f"checkpoint=runs/cell/first {IN}", ["did you mean runs/cells?"]),
    ("predict", f"checkpoint=photos {IN}", ["there is no best.pt or last.pt"]),
    ("predict", f"checkpoint=train.json {IN}", ["train.json: not a checkpoint"]),
    ("predict", IN, ["checkpoint=... is missing"]),
    ("predict", RUN, ["input=... is missing"]),
    ("predict", f"{RUN} input=photo output=out", ["did you mean photos?"]),
    ("predict", f"{RUN} input=runs output=out", ["no image found", "input='runs/**/*'"]),
    ("predict", f"{RUN} input=photos output=runs/cells/first", ["choose another folder"]),
    (
        "predict",
        f"{RUN} input=photos output=train.json",
        ["output=train.json: the folder cannot be made, it is a file"],
    ),
    ("evaluate", RUN, ["output=... is missing"]),
    (
        "evaluate",
        f"{RUN} output=out data=custom data.val_json=photos data.images=train.json",
        ["write data.val_json=train.json data.images=photos"],
    ),
    ("evaluate", f"{RUN} output=out {CUSTOM} split=test", ["split=test: there are train"]),
    ("propose", "checkpoint=runs/cells output=x", ["runs/cells/first"]),
    ("fit_hash", "checkpoint=absent output=x", ["absent: no such checkpoint"]),
    ("fit_svm", f"{RUN} output=x", ["model=cfm"]),
    ("convert", "source=torchvision weights=absent.pth output=y.pt", ["absent.pth: no such file"]),
    ("convert", "source=torchvision output=y.pt", ["weights=... is missing"]),
    ("compare", "", ["no run folder is named"]),
    ("compare", "runs/cells", ["runs/cells/first"]),
    ("compare", "absent", ["there is no such run folder"]),
    (
        "annotate",
        "data.val_json=train.json data.images=photos output=train.json",
        ["output=train.json is an input file: choose another name"],
    ),
    ("review", "file=train.json images=train.json", ["images=train.json", "folder"]),
    ("review", "file=tran.json images=photos", ["tran.json", "did you mean"]),
]


@pytest.mark.parametrize(
    ("tool", "arguments", "parts"), MISTAKES, ids=[f"{m[0]} {m[1]}"[:80] for m in MISTAKES]
)
def test_a_mistake_is_one_line(at_desk: Path, tool: str, arguments: str, parts: list[str]) -> None:
    before = sorted(at_desk.rglob("*"))
    result = said(tool, *arguments.split())
    assert result.code == 2, result
    assert len(result.err.splitlines()) == 1, result
    assert result.err.startswith("error: ")
    for part in parts:
        assert part in result.err, result
    assert sorted(at_desk.rglob("*")) == before


def test_the_list_covers_all_tools() -> None:
    tools = {path.stem for path in (Path(__file__).parents[2] / "tools").glob("*.py")}
    assert {mistake[0] for mistake in MISTAKES} == tools


def test_each_foreign_name_leads_to_a_key_that_exists() -> None:
    known: set[str] = set()
    for choices in ([], ["data=custom", "optimizer=sgd", "scheduler=cosine"], ["data=coco"]):
        known |= set(keys_of(configs.compose("train", choices)))
    for tool in ("predict", "evaluate", "review"):
        known |= set(keys_of(configs.compose(tool, [])))
    for name in names():
        assert find_key(name, known) or find_advice(name), name
