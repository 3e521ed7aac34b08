"""Files of `torch.save`: verified first, and then read only by `torch.load(weights_only=True)`.

`weights_only` prevents a file from running code. It does not prevent it from taking all memory or
time, and torch does not compare checksums. The archive is therefore checked first, and the pickle
inside is interpreted by `maskseg.files.pickles`, which builds no tensor.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from maskseg.errors import UserError, describe_error
from maskseg.files.pickles import (
    Budget,
    Maker,
    Name,
    SkippedNames,
    describe_value,
    encode_latin1,
    make_dict,
    read_pickle,
)

_ZIP = b"PK\x03\x04"
# Before version 1.6, torch wrote a file that begins with the pickle of this number, in protocol 2
# or 3.
_LEGACY = tuple(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=protocol) for protocol in (2, 3))
_START = max(map(len, _LEGACY))
_DATA = re.compile(r"[^/]+/data\.pkl")

# Bytes per element, by the last part of the name of a dtype or of a storage.
_SIZES = {
    str(dtype).removeprefix("torch."): dtype.itemsize
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_STORAGES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "UntypedStorage": 1,
}
_MAX_DIMENSIONS = 64
_MAX_SIZE = 2**62

# The end of a zip archive (APPNOTE 4.3.14 to 4.3.16): the end record, and for 64-bit archives the
# locator and the end record in 64 bits.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


class SkippedObject:
    """Takes the place of an object that `read_torch` skips."""

    def __new__(cls, *_: object) -> SkippedObject:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Ignore the state."""


def read_torch(
    path: Path, kind: str, advice: str = "", mmap: bool = False, skip_objects: bool = False
) -> Any:
    """Read a file of `torch.save` into CPU memory: tensors, plain values and containers.

    Args:
        path: the file.
        kind: what the file should be, for the error message.
        advice: what to do about a damaged file, for the error message.
        mmap: map the storages into memory instead of reading them.
        skip_objects: put a `SkippedObject` in the place of an object of another class, of which
            nothing is read, instead of refusing the file.

    Raises UserError if the file is missing, not written by torch, damaged, or if it contains
    anything else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not start.startswith((_ZIP, *_LEGACY)):
        raise UserError(f"{path}: not {kind}, or truncated")
    contents = _read_archive(path, kind, advice) if start.startswith(_ZIP) else None
    skipped = SkippedNames() if skip_objects else None
    try:
        if contents is not None:
            data, sizes = contents
            storages = _ArchiveStorages(sizes)
            read_pickle(io.BytesIO(data), _MAKERS, storages, path.stat().st_size, skipped)
        else:
            _check_legacy(path, skipped)
        with torch.serialization.safe_globals(_stand_ins(skipped)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises almost any exception for a damaged file
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise UserError(
            f"{path}: refused, not {kind}: damaged, or contains more than tensors and plain values "
            f"({reason})"
        ) from error


def _stand_ins(skipped: SkippedNames | None) -> list[Callable[..., Any] | tuple[Any, str]]:
    """Return the classes that `torch.load` uses under the skipped names."""
    if skipped is None:
        return []
    # torch sets items of its own kinds of dictionaries only.
    return [
        (OrderedDict if name in skipped.with_items else SkippedObject, name)
        for name in sorted(skipped.every)
    ]


def is_torch_file(path: Path) -> bool:
    """Whether the first bytes of a file are those of `torch.save`."""
    with path.open("rb") as file:
        return file.read(_START).startswith((_ZIP, *_LEGACY))


def _read_archive(path: Path, kind: str, advice: str) -> tuple[bytes, dict[str, int]]:
    """Verify an archive. Returns its pickle, and the number of bytes of each storage by its key."""
    data = b""
    damaged = None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [e.filename for e in entries if _DATA.fullmatch(e.filename)]
            fault = _entries_fault(entries, path.stat().st_size)
            fault = fault or _directory_fault(path, archive.start_dir)
            if not fault:
                damaged = _first_damaged(archive)
            if not fault and not damaged and len(pickles) == 1:
                data = archive.read(pickles[0])
    except Exception as error:  # zipfile raises almost any exception for damaged data
        raise UserError(f"{path}: not {kind}, or truncated ({describe_error(error)})") from error
    if fault:
        raise UserError(f"{path}: refused, {fault}, which torch does not write")
    if damaged:
        raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong{advice}")
    if len(pickles) != 1:
        raise UserError(f"{path}: not {kind}: it does not contain exactly one data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    return data, {e.filename.removeprefix(f"{folder}data/"): e.file_size for e in entries}


def _first_damaged(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the first damaged entry, or None.

    An entry that is marked as a folder counts as damaged: torch returns uninitialized memory for
    it.
    """
    damaged = archive.testzip()
    if damaged:
        return damaged
    return next((e.filename for e in archive.infolist() if e.external_attr), None)


