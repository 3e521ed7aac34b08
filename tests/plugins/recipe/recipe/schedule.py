"""The polynomial schedule."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from maskseg.engine.schedules import warmup_scale


def polynomial(
    optimizer: Optimizer,
    max_steps: int,
    power: float = 0.9,
    warmup_steps: int = 1000,
    warmup_factor: float = 0.001,
) -> LambdaLR:
    """Multiply the learning rate by (1 - step / max_steps) ** power, after a linear warm-up."""

    def factor(step: int) -> float:
        decay = (1 - min(step / max_steps, 1.0)) ** power
        return float(warmup_scale(step, warmup_steps, warmup_factor) * decay)

    return LambdaLR(optimizer, factor)
