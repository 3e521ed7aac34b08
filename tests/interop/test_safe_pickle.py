"""Pickles of arrays are read; pickles that refer to anything else are refused and not run."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskseg.errors import UserError
from maskseg.interop.safe_pickle import Array, load

PATH = Path("weights.pkl")


def read(content: bytes) -> Any:
    return load(io.BytesIO(content), PATH)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, np.ndarray):
        assert isinstance(found, Array)
        assert found.value is not None
        return (
            found.value.dtype == wanted.dtype.newbyteorder("=")
            and found.value.shape == wanted.shape
            and np.array_equal(found.value, wanted)
        )
    if isinstance(wanted, dict):
        return set(found) == set(wanted) and all(same(found[k], v) for k, v in wanted.items())
    return bool(found == wanted)


ARRAYS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "other byte order": np.arange(3, dtype=">i4"),
    "halves": np.ones((2, 1, 2), dtype=np.float16),
    "booleans": np.array([True, False]),
    "none": np.zeros((0, 4), dtype=np.float32),
    "one number": np.array(3.0),
    "small": np.arange(3, dtype=np.uint8),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_of_every_protocol(protocol: int) -> None:
    content = {
        "model": OrderedDict(ARRAYS),
        "__author__": "somebody",
        "iteration": 3,
        "lr": 0.5,
        "list": [1, (2, None)],
        "scalar": np.float32(0.25),
    }
    assert same(read(pickle.dumps(content, protocol=protocol)), content)


# Written by Python 2 for {"w": float32 [[0 1 2] [3 4 5]]}; the bytes are stored as text.
PYTHON_2 = (
    b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02K\x03\x86"
    b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x18"
    + np.arange(6, dtype="<f4").tobytes()
    + b"tbs."
)


def test_python_2() -> None:
    assert same(read(PYTHON_2), {"w": np.arange(6, dtype=np.float32).reshape(2, 3)})


class Call:
    """An object whose pickle is a call of `function`."""

    def __init__(self, function: Any, *values: Any, state: Any = None) -> None:
        self.parts = (function, values) if state is None else (function, values, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


MARK = Path("/tmp/maskseg_evil_pickle_was_run")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (Call(os.system, f"touch {MARK}"), "system"),
        (Call(eval, f"open('{MARK}', 'w')"), "eval"),
        (Call(exec, f"open('{MARK}', 'w')"), "exec"),
        (Call(open, str(MARK), "w"), "open"),
        (Call(getattr, "text", "encode"), "getattr"),
        (Call(np.fromfile, "/etc/passwd"), "fromfile"),
        (Call(np.load, str(MARK)), "load"),
        (Call(bytearray, 10**12), "bytearray"),
        (Path("x"), "Path"),
        (np.array([{}], dtype=object), "type 'O8'"),
        (np.array(["text"]), "type 'U4'"),
        (np.zeros(2, dtype=[("a", "f4")]), "type"),
        (np.array([1j]), "type 'c16'"),
        (np.ma.masked_array([1.0]), "_mareconstruct"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_anything_else_is_refused_and_not_run(content: Any, told: str, protocol: int) -> None:
    with pytest.raises(UserError, match="refused") as raised:
        read(pickle.dumps({"model": {"a": np.zeros(1), "b": content}}, protocol=protocol))
    assert not MARK.exists()
    assert str(raised.value).startswith("weights.pkl: ")
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        PYTHON_2[:-30],
        pickle.dumps(ARRAYS)[:200],
        PYTHON_2.replace(
            b"K\x02K\x03\x86", b"K\x02K\x04\x86"
        ),  # a shape that does not fit the bytes
        PYTHON_2.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
        PYTHON_2.replace(b"U\x02f4", b"U\x02O8"),
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
        b"\x80\x02cnumpy\nndarray\n}X\x08\x00\x00\x00function}sb.",  # a state for the maker
        b"\x80\x02cnumpy\ndtype\n)R.",
        b"\x80\x02cnumpy.core\nmultiarray\n.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id
    ],
)
def test_damaged_or_crafted(content: bytes) -> None:
    with pytest.raises(UserError, match=r"weights\.pkl: refused"):
        read(content)


def test_what_python_2_wrote_is_as_the_test_says() -> None:
    assert any(op.name == "SHORT_BINSTRING" for op, _, _ in pickletools.genops(PYTHON_2))