def _entries_fault(entries: list[zipfile.ZipInfo], size: int) -> str:
    """Explain why an archive can expand or be ambiguous; empty for an archive of torch."""
    if any(
        e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries
    ):
        return "its entries are compressed"
    if sum(e.file_size for e in entries) > size:
        return "its entries overlap"
    # torch ignores the case of an entry's name.
    if len({e.filename.lower() for e in entries}) < len(entries):
        return "it has two entries of one name"
    if len({e.filename.partition("/")[0] for e in entries}) > 1:
        return "its entries are not in one folder"
    return ""


def _directory_fault(path: Path, start: int) -> str:
    """Explain how another program could find a different directory of entries; empty if none can.

    start: offset of the directory that zipfile has found.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - _END.size)
        signature, *_, entries, _, length, offset, comment = _END.unpack(file.read(_END.size))
        end = size - _END.size
        file.seek(max(end - _LOCATOR.size, 0))
        locator, _, place, disks = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if locator == b"PK\x06\x07":  # a second end record in 64 bits, which torch always writes
            end -= _LOCATOR.size + _END64.size
            file.seek(end)
            signature64, _, *_, entries64, _, length64, offset64 = _END64.unpack(
                file.read(_END64.size)
            )
            # Values that do not fit into the 32-bit record are stored there as their maximum.
            expected = min(entries64, 2**16 - 1), min(length64, 2**32 - 1), min(offset64, 2**32 - 1)
            if (
                place != end
                or signature64 != b"PK\x06\x06"
                or disks != 1
                or expected != (entries, length, offset)
            ):
                return "it has two directories"
            length = length64
            offset = offset64
    if signature != b"PK\x05\x06" or comment or offset != start or offset + length != end:
        return "its directory is not at the stated offset"
    return ""


@dataclass(frozen=True)
class _Storage:
    """Number of elements of a storage, and bytes per element.

    is_typed: whether the elements have a dtype. Otherwise they are bytes, and each tensor states
    its dtype.
    """

    count: int
    itemsize: int
    is_typed: bool

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.count * self.itemsize


class _ArchiveStorages:
    """Maps persistent ids of an archive to storages. sizes: bytes in the archive by key."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes

    def __call__(self, identity: object) -> _Storage:
        _, type_name, key, _, count = _to_tuple(identity, 5)
        storage = _make_storage(type_name, count)
        if not isinstance(key, str) or self.sizes.get(key) != storage.num_bytes:
            raise pickle.UnpicklingError(
                f"the size of storage {describe_value(key)} is not that of its data"
            )
        return storage


class _LegacyStorages:
    """Maps persistent ids of the legacy format, where the storages follow the pickles.

    size: bytes of the file.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_bytes: dict[str, int] = {}  # by key
        self.total = 0

    def __call__(self, identity: object) -> _Storage:
        _, type_name, key, _, count, view = _to_tuple(identity, 6)
        storage = _make_storage(type_name, count)
        if (
            not isinstance(key, str)
            or self.num_bytes.get(key, storage.num_bytes) != storage.num_bytes
        ):
            raise pickle.UnpicklingError("a storage is declared with two sizes")
        if key not in self.num_bytes:
            self.num_bytes[key] = storage.num_bytes
            self.total += storage.num_bytes
        if self.total > self.size:
            raise pickle.UnpicklingError("its storages are larger than the file")
        if view is None:
            return storage
        _, offset, view_count = _to_tuple(view, 3)
        part = _make_storage(type_name, view_count)
        if not _is_int(offset) or not 0 <= offset <= storage.count - part.count:
            raise pickle.UnpicklingError("a view exceeds its storage")
        return part


def _is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; a bool is none."""
    return type(value) is int


def _to_tuple(value: object, length: int) -> tuple[object, ...]:
    """Return the value, which must be a tuple of `length` values. Raises UnpicklingError."""
    if not isinstance(value, tuple) or len(value) != length:
        raise pickle.UnpicklingError("a storage is not described by the usual values")
    return value


