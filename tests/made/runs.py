"""Small training runs in separate processes, as a user starts them, and their comparison."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from made.forked import ForkedScript
from torch import Tensor

from maskseg.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
# The smallest models that the configs allow.
SMALL = [
    "trainer.device=cpu",
    "model.backbone.channels=32",
    "model.classifier.mlp.width=32",
    "data.num_workers=0",
    "debug=smoke",
    "trainer.plots=false",
]
MASKS = ["model.heads.mask.channels=16", "model.heads.mask.layers=1"]
SCENES = ["data.root=scenes", "data.num_train=8", "data.num_val=4", "data.size=128"]
GROUP_NORM = ["model.backbone.norm=GN", "model.backbone.trunk.norm=GN", "model.heads.mask.norm=GN"]
Process = subprocess.Popen[str] | ForkedScript
# Values of a log that differ between equal runs.
CLOCK = {"images_per_second", "data_seconds", "step_seconds", "memory_gb"}


def start(
    words: list[str],
    cwd: Path,
    ranks: int = 1,
    tool: str = "train",
    torchrun: Sequence[str] = (),
    said: str = "said.txt",
) -> Process:
    """Start a tool in a separate process (see `made.forked`), or in several under torchrun.

    torchrun: arguments of torchrun; said: file for the output.
    """
    launcher = list(torchrun)
    if ranks > 1 and not launcher:
        launcher = ["--standalone", "--nproc-per-node", str(ranks)]
    script = tool if tool.endswith(".py") else str(ROOT / "tools" / f"{tool}.py")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    if not launcher:
        return ForkedScript([script, *words], cwd, env, cwd / said)
    with (cwd / said).open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *launcher, script, *words],
            cwd=cwd,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def finish(process: Process, cwd: Path, seconds: float = 120) -> tuple[int, str]:
    """Wait for the end of a process. Returns the exit code and the output.

    After `seconds`, the process and its children are killed.
    """
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(
            f"still running after {seconds} s:\n{(cwd / 'said.txt').read_text()}"
        ) from None
    return process.returncode, (cwd / "said.txt").read_text()


def call(words: list[str], cwd: Path, ranks: int = 1, **keys: Any) -> str:
    """Run a tool, which must succeed. Returns the output."""
    code, said = finish(start(words, cwd, ranks, **keys), cwd)
    assert code == 0, said
    return said


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the lines of a run's log, without timings and memory."""
    path = run / "metrics.jsonl"
    result = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # the line is being written
            continue
        if line["kind"] == kind:
            result.append({k: v for k, v in line.items() if k not in CLOCK})
    return result


def wait_for_step(run: Path, step: int, process: Process, seconds: float = 90) -> None:
    """Wait until the run has logged a step."""
    end = time.monotonic() + seconds
    while not any(line["step"] >= step for line in lines(run)):
        assert process.poll() is None, (
            f"it ended before step {step}: {(run.parent / 'said.txt').read_text()}"
        )
        assert time.monotonic() < end, f"no step {step} after {seconds} s"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    descendants = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(p) for p in path.read_text().split()]
        except OSError:
            continue
        descendants += direct
        for child in direct:
            descendants += children(child)
    return descendants


def alive(pid: int) -> bool:
    """Whether a process is running. A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Return every leaf of nested dictionaries and lists by its path."""
    if not isinstance(value, dict | list | tuple):
        return {name: value}
    leaves = {}
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        leaves |= tensors(inner, f"{name}.{key}")
    return leaves


def assert_equal(first: Any, second: Any) -> None:
    """Assert equality bit for bit."""
    one = tensors(first)
    other = tensors(second)
    assert list(one) == list(other)
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def assert_same_runs(first: Path, second: Path) -> None:
    """Assert that last checkpoints, losses and metrics are equal bit for bit.

    The configs in the checkpoints may have other folders and numbers of workers.
    """
    one, other = (load_checkpoint(run / "last.pt") for run in (first, second))
    assert_equal(
        {k: v for k, v in one.items() if k != "config"},
        {k: v for k, v in other.items() if k != "config"},
    )
    assert lines(first) == lines(second)
    assert lines(first, "val") == lines(second, "val")
