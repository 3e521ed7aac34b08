"""Reader for MATLAB 5 files (.mat) with numbers, cells and structures, as datasets use them.

`scipy.io.loadmat` terminates the process (segmentation fault) on some damaged files. This reader
compares every size with the data that hold it before using it, and converts only the arrays that
are requested. Format: MathWorks, "MAT-File Format", version 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**28  # of a file, and of its decompressed content
MAX_ELEMENTS = 10_000  # of an array; more cells than any dataset has

# Types of elements ("miMATRIX" and so on).
_MATRIX = 14
_COMPRESSED = 15
_HEADER_TYPES = [6, 5, 1]  # flags, shape and name, with which every array begins
_DOUBLE = 9
_NUMBER_TYPES = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    _DOUBLE: "f8",
    12: "i8",
    13: "u8",
}

# Classes of arrays ("mxCELL_CLASS" and so on).
_CELL = 1
_STRUCT = 2
_DOUBLE_CLASS = 6
_NUMBER_CLASSES = {
    _DOUBLE_CLASS: "f8",
    7: "f4",
    8: "i1",
    9: "u1",
    10: "i2",
    11: "u2",
    12: "i4",
    13: "u4",
    14: "i8",
    15: "u8",
}
_COMPLEX = 0x0800  # flag of an array


class MatError(ValueError):
    """An invalid file; the message does not contain its name."""


class _Element(NamedTuple):
    kind: int
    data: memoryview
    end: int  # start of the next element


@dataclass(frozen=True)
class MatArray:
    """One array of a file with unread content. The methods raise MatError.

    kind, shape: the class and the shape that the file states; order: byte order, "<" or ">".
    """

    kind: int
    shape: tuple[int, ...]
    content: memoryview
    order: str

    def numbers(self) -> NDArray[np.number]:
        """Return the numbers in the array's shape, with the dtype of its class."""
        parts = list(_elements(self.content, self.order))
        is_real = len(parts) == 1 and parts[0].kind in _NUMBER_TYPES
        if self.kind not in _NUMBER_CLASSES or not is_real:
            raise MatError(f"an array of class {self.kind} where real numbers were expected")
        dtype = np.dtype(self.order + _NUMBER_TYPES[parts[0].kind])
        try:
            values = np.frombuffer(parts[0].data, dtype=dtype).reshape(self.shape, order="F")
        except ValueError as error:
            raise MatError(
                f"{len(parts[0].data)} bytes of numbers do not form an array of "
                f"{len(self.shape)} dimensions, {self.shape[:8]}"
            ) from error
        # A damaged file may have numbers that its class cannot represent.
        with np.errstate(invalid="ignore"):
            return values.astype(_NUMBER_CLASSES[self.kind])

    def cells(self) -> list[MatArray]:
        """Return the arrays in the cells, column by column."""
        if self.kind != _CELL:
            raise MatError(f"an array of class {self.kind} where cells were expected")
        return self._children(list(_elements(self.content, self.order)), math.prod(self.shape))

    def field(self, name: str) -> MatArray:
        """Return a field of a structure with one element."""
        if self.kind != _STRUCT or math.prod(self.shape) != 1:
            raise MatError(
                f"an array of class {self.kind} and shape {self.shape} "
                "where one structure was expected"
            )
        parts = list(_elements(self.content, self.order))
        names = self._field_names(parts)
        if name not in names:
            raise MatError(
                f"a structure without the field {name!r} (it has {', '.join(names)})"[:200]
            )
        return self._children(parts[2:], len(names))[names.index(name)]

    def _field_names(self, parts: list[_Element]) -> list[str]:
        """Return the field names, which have a fixed length and are padded with zeros."""
        if len(parts) < 2 or len(parts[0].data) != 4:
            raise MatError("a structure without names of its fields")
        (length,) = struct.unpack(f"{self.order}i", parts[0].data)
        text = bytes(parts[1].data)
        if length < 1 or len(text) % length:
            raise MatError(f"{len(text)} bytes of names with {length} bytes each")
        names = []
        for start in range(0, len(text), length):
            name = text[start : start + length].partition(b"\0")[0]
            names.append(name.decode("latin-1"))
        return names

    def _children(self, parts: list[_Element], count: int) -> list[MatArray]:
        if len(parts) != count or any(part.kind != _MATRIX for part in parts):
            raise MatError(f"{len(parts)} elements where {count} arrays were expected")
        return [_parse_array(part.data, self.order)[1] for part in parts]


