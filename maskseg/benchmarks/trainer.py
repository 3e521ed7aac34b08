"""Suite `trainer`: what the training loop costs beyond the training itself."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from maskseg import config as configs
from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.benchmarks.minimal_step import BareStep, prepared
from maskseg.commands.evaluate import validation
from maskseg.engine.checkpoint import Keeper
from maskseg.engine.distributed import Group
from maskseg.engine.logs import RunLog, peak_memory
from maskseg.engine.step import Stepper

_REPEATS = 5


def trainer(config: Any) -> dict[str, Any]:
    """A step by the bare loop (forward, backward, clipping, optimiser, schedule) and by the trainer's, with its checks of every number, in turn,
    `steps` times; then a line of the log, a checkpoint, and the pictures of an evaluation, each as a share of the steps between two of them.

    config: that of a training, with `steps`. -> seconds, and the overheads as shares of the bare step's time.
    """
    own = _Setup(config)
    for step in (own.bare, own.step):  # warm
        step()
    seconds = in_turn({"bare": own.bare, "trainer": own.step}, own.steps, own.trainer.device)
    bare = median(seconds["bare"])
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "log": own.line(Path(folder)),
            "checkpoint": own.checkpoint(Path(folder)),
            "pictures": own.pictures(Path(folder)),
        }
    numbers = config.trainer
    every = {
        "log": numbers.log_every,
        "checkpoint": numbers.checkpoint_every or numbers.max_steps,
        "pictures": numbers.evaluate_every or numbers.max_steps,
    }
    shares = {
        "step": ratio(seconds["trainer"], seconds["bare"]) - 1,
        **{k: parts[k] / (every[k] * bare) for k in parts},
    }
    return {
        "experiment": config.name,
        "device": str(own.trainer.device),
        "threads": torch.get_num_threads(),
        "steps": own.steps,
        "seconds": {"bare_step": bare, "trainer_step": median(seconds["trainer"]), **parts},
        "every": every,
        "overhead": {**shares, "all": sum(shares.values())},
    }


class _Setup:
    """Model, batches and both ways of a step."""

    def __init__(self, config: Any) -> None:
        self.config, self.steps = config, int(config.steps)
        self.trainer, self.source, self.model, batches = prepared(config)
        # The same batch for both, one after the other
        self.batches = (batch for batch in cycle(batches) for _ in range(2))
        self.bare = BareStep(config, self.trainer, self.model, self.batches)
        about = {"config": configs.to_yaml(config), "categories": self.source.categories.to_dict()}
        self.state = self.trainer.state(
            self.model, self.bare.optimizer, self.bare.scheduler, about, Group()
        )
        self.take_step = Stepper(
            self.state,
            self.model,
            self.trainer.device,
            self.trainer.autocast,
            self.trainer.clip_norm,
        )

    def step(self) -> None:
        """The trainer's own."""
        self.last = self.take_step(list(islice(self.batches, 1)), lambda: False)

    def line(self, folder: Path) -> float:
        """Seconds of a line of the log: numbers to the file and to TensorBoard, and to the terminal."""
        log = RunLog(folder, 0, 10**6, "")

        def write() -> None:
            values = {k: float(v) for k, v in self.last.losses.items()} | {
                "memory_gb": peak_memory(self.trainer.device)
            }
            log.numbers(1, "train", values)
            log.progress(1, values, say=True)

        with contextlib.redirect_stdout(io.StringIO()):
            seconds = self._median(write)
        log.close()
        return seconds

    def checkpoint(self, folder: Path) -> float:
        """Seconds to write a checkpoint and keep the one before."""
        keeper = Keeper(folder, self.trainer.keep)

        def save() -> None:
            self.state.step += 1
            keeper.save(self.state.checkpoint())

        return self._median(save)

    def pictures(self, folder: Path) -> float:
        """Seconds to draw and write all pictures of an evaluation, beyond the evaluation itself."""
        check = validation(self.config, self.source, "val", self.source.categories)
        drawn, check.pictures = check.pictures, 0
        check(self.model, 0)
        start = time.perf_counter()
        check.save(folder)
        sheets = time.perf_counter() - start
        check.pictures = drawn
        batches = list(islice(iter(check.batches()), -(-drawn // self.config.evaluation.batch)))
        outputs = [self.model.validate(batch.to(self.trainer.device))[1] for batch in batches]  # type: ignore[operator]
        start = time.perf_counter()
        for batch, found in zip(batches, outputs, strict=True):
            check.draw(batch, found)
        return sheets + time.perf_counter() - start

    def _median(self, thing: Callable[[], None]) -> float:
        """Seconds, of a few calls after a first one."""
        return median(in_turn({"": thing}, _REPEATS + 1, self.trainer.device)[""][1:])
