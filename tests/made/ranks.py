"""One of several processes of a training, started by torchrun: ranks.py SCENES FOLDER WHAT."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from made.training import Run, make_source

from maskseg.cli import run as run_tool
from maskseg.engine.distributed import processes
from maskseg.structures import Batch


def main(words: list[str]) -> None:
    """WHAT: `nan`, the loss of rank 1 is not finite at step 2; `raise`, rank 1 raises there; `accumulate`, two pieces a process."""
    scenes, folder, what = Path(words[0]), Path(words[1]), words[2]
    with processes(torch.device("cpu")) as group:
        run = Run(
            make_source(scenes),
            folder,
            steps=4,
            batch=4,
            norm="GN",
            checkpoint_every=1,
            keep=9,
            accumulate=2 if what == "accumulate" else 1,
        )
        forward, count = run.model.forward, 0

        def poisoned(batch: Batch) -> Any:
            nonlocal count
            count += 1
            losses = forward(batch)
            if group.rank == 1 and count == 2 and what == "nan":
                losses["mask"] = losses["mask"] * math.nan
            if group.rank == 1 and count == 2 and what == "raise":
                raise RuntimeError("a bug in rank 1")
            return losses

        run.model.forward = poisoned  # type: ignore[method-assign]
        run.go(group=group)
        states = group.gather(dict(run.model.state_dict()))
        if group.main:
            assert all(torch.equal(v, states[1][k]) for k, v in states[0].items()), (
                "the processes have drifted apart"
            )
            print("equal weights")
        group.wait()


if __name__ == "__main__":
    sys.exit(run_tool(main, ""))
