"""Suite `train`: what a training step costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from statistics import median
from typing import Any

import torch

from maskseg.benchmarks.bare import BareStep, prepared
from maskseg.benchmarks.measure import in_turn, ratio
from maskseg.errors import UserError
from maskseg.modules.file_proposer import FileProposer
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch


def train(config: Any) -> dict[str, Any]:
    """A step (forward, backward, optimiser) of the configured model, and of the same one that takes its proposals from a file, in turn, `steps`
    times.

    config: that of a training, with `steps`. -> median seconds, and the ratio of the two, the median of the ratios pair by pair.
    """
    trainer, _, joint, drawn = prepared(config)
    if not isinstance(joint, GeneralizedRCNN) or getattr(joint.proposer, "needs", None):
        raise UserError("suite train compares a model with a proposer of its own to one without: leave model/proposer as it is")
    parts = joint.backbone, FileProposer(), joint.sampler, joint.classifier, dict(joint.heads)
    batches = [_with_proposals(joint, batch.to(trainer.device)) for batch in drawn]
    models = {"joint": joint, "from_file": trainer.place(GeneralizedRCNN(*parts))}  # of shared weights, which does not matter for the time
    steps = {name: BareStep(config, trainer, model, cycle(batches)) for name, model in models.items()}
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
