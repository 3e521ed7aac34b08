"""Loss terms and their divisor."""

from __future__ import annotations

import pytest
import torch

from maskseg.ops.losses import mean_count, smooth_l1_sum


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (1, 1), (2, 2), (300, 300)])
def test_mean_count_is_at_least_one(count: int, expected: int) -> None:
    assert mean_count(count, torch.zeros(1)) == expected


def test_smooth_l1_literal() -> None:
    predicted = torch.tensor([0.0, 0.5, 3.0])
    target = torch.tensor([0.0, 0.0, 1.0])
    assert smooth_l1_sum(predicted, target, 0.0).item() == pytest.approx(2.5)
    assert smooth_l1_sum(predicted, target, 1.0).item() == pytest.approx(0.5 * 0.25 + 1.5)
    assert smooth_l1_sum(torch.zeros(0, 4), torch.zeros(0, 4), 1.0).item() == 0
