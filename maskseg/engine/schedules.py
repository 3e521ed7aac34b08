"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import cos, pi

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from maskseg.values import Fraction, NonNegativeInt, PositiveInt


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_norms_and_biases: bool
) -> list[dict[str, object]]:
    """Group the trainable parameters for the optimizer.

    decay_norms_and_biases: if false, one-dimensional parameters (norm weights and all biases) are
    in a second group without weight decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if decay_norms_and_biases:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def warmup_scale(step: int, warmup_steps: int, warmup_factor: float) -> float:
    """Linear warm-up from `warmup_factor` to 1 (Goyal et al., section 2.2)."""
    if step >= warmup_steps:
        return 1.0
    return warmup_factor + (1 - warmup_factor) * step / warmup_steps


def multistep(
    optimizer: Optimizer,
    max_steps: PositiveInt,
    milestones: Sequence[Fraction] = (2 / 3, 8 / 9),
    gamma: Fraction = 0.1,
    warmup_steps: NonNegativeInt = 1000,
    warmup_factor: Fraction = 0.001,
) -> LambdaLR:
    """Multiply the learning rate by `gamma` at each milestone, after a linear warm-up.

    milestones: fractions of `max_steps`. The defaults are steps 60k and 80k of the 1x schedule,
    which has 90k steps.
    """
    milestone_steps = [round(m * max_steps) for m in milestones]

    def factor(step: int) -> float:
        decay = gamma ** bisect_right(milestone_steps, step)
        return float(warmup_scale(step, warmup_steps, warmup_factor) * decay)

    return LambdaLR(optimizer, factor)


def cosine(
    optimizer: Optimizer,
    max_steps: PositiveInt,
    final_factor: Fraction = 0.0,
    warmup_steps: NonNegativeInt = 1000,
    warmup_factor: Fraction = 0.001,
) -> LambdaLR:
    """Half a cosine from the full learning rate to `final_factor` of it, after a linear warm-up.

    Source: Loshchilov and Hutter, eq. 5, without restarts.
    """

    def factor(step: int) -> float:
        progress = min(max(step - warmup_steps, 0) / max(max_steps - warmup_steps, 1), 1.0)
        decay = final_factor + (1 - final_factor) * 0.5 * (1 + cos(pi * progress))
        return warmup_scale(step, warmup_steps, warmup_factor) * decay

    return LambdaLR(optimizer, factor)
