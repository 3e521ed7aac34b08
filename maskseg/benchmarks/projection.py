"""Suite `projection`: segment proposals, sets of superpixels, on the cells of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.segmentation_iou import cells
from maskseg.variants.cfm.projection import project, project_superpixels


def projection(
    config: Any,
    proposals: int = 1000,
    superpixels: int = 500,
    height: int = 480,
    width: int = 640,
    strides: tuple[int, ...] = (16, 8),
) -> dict[str, Any]:
    """One image's proposals on the CPU, beside their bitmaps that are made and projected one by one.

    Cells are squares of `stride` pixels, so that torch's average pooling is a peer too. config: with `rounds`.
    -> the suite's cases; agreement: cells in which either of the other two differs.
    """
    labels, members = proposed(
        proposals, superpixels, height, width, torch.Generator().manual_seed(0)
    )
    cases = []
    for stride in strides:
        shape = (height // stride, width // stride)
        things: dict[str, Callable[[], Tensor]] = {
            "bitmaps, projected": partial(
                by_bitmaps,
                labels,
                members,
                partial(project, shape=shape, stride=stride, centre=stride / 2),
            ),
            "bitmaps, avg_pool2d": partial(
                by_bitmaps, labels, members, partial(pooled, stride=stride)
            ),
            "maskseg": partial(project_superpixels, labels, members, shape, stride, stride / 2),
        }
        wanted, *others = (thing() for thing in things.values())
        agreement = {"cells that differ": sum(float((wanted != other).sum()) for other in others)}
        name = (
            f"{proposals} proposals, {superpixels} superpixels, {width} x {height}, stride {stride}"
        )
        cases.append(case(name, things, config.rounds, torch.device("cpu"), agreement))
    return {"suite": "projection", "machine": machine(torch.device("cpu")), "cases": cases}


def proposed(
    proposals: int, superpixels: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """labels i64 [H, W] and members bool [R, S]: the superpixels about random points, out to random distances of at most half the longer side."""
    labels = torch.from_numpy(cells(superpixels, height, width, generator))
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    middles = torch.zeros(superpixels, 2).index_add_(0, labels.flatten(), places)
    middles /= torch.bincount(labels.flatten(), minlength=superpixels)[:, None].clamp(min=1)
    points = torch.rand((proposals, 2), generator=generator) * torch.tensor([height, width])
    reach = torch.rand((proposals, 1), generator=generator) * max(height, width) / 2
    return labels, torch.cdist(points, middles) <= reach


def by_bitmaps(labels: Tensor, members: Tensor, onto: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each proposal its bitmap, bool [1, H, W], `onto` the cells. -> f32 [R, h, w]."""
    return torch.cat([onto(member[labels][None]) for member in members])


def pooled(masks: Tensor, stride: int) -> Tensor:
    """What `project` gives of bitmaps [R, H, W] where the cells are squares of `stride` pixels, by torch's average pooling."""
    return (F.avg_pool2d(masks.float(), stride) > 0.5).float()
