"""Suite `trainer`: what the training loop costs beyond the training itself."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from maskseg import config as configs
from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.pipeline import open_data, validation
from maskseg.structures import Batch

_DISTINCT = 8  # batches that both loops take in turn, from memory: the loader is measured by itself


def trainer(config: Any) -> dict[str, Any]:
    """The same steps by the bare loop (forward, backward, clipping, optimiser, schedule) and by `Trainer.run` with its log, its checks of every
    number and one checkpoint in `steps` steps; then one evaluation's pictures, as a share of the steps between two evaluations.

    config: that of a training, with `rounds` and `steps`. -> seconds, and the overheads as shares of the bare loop's time.
    """
    own = _Setup(config)
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                own.run(Path(folder) / "run")

        run()  # warm, both: the same code in the model
        seconds = in_turn({"bare": own.bare, "trainer": run}, config.rounds, own.trainer.device)
        pictures = own.pictures(Path(folder))
    step = median(seconds["bare"]) / own.steps
    between = config.trainer.evaluate_every or config.trainer.max_steps
    loop = ratio(seconds["trainer"], seconds["bare"]) - 1
    return {
        "experiment": config.name,
        "device": str(own.trainer.device),
        "threads": torch.get_num_threads(),
        "steps": own.steps,
        "rounds": config.rounds,
        "seconds": {k: [round(v, 3) for v in values] for k, values in seconds.items()},
        "step_seconds": step,
        "loop_overhead": loop,
        "pictures_seconds": pictures,
        "pictures_overhead": pictures / (between * step),
        "overhead": loop + pictures / (between * step),
    }


class _Setup:
    """Model, batches and both loops."""

    def __init__(self, config: Any) -> None:
        self.config, self.steps = config, int(config.steps)
        if self.steps < 1 or config.rounds < 1:
            raise UserError("steps and rounds must be at least 1")
        self.trainer: Trainer = configs.build(config.trainer)
        self.trainer.max_steps, self.trainer.checkpoint_every, self.trainer.evaluate_every = self.steps, 0, 0
        self.source = open_data(config)
        configs.set_num_classes(config, len(self.source.categories))
        torch.manual_seed(config.seed)
        self.model: nn.Module = self.trainer.place(configs.build_model(config, pretrained=False))
        batches = self.source.train_loader(config.total_batch, _DISTINCT, config.seed)
        self.batches = [batch.to("cpu") for batch in batches]

    def _fresh(self) -> tuple[Any, Any]:
        optimizer = self.trainer.optimizer(self.model, configs.build(self.config.optimizer), self.config.total_batch)
        return optimizer, configs.build(self.config.scheduler)(optimizer, max_steps=self.config.trainer.max_steps)

    def _stream(self, _: int = 0) -> list[Batch]:
        return list(islice(cycle(self.batches), self.steps))

    def bare(self) -> None:
        """What one would write in a notebook."""
        optimizer, scheduler = self._fresh()
        self.model.train()
        for batch in self._stream():
            with self.trainer.autocast():
                total = torch.stack(list(self.model(batch.to(self.trainer.device)).values())).sum()
            optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            if self.trainer.clip_norm:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.clip_norm)
            optimizer.step()
            scheduler.step()

    def run(self, folder: Path) -> None:
        """The trainer's loop, with one checkpoint at the end."""
        folder.mkdir(exist_ok=True)
        about = {"config": configs.to_yaml(self.config), "categories": self.source.categories.to_dict()}
        self.trainer.run(self.model, *self._fresh(), self._stream, folder, about)

    def pictures(self, folder: Path) -> float:
        """Seconds to draw and write all pictures of an evaluation, beyond the evaluation itself."""
        check = validation(self.config, self.source, "val", self.source.categories)
        check(self.model, 0)
        drawn = len(check.drawn)
        check.pictures = 0
        start = time.perf_counter()
        check(self.model, 0)
        without = time.perf_counter() - start
        check.pictures = drawn
        start = time.perf_counter()
        check(self.model, 0)
        check.save(folder)
        return max(time.perf_counter() - start - without, 0.0)
