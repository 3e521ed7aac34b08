"""Suite `projection`: segment proposals (sets of superpixels) to the cells of a feature map."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.benchmarks.segmentation_iou import cells
from maskseg.config import Config
from maskseg.variants.cfm.projection import project, project_superpixels


def projection(
    config: Config,
    proposals: int = 1000,
    superpixels: int = 500,
    height: int = 480,
    width: int = 640,
    strides: tuple[int, ...] = (16, 8),
) -> SuiteResult:
    """Project the proposals of one image on the CPU.

    The alternatives build the bitmaps of the proposals and project them one by one. Cells are
    squares of `stride` pixels, so that average pooling is comparable, too.

    config: with `rounds`.

    Returns the suite's cases; agreement: number of cells in which the alternatives differ.
    """
    labels, members = simulate_proposals(
        proposals, superpixels, height, width, torch.Generator().manual_seed(0)
    )
    cases = []
    for stride in strides:
        shape = (height // stride, width // stride)
        runs: dict[str, Callable[[], Tensor]] = {
            "bitmaps, projected": partial(
                by_bitmaps,
                labels,
                members,
                partial(project, shape=shape, stride=stride, centre=stride / 2),
            ),
            "bitmaps, avg_pool2d": partial(
                by_bitmaps, labels, members, partial(average_pool, stride=stride)
            ),
            "maskseg": partial(project_superpixels, labels, members, shape, stride, stride / 2),
        }
        expected, *others = (run() for run in runs.values())
        agreement = {"cells that differ": sum(float((expected != other).sum()) for other in others)}
        name = (
            f"{proposals} proposals, {superpixels} superpixels, {width} x {height}, stride {stride}"
        )
        cases.append(case(name, runs, config.rounds, torch.device("cpu"), agreement))
    return {"suite": "projection", "machine": machine(torch.device("cpu")), "cases": cases}


def simulate_proposals(
    proposals: int, superpixels: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Simulate proposals: all superpixels within a random distance of a random point.

    The distance is at most half the longer side of the image. Returns labels i64 [H, W] and members
    bool [R, S].
    """
    labels = torch.from_numpy(cells(superpixels, height, width, generator))
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    centers = torch.zeros(superpixels, 2).index_add_(0, labels.flatten(), pixels)
    centers /= torch.bincount(labels.flatten(), minlength=superpixels)[:, None].clamp(min=1)
    points = torch.rand((proposals, 2), generator=generator) * torch.tensor([height, width])
    reach = torch.rand((proposals, 1), generator=generator) * max(height, width) / 2
    return labels, torch.cdist(points, centers) <= reach


def by_bitmaps(labels: Tensor, members: Tensor, to_cells: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `to_cells` to the bitmap of each proposal, bool [1, H, W]. Returns f32 [R, h, w]."""
    return torch.cat([to_cells(member[labels][None]) for member in members])


def average_pool(masks: Tensor, stride: int) -> Tensor:
    """Project bitmaps [R, H, W] to square cells of `stride` pixels by average pooling."""
    return (F.avg_pool2d(masks.float(), stride) > 0.5).float()
