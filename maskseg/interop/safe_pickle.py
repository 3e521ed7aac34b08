"""Pickles of numpy arrays, read without running what a pickle may ask for.

A pickle is a program: it names functions and calls them. Here the names lead to the makers below and to nothing else, and none of numpy's own code
sees what the file says of an array before it was checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError

KINDS = {f"{kind}{size}" for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}.items() for size in sizes}


class _Maker:
    """A function that a pickle may call, and do nothing else with."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *values: Any) -> Any:
        return self.function(*values)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function is given a state")


class _DType:
    """`numpy.dtype` of whole and real numbers and booleans."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = str(code).lstrip("<>=|"), str(code)[:1] if str(code)[:1] in "<>" else "="
        if self.code not in KINDS:
            raise pickle.UnpicklingError(f"an array of type {str(code)!r}")

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def array(self, data: Any) -> NDArray[Any]:
        """The numbers in bytes (Python 2's pickles hold them as latin-1 text), in the machine's order."""
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("an array without bytes")
        return np.frombuffer(data, np.dtype(f"{self.order}{self.code}")).astype(self.code)


class Array:
    """What stands for an array while the pickle is read; its numbers are in `value`."""

    __slots__ = ("value",)

    def __init__(self, value: NDArray[Any] | None = None) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, columns_first, data = state
        self.value = _shaped(dtype, data, shape, "F" if columns_first else "C")


def _shaped(dtype: Any, data: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array without a type or a shape")
    return dtype.array(data).reshape(shape, order=order)


def _latin1(text: str, encoding: str = "") -> bytes:
    """How Python 3 writes bytes in the protocols of Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How it writes none of them."""
    return b""


MAKERS = {
    "numpy.ndarray": _Maker(lambda *_: Array()),
    "numpy.dtype": _Maker(_DType),
    "multiarray._reconstruct": _Maker(lambda *_: Array()),
    "multiarray.scalar": _Maker(lambda dtype, data: dtype.array(data)[0].item()),
    "numeric._frombuffer": _Maker(lambda data, dtype, shape, order: Array(_shaped(dtype, data, shape, order))),
    "_codecs.encode": _Maker(_latin1),
    "__builtin__.bytes": _Maker(_no_bytes),
    "collections.OrderedDict": _Maker(dict),
}


class _Unpickler(pickle.Unpickler):
    """Names lead to `MAKERS` alone."""

    def find_class(self, module: str, name: str) -> Any:
        """The maker of that name."""
        short = f"{module}.{name}"
        for core in ("numpy.core.", "numpy._core."):
            short = short.removeprefix(core)
        if short not in MAKERS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return MAKERS[short]


def load(file: IO[bytes], path: Path) -> Any:
    """What the pickle holds: plain values and containers, and an `Array` for each array. Python 2's too.

    Raises UserError for a file that is damaged or asks for anything else, which is then not run.
    """
    try:
        return _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: refused, a pickle that is damaged or holds more than numbers and plain containers ({reason})") from error
