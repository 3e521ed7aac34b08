"""Suite `roi_align`: RoIAlign over a feature pyramid, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskseg.benchmarks.measure import case, machine
from maskseg.config import Config
from maskseg.ops.roi_align import assign_levels, roi_align_levels, roi_align_levels_torchvision

STRIDES = [4, 8, 16, 32]
# Regions per image and bins per side, of the box head and of the mask head.
SHAPES = ((1000, 7), (100, 14))


def roi_align(
    config: Config,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    channels: int = 256,
    height: int = 800,
    width: int = 1088,
) -> dict[str, Any]:
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
        rest = (boxes, torch.zeros(n, dtype=torch.int64), assign_levels(boxes, 2, 5) - 2, size, 2)
        for aligned in (True, False):
            cases += _forward_and_backward(maps, (*rest, aligned), config.rounds)
    return {"suite": "roi_align", "machine": machine(device), "cases": cases}


def _forward_and_backward(
    maps: list[Tensor], rest: tuple[Any, ...], rounds: int
) -> list[dict[str, Any]]:
    layouts = {
        "torchvision": torch.contiguous_format,
        "maskseg": torch.channels_last,
        "maskseg, NCHW maps": torch.contiguous_format,
    }
    boxes, _, _, size, _, aligned = rest
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    outputs: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    for name, layout in layouts.items():
        function = roi_align_levels_torchvision if name == "torchvision" else roi_align_levels
        inputs = [x.contiguous(memory_format=layout) for x in maps]
        forward[name] = partial(function, inputs, STRIDES, *rest)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(leaves, STRIDES, *rest)
        grad_output = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grad_layout = torch.contiguous_format if name == "torchvision" else torch.channels_last
        backward[name] = partial(
            torch.autograd.grad,
            out,
            leaves,
            grad_output.contiguous(memory_format=grad_layout),
            retain_graph=True,
        )
        outputs[name] = [out.detach()]
        gradients[name] = backward[name]()
    description = f"{len(boxes)} regions of {size} x {size}, aligned={aligned}"
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


def _max_difference(first: Any, second: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