def read_mat(path: Path) -> dict[str, MatArray]:
    """Return the variables of a file by name.

    Raises MatError for a file that is not a MATLAB 5 file, damaged or too large, and OSError.
    """
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
    bytes_left = MAX_BYTES
    for part in _elements(memoryview(data)[128:], order):
        elements: Iterable[_Element] = (part,)
        if part.kind == _COMPRESSED:
            content = _decompress(part.data, bytes_left)
            bytes_left -= len(content)
            elements = _elements(memoryview(content), order)
        for element in elements:
            if element.kind == _MATRIX:
                name, array = _parse_array(element.data, order)
                variables[name] = array
    return variables


def _decompress(data: memoryview, max_bytes: int) -> bytes:
    """Decompress at most `max_bytes`, so that a small file cannot fill the memory."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise MatError(f"its compressed data are damaged: {error}") from error
    if len(content) > max_bytes:
        raise MatError(f"the file unpacks to more than {MAX_BYTES} bytes")
    if not stream.eof:
        raise MatError("its compressed data are truncated")
    return content


def _elements(data: memoryview, order: str) -> Iterator[_Element]:
    """Yield consecutive elements."""
    start = 0
    count = 0
    while start < len(data):
        if count == MAX_ELEMENTS:
            raise MatError(f"more than {MAX_ELEMENTS} elements in one array")
        if len(data) - start < 8:
            raise MatError("an element is truncated")
        element = _parse_element(data, start, order)
        yield element
        start = element.end
        count += 1


def _parse_element(data: memoryview, start: int, order: str) -> _Element:
    kind, size = struct.unpack_from(f"{order}II", data, start)
    if kind >> 16:  # small element: 4 bytes of tag with the size in its upper half, 4 of content
        size = kind >> 16
        kind = kind & 0xFFFF
        begin = start + 4
        end = start + 8
    else:
        begin = start + 8
        # Only compressed elements are not padded to 8 bytes.
        end = begin + (size if kind == _COMPRESSED else -(-size // 8) * 8)
    if begin + size > min(end, len(data)):
        raise MatError(f"an element of {size} bytes is truncated")
    return _Element(kind, data[begin : begin + size], end)


def _parse_array(data: memoryview, order: str) -> tuple[str, MatArray]:
    """Return the name and the array in an element of type matrix."""
    if not data:  # an empty cell or field; the array gets an element without numbers
        no_numbers = memoryview(struct.pack(f"{order}II", _DOUBLE, 0))
        return "", MatArray(_DOUBLE_CLASS, (0, 0), no_numbers, order)
    header = list(islice(_elements(data, order), 3))
    is_valid = (
        [part.kind for part in header] == _HEADER_TYPES
        and len(header[0].data) == 8
        and len(header[1].data) % 4 == 0
        and len(header[1].data) >= 8
    )
    if not is_valid:
        raise MatError("an array without flags, shape or name")
    flags_element, shape_element, name_element = header
    (flags,) = struct.unpack_from(f"{order}I", flags_element.data)
    num_dimensions = len(shape_element.data) // 4
    shape = struct.unpack(f"{order}{num_dimensions}i", shape_element.data)
    if min(shape) < 0 or flags & _COMPLEX:
        raise MatError(f"an array of shape {shape}, {'complex' if flags & _COMPLEX else 'real'}")
    array = MatArray(flags & 0xFF, shape, data[name_element.end :], order)
    return bytes(name_element.data).decode("latin-1"), array
