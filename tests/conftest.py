"""What the tests share: real data where there is some, small models, small batches."""

from __future__ import annotations

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "1000"
)  # before torch: tests that run side by side must not spin in each other's way

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.masks.annotated import FileMasks, Polygons
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.box_head import BoxClassifier, FCTrunk
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
    """torch starts with a random seed: each test, and what is made for it, begins with the same one."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository; the test is skipped where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder


def ellipse(box: Sequence[float], points: int = 24) -> Polygons:
    """The ellipse that touches the sides of an xyxy box."""
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
    """For each image its objects as (x1, y1, x2, y2, label) or (..., label, crowd); their masks are ellipses."""
    rows = [(image, *row) for image, rows in enumerate(truth) for row in rows]
    shapes = [[ellipse(row[:4]) for row in rows] for rows in truth]
    return Targets(
        boxes=torch.tensor([r[1:5] for r in rows], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([int(r[5]) for r in rows], dtype=torch.int64),
        image_index=torch.tensor([r[0] for r in rows], dtype=torch.int64),
        crowd=torch.tensor([len(r) > 6 and bool(r[6]) for r in rows], dtype=torch.bool),
        masks=FileMasks.cat(
            [FileMasks.from_file(s, h, w) for s, (h, w) in zip(shapes, sizes, strict=True)]
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
    """Noise images of the given (height, width), padded to a multiple of 32 or to `padded`; `truth` as for `build_targets`."""
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
        names=[f"{i}.png" for i in range(len(sizes))],
        targets=None if truth is None else build_targets(truth, sizes),
    )


def build_model(
    num_classes: int = 3,
    heads: bool = True,
    norm: str = "GN",
    class_agnostic: bool = False,
    **stages: Any,
) -> GeneralizedRCNN:
    """ResNet-18, a narrow FPN and narrow heads with fixed random weights, in evaluation mode. `stages` replaces parts of the model."""
    torch.manual_seed(0)
    classifier = BoxClassifier(
        MultiLevelRoIAlign(STRIDES, 7),
        FCTrunk(CHANNELS, 7, 64),
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
    """xyxy boxes f32 [count, 4] inside an image, sides of at least `least` pixels."""
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
    """Random numbers that are the same in every run."""
    return torch.Generator().manual_seed(0)


def missing_gradients(module: torch.nn.Module) -> list[str]:
    """Names of the trainable parameters that a backward pass did not reach or reached with something that is not finite."""
    found = [(n, p.grad) for n, p in module.named_parameters() if p.requires_grad]
    return [name for name, grad in found if grad is None or not torch.isfinite(grad).all()]


@pytest.fixture(scope="session")
def unreached() -> Callable[[torch.nn.Module], list[str]]:
    """`missing_gradients`."""
    return missing_gradients
