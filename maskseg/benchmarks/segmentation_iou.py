"""Suite `segmentation_iou`: best IoU of a predicted segment for each ground-truth segment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.evaluation.segmentation_iou import best_ious

Map = NDArray[np.int64]


def segmentation_iou(
    config: Config,
    counts: tuple[int, ...] = (200, 1000),
    true: int = 20,
    height: int = 321,
    width: int = 481,
) -> SuiteResult:
    """Compare one image of BSDS500's size with its ground truth.

    The alternative compares boolean masks pair by pair.

    Args:
        config: with `rounds`.
        counts: numbers of predicted segments.
        true: number of ground-truth segments.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns the suite's cases; agreement: the largest difference between the two.
    """
    generator = torch.Generator().manual_seed(0)
    truth = cells(true, height, width, generator)
    cases = []
    for number in counts:
        segments = cells(number, height, width, generator)
        runs: dict[str, Callable[[], object]] = {
            "pair by pair": partial(pair_by_pair, segments, truth),
            "maskseg": partial(best_ious, segments, truth),
        }
        difference = np.abs(pair_by_pair(segments, truth) - best_ious(segments, truth)[0])
        agreement = {"largest difference": float(difference.max())}
        name = f"{number} segments, {true} true ones, {width} x {height}"
        cases.append(case(name, runs, config.rounds, torch.device("cpu"), agreement))
    return {"suite": "segmentation_iou", "machine": machine(torch.device("cpu")), "cases": cases}


def cells(number: int, height: int, width: int, generator: torch.Generator) -> Map:
    """Return i64 [H, W]: the index of the nearest of `number` random points."""
    points = torch.rand((number, 2), generator=generator) * torch.tensor([height, width])
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    # In blocks: all pixels at once would need hundreds of megabytes.
    blocks = torch.split(pixels, 8192)
    nearest = [torch.cdist(block, points).argmin(dim=1) for block in blocks]
    return np.asarray(torch.cat(nearest).view(height, width).numpy())


def pair_by_pair(segments: Map, truth: Map) -> NDArray[np.float64]:
    """Compute `best_ious` by its definition."""
    masks = [segments == number for number in np.unique(segments)]
    best = []
    for number in np.unique(truth):
        target = truth == number
        best.append(max((target & mask).sum() / (target | mask).sum() for mask in masks))
    return np.array(best)
