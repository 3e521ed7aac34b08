"""Files of `torch.save`, checked before and read by `torch.load(weights_only=True)`, never otherwise.

`weights_only` keeps a file from running code. It does not keep it from taking all memory or time, and
torch compares no checksums. So the archive is checked first, and the pickle inside is interpreted by
`maskseg.files.pickles`, which builds no tensor.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskseg.errors import UserError
from maskseg.files.pickles import Budget, Maker, Name, encode_latin1, make_dict, read_pickle, shown

_ZIP = b"PK\x03\x04"
# What torch wrote before 1.6 begins with the pickle of this number, in protocol 2 or 3.
_LEGACY = tuple(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=protocol) for protocol in (2, 3))
_START = max(map(len, _LEGACY))
_DATA = re.compile(r"[^/]+/data\.pkl")

# Bytes of an element, by the last part of a storage's or a type's name.
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
_MAX_DIMENSIONS, _MAX_SIZE = 64, 2**62

# The end of a zip archive (APPNOTE 4.3.14 to 4.3.16): its end record, the locator of the 64-bit one, and that one.
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


def read_torch(path: Path, kind: str, advice: str = "", mmap: bool = False) -> Any:
    """What `torch.save` wrote, on the CPU: tensors, plain values and containers.

    kind: what the file should be, advice: what to do about a damaged one, both for messages. mmap:
    storages stay in the file until they are used. Raises UserError for a file that is missing, no
    file of torch, damaged, or that holds anything else.
    """
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not start.startswith((_ZIP, *_LEGACY)):
        raise UserError(f"{path}: not {kind}, or cut short")
    stream = _checked_archive(path, kind, advice) if start.startswith(_ZIP) else None
    try:
        if stream is not None:
            data, sizes = stream
            read_pickle(io.BytesIO(data), _MAKERS, _ArchiveStorages(sizes), path.stat().st_size)
        else:
            _check_legacy(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises almost anything on damaged files
        reason = (str(error).splitlines() or [""])[0][:300] or type(error).__name__
        raise UserError(
            f"{path}: refused, not {kind}: damaged, or more than tensors and plain values ({reason})"
        ) from error


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as those of `torch.save` do."""
    with path.open("rb") as file:
        return file.read(_START).startswith((_ZIP, *_LEGACY))


def _checked_archive(path: Path, kind: str, advice: str) -> tuple[bytes, dict[str, int]]:
    """The pickle of an archive whose checksums are right, and the bytes of each storage by its key."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            fault = _archive_fault(entries, path.stat().st_size) or _directory_fault(
                path, archive.start_dir
            )
            # torch reads an entry that is marked as a folder as whatever lies in memory
            damaged = (
                None
                if fault
                else archive.testzip()
                or next((e.filename for e in entries if e.external_attr), None)
            )
            pickles = [e.filename for e in entries if _DATA.fullmatch(e.filename)]
            data = (
                archive.read(pickles[0]) if len(pickles) == 1 and not fault and not damaged else b""
            )
    except Exception as error:  # zipfile raises almost anything on damaged data
        raise UserError(f"{path}: not {kind}, or cut short ({error})") from error
    if fault:
        raise UserError(f"{path}: refused, {fault}, which torch does not write")
    if damaged:
        raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong{advice}")
    if len(pickles) != 1:
        raise UserError(f"{path}: not {kind}: it has no data.pkl, or several")
    folder = pickles[0].removesuffix("data.pkl")
    return data, {e.filename.removeprefix(f"{folder}data/"): e.file_size for e in entries}


def _archive_fault(entries: list[zipfile.ZipInfo], size: int) -> str:
    """Why an archive may be larger than it looks, or be read in two ways. Empty for one of torch's."""
    if any(
        e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries
    ):
        return "its entries are compressed"
    if sum(e.file_size for e in entries) > size:
        return "its entries overlap"
    if len({e.filename.lower() for e in entries}) < len(
        entries
    ):  # torch finds an entry whatever the case
        return "it has two entries of one name"
    if len({e.filename.partition("/")[0] for e in entries}) > 1:
        return "its entries are not in one folder"
    return ""


