"""Suite `roi_align`: RoIAlign over a feature pyramid, forward and backward."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskseg.benchmarks.measure import case, machine
from maskseg.ops.roi_align import assign_levels, by_torchvision, roi_align_levels

STRIDES = [4, 8, 16, 32]
SHAPES = (
    (1000, 7),
    (100, 14),
)  # regions and bins of the box head and of the mask head, of one image


def roi_align(
    config: Any,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    channels: int = 256,
    height: int = 800,
    width: int = 1088,
) -> dict[str, Any]:
    """Regions of one image on p2 to p5, two sample points a bin and direction, on the CPU. torchvision reads and writes NCHW, in which it is fastest,
    maskseg channels_last, as in training; besides from NCHW maps, which it has to convert first.

    config: with `rounds`. -> the suite's cases; agreement: the largest differences from torchvision's output, or gradient.
    """
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn((1, channels, height // s, width // s), generator=generator) for s in STRIDES
    ]
    cases = []
    for n, size in shapes:
        boxes = boxes_of_all_sizes(n, height, width, generator)
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
    forward, backward, outputs, gradients = {}, {}, {}, {}
    for name, layout in layouts.items():
        function = by_torchvision if name == "torchvision" else roi_align_levels
        inputs = [x.contiguous(memory_format=layout) for x in maps]
        forward[name] = partial(function, inputs, STRIDES, *rest)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(leaves, STRIDES, *rest)
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        own = torch.contiguous_format if name == "torchvision" else torch.channels_last
        backward[name] = partial(
            torch.autograd.grad,
            out,
            leaves,
            towards.contiguous(memory_format=own),
            retain_graph=True,
        )
        outputs[name], gradients[name] = [out.detach()], backward[name]()
    told = f"{len(boxes)} regions of {size} x {size}, aligned={aligned}"
    found = []
    for what, things, results in (("forward", forward, outputs), ("backward", backward, gradients)):
        agreement = {
            f"{what}, largest difference": _apart(results["torchvision"], results["maskseg"])
        }
        found.append(case(f"{what}: {told}", things, rounds, torch.device("cpu"), agreement))
    return found


def boxes_of_all_sizes(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """f32 [n, 4] in the image: of 16 pixels to three quarters of its shorter side, all sizes (as logarithms) equally often."""
    least, most = math.log(16.0), math.log(0.75 * min(height, width))
    extent = torch.exp(
        torch.empty(n, 1).uniform_(least, most, generator=generator)
        + torch.empty(n, 2).uniform_(-0.35, 0.35, generator=generator)
    )
    frame = torch.tensor([width, height], dtype=torch.float32)
    centre = torch.rand((n, 2), generator=generator) * frame
    return torch.cat(
        [(centre - extent / 2).clamp(min=0.0), torch.minimum(centre + extent / 2, frame)], dim=1
    )


def _apart(first: Any, second: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))
