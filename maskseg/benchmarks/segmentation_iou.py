"""Suite `segmentation_iou`: the best IoU of any predicted segment with each segment of the truth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.benchmarks.measure import case, machine
from maskseg.evaluation.segmentation_iou import best_ious

Map = NDArray[np.int64]


def segmentation_iou(
    config: Any,
    counts: tuple[int, ...] = (200, 1000),
    true: int = 20,
    height: int = 321,
    width: int = 481,
) -> dict[str, Any]:
    """One image of BSDS500's size, of `counts` segments and `true` segments in the truth, beside boolean masks that are compared pair by pair.

    config: with `rounds`. -> the suite's cases; agreement: the largest difference between the two.
    """
    generator = torch.Generator().manual_seed(0)
    truth = cells(true, height, width, generator)
    cases = []
    for number in counts:
        segments = cells(number, height, width, generator)
        things: dict[str, Callable[[], object]] = {
            "pair by pair": partial(pair_by_pair, segments, truth),
            "maskseg": partial(best_ious, segments, truth),
        }
        agreement = {
            "largest difference": float(
                np.abs(pair_by_pair(segments, truth) - best_ious(segments, truth)[0]).max()
            )
        }
        cases.append(
            case(
                f"{number} segments, {true} true ones, {width} x {height}",
                things,
                config.rounds,
                torch.device("cpu"),
                agreement,
            )
        )
    return {"suite": "segmentation_iou", "machine": machine(torch.device("cpu")), "cases": cases}


def cells(number: int, height: int, width: int, generator: torch.Generator) -> Map:
    """i64 [H, W]: each pixel belongs to the nearest of `number` random points."""
    points = torch.rand((number, 2), generator=generator) * torch.tensor([height, width])
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    nearest = [
        torch.cdist(part, points).argmin(dim=1) for part in torch.split(pixels, 8192)
    ]  # all at once would need hundreds of megabytes
    return np.asarray(torch.cat(nearest).view(height, width).numpy())


def pair_by_pair(segments: Map, truth: Map) -> NDArray[np.float64]:
    """What `best_ious` gives, from the definition."""
    found = [segments == number for number in np.unique(segments)]
    return np.array(
        [
            max((mask & one).sum() / (mask | one).sum() for one in found)
            for mask in (truth == number for number in np.unique(truth))
        ]
    )