def _directory_fault(path: Path, start: int) -> str:
    """Whether another program finds another directory of entries than the one that begins at `start`. Empty where all find it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - _END.size)
        signature, *_, entries, _, length, offset, comment = _END.unpack(file.read(_END.size))
        end = size - _END.size
        file.seek(max(end - _LOCATOR.size, 0))
        locator, _, place, disks = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if locator == b"PK\x06\x07":  # the same in 64 bits, which torch writes always
            end -= _LOCATOR.size + _END64.size
            file.seek(end)
            signature64, _, *_, entries64, _, length64, offset64 = _END64.unpack(
                file.read(_END64.size)
            )
            stated = min(entries64, 2**16 - 1), min(length64, 2**32 - 1), min(offset64, 2**32 - 1)
            if (
                place != end
                or signature64 != b"PK\x06\x06"
                or disks != 1
                or stated != (entries, length, offset)
            ):
                return "it has two directories"
            length, offset = length64, offset64
    if signature != b"PK\x05\x06" or comment or offset != start or offset + length != end:
        return "its directory is not where it says"
    return ""


@dataclass(frozen=True)
class _Storage:
    """num_bytes of a storage; itemsize None where the tensor names its type."""

    num_bytes: int
    itemsize: int | None


class _ArchiveStorages:
    """Persistent ids of an archive -> storages. sizes: key -> bytes in the archive."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes

    def __call__(self, identity: Any) -> _Storage:
        _, type_name, key, _, count = identity
        storage = _storage(type_name, count)
        if not isinstance(key, str) or self.sizes.get(key) != storage.num_bytes:
            raise pickle.UnpicklingError(
                f"the size of storage {shown(key)} is not that of its data"
            )
        return storage


class _LegacyStorages:
    """The same for torch's old format, whose storages lie behind the pickles. size: of the file."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.num_bytes: dict[str, int] = {}  # of each key
        self.total = 0

    def __call__(self, identity: Any) -> _Storage:
        _, type_name, key, _, count, view = identity
        storage = _storage(type_name, count)
        if (
            not isinstance(key, str)
            or self.num_bytes.get(key, storage.num_bytes) != storage.num_bytes
        ):
            raise pickle.UnpicklingError("a storage that is stated in two ways")
        if key not in self.num_bytes:
            self.num_bytes[key] = storage.num_bytes
            self.total += storage.num_bytes
        if self.total > self.size:
            raise pickle.UnpicklingError("its storages are larger than the file")
        if view is None:
            return storage
        _, offset, view_count = view
        part = _storage(type_name, view_count)
        if type(offset) is not int or not 0 <= offset <= count - view_count:
            raise pickle.UnpicklingError("a part of a storage that is not in it")
        return part


def _storage(type_name: Any, count: Any) -> _Storage:
    if not isinstance(type_name, Name) or type(count) is not int or count < 0:
        raise pickle.UnpicklingError("a storage without a type or a size")
    if count > _MAX_SIZE:
        raise pickle.UnpicklingError("a storage that is larger than any file")
    short = type_name.name.rpartition(".")[2]
    itemsize = _STORAGES[short]
    return _Storage(count * itemsize, None if short == "UntypedStorage" else itemsize)


def _check_legacy(path: Path) -> None:
    """Raises an exception for a file of the old format whose pickles are refused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for persistent_load in (
            None,
            None,
            None,
            _LegacyStorages(size),
            None,
        ):  # magic number, protocol, machine, object, keys
            read_pickle(file, _MAKERS, persistent_load, size)


@dataclass(frozen=True)
class _Tensor:
    """What stands for a tensor."""


def _make_tensor(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *_more: Any
) -> _Tensor:
    """As `torch._utils._rebuild_tensor_v2`. Raises UnpicklingError for a tensor that has more elements than its storage."""
    if not isinstance(storage, _Storage) or storage.itemsize is None:
        raise pickle.UnpicklingError("a tensor without a typed storage")
    return _checked_tensor(budget, storage, storage.itemsize, (offset, size, stride))


def _make_tensor_of_dtype(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *more: Any
) -> _Tensor:
    """As `torch._utils._rebuild_tensor_v3`."""
    _grad, _hooks, dtype = more[:3]
    if not isinstance(storage, _Storage) or not isinstance(dtype, Name):
        raise pickle.UnpicklingError("a tensor without a storage or a type")
    return _checked_tensor(
        budget, storage, _SIZES[dtype.name.removeprefix("torch.")], (offset, size, stride)
    )


def _checked_tensor(
    budget: Budget, storage: _Storage, itemsize: int, place: tuple[Any, Any, Any]
) -> _Tensor:
    offset, size, stride = place
    available = storage.num_bytes // itemsize
    if (
        not isinstance(size, tuple)
        or not isinstance(stride, tuple)
        or max(len(size), len(stride)) > _MAX_DIMENSIONS
    ):
        raise pickle.UnpicklingError("a tensor without a shape")
    if any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor whose shape is no whole numbers")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > available or (count and last >= available):
        raise pickle.UnpicklingError("a tensor has more elements than its storage")
    budget.spend(count * itemsize)  # of several tensors of one storage, each may be copied
    return _Tensor()


def _make_parameter(_: Budget, data: Any, *_more: Any) -> Any:
    return data


def _make_size(budget: Budget, sizes: Any = ()) -> Any:
    if not isinstance(sizes, tuple | list):
        raise pickle.UnpicklingError("a shape that is no tuple")
    budget.spend(len(sizes))
    return tuple(sizes)


def _make_device(_: Budget, *__: Any) -> None:
    """A device is no plain value, but other programs' files have some."""


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
