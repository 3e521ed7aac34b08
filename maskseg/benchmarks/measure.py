"""Measurements of things that are to be compared, taken in turn in one process, so that what else the machine does meets them all."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from maskseg.errors import UserError

Things = Mapping[str, Callable[[], object]]


def in_turn(things: Things, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each thing in each of `rounds` rounds; every round runs all of them, every other round backwards.

    Raises UserError without any round.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}")
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


def case(
    name: str,
    things: Things,
    rounds: int,
    device: torch.device,
    agreement: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One row of a suite's table. things: the first one is what the others are compared with (the peer); each is run once before, and its memory is
    taken then. agreement: how far the outputs are apart, by what.

    -> name, seconds (medians), times_faster (than the first, the median of the ratios round by round), memory_mb (at the peak, beyond what was held
    before), agreement.
    """
    memory = {label: _peak(thing, device) for label, thing in things.items()}
    seconds = in_turn(things, rounds, device)
    first = next(iter(things))
    return {
        "name": name,
        "seconds": {label: median(values) for label, values in seconds.items()},
        "times_faster": {
            label: ratio(seconds[first], values)
            for label, values in seconds.items()
            if label != first
        },
        "memory_mb": memory,
        "agreement": dict(agreement or {}),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    return {"device": name, "threads": torch.get_num_threads(), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def _peak(thing: Callable[[], object], device: torch.device) -> float:
    """Megabytes that a call takes at its worst, beyond those held before it."""
    if device.type == "cuda":
        _wait(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        thing()
        _wait(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 1e6
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed and is kept for later would count as held before (glibc)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark (Linux)
    before = _resident("VmRSS")
    thing()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            float(line.split()[1]) * 1024 / 1e6
            for line in status.read_text().splitlines()
            if line.startswith(key)
        )
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e6
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
