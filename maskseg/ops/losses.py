"""Loss terms as sums, so that the caller says what they are divided by."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def smooth_l1_sum(predicted: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of the smooth L1 distance (Fast R-CNN, eq. 3), quadratic below `beta`; plain L1 where beta is 0. Any equal shapes -> scalar."""
    if beta == 0:
        return F.l1_loss(predicted.float(), target, reduction="sum")
    return F.smooth_l1_loss(predicted.float(), target, beta=beta, reduction="sum")
