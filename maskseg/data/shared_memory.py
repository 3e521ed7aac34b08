"""Fast transfer of batches from loader processes.

torch creates one shared-memory segment per tensor, which takes 0.5 ms each. Here only large tensors
get their own segment; all others are pickled together.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MIN_SHARED_BYTES = 1 << 17  # smaller tensors are pickled


S = TypeVar("S")
T = TypeVar("T")


@runtime_checkable
class _Pinnable(Protocol):
    def pin_memory(self) -> Self: ...


class SharedBatch(Generic[T]):
    """A picklable value whose large CPU tensors are kept apart for shared memory.

    One process creates it; another process of the same program unpacks it.
    """

    def __init__(self, value: T) -> None:
        self.large: list[Tensor] = []
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5, buffer_callback=self._pickle_in_band)
        pickler.dispatch_table = {**copyreg.dispatch_table, Tensor: _reduce_tensor}
        pickler.dump(value)
        self.pickled = file.getvalue()

    def unpack(self) -> T:
        """Return the value. Its large tensors stay in the shared memory that holds them."""
        value: T = pickle.loads(self.pickled, buffers=[tensor.numpy() for tensor in self.large])
        return value

    def pin_memory(self) -> T:
        """Return the value in page-locked memory (called by torch's loader, in a thread)."""
        value = self.unpack()
        return value.pin_memory() if isinstance(value, _Pinnable) else value

    def _pickle_in_band(self, buffer: pickle.PickleBuffer) -> bool:
        """Keep a large buffer apart; return True for one that is to be pickled with the rest."""
        raw = buffer.raw()
        if raw.nbytes < _MIN_SHARED_BYTES or raw.readonly:
            return True
        self.large.append(torch.frombuffer(raw, dtype=torch.uint8))
        return False


class SharedCollate(Generic[S, T]):
    """Wraps a collate function; its results are returned as `SharedBatch`."""

    def __init__(self, collate: Callable[[list[S]], T]) -> None:
        self.collate = collate

    def __call__(self, samples: list[S]) -> SharedBatch[T]:
        batch = SharedBatch(self.collate(samples))
        # Here, where the main process receives the error if there is not enough shared memory.
        # torch would otherwise do it in a thread, whose error is printed and loses the batch.
        for tensor in batch.large:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return batch


def _reduce_tensor(
    tensor: Tensor,
) -> tuple[Callable[[NDArray[np.generic]], Tensor], tuple[NDArray[np.generic]]]:
    """Pickle a tensor through numpy, whose buffers can be kept apart."""
    return torch.from_numpy, (tensor.numpy(),)
