"""A model small enough for a CPU, pictures to train it on, and one training of it in this process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made.runs import assert_equal, lines
from PIL import Image, ImageDraw
from torch import nn

from maskseg.data.datasets.coco import CocoSource
from maskseg.data.transforms import ColorJitter, Flip, RandomCrop, Transform
from maskseg.engine.checkpoint import Checkpoint, load_checkpoint
from maskseg.engine.distributed import Group
from maskseg.engine.schedules import multistep
from maskseg.engine.trainer import Trainer
from maskseg.inference.validation import Validation
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.box_head import BoxClassifier, FCTrunk
from maskseg.models.mask_head import MaskHead
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.region_sampler import RegionSampler
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.models.rpn import RPN, RPNHead
from maskseg.structures import Batch

SIZE, CHANNELS, CLASSES = 64, 32, 2
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
RANDOM: list[Transform] = [RandomCrop(56), Flip(0.5, 0.5), ColorJitter(0.2, 0.2, 0.2, 0.05)]


def write_scenes(folder: Path, count: int, seed: int = 0) -> str:
    """Pictures of SIZE with an ellipse and a triangle of two colours on noise, and their COCO file. -> its path."""
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        picture = Image.fromarray(rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        for k in range(2):
            w, h = (int(v) for v in rng.integers(16, 26, 2))
            x, y = (
                int(rng.integers(0, SIZE - w)),
                int(rng.integers(0, SIZE // 2 - h + 1) + k * SIZE // 2),
            )
            if k == 0:
                angle = np.arange(24) * np.pi / 12
                points = np.stack(
                    [x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], axis=1
                )
            else:
                points = np.array([[x, y + h], [x + w, y + h], [x + w / 2, y]])
            pen.polygon(
                [tuple(p) for p in points.tolist()],
                fill=(230, 120, 20) if k == 0 else (30, 120, 240),
            )
            row = {
                "image_id": i,
                "category_id": k + 1,
                "bbox": [x, y, w, h],
                "segmentation": [points.ravel().tolist()],
            }
            annotations.append({"id": len(annotations) + 1, **row})
        picture.save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE})
    categories = [{"id": 1, "name": "ellipse"}, {"id": 2, "name": "triangle"}]
    path = folder / "data.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return str(path)


def make_source(folder: Path, transforms: list[Transform] | None = None, **keys: Any) -> CocoSource:
    file = str(folder / "data.json")
    values: dict[str, Any] = {
        "num_workers": 0,
        "train_transforms": transforms or [],
        "val_json": file,
    }
    return CocoSource(file, images=str(folder / "images"), **(values | keys))


def validation(source: CocoSource) -> Validation:
    return Validation(
        lambda: source.test_loader("val", 2), lambda: source.val.to_dict(), source.categories
    )


def make_model(seed: int = 0, norm: str = "BN") -> GeneralizedRCNN:
    torch.manual_seed(seed)
    anchors = AnchorGenerator([[8], [16], [32], [64], [128]])
    limits = {"per_level": 100, "per_image": 50}
    pool = partial(MultiLevelRoIAlign, STRIDES, canonical_size=56.0)
    return GeneralizedRCNN(
        FPN(ResNet("resnet18", norm=norm), CHANNELS),
        RPN(RPNHead(CHANNELS), anchors, STRIDES | {"p6": 64}, limits, limits, num_samples=64),
        RegionSampler(CLASSES, 32),
        BoxClassifier(pool(7), FCTrunk(CHANNELS, 7, 128), CLASSES, max_detections=20),
        {"mask": MaskHead(pool(14), CLASSES, CHANNELS, 32, layers=2)},
    )


class Run:
    """One process' worth of a training: everything is new but the folder."""

    def __init__(
        self,
        source: CocoSource,
        folder: Path,
        steps: int = 6,
        seed: int = 0,
        batch: int = 2,
        norm: str = "BN",
        **keys: Any,
    ) -> None:
        values: dict[str, Any] = {
            "device": "cpu",
            "reference_batch": batch,
            "clip_norm": 10.0,
            "log_every": 1,
            "checkpoint_every": 0,
        }
        self.trainer = Trainer(steps, **(values | keys))
        self.model = self.trainer.place(make_model(seed, norm))
        self.optimizer = self.trainer.optimizer(
            self.model, partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4), batch
        )
        self.scheduler = multistep(self.optimizer, 6, (0.5,), warmup_steps=2)
        self.source, self.folder, self.batch, self.seed = source, folder, batch, seed
        folder.mkdir(exist_ok=True, parents=True)

    def go(
        self,
        resume: Checkpoint | None = None,
        evaluate: Any = None,
        stop: int | None = None,
        group: Group | None = None,
        report: Any = None,
    ) -> dict[str, float]:
        """stop: the run is cut off after so many batches, as a kill would."""

        rank, world = (group.rank, group.world) if group else (0, 1)

        def loader(step: int) -> Iterable[Batch]:
            batches = self.source.train_loader(
                self.batch,
                self.trainer.max_steps,
                self.seed,
                step,
                rank=rank,
                world=world,
                pieces=self.trainer.accumulate,
            )
            for i, batch in enumerate(batches, start=step):
                if i == stop:
                    raise Killed
                yield batch

        about: Checkpoint = {
            "config": "name: test",
            "categories": {"names": ["a", "b"], "ids": [1, 2]},
        }
        return self.trainer.run(
            self.model,
            self.optimizer,
            self.scheduler,
            loader,
            self.folder,
            about,
            evaluate,
            resume,
            group,
            report,
        )


class Killed(Exception):  # noqa: N818
    """What a kill is for the tests."""


def log(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a run without what the clock says."""
    return lines(folder, kind)


def assert_same_run(first: Run, second: Run) -> None:
    assert_equal(dict(first.model.state_dict()), dict(second.model.state_dict()))
    assert_equal(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert_equal(
        load_checkpoint(first.folder / "last.pt"), load_checkpoint(second.folder / "last.pt")
    )
    assert log(first.folder) == log(second.folder)


class Scripted:
    """An evaluation that gives the numbers it was told, and draws random numbers as a careless one would."""

    def __init__(self, *values: float, key: str = "segm/AP") -> None:
        self.values, self.key, self.steps = list(values), key, []  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, step: int, log: Any = None) -> dict[str, float]:
        assert log is not None
        model.eval()
        torch.rand(7)
        np.random.rand(3)
        self.steps.append(step)
        return {self.key: self.values.pop(0), "loss": 1.5}
