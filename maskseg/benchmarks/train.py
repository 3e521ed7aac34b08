"""Suite `train`: training steps of maskseg and of torchvision's Mask R-CNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import nn

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import case, in_turn, machine, ratio
from maskseg.config import Config
from maskseg.engine.precision import autocast, pick_device
from maskseg.models.file_proposer import FileProposer
from maskseg.models.layers.conv_norm import channels_last
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch

_DISTINCT = 4  # batches in memory, used in turn: the loader is measured separately


def train(config: Config) -> dict[str, Any]:
    """Time a step (forward, backward, SGD) of a Mask R-CNN with the body `config.trunk`.

    Two stages and the norms of the body are frozen. The images are those of the training split of
    `config.data`, `config.batch` at a time, with a shorter side of `config.size` pixels.

    Returns a case: torchvision's model in fp32 and under autocast, ours in fp32 and bf16, and ours
    with proposals from a file. Raises UserError.
    """
    device = pick_device(config.trainer.device)
    batches = [batch.to(device) for batch in torchvision_model.batches(config, "train", _DISTINCT)]
    theirs, ours = torchvision_model.models(config.trunk, config.size)
    theirs = theirs.to(device).train()
    ours = channels_last(ours.to(device)).train()
    images = [torchvision_model.torchvision_inputs(batch) for batch in batches]
    parts = ours.backbone, FileProposer(), ours.sampler, ours.classifier, dict(ours.heads)
    stored = [_with_proposals(ours, batch) for batch in batches]
    from_file: Callable[[Any], Any] = GeneralizedRCNN(*parts).to(device).train()  # shares weights
    runs = {
        "torchvision": _Step(
            theirs, lambda pair: theirs(*pair), images, device, "fp32", fused=False
        ),
        "torchvision autocast bf16": _Step(
            theirs, lambda pair: theirs(*pair), images, device, "bf16", fused=False
        ),
        "maskseg": _Step(ours, ours, batches, device, "fp32"),
        "maskseg bf16": _Step(ours, ours, batches, device, "bf16"),
        "maskseg, proposals from a file": _Step(ours, from_file, stored, device, "fp32"),
    }
    result = case(f"{config.trunk}, {config.batch} x {config.size} px", runs, config.rounds, device)
    again = in_turn(
        {k: runs[k] for k in ("maskseg", "maskseg, proposals from a file")}, config.rounds, device
    )
    also = {"joint training over proposals from a file": ratio(*again.values())}
    return {"suite": "train", "machine": machine(device), "cases": [result], "also": also}


class _Step:
    """Forward, backward and SGD on one batch after the other.

    The learning rate is 0, so that all steps are taken with the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], Any],
        batches: list[Any],
        device: torch.device,
        precision: str,
        fused: bool = True,
    ) -> None:
        self.forward = forward
        self.batches: Iterator[Any] = cycle(batches)
        self.device = device
        self.precision = precision
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trainable, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=fused or None
        )

    def __call__(self) -> None:
        with autocast(self.device, self.precision):
            total = torch.stack(list(self.forward(next(self.batches)).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _with_proposals(model: GeneralizedRCNN, batch: Batch) -> Batch:
    """Add the proposals that a file would hold, as many as training keeps."""
    return replace(batch, proposals=model.propose(batch))