def _make_storage(type_name: object, count: object) -> _Storage:
    if not isinstance(type_name, Name) or not _is_int(count) or count < 0:
        raise pickle.UnpicklingError("a storage has no type or no size")
    if count > _MAX_SIZE:
        raise pickle.UnpicklingError("a storage is larger than any file")
    short_name = type_name.name.rpartition(".")[2]
    return _Storage(count, _STORAGES[short_name], short_name != "UntypedStorage")


def _check_legacy(path: Path, skipped: SkippedNames | None) -> None:
    """Raise an exception for a legacy file with a pickle that is refused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        # The pickles are: magic number, protocol, machine, object, storage keys.
        for persistent_load in (None, None, None, _LegacyStorages(size), None):
            read_pickle(file, _MAKERS, persistent_load, size, skipped)


@dataclass(frozen=True)
class _Tensor:
    """Placeholder for a tensor."""


def _make_tensor(
    budget: Budget, storage: object, offset: object, size: object, stride: object, *_more: object
) -> _Tensor:
    """Check the arguments of `torch._utils._rebuild_tensor_v2`.

    Raises UnpicklingError for a tensor with more elements than its storage.
    """
    if not isinstance(storage, _Storage) or not storage.is_typed:
        raise pickle.UnpicklingError("a tensor has no typed storage")
    layout = _parse_layout(offset, size, stride)
    return _check_tensor(budget, storage, storage.itemsize, layout)


def _make_tensor_of_dtype(
    budget: Budget, storage: object, offset: object, size: object, stride: object, *more: object
) -> _Tensor:
    """Check the arguments of `torch._utils._rebuild_tensor_v3`."""
    _grad, _hooks, dtype = more[:3]
    if not isinstance(storage, _Storage) or not isinstance(dtype, Name):
        raise pickle.UnpicklingError("a tensor has no storage or no dtype")
    itemsize = _SIZES[dtype.name.removeprefix("torch.")]
    return _check_tensor(budget, storage, itemsize, _parse_layout(offset, size, stride))


@dataclass(frozen=True)
class _Layout:
    """Offset, size and stride of a tensor in its storage, in elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _parse_layout(offset: object, size: object, stride: object) -> _Layout:
    """Return the layout that a pickle states. Raises UnpicklingError if it is invalid."""
    if (
        not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or max(len(size), len(stride)) > _MAX_DIMENSIONS
    ):
        raise pickle.UnpicklingError("a tensor has no valid shape")
    sizes = _to_sizes(size)
    strides = _to_sizes(stride)
    (start,) = _to_sizes((offset,))
    return _Layout(start, sizes, strides)


def _to_sizes(values: tuple[object, ...]) -> tuple[int, ...]:
    """Return the values as integers. Raises UnpicklingError for other or too large values."""
    sizes = []
    for value in values:
        if not _is_int(value) or not 0 <= value < _MAX_SIZE:
            raise pickle.UnpicklingError("the shape of a tensor is not made of integers")
        sizes.append(value)
    return tuple(sizes)


def _check_tensor(budget: Budget, storage: _Storage, itemsize: int, layout: _Layout) -> _Tensor:
    """Check a tensor against its storage."""
    available = storage.num_bytes // itemsize
    count = math.prod(layout.size)
    steps = zip(layout.size, layout.stride, strict=True)
    last = layout.offset + sum((n - 1) * step for n, step in steps)
    if count > available or (count and last >= available):
        raise pickle.UnpicklingError("a tensor has more elements than its storage")
    budget.spend(count * itemsize)  # each of several tensors with one storage may be copied later
    return _Tensor()


def _make_parameter(_: Budget, data: object, *_more: object) -> object:
    return data


def _make_size(budget: Budget, sizes: object = ()) -> tuple[object, ...]:
    if not isinstance(sizes, tuple | list):
        raise pickle.UnpicklingError("a torch.Size is not a tuple")
    budget.spend(len(sizes))
    return tuple(sizes)


def _make_device(_: Budget, *__: object) -> None:
    """Accept a device, which is not a plain value but occurs in files of other programs."""


_MAKERS: dict[str, Maker | None] = {
    "collections.OrderedDict": make_dict,
    "collections.Counter": make_dict,
    "_codecs.encode": encode_latin1,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_tensor_v3": _make_tensor_of_dtype,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch.Size": _make_size,
    "torch.device": _make_device,
    "torch.storage.UntypedStorage": None,
    **{f"torch.{name}": None for name in (*_STORAGES, *_SIZES)},
    **{f"torch.cuda.{name}": None for name in _STORAGES},
}
