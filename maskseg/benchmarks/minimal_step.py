"""The parts of a training run as a config describes them, and a minimal training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.fitted import fit_to_objects
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.models.interfaces import TrainableModel
from maskseg.structures import Batch

DISTINCT = 8  # batches in memory, used in turn: the loader is measured separately


def prepare(config: Config) -> tuple[Trainer, CocoSource, nn.Module, list[Batch]]:
    """Return the trainer, the data, the model (from scratch, on its device) and some batches.

    Raises UserError.
    """
    if config.steps < 1:
        raise UserError("steps must be at least 1")
    trainer: Trainer = configs.build(config.trainer)
    source = open_data(config)
    configs.set_categories(config, source.categories)
    source = fit_to_objects(config, source, _print_nothing)
    if trainer.uses_epochs:
        trainer = trainer.in_steps(source.images_per_epoch(), config.batch_size)
    torch.manual_seed(config.seed)
    model = trainer.place(configs.build_model(config, pretrained=False))
    if not isinstance(model, TrainableModel):
        raise UserError("the model finds no objects, so that no training step can be measured")
    batches = list(source.train_loader(config.batch_size, DISTINCT, config.seed))
    return trainer, source, model, batches


def _print_nothing(*_: object, **__: object) -> None:
    """The standard output of a benchmark is its result."""


class MinimalStep:
    """Forward, backward, clipping, optimizer and schedule, without any checks."""

    def __init__(
        self, config: Config, trainer: Trainer, model: nn.Module, batches: Iterator[Batch]
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.batches = batches
        self.optimizer = configs.build_optimizer(config, trainer, model)
        self.scheduler = configs.build(config.scheduler)(
            self.optimizer, max_steps=trainer.length.max_steps
        )

    def __call__(self) -> None:
        self.model.train()
        with self.trainer.autocast():
            batch = next(self.batches).to(self.trainer.torch_device)
            total = torch.stack(list(self.model(batch).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self.trainer.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
