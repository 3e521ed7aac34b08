"""Training runs in processes of their own, as a user starts them: tiny, on a few pictures; and what is compared of them."""

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
from torch import Tensor

from maskseg.engine.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
# Models of the tests are as small as configs make them.
SMALL = [
    "trainer.device=cpu",
    "model.backbone.channels=32",
    "model.classifier.trunk.width=32",
    "data.num_workers=0",
    "debug=smoke",
]
MASKS = ["model.heads.mask.channels=16", "model.heads.mask.layers=1"]
SCENES = ["data.root=scenes", "data.num_train=8", "data.num_val=4", "data.size=128"]
GROUP_NORM = ["model.backbone.norm=GN", "model.backbone.trunk.norm=GN", "model.heads.mask.norm=GN"]
Process = subprocess.Popen[str]
CLOCK = {
    "images_per_second",
    "data_seconds",
    "step_seconds",
    "memory_gb",
}  # the numbers of a log that no two runs share


def start(
    words: list[str],
    cwd: Path,
    ranks: int = 1,
    tool: str = "train",
    torchrun: Sequence[str] = (),
    said: str = "said.txt",
) -> Process:
    """A tool in a process of its own, or in several under torchrun (with words of its own); its output goes to `said`."""
    own = torchrun or (["--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else [])
    launch = ["-m", "torch.distributed.run", *own] if own else []
    script = tool if tool.endswith(".py") else str(ROOT / "tools" / f"{tool}.py")
    command = [sys.executable, *launch, script, *words]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with (cwd / said).open("w") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def finish(process: Process, cwd: Path, seconds: float = 120) -> tuple[int, str]:
    """-> exit code and what was said; a process that is still there then is killed with its children."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(
            f"still there after {seconds} s:\n{(cwd / 'said.txt').read_text()}"
        ) from None
    return process.returncode, (cwd / "said.txt").read_text()


def call(words: list[str], cwd: Path, ranks: int = 1, **keys: Any) -> str:
    """Runs to the end, which must be a good one. -> what was said."""
    code, said = finish(start(words, cwd, ranks, **keys), cwd)
    assert code == 0, said
    return said


def lines(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a run, without what the clock says."""
    found = []
    for text in (
        (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    ):
        try:
            line = json.loads(text)
        except ValueError:  # being written
            continue
        if line["kind"] == kind:
            found.append({k: v for k, v in line.items() if k not in CLOCK})
    return found


def wait_for_step(run: Path, step: int, process: Process, seconds: float = 90) -> None:
    """Until the run has logged a step."""
    end = time.monotonic() + seconds
    while not any(line["step"] >= step for line in lines(run)):
        assert process.poll() is None, (
            f"it ended before step {step}: {(run.parent / 'said.txt').read_text()}"
        )
        assert time.monotonic() < end, f"no step {step} after {seconds} s"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The processes below one, all of them."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            own = [int(p) for p in path.read_text().split()]
        except OSError:
            continue
        found += own + [c for child in own for c in children(child)]
    return found


def alive(pid: int) -> bool:
    """Whether the process runs (one that has ended and waits to be asked for its code does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(value, dict):
        return {
            k: v for key, inner in value.items() for k, v in tensors(inner, f"{name}.{key}").items()
        }
    if isinstance(value, list | tuple):
        return {
            k: v for i, inner in enumerate(value) for k, v in tensors(inner, f"{name}.{i}").items()
        }
    return {name: value}


def assert_equal(first: Any, second: Any) -> None:
    """Bit for bit."""
    one, other = tensors(first), tensors(second)
    assert list(one) == list(other)
    for key, value in one.items():
        assert (
            torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        ), key


def assert_same_runs(first: Path, second: Path) -> None:
    """Last checkpoints, losses and metrics, bit for bit; the config of the checkpoints may name other folders and workers."""
    one, other = (load_checkpoint(run / "last.pt") for run in (first, second))
    assert_equal(
        {k: v for k, v in one.items() if k != "config"},
        {k: v for k, v in other.items() if k != "config"},
    )
    assert lines(first) == lines(second)
    assert lines(first, "val") == lines(second, "val")
