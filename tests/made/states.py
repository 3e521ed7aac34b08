"""The state of a training of a very small model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from maskseg.engine.distributed import DistributedContext
from maskseg.engine.state import TrainState, build_ema

STEPS = 3
MakeOptimizer = Callable[..., torch.optim.Optimizer]
ADAM = partial(torch.optim.AdamW, lr=0.1)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
# State tensors of other shapes than the parameters'.
FACTORED = partial(torch.optim.Adafactor, lr=0.1)


def build_state(make: MakeOptimizer = ADAM, ema: bool = True, steps: int = STEPS) -> TrainState:
    """A small state after some steps, with a loss scaler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    weights = list(model.parameters())
    optimizer = make([{"params": weights[:3]}, {"params": weights[3:], "weight_decay": 0.0}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    average = build_ema(model, 0.9) if ema else None
    state = TrainState(model, optimizer, scheduler, scaler, average, {}, DistributedContext())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        if average is not None:
            average.update_parameters(model)
        state.step += 1
    state.metrics = {"segm/AP": 0.25}
    state.best = 0.25
    state.last_eval_step = min(steps, 2)
    return state
