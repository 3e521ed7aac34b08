"""Suite `curve`: training losses of maskseg and torchvision, from equal weights and batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from torch import nn
from tqdm import tqdm

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.engine.precision import autocast, pick_device
from maskseg.errors import UserError
from maskseg.structures import Batch, Losses

_LEARNING_RATE = 0.005
_WARMUP_STEPS = 50
_WINDOWS = 4

Forward = Callable[[Batch], Losses]


def curve(config: Config) -> SuiteResult:
    """Train Mask R-CNNs from scratch for `config.steps` steps with SGD.

    The models have the body `config.trunk` with BN, and are trained on `config.batch` images of the
    training split of `config.data` at a time, with its transforms. They are torchvision's, the same
    with other random samples (which shows the influence of chance), and ours in fp32 and bf16.

    Returns the mean loss of each quarter of the steps. Raises UserError.
    """
    if config.steps < 1:
        raise UserError("steps must be at least 1")
    device = pick_device(config.trainer.device)
    source = open_data(config)
    batches = list(source.train_loader(config.batch, config.steps, config.seed))
    curves: dict[str, list[float]] = {}
    for name, precision, seed in (
        ("torchvision", "fp32", 0),
        ("torchvision, other draws", "fp32", 1),
        ("maskseg", "fp32", 0),
        ("maskseg bf16", "bf16", 0),
    ):
        theirs, ours = torchvision_model.models(config.trunk, 64, trainable=True)
        # Disable torchvision's resize: the transforms have resized the batches already.
        theirs.transform.min_size = (1,)
        theirs.transform.max_size = 10**9
        theirs.transform.resize = lambda image, target=None: (image, target)
        model: nn.Module = ours
        forward: Forward = ours
        if name.startswith("torchvision"):
            model = theirs
            forward = partial(torchvision_model.torchvision_losses, theirs)
        torch.manual_seed(seed)
        model = model.to(device).train()
        curves[name] = _losses(name, model, forward, batches, precision)
    length = -(-len(batches) // min(_WINDOWS, len(batches)))
    also = {}
    for start in range(0, len(batches), length):
        end = min(start + length, len(batches))
        for name, losses in curves.items():
            also[f"loss of steps {start + 1}-{end}, {name}"] = mean(losses[start:end])
    return {"suite": "curve", "machine": machine(device), "cases": [], "also": also}


def _losses(
    name: str,
    model: nn.Module,
    forward: Forward,
    batches: list[Batch],
    precision: str,
) -> list[float]:
    """The loss of each step of a training.

    name: for the progress bar; model: in training mode; forward: the losses of a batch.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        model.parameters(), lr=_LEARNING_RATE, momentum=0.9, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=_WARMUP_STEPS)
    losses = []
    for batch in tqdm(batches, desc=name, disable=None, leave=False):
        with autocast(device, precision):
            total = torch.stack(list(forward(batch.to(device)).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(float(total.detach()))
    return losses
