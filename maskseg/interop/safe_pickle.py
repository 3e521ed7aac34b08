"""Pickles of numpy arrays, read without running any code in them (`maskseg.files.pickles`).

What a file says about an array is checked before any code of numpy sees it.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.files.pickles import (
    Budget,
    Maker,
    describe_value,
    encode_latin1,
    make_dict,
    read_pickle,
)

# Type codes of floats, signed and unsigned integers and booleans.
TYPE_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
MAX_REASON = 200  # characters of the reason in an error message

Values = NDArray[np.generic]  # of one of these types


class _DType:
    """Stands for `numpy.dtype`; only integers, floats and booleans are allowed."""

    __slots__ = ("code", "order")

    def __init__(self, code: object) -> None:
        if not isinstance(code, str) or code.lstrip("<>=|") not in TYPE_CODES:
            raise pickle.UnpicklingError(f"an array of type {describe_value(code)}")
        self.code = code.lstrip("<>=|")
        self.order = code[0] if code[0] in "<>" else "="

    def set_state(self, _: Budget, state: object) -> None:
        """Set the byte order."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def array(self, budget: Budget, data: object) -> Values:
        """Return the values in `data`, in the byte order of the machine.

        data: bytes, or latin-1 text, in which pickles of Python 2 store them.
        """
        if not isinstance(data, str | bytes | bytearray):
            raise pickle.UnpicklingError("an array without bytes")
        budget.spend(len(data))
        data = data.encode("latin1") if isinstance(data, str) else data
        return np.frombuffer(data, np.dtype(f"{self.order}{self.code}")).astype(self.code)


class Array:
    """Stands for an array while the pickle is read; the array itself is `value`."""

    __slots__ = ("value",)

    def __init__(self, value: Values | None = None) -> None:
        self.value = value

    def set_state(self, budget: Budget, state: object) -> None:
        """Set the array from its version, shape, type, memory order and bytes."""
        if not isinstance(state, tuple):
            raise pickle.UnpicklingError("an array without a state")
        _, shape, dtype, columns_first, data = state
        self.value = _build_array(budget, dtype, data, shape, "F" if columns_first else "C")


def _build_array(
    budget: Budget, dtype: object, data: object, shape: object, order: object
) -> Values:
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a type or a shape")
    return dtype.array(budget, data).reshape(shape, order="F" if order == "F" else "C")


def _make_array(_: Budget, *__: object) -> Array:
    return Array()


def _make_dtype(_: Budget, code: object, *__: object) -> _DType:
    return _DType(code)


def _make_scalar(budget: Budget, dtype: object, data: object) -> object:
    return _build_array(budget, dtype, data, (1,), "C").item(0)


def _make_from_buffer(
    budget: Budget, data: object, dtype: object, shape: object, order: object
) -> Array:
    return Array(_build_array(budget, dtype, data, shape, order))


def _makers() -> dict[str, Maker | None]:
    makers: dict[str, Maker | None] = {
        "numpy.ndarray": _make_array,
        "numpy.dtype": _make_dtype,
        "_codecs.encode": encode_latin1,
        # In the protocols of Python 2, Python 3 writes empty bytes as a call of this name.
        "__builtin__.bytes": lambda _: b"",
        "collections.OrderedDict": make_dict,
    }
    for core in ("numpy.core", "numpy._core"):
        makers[f"{core}.multiarray._reconstruct"] = _make_array
        makers[f"{core}.multiarray.scalar"] = _make_scalar
        makers[f"{core}.numeric._frombuffer"] = _make_from_buffer
    return makers


MAKERS = _makers()


def load(file: IO[bytes], path: Path) -> object:
    """Return the content of a pickle: plain values and containers, and an `Array` for each array.

    Pickles of Python 2 are supported. Memory and time are proportional to the file's size.
    Raises UserError for a file that is damaged or refers to anything else, which is not run.
    """
    try:
        return read_pickle(file, MAKERS)
    except Exception as error:  # a damaged pickle can raise almost any exception
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise UserError(
            f"{path}: refused, a pickle that is damaged or contains more than numbers and plain "
            f"containers ({reason})"
        ) from error
