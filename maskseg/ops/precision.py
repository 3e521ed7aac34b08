"""What must not be rounded to the half precision of autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function of tensors (the first argument says on which device), outside of autocast: a place to a fraction of a pixel has more digits than
    bfloat16."""

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return outside
