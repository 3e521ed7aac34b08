"""One rank of a training run, started by torchrun: ranks.py SCENES FOLDER MODE."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from made.training import Run, make_source

from maskseg.cli import run as run_tool
from maskseg.engine.distributed import init_distributed
from maskseg.structures import Batch


def main(arguments: list[str]) -> None:
    """Train, and check that all ranks end with equal weights.

    MODE: `nan`, the loss of rank 1 is not finite at step 2; `raise`, rank 1 raises there;
    `accumulate`, two micro-batches per rank and step; `stop`, rank 1 stops itself at step 2.
    """
    scenes = Path(arguments[0])
    folder = Path(arguments[1])
    mode = arguments[2]
    with init_distributed(torch.device("cpu"), 3 if mode == "stop" else 60) as group:
        run = Run(
            make_source(scenes),
            folder,
            steps=4,
            batch=4,
            norm="GN",
            checkpoint_every=1,
            keep_checkpoints=9,
            accumulate_grad_batches=2 if mode == "accumulate" else 1,
        )
        forward = run.model.forward
        count = 0

        def poisoned(batch: Batch) -> Any:
            nonlocal count
            count += 1
            losses = forward(batch)
            if group.rank == 1 and count == 2 and mode == "nan":
                losses["mask"] = losses["mask"] * math.nan
            if group.rank == 1 and count == 2 and mode == "raise":
                raise RuntimeError("a bug in rank 1")
            if group.rank == 1 and count == 2 and mode == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            return losses

        run.model.forward = poisoned  # type: ignore[method-assign]
        run.go(group=group)
        states = group.gather(dict(run.model.state_dict()))
        if group.main:
            assert all(torch.equal(v, states[1][k]) for k, v in states[0].items()), (
                "the processes have drifted apart"
            )
            print("equal weights")
        group.barrier()


if __name__ == "__main__":
    sys.exit(run_tool(main, ""))
