"""What the suites start from: the parts of a training as a config names them, and a training step as one would write it in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from maskseg import config as configs
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.structures import Batch

DISTINCT = 8  # batches that are taken in turn, from memory: the loader is measured by itself


def prepared(config: Any) -> tuple[Trainer, CocoSource, nn.Module, list[Batch]]:
    """Trainer, data, model (from noise, placed) and a few batches. Raises UserError."""
    if config.steps < 1:
        raise UserError("steps must be at least 1")
    trainer: Trainer = configs.build(config.trainer)
    source = open_data(config)
    configs.set_categories(config, source.categories)
    torch.manual_seed(config.seed)
    model = trainer.place(configs.build_model(config, pretrained=False))
    return (
        trainer,
        source,
        model,
        list(source.train_loader(config.total_batch, DISTINCT, config.seed)),
    )


class BareStep:
    """Forward, backward, clipping, optimiser, schedule, and nothing else."""

    def __init__(
        self, config: Any, trainer: Trainer, model: nn.Module, batches: Iterator[Batch]
    ) -> None:
        self.trainer, self.model, self.batches = trainer, model, batches
        self.optimizer = trainer.optimizer(
            model, configs.build(config.optimizer), config.total_batch
        )
        self.scheduler = configs.build(config.scheduler)(
            self.optimizer, max_steps=config.trainer.max_steps
        )

    def __call__(self) -> None:
        self.model.train()
        with self.trainer.autocast():
            total = torch.stack(
                list(self.model(next(self.batches).to(self.trainer.device)).values())
            ).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self.trainer.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.trainer.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
