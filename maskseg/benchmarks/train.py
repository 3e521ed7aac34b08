"""Suite `train`: training steps of maskseg and of torchvision's Mask R-CNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from torch import nn

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import case, in_turn, machine, ratio
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.engine.precision import autocast, pick_device
from maskseg.models.file_proposer import FileProposer
from maskseg.models.layers.conv_norm import channels_last
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Losses

_DISTINCT = 4  # batches in memory, used in turn: the loader is measured separately


def train(config: Config) -> SuiteResult:
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
    inputs = [torchvision_model.torchvision_inputs(batch) for batch in batches]
    # The model whose proposals come from a file shares its weights with `ours`.
    parts = ours.backbone, FileProposer(), ours.sampler, ours.classifier, dict(ours.heads)
    from_file = GeneralizedRCNN(*parts).to(device).train()
    stored = [_with_proposals(ours, batch) for batch in batches]
    their_passes = [partial(theirs, images, targets) for images, targets in inputs]
    our_passes = [partial(ours, batch) for batch in batches]
    stored_passes = [partial(from_file, batch) for batch in stored]
    runs = {
        "torchvision": _Step(theirs, their_passes, device, "fp32", fused=False),
        "torchvision autocast bf16": _Step(theirs, their_passes, device, "bf16", fused=False),
        "maskseg": _Step(ours, our_passes, device, "fp32"),
        "maskseg bf16": _Step(ours, our_passes, device, "bf16"),
        "maskseg, proposals from a file": _Step(ours, stored_passes, device, "fp32"),
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

    passes: the forward pass of each batch, which returns the losses.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: Sequence[Callable[[], Losses]],
        device: torch.device,
        precision: str,
        fused: bool = True,
    ) -> None:
        self.passes = cycle(passes)
        self.device = device
        self.precision = precision
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trainable, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=fused or None
        )

    def __call__(self) -> None:
        with autocast(self.device, self.precision):
            losses = next(self.passes)()
            total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _with_proposals(model: GeneralizedRCNN, batch: Batch) -> Batch:
    """Add the proposals that a file would hold, as many as training keeps."""
    return replace(batch, proposals=model.propose(batch))
