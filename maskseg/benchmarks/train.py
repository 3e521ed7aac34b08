"""Suite `train`: what a training step costs, beside torchvision's Mask R-CNN, and with proposals from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any, cast

import torch
from torch import nn

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import case, in_turn, machine, ratio
from maskseg.engine.precision import autocast, pick_device
from maskseg.models.file_proposer import FileProposer
from maskseg.models.layers.conv_norm import channels_last
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch

_DISTINCT = 4  # batches that are taken in turn, from memory: the loader is measured by itself


def train(config: Any) -> dict[str, Any]:
    """A step (forward, backward, SGD) of a Mask R-CNN with the trunk `config.trunk`, of which two stages and the norms are frozen, on pictures of the
    training split of `config.data`, `config.batch` at a time with a shorter side of `config.size` pixels.

    -> a case: torchvision's in fp32 and under its autocast, ours in fp32 and bf16, and ours with proposals from a file. Raises UserError.
    """
    device = pick_device(config.trainer.device)
    batches = [batch.to(device) for batch in torchvision_model.batches(config, "train", _DISTINCT)]
    theirs, ours = torchvision_model.models(config.trunk, config.size)
    theirs, ours = theirs.to(device).train(), channels_last(ours.to(device)).train()
    images = [torchvision_model.both(batch) for batch in batches]
    parts = ours.backbone, FileProposer(), ours.sampler, ours.classifier, dict(ours.heads)
    stored = [_with_proposals(ours, batch) for batch in batches]
    own: Callable[[Any], Any] = ours
    from_file = cast(
        Callable[[Any], Any], GeneralizedRCNN(*parts).to(device).train()
    )  # of the same weights, which does not matter for the time
    things = {
        "torchvision": _Step(
            theirs, lambda pair: theirs(*pair), images, device, "fp32", fused=False
        ),
        "torchvision autocast bf16": _Step(
            theirs, lambda pair: theirs(*pair), images, device, "bf16", fused=False
        ),
        "maskseg": _Step(ours, own, batches, device, "fp32"),
        "maskseg bf16": _Step(ours, own, batches, device, "bf16"),
        "maskseg, proposals from a file": _Step(ours, from_file, stored, device, "fp32"),
    }
    one = case(f"{config.trunk}, {config.batch} x {config.size} px", things, config.rounds, device)
    again = in_turn(
        {k: things[k] for k in ("maskseg", "maskseg, proposals from a file")}, config.rounds, device
    )
    also = {"joint training over proposals from a file": ratio(*again.values())}
    return {"suite": "train", "machine": machine(device), "cases": [one], "also": also}


class _Step:
    """Forward, backward and SGD, batch after batch; the rate is 0, so that all steps of all things are of one model."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], Any],
        batches: list[Any],
        device: torch.device,
        precision: str,
        fused: bool = True,
    ) -> None:
        self.forward, self.batches, self.device, self.precision = (
            forward,
            cast("Iterator[Any]", cycle(batches)),
            device,
            precision,
        )
        learnt = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            learnt, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=fused or None
        )

    def __call__(self) -> None:
        with autocast(self.device, self.precision):
            total = torch.stack(list(self.forward(next(self.batches)).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _with_proposals(model: GeneralizedRCNN, batch: Batch) -> Batch:
    """What the file would hold; as many as the training keeps."""
    return replace(batch, proposals=model.propose(batch))
