"""Training with two processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from made.forked import ForkedRanks
from made.runs import ROOT, TORCHRUN_TWO, call, finish, lines, start
from made.training import Run, make_source, write_scenes

from maskseg.engine.checkpoint import load_checkpoint
from maskseg.engine.distributed import DistributedContext
from maskseg.errors import UserError

RANKS = str(ROOT / "tests" / "made" / "ranks.py")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5)
    return folder


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(
    scenes: Path, tmp_path: Path
) -> None:
    said = call([str(scenes), str(tmp_path / "run"), "nan"], tmp_path, ranks=2, tool=RANKS)
    assert "equal weights" in said
    assert said.count("warning: step 2 is skipped, not finite: mask = nan, from image") == 1
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 3, 4]
    one, three = (load_checkpoint(tmp_path / "run" / f"step_000000{i}.pt")["model"] for i in (1, 3))
    assert any(not torch.equal(v, three[k]) for k, v in one.items())
    assert not (tmp_path / "run" / "step_0000002.pt").exists()


def test_a_rank_that_raises_ends_all_with_its_traceback(scenes: Path, tmp_path: Path) -> None:
    code, said = finish(
        start(
            [str(scenes), str(tmp_path / "run"), "raise"],
            tmp_path,
            tool=RANKS,
            torchrun=TORCHRUN_TWO,
        ),
        tmp_path,
    )
    assert code != 0
    assert "RuntimeError: a bug in rank 1" in said
    assert "in poisoned" in said
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_a_rank_that_is_stopped_ends_the_others_with_one_line(scenes: Path, tmp_path: Path) -> None:
    process = start([str(scenes), str(tmp_path / "run"), "stop"], tmp_path, ranks=2, tool=RANKS)
    assert isinstance(process, ForkedRanks)
    other, stopped = process.ranks
    assert other.wait(90) == 2
    os.kill(stopped.pid, signal.SIGKILL)
    said = (tmp_path / "said.txt").read_text()
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert errors == [
        "error: process 1 of 2 has not answered for trainer.distributed_timeout=3 seconds: is it "
        "stopped, or is its machine or disk not available? trainer.resume=auto resumes from the "
        "last checkpoint"
    ]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 1


@pytest.mark.slow
def test_gradient_accumulation_with_two_processes(scenes: Path, tmp_path: Path) -> None:
    said = call([str(scenes), str(tmp_path / "run"), "accumulate"], tmp_path, ranks=2, tool=RANKS)
    assert "equal weights" in said
    alone = Run(make_source(scenes), tmp_path / "alone", steps=4, batch=4, norm="GN")
    alone.go()
    for two, one in zip(lines(tmp_path / "run"), lines(tmp_path / "alone"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.05)


def test_the_context_of_a_single_process() -> None:
    group = DistributedContext()
    assert group.main
    assert group.any_rank(True, False) == (True, False)
    assert group.gather(3) == [3]
    assert group.broadcast("x") == "x"
    assert group.split_batch(6, 3) == 2
    for total, world_size, accumulate in ((5, 2, 1), (4, 2, 4), (0, 1, 1), (-2, 1, 1)):
        with pytest.raises(
            UserError,
            match=f"batch_size={total} must be a multiple of {world_size} processes "
            f"x trainer.accumulate_grad_batches={accumulate}",
        ):
            DistributedContext(world_size=world_size).split_batch(total, accumulate)
