"""Suite `trainer`: the overhead of the training loop."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median

import torch

from maskseg import config as configs
from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.benchmarks.minimal_step import MinimalStep, prepare
from maskseg.commands.evaluate import build_validation
from maskseg.config import Config
from maskseg.engine.checkpoint import CheckpointManager
from maskseg.engine.logs import RunLog, peak_memory
from maskseg.engine.step import StepResult, TrainStep
from maskseg.models.interfaces import TrainableModel

_REPEATS = 5


def trainer(config: Config) -> dict[str, object]:
    """Compare the trainer's step with a minimal one, in turn, `steps` times.

    The minimal step consists of forward, backward, clipping, optimizer and schedule. The trainer's
    step checks all values, too. A line of the log, a checkpoint and the images of an evaluation are
    timed as well, relative to the steps between two of them.

    config: of a training run, with `steps`.

    Returns seconds, and the overheads as fractions of the minimal step's time.
    """
    setup = _Setup(config)
    kinds: dict[str, Callable[[], None]] = {"bare": setup.minimal_step, "trainer": setup.step}
    for step in kinds.values():  # warm-up
        step()
    seconds = in_turn(kinds, setup.steps, setup.trainer.torch_device)
    bare = median(seconds["bare"])
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "log": setup.log_line(Path(folder)),
            "checkpoint": setup.checkpoint(Path(folder)),
            "pictures": setup.images(Path(folder)),
        }
    length = setup.trainer.length
    every = {
        "log": setup.trainer.log_every or 1,
        "checkpoint": length.checkpoint_every or length.max_steps,
        "pictures": length.evaluate_every or length.max_steps,
    }
    shares = {
        "step": ratio(seconds["trainer"], seconds["bare"]) - 1,
        **{k: parts[k] / (every[k] * bare) for k in parts},
    }
    return {
        "experiment": config.name,
        "device": str(setup.trainer.torch_device),
        "threads": torch.get_num_threads(),
        "steps": setup.steps,
        "seconds": {"bare_step": bare, "trainer_step": median(seconds["trainer"]), **parts},
        "every": every,
        "overhead": {**shares, "all": sum(shares.values())},
    }


class _Setup:
    """Model, batches, and both kinds of a step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.steps = int(config.steps)
        self.trainer, self.source, self.model, batches = prepare(config)
        # Each batch comes twice in a row, so that both kinds of a step get the same one.
        self.batches = chain.from_iterable((batch, batch) for batch in cycle(batches))
        self.minimal_step = MinimalStep(config, self.trainer, self.model, self.batches)
        categories = self.source.categories.to_dict()
        metadata = {"config": configs.to_yaml(config), "categories": categories}
        self.state = self.trainer.build_state(
            self.model, self.minimal_step.optimizer, self.minimal_step.scheduler, metadata
        )
        self.result = StepResult()  # of the trainer's last step
        self.train_step = TrainStep(
            self.state,
            self.model,
            self.trainer.torch_device,
            self.trainer.autocast,
            self.trainer.clip_norm,
        )

    def step(self) -> None:
        """Take a step of the trainer."""
        self.result = self.train_step(list(islice(self.batches, 1)), lambda: False)

    def log_line(self, folder: Path) -> float:
        """Seconds to log the scalars to the file, to TensorBoard and to the terminal."""
        log = RunLog(folder, 0, 10**6, "")

        def write() -> None:
            values = {name: float(value) for name, value in self.result.losses.items()}
            values["memory_gb"] = peak_memory(self.trainer.torch_device) or 0.0
            log.log_scalars(1, "train", values)
            log.progress(1, values, show=True)

        with contextlib.redirect_stdout(io.StringIO()):
            seconds = self._median(write)
        log.close()
        return seconds

    def checkpoint(self, folder: Path) -> float:
        """Seconds to write a checkpoint and keep the previous one."""
        manager = CheckpointManager(folder, self.trainer.keep_checkpoints)

        def save() -> None:
            self.state.step += 1
            manager.save(self.state.checkpoint())

        return self._median(save)

    def images(self, folder: Path) -> float:
        """Seconds to draw and write all images of an evaluation, without the evaluation itself."""
        categories = self.source.categories
        undrawn = build_validation(self.config, self.source, "val", categories, num_images=0)
        undrawn(self.model, 0)
        start = time.perf_counter()
        undrawn.save(folder)
        sheets = time.perf_counter() - start
        check = build_validation(self.config, self.source, "val", categories)
        drawn = check.settings.num_images
        batches = list(islice(iter(check.batches()), -(-drawn // self.config.evaluation.batch)))
        model = self.model
        assert isinstance(model, TrainableModel)  # `prepare` checks it
        device = self.trainer.torch_device
        outputs = [model.validate(batch.to(device))[1] for batch in batches]
        start = time.perf_counter()
        for batch, detections in zip(batches, outputs, strict=True):
            check.draw(batch, detections)
        return sheets + time.perf_counter() - start

    def _median(self, function: Callable[[], None]) -> float:
        """Median seconds of a few calls, without the first one."""
        return median(in_turn({"": function}, _REPEATS + 1, self.trainer.torch_device)[""][1:])
