"""MATLAB 5 files (.mat) as data sets use them: numbers, cells and structures.

`scipy.io.loadmat` ends the process on some files with a few damaged bytes (a segmentation fault, not an error). Here no size is believed before
it was compared with what holds it, and nothing is built but what is asked for. Layout: MathWorks, "MAT-File Format", version 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**28  # of a file, and of what it unpacks to
MAX_ELEMENTS = 10_000  # side by side in one array: more cells than any data set has

_MATRIX, _COMPRESSED = (
    14,
    15,
)  # kinds of elements; 6, 5, 1: those that every array begins with, its flags, shape and name
_STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}  # the kinds that are numbers
_CELL, _STRUCT = 1, 2  # classes of arrays
_CLASSES = {
    6: "f8",
    7: "f4",
    8: "i1",
    9: "u1",
    10: "i2",
    11: "u2",
    12: "i4",
    13: "u4",
    14: "i8",
    15: "u8",
}  # those of numbers
_COMPLEX = 0x0800


class MatError(ValueError):
    """What is wrong with the file, without its name."""


class _Element(NamedTuple):
    kind: int
    data: memoryview
    end: int  # where the next one begins


@dataclass(frozen=True)
class MatArray:
    """One array of a file: its class and its shape as the file states them, and its content, unread. The methods raise MatError."""

    kind: int
    shape: tuple[int, ...]
    content: memoryview
    order: str  # of the bytes: "<" or ">"

    def numbers(self) -> NDArray[Any]:
        """The numbers in the array's shape, of the type that its class says."""
        parts = list(_elements(self.content, self.order))
        if self.kind not in _CLASSES or len(parts) != 1 or parts[0].kind not in _STORED:
            raise MatError(f"an array of class {self.kind} where real numbers were expected")
        dtype = np.dtype(self.order + _STORED[parts[0].kind])
        try:
            values = np.frombuffer(parts[0].data, dtype=dtype).reshape(self.shape, order="F")
        except ValueError as error:
            raise MatError(
                f"{len(parts[0].data)} bytes of numbers do not make an array of {len(self.shape)} dimensions, {self.shape[:8]}"
            ) from error
        with np.errstate(invalid="ignore"):  # damaged: numbers that their class cannot hold
            return values.astype(_CLASSES[self.kind])

    def cells(self) -> list[MatArray]:
        """The arrays in the cells, column by column."""
        if self.kind != _CELL:
            raise MatError(f"an array of class {self.kind} where cells were expected")
        return self._children(list(_elements(self.content, self.order)), math.prod(self.shape))

    def field(self, name: str) -> MatArray:
        """A field of a structure of one element."""
        if self.kind != _STRUCT or math.prod(self.shape) != 1:
            raise MatError(
                f"an array of class {self.kind} and shape {self.shape} where one structure was expected"
            )
        parts = list(_elements(self.content, self.order))
        if len(parts) < 2 or len(parts[0].data) != 4:
            raise MatError("a structure without names of its fields")
        (length,) = struct.unpack(f"{self.order}i", parts[0].data)
        text = bytes(parts[1].data)
        if length < 1 or len(text) % length:
            raise MatError(f"{len(text)} bytes of names with {length} bytes each")
        names = [
            text[i : i + length].partition(b"\0")[0].decode("latin-1")
            for i in range(0, len(text), length)
        ]
        if name not in names:
            raise MatError(
                f"a structure without the field {name!r} (it has {', '.join(names)})"[:200]
            )
        return self._children(parts[2:], len(names))[names.index(name)]

    def _children(self, parts: list[_Element], number: int) -> list[MatArray]:
        if len(parts) != number or any(part.kind != _MATRIX for part in parts):
            raise MatError(f"{len(parts)} elements where {number} arrays were expected")
        return [_array(part.data, self.order)[1] for part in parts]


def read_mat(path: Path) -> dict[str, MatArray]:
    """The variables of a file by their names. Raises MatError for what is no MATLAB 5 file, is damaged or too large, and OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MatError(f"the file is larger than {MAX_BYTES} bytes")
    if data[:8] in (b"MATLAB 7", b"\x89HDF\r\n\x1a\n"):
        raise MatError("the file has version 7.3 (HDF5); save it again with -v7")
    order = {b"\x00\x01IM": "<", b"\x01\x00MI": ">"}.get(data[124:128])
    if order is None:
        raise MatError("the file does not begin as a MATLAB 5 file does")
    variables: dict[str, MatArray] = {}
    room = MAX_BYTES
    for part in _elements(memoryview(data)[128:], order):
        inner: Iterable[_Element] = (part,)
        if part.kind == _COMPRESSED:
            unpacked = _unpacked(part.data, room)
            room -= len(unpacked)
            inner = _elements(memoryview(unpacked), order)
        variables.update(
            _array(element.data, order) for element in inner if element.kind == _MATRIX
        )
    return variables


def _unpacked(data: memoryview, room: int) -> bytes:
    """At most `room` bytes, so that a small file cannot fill the memory."""
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(data, room + 1)
    except zlib.error as error:
        raise MatError(f"its compressed data are damaged: {error}") from error
    if len(unpacked) > room:
        raise MatError(f"the file unpacks to more than {MAX_BYTES} bytes")
    if not stream.eof:
        raise MatError("its compressed data are cut short")
    return unpacked


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    """What lies side by side."""
    start, number = 0, 0
    while start < len(data):
        if len(data) - start < 8 or number == MAX_ELEMENTS:
            raise MatError(
                "an element is cut short"
                if number < MAX_ELEMENTS
                else f"more than {MAX_ELEMENTS} elements side by side"
            )
        kind, size = struct.unpack_from(f"{order}II", data, start)
        if kind >> 16:  # a short one: four bytes of tag, up to four of content
            kind, size, begin, end = kind & 0xFFFF, kind >> 16, start + 4, start + 8
        else:
            begin = start + 8
            end = begin + (
                size if kind == _COMPRESSED else -(-size // 8) * 8
            )  # others are padded to whole words
        if begin + size > min(end, len(data)):
            raise MatError(f"an element of {size} bytes is cut short")
        yield _Element(kind, data[begin : begin + size], end)
        start, number = end, number + 1


def _array(data: memoryview, order: str) -> tuple[str, MatArray]:
    """The name and the array that an element of the kind matrix holds."""
    if not data:  # how an empty cell or field is written
        return "", MatArray(6, (0, 0), memoryview(struct.pack(f"{order}II", 9, 0)), order)
    head = list(islice(_elements(data, order), 3))
    if (
        [part.kind for part in head] != [6, 5, 1]
        or len(head[0].data) != 8
        or len(head[1].data) % 4
        or len(head[1].data) < 8
    ):
        raise MatError("an array without flags, shape or name")
    (flags,) = struct.unpack_from(f"{order}I", head[0].data)
    shape = struct.unpack(f"{order}{len(head[1].data) // 4}i", head[1].data)
    if min(shape) < 0 or flags & _COMPLEX:
        raise MatError(f"an array of shape {shape}, {'complex' if flags & _COMPLEX else 'real'}")
    return bytes(head[2].data).decode("latin-1"), MatArray(
        flags & 0xFF, shape, data[head[2].end :], order
    )
