"""A decorator for functions that need more precision than autocast's half precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` outside autocast: bfloat16 cannot represent sub-pixel coordinates.

    The first argument must be a tensor; its device decides which autocast is disabled.
    """

    @wraps(function)
    def run_without_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run_without_autocast
