"""Shared fixtures: real data if available, small models, small batches."""

from __future__ import annotations

import os

# Before torch is imported: threads of parallel tests must not slow each other down by spinning.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.box_head import BoxHead, BoxHeadMLP
from maskseg.models.mask_head import MaskHead
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.region_sampler import RegionSampler
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.models.rpn import RPN, RPNHead
from maskseg.structures import Batch, Targets

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
CHANNELS = 32


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed torch, which otherwise starts randomly, before each test and its fixtures."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository. Without it the test is skipped."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder


def ellipse(box: Sequence[float], points: int = 24) -> Polygons:
    """Return the ellipse inscribed in an xyxy box."""
    angle = np.arange(points) * 2 * np.pi / points
    x0, y0, x1, y1 = box
    return Polygons(
        (
            np.stack(
                [
                    (x0 + x1 + (x1 - x0) * np.cos(angle)) / 2,
                    (y0 + y1 + (y1 - y0) * np.sin(angle)) / 2,
                ],
                axis=1,
            ),
        )
    )


def build_targets(
    truth: Sequence[Sequence[Sequence[float]]], sizes: Sequence[tuple[int, int]], masks: bool = True
) -> Targets:
    """Build targets whose masks are ellipses.

    truth: for each image its objects as (x1, y1, x2, y2, label) or (..., label, iscrowd).
    """
    rows: list[tuple[float, ...]] = []
    for image, objects in enumerate(truth):
        rows += [(image, *row) for row in objects]
    shapes = [[ellipse(row[:4]) for row in rows] for rows in truth]
    return Targets(
        boxes=torch.tensor([r[1:5] for r in rows], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([int(r[5]) for r in rows], dtype=torch.int64),
        image_index=torch.tensor([r[0] for r in rows], dtype=torch.int64),
        iscrowd=torch.tensor([len(r) > 6 and bool(r[6]) for r in rows], dtype=torch.bool),
        masks=AnnotatedMasks.cat(
            [AnnotatedMasks.from_file(s, h, w) for s, (h, w) in zip(shapes, sizes, strict=True)]
        )
        if masks
        else None,
    )


def build_batch(
    sizes: Sequence[tuple[int, int]],
    truth: Sequence[Sequence[Sequence[float]]] | None = None,
    padded: tuple[int, int] | None = None,
    seed: int = 0,
) -> Batch:
    """Build noise images of the given (height, width), padded to a multiple of 32 or to `padded`.

    truth: see `build_targets`.
    """
    height, width = padded or tuple(-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))
    images = torch.zeros((len(sizes), 3, height, width), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, :h, :w] = torch.randint(0, 256, (3, h, w), generator=generator, dtype=torch.uint8)
    return Batch(
        images=images,
        sizes=torch.tensor(sizes),
        original_sizes=torch.tensor(sizes),
        image_ids=list(range(len(sizes))),
        file_names=[f"{i}.png" for i in range(len(sizes))],
        targets=None if truth is None else build_targets(truth, sizes),
    )


def build_model(
    num_classes: int = 3,
    heads: bool = True,
    norm: str = "GN",
    class_agnostic: bool = False,
    **stages: Any,
) -> GeneralizedRCNN:
    """Build a small model with fixed random weights, in evaluation mode.

    It has a ResNet-18, a narrow FPN and narrow heads. stages: replacements of parts.
    """
    torch.manual_seed(0)
    classifier = BoxHead(
        MultiLevelRoIAlign(STRIDES, 7),
        BoxHeadMLP(CHANNELS, 7, 64),
        num_classes,
        class_agnostic=class_agnostic,
        score_threshold=0.01,
    )
    mask = MaskHead(
        MultiLevelRoIAlign(STRIDES, 14),
        num_classes,
        CHANNELS,
        16,
        layers=1,
        class_agnostic=class_agnostic,
    )
    parts: dict[str, Any] = {
        "backbone": FPN(ResNet("resnet18", norm=norm), CHANNELS),
        "proposer": RPN(RPNHead(CHANNELS), AnchorGenerator(), STRIDES | {"p6": 64}),
        "sampler": RegionSampler(num_classes, 32),
        "classifier": classifier,
        "heads": {"mask": mask} if heads else {},
    }
    return GeneralizedRCNN(**(parts | stages)).eval()


def random_boxes(
    count: int, height: float, width: float, generator: torch.Generator, least: float = 4.0
) -> Tensor:
    """Sample xyxy boxes f32 [count, 4] inside an image, with sides of at least `least` pixels."""
    size = least + torch.rand((count, 2), generator=generator) ** 2 * (
        torch.tensor([width, height]) - least
    )
    low = torch.rand((count, 2), generator=generator) * (torch.tensor([width, height]) - size)
    return torch.cat([low, low + size], dim=1)


@pytest.fixture(scope="session")
def make_targets() -> Callable[..., Targets]:
    """`build_targets`."""
    return build_targets


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """`build_batch`."""
    return build_batch


@pytest.fixture(scope="session")
def make_model() -> Callable[..., GeneralizedRCNN]:
    """`build_model`."""
    return build_model


@pytest.fixture(scope="session")
def make_boxes() -> Callable[..., Tensor]:
    """`random_boxes`."""
    return random_boxes


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded random generator."""
    return torch.Generator().manual_seed(0)


def missing_gradients(module: torch.nn.Module) -> list[str]:
    """List the trainable parameters without a gradient, or whose gradient is not finite."""
    gradients = [(n, p.grad) for n, p in module.named_parameters() if p.requires_grad]
    return [name for name, grad in gradients if grad is None or not torch.isfinite(grad).all()]


@pytest.fixture(scope="session")
def unreached() -> Callable[[torch.nn.Module], list[str]]:
    """`missing_gradients`."""
    return missing_gradients


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's folder of downloaded weights, which does not exist yet; no proxy is used."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the module's fixture `home` makes, as the working directory."""
    monkeypatch.chdir(home)
    return home
