"""Schedules compared with torch's, parameter groups, and the scaling of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import cos, pi

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from maskseg.engine.schedules import cosine, multistep, parameter_groups
from maskseg.engine.trainer import Trainer

RATE = 0.02


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int) -> list[float]:
    """The learning rate of every step, including the first."""
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    result = []
    for _ in range(steps):
        result.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return result


@pytest.mark.parametrize("milestones", [(2 / 3, 8 / 9), (0.5,), (), (0.6666667, 0.8888889)])
def test_multistep_is_torchs(milestones: tuple[float, ...]) -> None:
    steps = [round(90 * m) for m in milestones]
    actual = rates(lambda o: multistep(o, 90, milestones, gamma=0.3, warmup_steps=0), 90)
    assert actual == pytest.approx(rates(lambda o: MultiStepLR(o, steps, gamma=0.3), 90))


def test_the_1x_schedule_at_literal_steps() -> None:
    scheduler = multistep(make_optimizer(), 90_000, [0.6666667, 0.8888889])
    factor = scheduler.lr_lambdas[0]
    expected = {
        0: 0.001,
        500: 0.5005,
        999: 0.999001,
        1000: 1,
        59_999: 1,
        60_000: 0.1,
        79_999: 0.1,
        80_000: 0.01,
        89_999: 0.01,
    }
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_the_3x_schedule_at_literal_steps() -> None:
    factor = multistep(make_optimizer(), 270_000, [0.7777778, 0.9259259]).lr_lambdas[0]
    expected = {209_999: 1, 210_000: 0.1, 249_999: 0.1, 250_000: 0.01}
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_cosine_is_torchs() -> None:
    actual = rates(lambda o: cosine(o, 50, final_factor=0.1, warmup_steps=0), 51)
    assert actual == pytest.approx(
        rates(lambda o: CosineAnnealingLR(o, 50, eta_min=0.1 * RATE), 51)
    )


def test_cosine_at_literal_steps() -> None:
    factor = cosine(
        make_optimizer(), 1100, final_factor=0.2, warmup_steps=100, warmup_factor=0.5
    ).lr_lambdas[0]
    expected = {
        0: 0.5,
        50: 0.75,
        100: 1.0,
        600: 0.6,
        1100: 0.2,
        5000: 0.2,
        350: 0.2 + 0.8 * 0.5 * (1 + cos(pi / 4)),
    }
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_the_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    actual = rates(lambda o: multistep(o, 1000, (), warmup_steps=10, warmup_factor=0.1), 15)
    assert actual == pytest.approx([RATE * min(0.1 + 0.09 * i, 1.0) for i in range(15)])


@pytest.mark.parametrize("make", [multistep, cosine])
def test_a_run_shorter_than_its_warm_up(make: Callable[..., LRScheduler]) -> None:
    actual = rates(lambda o: make(o, 4), 6)
    assert all(0 < rate < RATE * 0.01 for rate in actual[:4])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 3)
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)
        self.frozen.requires_grad_(False)


def test_vectors_are_decayed_only_if_configured() -> None:
    model = Model()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, decay_norms_and_biases=False)
    assert {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in groups} == {
        0.1: {"conv.weight", "linear.weight"},
        0.0: {"conv.bias", "norm.weight", "norm.bias", "linear.bias"},
    }
    (one,) = parameter_groups(model, 0.1, decay_norms_and_biases=True)
    assert one["weight_decay"] == 0.1
    assert {names[id(p)] for p in one["params"]} == {
        n for n in names.values() if not n.startswith("frozen")
    }


@pytest.mark.parametrize(
    ("batch_size", "base_batch_size", "expected"),
    [(16, 16, 0.02), (2, 16, 0.0025), (64, 16, 0.08), (4, 4, 0.02), (4, None, 0.02)],
)
def test_the_learning_rate_scales_with_the_batch_size(
    batch_size: int, base_batch_size: int | None, expected: float
) -> None:
    trainer = Trainer(10, device="cpu")
    optimizer = trainer.build_optimizer(
        Model(),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.1),
        batch_size,
        base_batch_size,
    )
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([expected])
    assert optimizer.param_groups[0]["momentum"] == 0.9
    multistep(optimizer, 10, (), warmup_steps=0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_the_trainer_passes_the_decay_to_the_groups() -> None:
    model = Model()
    trainer = Trainer(10, device="cpu", decay_norms_and_biases=False)
    optimizer = trainer.build_optimizer(
        model, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05), 16
    )
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
