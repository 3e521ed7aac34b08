"""Suite `train`: what a training step costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import nn

from maskseg import config as configs
from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.modules.file_proposer import FileProposer
from maskseg.pipeline import open_data
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch


def train(config: Any) -> dict[str, Any]:
    """A step (forward, backward, optimiser) of the configured model, and of the same one that takes its proposals from a file, in turn, `steps`
    times.

    config: that of a training, with `steps`. -> median seconds, and the ratio of the two, the median of the ratios pair by pair.
    """
    if config.steps < 1:
        raise UserError("steps must be at least 1")
    trainer: Trainer = configs.build(config.trainer)
    source = open_data(config)
    configs.set_categories(config, source.categories)
    torch.manual_seed(config.seed)
    joint = trainer.place(configs.build_model(config, pretrained=False))
    if not isinstance(joint, GeneralizedRCNN) or getattr(joint.proposer, "needs", None):
        raise UserError("suite train compares a model with a proposer of its own to one without: leave model/proposer as it is")
    parts = joint.backbone, FileProposer(), joint.sampler, joint.classifier, dict(joint.heads)
    batches = [_with_proposals(joint, b.to(trainer.device)) for b in source.train_loader(config.total_batch, 8, config.seed)]
    steps = {name: _Step(config, trainer, model, batches) for name, model in (("joint", joint), ("from_file", GeneralizedRCNN(*parts)))}
    for step in steps.values():
        step()
    seconds = in_turn(steps, config.steps, trainer.device)
    return {
        "experiment": config.name,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "steps": config.steps,
        "step_seconds": {name: median(values) for name, values in seconds.items()},
        "joint_over_from_file": ratio(seconds["joint"], seconds["from_file"]),
    }


def _with_proposals(model: GeneralizedRCNN, batch: Batch) -> Batch:
    """What the file would hold; as many as the training keeps."""
    model.train()
    return replace(batch, proposals=model.propose(batch))


class _Step:
    """One step with an optimiser of its own; the weights are shared, which does not matter for the time."""

    def __init__(self, config: Any, trainer: Trainer, model: nn.Module, batches: list[Batch]) -> None:
        self.trainer, self.model, self.batches = trainer, trainer.place(model).train(), cycle(batches)
        self.optimizer = trainer.optimizer(model, configs.build(config.optimizer), config.total_batch)

    def __call__(self) -> None:
        with self.trainer.autocast():
            total = torch.stack(list(self.model(next(self.batches)).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
