"""A model that trains on a CPU in seconds, its data, and a training run in this process."""

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
from maskseg.engine.distributed import DistributedContext
from maskseg.engine.schedules import multistep
from maskseg.engine.trainer import Trainer
from maskseg.inference.validation import Validation
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.box_head import BoxHead, BoxHeadMLP
from maskseg.models.mask_head import MaskHead
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.region_sampler import RegionSampler
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.models.rpn import RPN, AnchorSampler, ProposalLimits, RPNHead
from maskseg.structures import Batch

SIZE = 64
CHANNELS = 32
CLASSES = 2
STRIDES = {"p2": 4, "p3": 8}
RANDOM: list[Transform] = [RandomCrop(56), Flip(0.5, 0.5), ColorJitter(0.2, 0.2, 0.2, 0.05)]


def write_scenes(folder: Path, count: int, seed: int = 0) -> str:
    """Write images of SIZE x SIZE pixels, each an ellipse and a triangle on noise.

    Returns the path of their COCO file.
    """
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        image = Image.fromarray(rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(image)
        for k in range(2):
            w, h = (int(v) for v in rng.integers(16, 26, 2))
            x = int(rng.integers(0, SIZE - w))
            y = int(rng.integers(0, SIZE // 2 - h + 1) + k * SIZE // 2)
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
        image.save(folder / "images" / f"{i}.png")
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
    return CocoSource.from_keys(train_json=file, images=str(folder / "images"), **(values | keys))


def validation(source: CocoSource) -> Validation:
    return Validation(
        lambda: source.test_loader("val", 2), lambda: source.val.to_dict(), source.categories
    )


def make_model(seed: int = 0, norm: str = "BN") -> GeneralizedRCNN:
    torch.manual_seed(seed)
    anchors = AnchorGenerator([[8], [16], [32]])
    limits = ProposalLimits(pre_nms_top_n=100, post_nms_top_n=50)
    pool = partial(MultiLevelRoIAlign, STRIDES, canonical_size=56.0)
    return GeneralizedRCNN(
        FPN(ResNet("resnet18", norm=norm, out_level="c3"), CHANNELS),
        RPN(
            RPNHead(CHANNELS),
            anchors,
            STRIDES | {"p4": 16},
            AnchorSampler(num_samples=64),
            limits,
            limits,
        ),
        RegionSampler(CLASSES, 32),
        BoxHead(pool(7), BoxHeadMLP(CHANNELS, 7, 128), CLASSES, max_detections=20),
        {"mask": MaskHead(pool(14), CLASSES, CHANNELS, 32, layers=2)},
    )


class Run:
    """One process of a training run. A resumed run is a new object with the same folder.

    keys: settings of the trainer.
    """

    def __init__(
        self,
        source: CocoSource,
        folder: Path,
        steps: int = 6,
        seed: int = 0,
        batch: int = 2,
        norm: str = "BN",
        skip_bad: int = 0,
        **keys: Any,
    ) -> None:
        values: dict[str, Any] = {
            "device": "cpu",
            "clip_norm": 10.0,
            "log_every": 1,
            "checkpoint_every": 0,
        }
        self.trainer = Trainer(steps, **(values | keys))
        self.model = self.trainer.place(make_model(seed, norm))
        self.optimizer = self.trainer.build_optimizer(
            self.model, partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4), batch
        )
        self.scheduler = multistep(self.optimizer, 6, (0.5,), warmup_steps=2)
        self.source = source
        self.folder = folder
        self.batch = batch
        self.seed = seed
        self.skip_bad = skip_bad
        folder.mkdir(exist_ok=True, parents=True)

    def go(
        self,
        resume: Checkpoint | None = None,
        evaluate: Any = None,
        stop: int | None = None,
        group: DistributedContext | None = None,
        report: Any = None,
    ) -> dict[str, float]:
        """Train to the end. stop: number of batches after which the loader raises Killed."""
        rank, world = (group.rank, group.world_size) if group else (0, 1)

        def loader(step: int) -> Iterable[Batch]:
            batches = self.source.train_loader(
                self.batch,
                self.trainer.max_steps,
                self.seed,
                step,
                rank=rank,
                world=world,
                pieces=self.trainer.accumulate_grad_batches,
            )
            for i, batch in enumerate(batches, start=step):
                if i == stop:
                    raise Killed
                yield batch

        metadata: Checkpoint = {
            "config": "name: test",
            "categories": {"names": ["a", "b"], "ids": [1, 2]},
        }
        state = self.trainer.build_state(
            self.model, self.optimizer, self.scheduler, metadata, group
        )
        if resume is not None:
            state.load(resume)
        return self.trainer.run(state, loader, self.folder, evaluate, report, self.skip_bad)


class Killed(Exception):  # noqa: N818
    """Stands for the end of a killed process."""


def log(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a run's log, without timings and memory."""
    return lines(folder, kind)


def assert_same_run(first: Run, second: Run) -> None:
    assert_equal(dict(first.model.state_dict()), dict(second.model.state_dict()))
    assert_equal(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert_equal(
        load_checkpoint(first.folder / "last.pt"), load_checkpoint(second.folder / "last.pt")
    )
    assert log(first.folder) == log(second.folder)


class Scripted:
    """An evaluation that returns scripted values, and that consumes random numbers."""

    def __init__(self, *values: float, key: str = "segm/AP") -> None:
        self.values = list(values)
        self.key = key
        self.steps: list[int] = []

    def __call__(self, model: nn.Module, step: int, log: Any = None) -> dict[str, float]:
        assert log is not None
        model.eval()
        torch.rand(7)
        np.random.rand(3)
        self.steps.append(step)
        return {self.key: self.values.pop(0), "loss": 1.5}
