"""The plug-ins of docs/extending.md: each is trained, resumed, evaluated, saved and loaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from made.plugins import FOLDER, enable
from made.runs import ROOT, assert_equal, lines
from made.tools import assert_refused, done, said
from made.training import SIZE, write_scenes
from PIL import Image

import maskseg
from maskseg.data.coco.file import read_coco
from maskseg.data.sample import Sample
from maskseg.engine.checkpoint import load_checkpoint
from maskseg.errors import UserError
from maskseg.plugins import VARIABLE

SMALL = [
    "debug=smoke",
    "trainer.device=cpu",
    "model.backbone.channels=16",
    "model.classifier.mlp.width=16",
    "model.classifier.score_threshold=0.0",
    "model.classifier.max_detections=10",
    "model.sampler.num_samples=16",
    "trainer.max_steps=2",
    "trainer.checkpoint_every=1",
    "evaluation.pictures=0",
    "trainer.plots=false",
]
COCO = [
    "data=custom",
    "data.train_json=coco/data.json",
    "data.val_json=coco/data.json",
    "data.images=coco/images",
    "data.train_transforms=[]",
    "data.test_transforms=[]",
]
MASK = ["model.heads.mask.channels=16", "model.heads.mask.layers=1"]
CONVNEXT = [
    "model/trunk@model.backbone.trunk=convnext",
    "model.backbone.trunk.channels=[8,16,24,32]",
    "model.backbone.trunk.depths=[1,1,1,1]",
    "model.backbone.trunk.weights=null",
]
BOUNDARY = [
    "model/heads@model.heads.mask=boundary",
    "model.heads.mask.channels=16",
    "model.heads.mask.layers=1",
]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check_whole_run(*words: str) -> list[dict[str, Any]]:
    """Train, resume from the middle, evaluate, predict and load. Returns the log."""
    done("train", *SMALL, *words, "run_dir=run")
    done("train", *SMALL, *words, "run_dir=again", "trainer.resume=run/step_0000001.pt")
    first = load_checkpoint(Path("run/last.pt"))
    second = load_checkpoint(Path("again/last.pt"))
    for key in ("model", "optimizer", "scheduler"):
        assert_equal(first[key], second[key])
    log = lines(Path("run"))
    assert [line["step"] for line in log] == [1, 2]
    assert log[1:] == lines(Path("again"))
    done("evaluate", "checkpoint=run", "output=evaluation", "pictures=0")
    metrics = json.loads(Path("evaluation/metrics.json").read_text())
    assert 0 <= metrics["segm/AP"] <= 1
    done("predict", "checkpoint=run", "input=image.png", "output=predictions")
    rows = json.loads(Path("predictions/predictions.json").read_text())
    assert rows
    prediction = maskseg.load("run", device="cpu")("image.png")
    assert len(prediction) == len(rows)
    assert prediction.masks.shape == (len(rows), SIZE, SIZE)
    return log


def check_disabled(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """The checkpoint of the run loads no more once the plug-in is not enabled."""
    package = target.partition(".")[0]
    others = [name for name in os.environ[VARIABLE].split(",") if name != package]
    monkeypatch.setenv(VARIABLE, ",".join(others))
    for result in (
        said("evaluate", "checkpoint=run", "output=other"),
        said("predict", "checkpoint=run", "input=image.png", "output=other"),
    ):
        assert_refused(result, target, f"MASKSEG_PLUGINS={package} enables it")
    with pytest.raises(UserError, match=f"{re.escape(target)}.*MASKSEG_PLUGINS={package}"):
        maskseg.load("run")
    assert not Path("other").exists()


def write_images() -> None:
    write_scenes(Path("coco"), 4)
    Image.open("coco/images/1.png").save("image.png")


def test_a_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "convnext_trunk")
    write_images()
    check_whole_run(*COCO, *MASK, "experiment=scenes_r18", *CONVNEXT)
    weights = load_checkpoint(Path("run/last.pt"))["model"]
    assert weights["backbone.trunk.features.0.0.weight"].shape == (8, 3, 4, 4)
    assert weights["backbone.lateral.p5.0.weight"].shape[1] == 32
    check_disabled(monkeypatch, "convnext_trunk.trunk.ConvNeXt")


def test_the_levels_and_weights_of_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "convnext_trunk")
    from convnext_trunk import ConvNeXt

    torchvision_model = torchvision.models.convnext.ConvNeXt(
        [
            torchvision.models.convnext.CNBlockConfig(8, 16, 1),
            torchvision.models.convnext.CNBlockConfig(16, 24, 1),
            torchvision.models.convnext.CNBlockConfig(24, 32, 2),
            torchvision.models.convnext.CNBlockConfig(32, None, 1),
        ]
    )
    torch.save(torchvision_model.state_dict(), "weights.pt")
    trunk = ConvNeXt([8, 16, 24, 32], [1, 1, 2, 1], weights="weights.pt").eval()
    images = torch.rand(1, 3, 64, 96)
    features = trunk(images)
    assert torch.equal(features["c5"], torchvision_model.eval().features(images))
    for name, spec in trunk.levels.items():
        rows, columns = 64 // spec.stride, 96 // spec.stride
        assert features[name].shape == (1, spec.channels, rows, columns)
    with pytest.raises(UserError, match="do not fit this ConvNeXt"):
        ConvNeXt([8, 16, 24, 40], [1, 1, 2, 1], weights="weights.pt")


def test_an_experiment_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "convnext_trunk", "recipe")
    from maskseg import config as configs

    config = configs.compose("train", ["experiment=coco_convnext_tiny"])
    assert config.model.backbone.trunk._target_ == "convnext_trunk.trunk.ConvNeXt"
    config = configs.compose("train", ["experiment=scenes_recipe", "optimizer=sgd"])
    assert config.optimizer._target_ == "torch.optim.SGD"
    assert config.optimizer.lr == 0.02
    assert config.scheduler._target_ == "recipe.schedule.polynomial"


def test_a_mask_head(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "boundary_head", "convnext_trunk")
    write_images()
    log = check_whole_run(*COCO, "experiment=scenes_r18", *CONVNEXT, *BOUNDARY)
    assert all(line["loss/boundary"] > 0 for line in log)
    check_disabled(monkeypatch, "boundary_head.head.BoundaryHead")


def test_the_boundary_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "boundary_head")
    from boundary_head.head import find_boundaries

    mask = torch.zeros(1, 6, 6)
    mask[0, 1:5, 2:6] = 1  # the last column is the border of the grid, not of the object
    expected = mask.clone()
    expected[0, 2:4, 3:6] = 0
    assert torch.equal(find_boundaries(mask), expected)
    assert find_boundaries(torch.zeros(0, 6, 6)).shape == (0, 6, 6)


def write_yolo(root: Path) -> None:
    """The images of `write_scenes` in the YOLO format."""
    coco = json.loads(Path("coco/data.json").read_text())
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for image in coco["images"]:
            name = f"{image['id']}.png"
            Image.open(f"coco/images/{name}").save(root / "images" / split / name)
            rows = [row for row in coco["annotations"] if row["image_id"] == image["id"]]
            text = ""
            for row in rows:
                numbers = np.array(row["segmentation"][0]) / SIZE
                text += " ".join([str(row["category_id"] - 1), *map(str, numbers.tolist())]) + "\n"
            (root / "labels" / split / f"{image['id']}.txt").write_text(text)
    (root / "data.yaml").write_text("names: [ellipse, triangle]\n")


def test_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "yolo_reader", "convnext_trunk")
    write_images()
    write_yolo(Path("yolo"))
    words = ["data=yolo", "data.root=yolo", "data.num_workers=1", *COCO[-2:]]
    log = check_whole_run("experiment=scenes_r18", *CONVNEXT, *MASK, *words)
    made = Path("yolo/maskseg/train.json")
    file = read_coco(made)
    original = read_coco(Path("coco/data.json"))
    assert file.categories.names == ("ellipse", "triangle")
    for one, other in zip(
        file.to_dict()["annotations"], original.to_dict()["annotations"], strict=True
    ):
        assert one["segmentation"][0] == pytest.approx(other["segmentation"][0], abs=1e-9)
        assert one["category_id"] == other["category_id"] - 1
    # The same training on the COCO files.
    done("train", *SMALL, *COCO, *CONVNEXT, *MASK, "experiment=scenes_r18", "run_dir=coco_run")
    coco_log = lines(Path("coco_run"))
    assert log[0]["loss"] == pytest.approx(coco_log[0]["loss"], rel=1e-4)
    check_disabled(monkeypatch, "yolo_reader.source.YoloSource")


def test_what_the_reader_accepts_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "yolo_reader")
    write_images()
    write_yolo(Path("yolo"))
    labels = Path("yolo/labels/train/1.txt")
    labels.write_text("0 0.5 0.5 0.25 0.5\n")
    done("check_data", "data=yolo", "data.root=yolo")
    made = Path("yolo/maskseg/train.json")
    (annotation, *_) = json.loads(made.read_text())["annotations"]
    assert annotation["bbox"] == [24.0, 16.0, 16.0, 32.0]
    before = made.stat().st_mtime_ns
    done("check_data", "data=yolo", "data.root=yolo")
    assert made.stat().st_mtime_ns == before
    for text in ("2 0.5 0.5 0.2 0.2", "0 0.1 0.2 0.3 0.4 0.5", "0 a b c d", "0 nan 0 1 1"):
        labels.write_text(f"{text}\n")
        result = said("check_data", "data=yolo", "data.root=yolo")
        assert result.code == 2
        assert "1.txt, line 1" in result.err
    result = said("check_data", "data=yolo", "data.root=yolo", "data.train_labels=nothing")
    assert_refused(result, "data.train_labels=nothing: there is no such folder")


def test_an_optimizer_a_schedule_and_a_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "recipe", "convnext_trunk")
    write_images()
    transforms = "data.train_transforms=[{_target_:recipe.photometric.Photometric,contrast:0.4}]"
    words = ["optimizer=lion", "scheduler=polynomial", "scheduler.warmup_steps=2", transforms]
    log = check_whole_run("experiment=scenes_r18", *COCO, *CONVNEXT, *MASK, *words)
    state = load_checkpoint(Path("run/last.pt"))["optimizer"]["state"]
    assert set(state[0]) == {"momentum"}
    assert log[1]["lr"] > log[0]["lr"]
    check_disabled(monkeypatch, "recipe.")


def test_a_transform_draws_from_its_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "recipe")
    from recipe.photometric import Photometric

    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    none = torch.zeros(0)
    sample = Sample(image, none.view(0, 4), none.long(), none.bool(), None, 1, "a.png", (32, 48))
    change = Photometric(probability=1.0)
    first = change(sample, np.random.default_rng(1)).image
    np.random.rand(3)
    assert torch.equal(change(sample, np.random.default_rng(1)).image, first)
    assert not torch.equal(change(sample, np.random.default_rng(2)).image, first)
    assert first.shape == image.shape
    assert torch.equal(Photometric(probability=0.0)(sample, np.random.default_rng(1)).image, image)


def test_lion_steps_along_the_sign_of_its_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, "recipe")
    from recipe.lion import Lion

    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Lion([weight], lr=0.1, betas=(0.5, 0.5), weight_decay=0.5)
    weight.grad = torch.tensor([4.0, -1.0])
    optimizer.step()  # 1 * 0.95 - 0.1, -2 * 0.95 + 0.1
    torch.testing.assert_close(weight.detach(), torch.tensor([0.85, -1.8]))
    weight.grad = torch.tensor([-1.0, 0.25])  # the momentum [2, -0.5] outweighs it
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([0.7075, -1.61]))


def test_the_page_shows_the_files_of_the_packages() -> None:
    # Guards against: examples in docs/extending.md that differ from the tested packages
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"^`(tests/plugins/\S+)`:\n\n```\w+\n(.*?)^```$", page, re.M | re.S)
    shown = dict(blocks)
    assert shown
    for path, text in shown.items():
        assert (ROOT / path).read_text() == text, path
    for package in ("convnext_trunk", "boundary_head", "yolo_reader"):
        for file in (FOLDER / package).rglob("*"):
            if file.suffix in (".py", ".yaml", ".toml"):
                assert str(file.relative_to(ROOT)) in shown
    assert "tests/plugins/recipe/recipe/photometric.py" in shown
