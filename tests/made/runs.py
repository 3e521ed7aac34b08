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
from made.forked import ForkedRanks, ForkedScript
from torch import Tensor

from maskseg.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
# The smallest models that the configs allow: without the trunk's last stages, a checkpoint of all
# training state takes 9 MB instead of 140.
SMALL_WITHOUT_RPN = [
    "trainer.device=cpu",
    "model.backbone.trunk.out_level=c3",
    "model.backbone.channels=32",
    "model.classifier.mlp.width=32",
    "data.num_workers=0",
    "debug=smoke",
    "trainer.plots=false",
]
SMALL = [*SMALL_WITHOUT_RPN, "model.proposer.anchors.sizes=[[16],[32],[64]]"]
MASKS = ["model.heads.mask.channels=16", "model.heads.mask.layers=1"]
SCENES = ["data.root=scenes", "data.num_train=8", "data.num_val=4", "data.size=128"]
GROUP_NORM = ["model.backbone.norm=GN", "model.backbone.trunk.norm=GN", "model.heads.mask.norm=GN"]
# Arguments of torchrun for two processes, for tests of how torchrun ends them.
TORCHRUN_TWO = ["--standalone", "--nproc-per-node", "2"]
Process = subprocess.Popen[str] | ForkedScript | ForkedRanks
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
    """Start a tool in `ranks` separate processes (see `made.forked`).

    torchrun: arguments of torchrun, which then starts them; said: file for the output.
    """
    script = tool if tool.endswith(".py") else str(ROOT / "tools" / f"{tool}.py")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    output = cwd / said
    output.write_text("")
    if not torchrun and ranks == 1:
        return ForkedScript([script, *words], cwd, env, output)
    if not torchrun:
        return ForkedRanks(ranks, [script, *words], cwd, env, output)
    with output.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *torchrun, script, *words],
            cwd=cwd,
            env=env,
            stdout=file,
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
        kill(process)
        raise AssertionError(
            f"still running after {seconds} s:\n{(cwd / 'said.txt').read_text()}"
        ) from None
    return process.returncode, (cwd / "said.txt").read_text()


def kill(process: Process) -> None:
    """Kill a process and its children, or all ranks of a run."""
    ranks = process.ranks if isinstance(process, ForkedRanks) else [process]
    for rank in ranks:
        if rank.poll() is None:
            os.killpg(rank.pid, signal.SIGKILL)


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
