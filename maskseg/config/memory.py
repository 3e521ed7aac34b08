"""A limit on the memory that the construction of a model may take."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskseg.errors import UserError

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MAX_TENSORS = 10_000  # a model of a thousand layers has a few thousand


def machine_memory() -> int | None:
    """Bytes of memory that this machine or container has; None if the system does not tell."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    try:
        return min(memory, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return memory


class TooLargeError(UserError):
    """A model needs more memory than there is."""


class MemoryLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that refuses to create tensors that need more memory than there is.

    A wrong size in a config would otherwise end the process, or the machine, without a message. The
    sizes of all tensors are added; none is subtracted when it is freed.

    limit: in bytes; by default, the memory of the machine. Raises TooLargeError.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = machine_memory() if limit is None else limit
        self.num_bytes = 0
        self.num_tensors = 0

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        _types: Sequence[type],
        arguments: Sequence[object] = (),
        keys: Mapping[str, object] | None = None,
    ) -> object:
        """Check the size that a factory function, such as torch.empty, has as its argument."""
        keys = keys or {}
        size = arguments[0] if arguments else None
        if isinstance(size, list | tuple) and all(isinstance(side, int) for side in size):
            dtype = keys.get("dtype")
            itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
            self._add(math.prod(int(side) for side in size) * itemsize)
        return function(*arguments, **keys)

    def _add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self.num_tensors += 1
        if self.limit is not None and self.num_bytes > self.limit:
            raise TooLargeError(
                f"config: the model needs more than {self.num_bytes / 1e9:.3g} GB of memory, this "
                f"machine has {self.limit / 1e9:.3g} GB: a width, a number of layers or another "
                "size in the config of the model is too large"
            )
        if self.num_tensors > _MAX_TENSORS:
            raise TooLargeError(
                f"config: the model has more than {_MAX_TENSORS} tensors: a number of layers in "
                "its config is too large"
            )
