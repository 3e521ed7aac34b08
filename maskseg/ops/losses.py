"""Loss terms as sums, so that the caller chooses the divisor."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def smooth_l1_sum(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of the smooth L1 loss (Fast R-CNN, eq. 3), quadratic below `beta`; L1 if beta is 0.

    predicted, target: of equal shape. Returns a scalar.
    """
    if beta == 0:
        return F.l1_loss(predicted.float(), target, reduction="sum")
    return F.smooth_l1_loss(predicted.float(), target, beta=beta, reduction="sum")


def mean_count(count: int, like: Tensor) -> Tensor | int:
    """Divisor of a sum of losses: the mean of `count` over all processes.

    The total over the processes is at least 1.
    DistributedDataParallel averages gradients over the processes. With this divisor, the result
    equals that of one process with all images. The counts are exchanged only while gradients are
    recorded: in a distributed validation, processes may have different numbers of batches.
    like: a tensor on the device of the result.
    """
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not (torch.is_grad_enabled() and distributed):
        return max(count, 1)
    total = torch.tensor(float(count), device=like.device)
    dist.all_reduce(total)
    return total.clamp(min=1.0) / dist.get_world_size()
