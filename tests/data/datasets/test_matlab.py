"""The MATLAB 5 reader: equality with scipy's reader, and handmade inconsistent arrays."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from maskseg.data.datasets.matlab import MatArray, MatError, read_mat

scipy_io = pytest.importorskip("scipy.io")


@pytest.mark.parametrize("compressed", [True, False])
def test_arrays_as_scipy_reads_them(tmp_path: Path, compressed: bool) -> None:
    draws = np.random.default_rng(0)
    kinds = (
        np.int8,
        np.uint8,
        np.int16,
        np.uint16,
        np.int32,
        np.uint32,
        np.int64,
        np.uint64,
        np.float32,
        np.float64,
    )
    shapes = ((3, 4), (1, 1), (2, 3, 4), (0, 2))
    values = [draws.integers(0, 100, shape).astype(kind) for kind in kinds for shape in shapes]
    written = {f"v{i}": one for i, one in enumerate(values)}
    scipy_io.savemat(tmp_path / "a.mat", written, do_compression=compressed)
    read, found = scipy_io.loadmat(tmp_path / "a.mat"), read_mat(tmp_path / "a.mat")
    assert set(found) == set(written)
    for name in written:
        numbers = found[name].numbers()
        assert numbers.dtype == read[name].dtype
        np.testing.assert_array_equal(numbers, read[name])


def element(kind: int, data: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


def array(kind: int, shape: tuple[int, ...], content: bytes, order: str = "<") -> bytes:
    """The bytes of an array x of a class, with any content."""
    head = element(6, struct.pack(f"{order}II", kind, 0), order) + element(
        5, struct.pack(f"{order}{len(shape)}i", *shape), order
    )
    return element(14, head + struct.pack(f"{order}I", 1 << 16 | 1) + b"x   " + content, order)


def read_x(path: Path, content: bytes, order: str = "<") -> MatArray:
    path.write_bytes(
        b"MATLAB 5.0".ljust(124) + (b"\x00\x01IM" if order == "<" else b"\x01\x00MI") + content
    )
    return read_mat(path)["x"]


@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_in_either_order(tmp_path: Path, order: str) -> None:
    numbers = np.array([[1, 300], [2, 70000]], dtype=f"{order}i4")
    found = read_x(
        tmp_path / "a.mat", array(12, (2, 2), element(5, numbers.tobytes("F"), order), order), order
    ).numbers()
    assert found.tolist() == scipy_io.loadmat(tmp_path / "a.mat")["x"].tolist() == numbers.tolist()


def test_inconsistent_arrays(tmp_path: Path) -> None:
    one = element(9, struct.pack("<d", 1.0))
    cell, names = (
        array(6, (1, 1), one),
        element(5, struct.pack("<i", 8)) + element(1, b"a".ljust(8, b"\0") + b"b".ljust(8, b"\0")),
    )
    assert read_x(tmp_path / "a.mat", array(1, (1, 2), cell * 2)).cells()[1].numbers().tolist() == [
        [1.0]
    ]
    assert read_x(tmp_path / "a.mat", array(2, (1, 1), names + cell * 2)).field(
        "b"
    ).numbers().tolist() == [[1.0]]
    with pytest.raises(MatError, match="1 elements where 2 arrays were expected"):
        read_x(tmp_path / "a.mat", array(1, (1, 2), cell)).cells()
    with pytest.raises(MatError, match="1 elements where 1 arrays were expected"):
        read_x(tmp_path / "a.mat", array(1, (1, 1), one)).cells()
    with pytest.raises(MatError, match="1 elements where 2 arrays were expected"):
        read_x(tmp_path / "a.mat", array(2, (1, 1), names + cell)).field("b")
    with pytest.raises(MatError, match="16 bytes of names with 7 bytes each"):
        read_x(
            tmp_path / "a.mat",
            array(2, (1, 1), names.replace(b"\x08\0\0\0\0", b"\x07\0\0\0\0", 1) + cell * 2),
        ).field("b")
    with pytest.raises(MatError, match="8 bytes of numbers do not form an array of 2 dimensions"):
        read_x(tmp_path / "a.mat", array(6, (1, 2), one)).numbers()
    with pytest.raises(MatError, match="100 dimensions"):
        read_x(tmp_path / "a.mat", array(6, (1,) * 100, one)).numbers()
    with pytest.raises(MatError, match=r"an array of shape \(1, -1\)"):
        read_x(tmp_path / "a.mat", array(6, (1, -1), one))


def test_mat_errors_have_no_name(tmp_path: Path) -> None:
    (tmp_path / "a.mat").write_bytes(b"")
    with pytest.raises(MatError, match=r"^the file does not begin as a MATLAB 5 file does$"):
        read_mat(tmp_path / "a.mat")
