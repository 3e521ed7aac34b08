"""Timing of functions that are compared.

They are called in turn in one process, so that other load on the machine affects all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
import torchvision
from tqdm import tqdm

from maskseg.benchmarks.results import Case, Machine
from maskseg.engine.logs import peak_memory
from maskseg.errors import UserError

Runs = Mapping[str, Callable[[], object]]  # functions to compare, by label


def in_turn(runs: Runs, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Call every function once per round, in reverse order in every other round.

    Returns the seconds of each function in each round. Raises UserError if `rounds` is below 1.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        order = list(runs) if k % 2 == 0 else list(runs)[::-1]
        for name in order:
            _synchronize(device)
            start = time.perf_counter()
            runs[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(first: list[float], second: list[float]) -> float:
    """Median of the ratios of each round."""
    return median(a / b for a, b in zip(first, second, strict=True))


def case(
    name: str,
    runs: Runs,
    rounds: int,
    device: torch.device,
    agreement: Mapping[str, float] | None = None,
) -> Case:
    """Measure one case of a suite's table.

    Args:
        name: of the case.
        runs: the functions. The first one is the peer that the others are compared with. Each is
            called once before the rounds, and its memory is measured in that call.
        rounds: number of rounds.
        device: device that the functions use.
        agreement: differences of the outputs, by their description.

    In the result, times_faster is the median of the ratios of each round.
    """
    memory = {label: _peak_memory(run, device) for label, run in runs.items()}
    seconds = in_turn(runs, rounds, device)
    peer = next(iter(runs))
    return {
        "name": name,
        "seconds": {label: median(values) for label, values in seconds.items()},
        "times_faster": {
            label: ratio(seconds[peer], values)
            for label, values in seconds.items()
            if label != peer
        },
        "memory_mb": memory,
        "agreement": dict(agreement or {}),
    }


def machine(device: torch.device) -> Machine:
    """Describe the device and the versions that the measurements were made with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def _peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Peak memory of a call in megabytes, above the memory in use before."""
    if device.type == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        _synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    with contextlib.suppress(OSError, AttributeError):
        # Freed memory that glibc keeps would count as in use before.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    resident_before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - resident_before


def _resident(key: str) -> float:
    """Resident memory in megabytes: the value of `key` in /proc/self/status, else the peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(
            float(line.split()[1]) * 1024 / 1e6
            for line in status.read_text().splitlines()
            if line.startswith(key)
        )
    return (peak_memory(torch.device("cpu")) or 0.0) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
