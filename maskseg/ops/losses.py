"""Loss terms as sums, so that the caller says what they are divided by."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def smooth_l1_sum(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of the smooth L1 distance (Fast R-CNN, eq. 3), quadratic below `beta`; plain L1 where beta is 0. Any equal shapes -> scalar."""
    if beta == 0:
        return F.l1_loss(predicted.float(), target, reduction="sum")
    return F.smooth_l1_loss(predicted.float(), target, beta=beta, reduction="sum")


def mean_count(count: int, like: Tensor) -> Tensor | int:
    """What a sum of losses is divided by: the mean over all processes of how many things each has, at least one in all.

    Averaged over the processes, as DistributedDataParallel averages gradients, the quotients are then what one process with all the
    images has. Only while gradients are recorded: a validation shared out over processes need not give each the same number of batches.
    like: a tensor on the device of the result.
    """
    if not (
        torch.is_grad_enabled()
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() > 1
    ):
        return max(count, 1)
    total = torch.tensor(float(count), device=like.device)
    dist.all_reduce(total)
    return total.clamp(min=1.0) / dist.get_world_size()
