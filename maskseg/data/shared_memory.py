"""What a loader process sends: torch opens a piece of shared memory for every tensor, half a millisecond each, so here only large ones get one."""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LARGE = 1 << 17  # bytes; what is smaller is sent through the pipe with the rest


class Parcel:
    """Any picklable value, its tensors (on the CPU) packed; one process packs it, another one of the same program opens it."""

    def __init__(self, value: Any) -> None:
        self.large: list[Tensor] = []
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5, buffer_callback=self._keep_out)
        pickler.dispatch_table = {**copyreg.dispatch_table, Tensor: _as_array}
        pickler.dump(value)
        self.rest = file.getvalue()

    def open(self) -> Any:
        """The value. Its large tensors lie in the shared memory that they came in."""
        return pickle.loads(self.rest, buffers=[tensor.numpy() for tensor in self.large])

    def pin_memory(self) -> Any:
        """The value in page-locked memory (called by torch's loader, in a thread of its own)."""
        value = self.open()
        return value.pin_memory() if hasattr(value, "pin_memory") else value

    def _keep_out(self, buffer: pickle.PickleBuffer) -> bool:
        """Takes a large array's memory; -> whether it is to be pickled with the rest."""
        raw = buffer.raw()
        if raw.nbytes < _LARGE or raw.readonly:
            return True
        self.large.append(torch.frombuffer(raw, dtype=torch.uint8))
        return False


class Packed:
    """A collate function whose result is a parcel."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Parcel:
        return Parcel(self.collate(samples))


def _as_array(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.numpy(),)
