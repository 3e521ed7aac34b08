"""Times of things that are to be compared, taken in turn in one process, so that what else the machine does meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from tqdm import tqdm


def in_turn(things: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each thing in each of `rounds` rounds; every round runs all of them, every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for k in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for name in list(things) if k % 2 == 0 else list(things)[::-1]:
            _wait(device)
            start = time.perf_counter()
            things[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(first: list[float], second: list[float]) -> float:
    """The median of the ratios round by round."""
    return median(a / b for a, b in zip(first, second, strict=True))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
