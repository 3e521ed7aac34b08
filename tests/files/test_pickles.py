"""Pickles and torch files of any content.

Memory and time must be proportional to the file, and no code may run.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made.runs import ROOT
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files.pickles import encode_latin1, make_dict, read_pickle
from maskseg.files.torch_files import read_torch
from maskseg.interop.weight_files import read_weights

MAKERS = {
    "_codecs.encode": encode_latin1,
    "collections.OrderedDict": make_dict,
    "__builtin__.bytes": lambda _: b"",
}
CASES = ROOT.parent / "shared" / "cases"


def read(content: bytes) -> Any:
    return read_pickle(io.BytesIO(content), MAKERS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, False, 0, -1, 255, 65536, -(2**31), 2**80, 0.5, float("inf")],
        {"a": (), "b": (1,), "c": (1, 2), "d": (1, 2, 3), "e": (1, 2, 3, 4), 5: [], None: {}},
        ["text", "Übung", "x" * 70000, b"", b"bytes", b"\xff" * 300],
        OrderedDict(a=1, b=[2]),
        [[[]], {"x": {"y": {}}}],
    ],
)
def test_plain_values_are_those_of_the_standard_library(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert read(content) == value


def test_shared_and_recursive_values() -> None:
    shared = [1]
    recursive: list[Any] = [shared, shared]
    recursive.append(recursive)
    result = read(pickle.dumps(recursive))
    assert result[0] is result[1]
    assert result[2] is result


def failure(content: bytes) -> Exception | None:
    """Return the exception that reading raises, if any."""
    try:
        read(content)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("rest", [b".", b"\x01\x00\x00\x00.", b"1\n1\n."])
def test_every_opcode_is_read_or_refused(rest: bytes) -> None:
    for opcode in pickletools.opcodes:
        error = failure(b"\x80\x04(]" + opcode.code.encode("latin1") + rest)
        assert not isinstance(error, MemoryError | RecursionError), opcode.name


def nested_tuple(depth: int) -> bytes:
    """Return the opcodes of a tuple with 2 ** depth leaves, 2 bytes per level.

    Each level is a tuple that holds the previous tuple twice.
    """
    return b")" + b"2\x86" * depth


# Harmless for this interpreter, which does not trust a stated length.
HARMLESS = {
    "a memo index of half a billion": b"Nr\xff\xff\xff\x2f.",
    "a memo index of four billion": b"Nr\xff\xff\xff\xff.",
    "a frame of an exabyte": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
}
BOMBS = {
    "a text of four gigabytes": b"X\xff\xff\xff\xff.",
    "bytes of eight exabytes": b"\x8e" + struct.pack("<Q", 2**62) + b".",
    "a byte array of a terabyte": b"\x96" + struct.pack("<Q", 2**40) + b".",
    "a whole number of two gigabytes": b"\x8b\xff\xff\xff\x7f.",
    "a key of 2**60 leaves": b"\x80\x04}" + nested_tuple(60) + b"Ns.",
    "a set of a nested tuple": b"\x80\x04\x8f(" + nested_tuple(60) + b"\x90.",
    "a frozen set of a nested tuple": b"\x80\x04(" + nested_tuple(60) + b"\x91.",
}


def peak(content: bytes) -> int:
    """Return the peak memory of reading in bytes, also if the pickle is refused."""
    tracemalloc.start()
    try:
        with contextlib.suppress(pickle.UnpicklingError, ValueError):
            read(content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [*BOMBS.values(), *HARMLESS.values()], ids=[*BOMBS, *HARMLESS])
@pytest.mark.timeout(20)
def test_bombs_need_little_memory_and_time(content: bytes) -> None:
    assert peak(content) < 2**20
    if content in HARMLESS.values():
        assert read(content) is None
    else:
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            read(content)


def test_the_standard_library_needs_the_memory() -> None:
    """The bomb works: limited to 2 GB, Python's own interpreter fails with a ten-byte pickle."""
    code = (
        "import pickle, resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); "
        "pickle.loads(b'Nr\\xff\\xff\\xff\\x2f.')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "MemoryError" in run.stderr


@pytest.mark.timeout(60)
def test_repeated_construction_is_charged() -> None:
    """A string of a megabyte is encoded a hundred thousand times: 100 GB from 1.8 MB."""
    text = (
        b"X"
        + struct.pack("<I", 2**20)
        + b"a" * 2**20
        + b"q\x00"
        + b"0"
        + b"X\x06\x00\x00\x00latin1q\x010c_codecs\nencode\nq\x020"
    )
    with pytest.raises(pickle.UnpicklingError, match="far larger than the file"):
        read(b"\x80\x02]" + text + b"h\x02h\x00h\x01\x86Ra" * 100_000 + b".")
    pairs = b"](" + b"K\x01K\x02\x86" * 10_000 + b"eq\x000ccollections\nOrderedDict\nq\x010"
    with pytest.raises(pickle.UnpicklingError, match="far larger than the file"):
        read(b"\x80\x02]" + pairs + b"h\x01h\x00\x85Ra" * 100_000 + b".")


def test_the_budget_is_sufficient_for_a_whole_file() -> None:
    content = {f"k{i}": bytes([i]) * 1000 for i in range(100)}
    assert read(pickle.dumps(content, protocol=2)) == content


@pytest.mark.timeout(60)
def test_a_depth_of_a_million() -> None:
    result = read(b"]" * 1_000_000 + b"a" * 999_999 + b".")
    assert len(result) == 1


def save(content: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


STATE = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict()
CONTENTS: dict[str, Any] = {
    "a state dict": STATE,
    "values": {
        "a": [1, 2.5, None, True, "x", (1, 2)],
        "big": 2**80,
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(3.0),
    },
    "views": {
        "one": torch.arange(10)[2:5:2],
        "other": torch.ones(3, 4).T,
        "broadcast": torch.arange(4).expand(1, 4),
    },
    "types": {
        str(t): torch.zeros(2, dtype=t)
        for t in (
            torch.bfloat16,
            torch.half,
            torch.double,
            torch.uint8,
            torch.int8,
            torch.bool,
            torch.int16,
        )
    },
    "parameters": {"p": torch.nn.Parameter(torch.ones(2))},
    "an optimiser": torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()).state_dict(),
    "the state of a schedule": {"milestones": Counter([3, 5]), "size": torch.Size([1, 2])},
}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return bool(torch.equal(one, other)) and one.dtype == other.dtype
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    return bool(one == other)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_files_of_torch_are_read_as_torch_reads_them(
    tmp_path: Path, content: Any, zipped: bool
) -> None:
    path = save(content, tmp_path / "a.pt", zipped)
    assert equal(read_torch(path, "weights"), torch.load(path, weights_only=True))


def test_types_that_the_old_format_does_not_have(tmp_path: Path) -> None:
    content = {
        "u16": torch.tensor([0, 1, 2], dtype=torch.uint16),
        "f8": torch.ones(2).to(torch.float8_e4m3fn),
    }
    result = read_torch(save(content, tmp_path / "a.pt"), "weights", mmap=True)
    assert result["u16"].tolist() == [0, 1, 2]
    assert result["f8"].float().tolist() == [1, 1]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_torch(path, "a checkpoint")
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_an_expanded_tensor(tmp_path: Path, zipped: bool) -> None:
    path = save({"x": torch.zeros(1).expand(10**10)}, tmp_path / "a.pt", zipped)
    assert path.stat().st_size < 3000
    assert "more elements than its storage" in refused(path)


def rewrite(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """Rewrite an archive with changed contents of its entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    with zipfile.ZipFile(path) as archive:
        attributes = [entry.header_offset for entry in archive.infolist()]
    raw = bytearray(path.read_bytes())
    start = raw.find(b"PK\x01\x02")
    for _ in attributes:  # unlike torch, writestr marks entries as Unix files
        raw[start + 38 : start + 42] = bytes(4)
        start = raw.find(b"PK\x01\x02", start + 4)
    path.write_bytes(bytes(raw))
    return path


def pickle_replaced(path: Path, content: bytes) -> Path:
    return rewrite(path, lambda name, old: content if name.endswith("data.pkl") else old)


def test_an_archive_that_is_written_again_is_read(tmp_path: Path) -> None:
    path = rewrite(save(STATE, tmp_path / "a.pt"), lambda _, old: old)
    assert equal(read_torch(path, "weights"), STATE)


def test_a_compressed_archive(tmp_path: Path) -> None:
    path = rewrite(
        save({"x": torch.zeros(2_000_000)}, tmp_path / "a.pt"),
        lambda _, old: old,
        zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 20_000
    assert "its entries are compressed" in refused(path)


def test_a_storage_of_another_size_than_it_says(tmp_path: Path) -> None:
    path = rewrite(
        save({"x": torch.zeros(100)}, tmp_path / "a.pt"),
        lambda name, old: old[:40] if "/data/" in name else old,
    )
    assert "the size of storage '0' is not that of its data" in refused(path)


def test_entries_that_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N" * 100_000)
    raw = path.read_bytes()
    start = raw.find(b"PK\x01\x02")
    end = raw.find(b"PK\x05\x06")
    entry = raw[start:end]
    tail = bytearray(raw[end:])
    entries = b"".join(entry.replace(b"a/data.pkl", b"b/%08d" % i) for i in range(100))
    tail[8:12] = struct.pack("<HH", 100, 100)
    tail[12:16] = struct.pack("<I", len(entries))
    path.write_bytes(raw[:start] + entries + tail)
    assert "overlap" in refused(path) or "not a checkpoint" in refused(path)


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"N.")
    assert "two entries of one name" in refused(path)


def test_another_directory_of_entries(tmp_path: Path) -> None:
    """Guards against: torch and zipfile use different directories.

    zipfile takes the directory before the end record and shifts its offsets. torch takes the one
    at the stated offset.
    """
    path = save(STATE, tmp_path / "a.pt")
    good = path.read_bytes()
    evil = save({"evil": 1}, tmp_path / "b.pt").read_bytes()
    start = good.find(b"PK\x01\x02")
    end = good.rfind(b"PK\x06\x06")
    evil_directory = evil[evil.find(b"PK\x01\x02") : evil.rfind(b"PK\x06\x06")]
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, end - start, start, 0)
    path.write_bytes(good[:start] + evil_directory + good[start:end] + record)
    refused(path)
    path.write_bytes(good[:end] + good[end:-22] + good[-22:-2] + b"\x01\x00x")
    refused(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100) + good)
    refused(path)


def test_entries_that_differ_in_case(tmp_path: Path) -> None:
    # Guards against: torch ignores the case of an entry's name.
    path = save(STATE, tmp_path / "a.pt")
    with zipfile.ZipFile(path, "a") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        archive.writestr(name.upper().replace("A/", "a/"), b"N.")
    assert "refused" in refused(path)


def dag(depth: int) -> bytes:
    """Return the opcodes of nested lists whose text has 2 ** depth parts.

    Each level is a list that holds the previous list twice.
    """
    return b"]" + b"".join(
        b"q" + bytes([i]) + b"0]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(depth)
    )


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00a" + dag(60) + b"\x86R.",
        b"\x80\x02((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        + dag(60)
        + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsccollections\nCounter\nsb.",
        b"\x80\x02ccollections\nOrderedDict\n)RK\x01b.",
        b"\x80\x02}\x8a\x09" + (2**65).to_bytes(9, "little") + b"K\x01s.",
        b"\x80\x02}G" + struct.pack(">d", 0.5) + b"K\x01s.",
    ],
)
def test_messages_keys_and_states_of_any_size(tmp_path: Path, content: bytes) -> None:
    # Guards against: the text of nested lists in a message; keys with equal hashes; attributes that
    # replace methods.
    assert "refused" in refused(pickle_replaced(save(STATE, tmp_path / "a.pt"), content))


@pytest.mark.timeout(30)
def test_many_tensors_of_one_storage(tmp_path: Path) -> None:
    """Guards against: each tensor is converted to another dtype, and so copied."""
    storage = torch.zeros(500_000, dtype=torch.half)
    assert "far larger than the file" in refused(
        save({f"w{i}": storage[0:] for i in range(200)}, tmp_path / "a.pt")
    )
    assert (
        len(read_torch(save({"tied": storage, "to": storage[:]}, tmp_path / "b.pt"), "weights"))
        == 2
    )


def test_the_old_format_in_protocol_3(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=False, pickle_protocol=3)
    assert equal(read_torch(path, "weights"), STATE)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_inside_an_archive(tmp_path: Path, content: bytes) -> None:
    # Guards against: torch's weights_only needs exponential time to hash a nested tuple.
    assert "refused" in refused(pickle_replaced(save(STATE, tmp_path / "a.pt"), content))


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
        b"cbuiltins\nset\n((K\x01ttR.",
        b"ctorch._utils\n_rebuild_sparse_tensor\n.",
        b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        b"ctorch\nload\n(X\x04\x00\x00\x00truetR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89NtR.",
        b"ctorch\nfloat32\n)R.",
        b"ctorch\nnot_a_name\n.",
        b"X\x01\x00\x00\x00aQ.",
        b"",
    ],
)
def test_pickles_with_other_functions(tmp_path: Path, content: bytes) -> None:
    assert "refused" in refused(pickle_replaced(save(STATE, tmp_path / "a.pt"), content))


def test_files_that_torch_has_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (
        b"",
        b"hello",
        b"PK\x03\x04",
        b"PK\x03\x04" + bytes(1000),
        pickle.dumps({"model": {}}),
    ):
        path.write_bytes(content)
        assert "not a checkpoint, or truncated" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "not a checkpoint" in refused(path) or "damaged" in refused(path)
    whole = save(STATE, path, zipped=False).read_bytes()
    for length in range(20, len(whole), 97):
        path.write_bytes(whole[:length])
        assert "refused" in refused(path)


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared/cases is absent")
@pytest.mark.parametrize("case", ["pickle_memory_bomb/bomb.pkl", "zip_multi_disk/multi.pth"])
def test_malicious_files(case: str) -> None:
    with pytest.raises(UserError) as raised:
        read_weights(CASES / case)
    assert "\n" not in str(raised.value)
