"""Pickles of numpy arrays, read without running what a pickle may ask for (`maskseg.files.pickles`).

None of numpy's own code sees what the file says of an array before it was checked.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.files.pickles import Budget, Maker, encode_latin1, make_dict, read_pickle, shown

KINDS = {
    f"{kind}{size}"
    for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}.items()
    for size in sizes
}


class _DType:
    """`numpy.dtype` of whole and real numbers and booleans."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>=|") not in KINDS:
            raise pickle.UnpicklingError(f"an array of type {shown(code)}")
        self.code = code.lstrip("<>=|")
        self.order = code[0] if code[0] in "<>" else "="

    def set_state(self, _: Budget, state: Any) -> None:
        """The byte order."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def array(self, budget: Budget, data: Any) -> NDArray[Any]:
        """The numbers in bytes (Python 2's pickles hold them as latin-1 text), in the machine's order."""
        if not isinstance(data, str | bytes | bytearray):
            raise pickle.UnpicklingError("an array without bytes")
        budget.spend(len(data))
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(f"{self.order}{self.code}")).astype(self.code)


class Array:
    """What stands for an array while the pickle is read; its numbers are in `value`."""

    __slots__ = ("value",)

    def __init__(self, value: NDArray[Any] | None = None) -> None:
        self.value = value

    def set_state(self, budget: Budget, state: Any) -> None:
        """Shape, type, order and bytes."""
        _, shape, dtype, columns_first, data = state
        self.value = _shaped(budget, dtype, data, shape, "F" if columns_first else "C")


def _shaped(budget: Budget, dtype: Any, data: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a type or a shape")
    return dtype.array(budget, data).reshape(shape, order=order)


def _make_array(_: Budget, *__: Any) -> Array:
    return Array()


def _make_dtype(_: Budget, code: Any, *__: Any) -> _DType:
    return _DType(code)


def _make_scalar(budget: Budget, dtype: Any, data: Any) -> Any:
    return _shaped(budget, dtype, data, (1,), "C")[0].item()


def _make_from_buffer(budget: Budget, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array(_shaped(budget, dtype, data, shape, order))


_OF_NUMPY: dict[str, Maker] = {
    "multiarray._reconstruct": _make_array,
    "multiarray.scalar": _make_scalar,
    "numeric._frombuffer": _make_from_buffer,
}
MAKERS: dict[str, Maker | None] = {
    "numpy.ndarray": _make_array,
    "numpy.dtype": _make_dtype,
    **{
        f"{core}.{name}": maker
        for core in ("numpy.core", "numpy._core")
        for name, maker in _OF_NUMPY.items()
    },
    "_codecs.encode": encode_latin1,
    "__builtin__.bytes": lambda _: b"",  # how Python 3 writes no bytes in the protocols of Python 2
    "collections.OrderedDict": make_dict,
}


def load(file: IO[bytes], path: Path) -> Any:
    """What the pickle holds: plain values and containers, and an `Array` for each array. Python 2's too.

    Raises UserError for a file that is damaged or asks for anything else, which is then not run. Memory and time follow the file's size.
    """
    try:
        return read_pickle(file, MAKERS)
    except Exception as error:  # a damaged pickle raises almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path}: refused, a pickle that is damaged or holds more than numbers and plain containers ({reason})"
        ) from error
