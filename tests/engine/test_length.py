"""A training in epochs is the training in steps that its images and its batch size make of it."""

from __future__ import annotations

import pytest

from maskseg import config as configs
from maskseg.engine.length import Length, epoch_steps
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError


@pytest.mark.parametrize(
    ("epochs", "images", "batch_size", "steps"),
    [
        (10, 16, 2, 80),
        (1, 5, 2, 3),  # the last step has images of the next epoch
        (3, 5, 2, 8),
        (0.1, 100, 10, 1),  # no rounding of binary fractions up to 2
        (0.3, 100, 10, 3),
        (1, 1, 64, 1),
        (2, 10.5, 3, 7),  # images that are repeated on average
    ],
)
def test_steps_of_epochs(epochs: float, images: float, batch_size: int, steps: int) -> None:
    assert epoch_steps(epochs, images, batch_size) == steps
    assert Trainer(epochs=epochs, device="cpu").in_steps(images, batch_size).max_steps == steps


def test_all_lengths_are_converted() -> None:
    trainer = Trainer(epochs=4, evaluate_every="1epoch", checkpoint_every="2 epochs", device="cpu")
    assert trainer.uses_epochs
    with pytest.raises(UserError, match="epochs cannot be counted here"):
        _ = trainer.length
    converted = trainer.in_steps(15, 4)
    assert converted.length == Length(max_steps=15, evaluate_every=4, checkpoint_every=8)
    assert not converted.uses_epochs
    # The number of processes and of micro-batches divides a step, and changes none of these.
    split = Trainer(epochs=4, accumulate_grad_batches=2, device="cpu").in_steps(15, 4)
    assert split.length.max_steps == 15
    in_steps = Trainer(100, evaluate_every="0.5epochs", device="cpu")
    assert in_steps.in_steps(40, 4).length == Length(100, 5, 1000)


@pytest.mark.parametrize("interval", ["0epochs", "0 epoch", "0.0epochs"])
def test_no_epochs_are_the_end_of_the_training_alone(interval: str) -> None:
    trainer = Trainer(100, evaluate_every=interval, checkpoint_every=interval, device="cpu")
    assert trainer.in_steps(40, 4).length == Length(100, 0, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "exactly one of trainer.epochs and trainer.max_steps must be set"),
        ({"epochs": 3, "max_steps": 5}, "exactly one of"),
        ({"epochs": 0}, r"trainer\.epochs=0: expected a number above 0"),
        ({"epochs": 1, "evaluate_every": "often"}, "trainer.evaluate_every=often: expected a num"),
        ({"epochs": 1, "checkpoint_every": "-1epoch"}, "trainer.checkpoint_every=-1epoch"),
    ],
)
def test_lengths_that_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(**{"device": "cpu", **keys})


@pytest.mark.parametrize(
    ("overrides", "epochs", "max_steps"),
    [
        (["trainer.epochs=7"], 7, None),
        (["trainer.max_steps=9"], None, 9),
        (["trainer.epochs=7", "trainer.max_steps=null"], 7, None),
        (["trainer.epochs=null"], None, 1400),
        (["debug=smoke"], None, 4),
        (["debug=smoke", "trainer.epochs=0.5"], 0.5, None),
    ],
)
def test_the_command_line_decides(
    overrides: list[str], epochs: float | None, max_steps: int | None
) -> None:
    trainer = configs.compose("train", ["experiment=scenes_r18", *overrides]).trainer
    assert (trainer.epochs, trainer.max_steps) == (epochs, max_steps)


def test_both_lengths_on_the_command_line_are_refused() -> None:
    both = ["trainer.epochs=7", "trainer.max_steps=9"]
    with pytest.raises(UserError, match=r"trainer\.epochs and trainer\.max_steps are both set"):
        configs.compose("train", both)
    text = configs.to_yaml(configs.compose("train", both[1:]))
    with pytest.raises(UserError, match=r"trainer\.epochs and trainer\.max_steps are both set"):
        configs.resumed_config(text, both)


def test_each_length_replaces_the_other_one_of_a_checkpoint() -> None:
    """A checkpoint stores its length in steps."""
    text = configs.to_yaml(configs.compose("train", ["trainer.max_steps=9"]))
    for override, epochs, max_steps in (
        ("trainer.epochs=60", 60, None),
        ("trainer.max_steps=20", None, 20),
        ("trainer.log_every=3", None, 9),
    ):
        trainer = configs.resumed_config(text, [override]).trainer
        assert (trainer.epochs, trainer.max_steps) == (epochs, max_steps)
