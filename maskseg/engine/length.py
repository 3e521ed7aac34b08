"""The length of a training and of its intervals: in steps, or in epochs until the data are read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from maskseg.errors import UserError

_EPOCHS = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?epochs?")


@dataclass(frozen=True)
class Length:
    """Numbers of steps.

    max_steps: of the training; evaluate_every, checkpoint_every: between two evaluations or
    checkpoints, 0 for one at the end alone.
    """

    max_steps: int
    evaluate_every: int
    checkpoint_every: int


def check_interval(key: str, value: int | str) -> None:
    """Raise UserError for a text that is no number of epochs, such as `2epochs`."""
    if isinstance(value, str) and _EPOCHS.fullmatch(value) is None:
        raise UserError(
            f"{key}={value}: expected a number of steps, or of epochs such as 1epoch or 5epochs"
        )


def interval_steps(value: int | str, images: float, batch_size: int) -> int:
    """An interval in steps; 0 epochs are 0 steps.

    value: steps, or a text of `check_interval`; images: of an epoch.
    """
    if isinstance(value, int):
        return value
    match = _EPOCHS.fullmatch(value)
    assert match is not None
    if float(match[1]) == 0:
        return 0
    return epoch_steps(match[1], images, batch_size)


def epoch_steps(epochs: float | str, images: float, batch_size: int) -> int:
    """The number of steps of this many epochs, rounded up; at least 1."""
    steps = Fraction(str(epochs)) * Fraction(images) / batch_size
    return max(1, math.ceil(steps))
