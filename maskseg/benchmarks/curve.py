"""Suite `curve`: the loss of our steps and of torchvision's, from equal weights over the same batches."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import machine
from maskseg.config.restore import open_data
from maskseg.engine.precision import autocast, pick_device
from maskseg.errors import UserError
from maskseg.structures import Batch

_RATE, _WARM_UP, _WINDOWS = 0.005, 50, 4


def curve(config: Any) -> dict[str, Any]:
    """Trains Mask R-CNNs with the trunk `config.trunk` (BN, from noise, SGD) for `config.steps` steps of `config.batch` training images of
    `config.data`, with its transforms: torchvision's, the same one with other random draws (which tells how much is chance), ours in fp32 and bf16.

    -> the mean loss of each quarter of the steps. Raises UserError.
    """
    if config.steps < 1:
        raise UserError("steps must be at least 1")
    device, source = pick_device(config.trainer.device), open_data(config)
    batches = list(source.train_loader(config.batch, config.steps, config.seed))
    found: dict[str, list[float]] = {}
    for name, precision, seed in (
        ("torchvision", "fp32", 0),
        ("torchvision, other draws", "fp32", 1),
        ("maskseg", "fp32", 0),
        ("maskseg bf16", "bf16", 0),
    ):
        theirs, ours = torchvision_model.models(config.trunk, 64, learnt=True)
        # Neither resizes: the batches are as the transforms made them
        theirs.transform.min_size, theirs.transform.max_size = (1,), 10**9
        theirs.transform.resize = lambda image, target=None: (image, target)
        model: nn.Module = theirs if name.startswith("torchvision") else ours
        give: Callable[[Batch], Any] = torchvision_model.both if model is theirs else _one
        torch.manual_seed(seed)
        found[name] = _losses(name, model.to(device), give, batches, device, precision)
    length = -(-len(batches) // min(_WINDOWS, len(batches)))
    also = {
        f"loss of steps {start + 1}-{min(start + length, len(batches))}, {name}": mean(
            losses[start : start + length]
        )
        for start in range(0, len(batches), length)
        for name, losses in found.items()
    }
    return {"suite": "curve", "machine": machine(device), "cases": [], "also": also}


def _one(batch: Batch) -> tuple[Batch]:
    return (batch,)


def _losses(
    name: str,
    model: nn.Module,
    give: Callable[[Batch], Any],
    batches: list[Batch],
    device: torch.device,
    precision: str,
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=_WARM_UP)
    losses = []
    model.train()
    for batch in tqdm(batches, desc=name, disable=None, leave=False):
        with autocast(device, precision):
            total = torch.stack(list(model(*give(batch.to(device))).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(float(total.detach()))
    return losses
