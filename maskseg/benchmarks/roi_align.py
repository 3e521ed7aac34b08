"""Suite `roi_align`: RoIAlign over a feature pyramid, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import Case, SuiteResult
from maskseg.config import Config
from maskseg.ops.roi_align import assign_levels, roi_align_levels, roi_align_levels_torchvision

STRIDES = [4, 8, 16, 32]
# Regions per image and bins per side, of the box head and of the mask head.
SHAPES = ((1000, 7), (100, 14))
_SAMPLING_RATIO = 2


def roi_align(
    config: Config,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    channels: int = 256,
    height: int = 800,
    width: int = 1088,
) -> SuiteResult:
    """Pool the regions of one image from p2 to p5 on the CPU, with 2 x 2 sample points per bin.

    torchvision reads and writes NCHW, in which it is fastest. maskseg uses channels_last, as in
    training; it is also timed with NCHW maps, which it converts first.

    config: with `rounds`.

    Returns the suite's cases; agreement: the largest difference from torchvision's output or
    gradient.
    """
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn((1, channels, height // s, width // s), generator=generator) for s in STRIDES
    ]
    cases = []
    for n, size in shapes:
        boxes = random_boxes(n, height, width, generator)
        image_index = torch.zeros(n, dtype=torch.int64)
        level = assign_levels(boxes, 2, 5) - 2
        for aligned in (True, False):
            pooling = _Pooling(boxes, image_index, level, size, aligned)
            cases += _forward_and_backward(maps, pooling, config.rounds)
    return {"suite": "roi_align", "machine": machine(device), "cases": cases}


@dataclass(frozen=True)
class _Pooling:
    """The regions to pool and the options of RoIAlign."""

    boxes: Tensor
    image_index: Tensor
    level: Tensor
    size: int
    aligned: bool

    def __call__(self, implementation: Callable[..., Tensor], maps: list[Tensor]) -> Tensor:
        """Pool the regions with one of the implementations in `ops.roi_align`."""
        return implementation(
            maps,
            STRIDES,
            self.boxes,
            self.image_index,
            self.level,
            self.size,
            _SAMPLING_RATIO,
            self.aligned,
        )


def _forward_and_backward(maps: list[Tensor], pooling: _Pooling, rounds: int) -> list[Case]:
    layouts = {
        "torchvision": torch.contiguous_format,
        "maskseg": torch.channels_last,
        "maskseg, NCHW maps": torch.contiguous_format,
    }
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    outputs: dict[str, Sequence[Tensor]] = {}
    gradients: dict[str, Sequence[Tensor]] = {}
    for name, layout in layouts.items():
        function = roi_align_levels_torchvision if name == "torchvision" else roi_align_levels
        inputs = [x.contiguous(memory_format=layout) for x in maps]
        forward[name] = partial(pooling, function, inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = pooling(function, leaves)
        grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grad_layout = torch.contiguous_format if name == "torchvision" else torch.channels_last
        backpropagate = partial(
            torch.autograd.grad,
            out,
            leaves,
            grad_output.contiguous(memory_format=grad_layout),
            retain_graph=True,
        )
        backward[name] = backpropagate
        outputs[name] = [out.detach()]
        gradients[name] = backpropagate()
    size = pooling.size
    description = f"{len(pooling.boxes)} regions of {size} x {size}, aligned={pooling.aligned}"
    cases = []
    for direction, runs, results in (
        ("forward", forward, outputs),
        ("backward", backward, gradients),
    ):
        agreement = {
            f"{direction}, largest difference": _max_difference(
                results["torchvision"], results["maskseg"]
            )
        }
        cases.append(
            case(f"{direction}: {description}", runs, rounds, torch.device("cpu"), agreement)
        )
    return cases


def random_boxes(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Sample boxes f32 [n, 4] with log-uniform sizes.

    The sizes range from 16 pixels to three quarters of the image's shorter side.
    """
    smallest = math.log(16.0)
    largest = math.log(0.75 * min(height, width))
    extent = torch.exp(
        torch.empty(n, 1).uniform_(smallest, largest, generator=generator)
        + torch.empty(n, 2).uniform_(-0.35, 0.35, generator=generator)
    )
    frame = torch.tensor([width, height], dtype=torch.float32)
    centre = torch.rand((n, 2), generator=generator) * frame
    low = (centre - extent / 2).clamp(min=0.0)
    high = torch.minimum(centre + extent / 2, frame)
    return torch.cat([low, high], dim=1)


def _max_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
