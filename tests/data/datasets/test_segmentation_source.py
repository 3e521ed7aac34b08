"""BSDS and MSRC: .mat files compared with scipy, color maps, damaged and invalid files."""

from __future__ import annotations

import random
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskseg import config
from maskseg.data.datasets import matlab
from maskseg.data.datasets.bsds import BsdsSource
from maskseg.data.datasets.msrc import MsrcSource
from maskseg.data.datasets.segmentation_source import SegmentedSource
from maskseg.errors import UserError

scipy_io = pytest.importorskip("scipy.io")
MAPS = [np.array([[1, 1, 2], [1, 3, 3]]), np.array([[1, 1, 1], [0, 2, 2]])]


def write_mat(
    path: Path, maps: list[np.ndarray], dtype: type = np.uint16, compressed: bool = True
) -> None:
    """Write a file of BSDS500: one cell per annotator, with Segmentation and Boundaries."""
    cells = np.empty((1, len(maps)), dtype=object)
    for i, one in enumerate(maps):
        cells[0, i] = {
            "Boundaries": np.zeros(one.shape, dtype=bool),
            "Segmentation": one.astype(dtype),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, {"other": "text", "groundTruth": cells}, do_compression=compressed)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """BSDS's layout: two images of 2 x 3 pixels in val, one in test."""
    for i, (split, name) in enumerate([("val", "b"), ("val", "a"), ("test", "c")]):
        write_image(tmp_path / "images" / split / f"{name}.jpg", np.full((2, 3, 3), 10 * i))
        write_mat(tmp_path / "groundTruth" / split / f"{name}.mat", MAPS[: 2 - i % 2])
    return tmp_path


def error_of(source: Any, split: str = "val", index: int = 0) -> str:
    """Return the one-line error of reading the ground truths."""
    with pytest.raises(UserError) as raised:
        source.ground_truths(split, index)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_bsds(root: Path) -> None:
    source: SegmentedSource = BsdsSource(str(root))
    source.prepare()
    assert (source.root, source.split) == (str(root), "val")
    assert source.splits() == ["val", "test"]
    assert source.names("val") == ["a", "b"]
    image = source.image("val", 0)
    assert (image.shape, image.dtype) == ((3, 2, 3), torch.uint8)
    assert int(image[0, 0, 0]) == 10
    truths = source.ground_truths("val", 1)
    assert [t.dtype for t in truths] == [np.int32, np.int32]
    assert truths[0].tolist() == [[0, 0, 1], [0, 2, 2]]
    assert truths[1].tolist() == [[0, 0, 0], [-1, 1, 1]]
    assert len(source.ground_truths("val", 0)) == 1
    assert BsdsSource(str(root), max_images=1).names("val") == ["a"]


@pytest.mark.parametrize("nested", ["data", "BSDS500/data", "BSR/BSDS500/data"])
def test_bsds_in_the_folders_of_its_archive(root: Path, nested: str) -> None:
    inner = root / "unpacked" / nested
    inner.mkdir(parents=True)
    for part in ("images", "groundTruth"):
        (root / part).rename(inner / part)
    assert BsdsSource(str(root / "unpacked")).names("test") == ["c"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float64, np.uint32])
@pytest.mark.parametrize("compressed", [True, False])
def test_numbers_of_every_type(root: Path, dtype: type, compressed: bool) -> None:
    write_mat(root / "groundTruth/val/a.mat", MAPS, dtype, compressed)
    assert [t.tolist() for t in BsdsSource(str(root)).ground_truths("val", 0)] == [
        (m - 1).tolist() for m in MAPS
    ]


def test_invalid_bsds_folders(root: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data.root=.*/none: no such folder: a folder with images/\{train,val,test\}",
    ):
        BsdsSource(str(root / "none")).splits()
    with pytest.raises(UserError, match="not found there"):
        BsdsSource(str(root / "images")).names("val")
    with pytest.raises(UserError, match=r"^split=train: .* has val, test"):
        BsdsSource(str(root)).names("train")
    (root / "images/train").mkdir()
    with pytest.raises(UserError, match=r"images/train: no file \*.jpg"):
        BsdsSource(str(root)).names("train")
    (root / "groundTruth/val/b.mat").unlink()
    assert BsdsSource(str(root), max_images=1).names("val") == ["a"]
    with pytest.raises(
        UserError, match=r"val/b.mat: no such file, but the image exists \(1 of 2 images"
    ):
        BsdsSource(str(root)).names("val")
    for part in ("val", "test", "train"):
        (root / "images" / part).rename(root / "images" / f"{part}_")
    with pytest.raises(UserError, match="none of the folders train, val, test"):
        BsdsSource(str(root)).splits()


def test_invalid_bsds_files(root: Path) -> None:
    source, path = BsdsSource(str(root)), root / "groundTruth/val/a.mat"
    write_mat(path, [MAPS[0], MAPS[0].T])
    assert "val/a.mat: the segmentation is 3 x 2 (height x width), its image 2 x 3" in error_of(
        source
    )
    for bad in (MAPS[0] - 2, MAPS[0] + 0.5, MAPS[0] * np.nan, MAPS[0] * 1e10):
        write_mat(path, [bad], np.float64)
        assert "val/a.mat: not a segmentation of BSDS" in error_of(source)
        assert "numbered from 1 on" in error_of(source)
    for values, what in (
        ({"x": MAPS[0]}, "it has no variable groundTruth (x)"),
        ({}, "it has no variable groundTruth (none at all)"),
        ({"groundTruth": MAPS[0]}, "where cells were expected"),
        ({"groundTruth": np.empty((1, 0), dtype=object)}, "groundTruth has no segmentation"),
        (
            {"groundTruth": np.array([[{"Boundaries": 1}, 0]], dtype=object)},
            "without the field 'Segmentation' (it has Boundaries)",
        ),
        ({"groundTruth": np.array([[1, 2]], dtype=object)}, "where one structure was expected"),
    ):
        scipy_io.savemat(path, values)
        assert what in error_of(source)
    write_mat(path, [MAPS[0] * 1j], np.complex128)
    assert "complex" in error_of(source)
    cells = np.empty((1, 1), dtype=object)
    cells[0, 0] = {"Segmentation": np.array(["abc", "def"])}
    scipy_io.savemat(path, {"groundTruth": cells})
    assert "where real numbers were expected" in error_of(source)
    with pytest.raises(UserError, match=r"a.jpg: the image has 2 x 3 pixels, data.max_pixels is 5"):
        BsdsSource(str(root), max_pixels=5).ground_truths("val", 0)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "does not begin as a MATLAB 5 file"),
        (b"\x80\x04." + bytes(200), "does not begin as a MATLAB 5 file"),  # a pickle
        (b"MATLAB 7.3 MAT-file".ljust(600), "version 7.3 (HDF5); save it again with -v7"),
        (
            b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"\x0e\x00\x00\x00\xff\xff\xff\xff",
            "truncated",
        ),
        (
            b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"\x0f\x00\x00\x00\x04\x00\x00\x00abcd",
            "compressed data are damaged",
        ),
        (
            b"MATLAB 5.0".ljust(124)
            + b"\x00\x01IM"
            + b"\x0e\x00\x00\x00\x08\x00\x00\x00"
            + bytes(8),
            "without flags, shape or name",
        ),
        (
            b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + b"\x01\x00\x00\x00\x00\x00\x00\x00" * 10_001,
            "more than 10000 elements",
        ),
    ],
)
def test_invalid_mat_files(root: Path, data: bytes, what: str) -> None:
    (root / "groundTruth/val/a.mat").write_bytes(data)
    message = error_of(BsdsSource(str(root)))
    assert what in message
    assert "groundTruth/val/a.mat" in message


def compressed_file(data: bytes, cut: int = 0) -> bytes:
    """A file with one compressed element, without its last `cut` bytes."""
    content = zlib.compress(data)[: -cut or None]
    return b"MATLAB 5.0".ljust(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(content)) + content


def test_a_file_that_decompresses_to_too_many_bytes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "groundTruth/val/a.mat"
    path.write_bytes(compressed_file(bytes(10**7)))
    monkeypatch.setattr(matlab, "MAX_BYTES", 10**5)
    source = BsdsSource(str(root))
    source.names("val")
    tracemalloc.start()
    assert "unpacks to more than 100000 bytes" in error_of(source)
    assert tracemalloc.get_traced_memory()[1] < 10**6  # nothing beyond the limit is unpacked
    tracemalloc.stop()
    monkeypatch.setattr(matlab, "MAX_BYTES", 500)
    assert "larger than 500 bytes" in error_of(source)


def test_a_file_without_its_checksum(root: Path) -> None:
    path = root / "groundTruth/val/a.mat"
    path.write_bytes(compressed_file(b""))
    assert "no variable groundTruth (none at all)" in error_of(BsdsSource(str(root)))
    path.write_bytes(compressed_file(b"", cut=2))
    assert "its compressed data are truncated" in error_of(BsdsSource(str(root)))


def test_damaged_files_are_read_or_refused_and_nothing_else(root: Path) -> None:
    path, source, draws = root / "groundTruth/val/a.mat", BsdsSource(str(root)), random.Random(0)
    read, refusals = 0, []
    for compressed in (False, True):
        write_mat(path, MAPS, compressed=compressed)
        whole = path.read_bytes()
        for i in range(800):
            data = bytearray(whole)
            for _ in range(draws.randint(1, 3)):
                data[draws.randrange(len(data))] = draws.randrange(256)
            path.write_bytes(data[: draws.randrange(len(data))] if i % 5 == 0 else data)
            try:
                maps = source.ground_truths("val", 0)
            except UserError as error:
                refusals.append(str(error))
            else:
                assert all(
                    m.shape == (2, 3) and m.dtype == np.int32 and m.min() >= -1 for m in maps
                )
                read += 1
    assert min(read, len(refusals)) > 100
    assert all("groundTruth/val/a.mat: " in message and "\n" not in message for message in refusals)


def test_the_real_bsds_as_scipy_reads_it(shared_data: Path) -> None:
    folder = shared_data / "bsds500"
    if not folder.is_dir():
        pytest.skip(f"needs BSDS500 in {folder}")
    source = BsdsSource(str(folder), max_images=10)
    assert source.splits() == ["train", "val"]
    for split in source.splits():
        assert len(source.names(split)) == 10
        for i, name in enumerate(source.names(split)):
            wanted = scipy_io.loadmat(folder / "groundTruth" / split / f"{name}.mat")["groundTruth"]
            found = source.ground_truths(split, i)
            assert len(found) == wanted.shape[1] >= 4
            assert source.image(split, i).shape[1:] == found[0].shape
            for k, one in enumerate(found):
                np.testing.assert_array_equal(
                    one, wanted[0, k]["Segmentation"][0, 0].astype(np.int64) - 1
                )


RED, BLUE, VOID = (128, 0, 0), (0, 0, 128), (0, 0, 0)
COLOURS = np.array(
    [
        [RED, VOID, VOID, RED],
        [BLUE, VOID, RED, VOID],
        [VOID, VOID, VOID, VOID],
        [BLUE, BLUE, BLUE, RED],
    ]
)


@pytest.fixture(params=["v2", "v1", "unpacked"])
def msrc(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """MSRC's layouts: the images 1_2_s and 1_1_s."""
    inner = tmp_path / "MSRC_ObjCategImageDatabase_v2" if request.param == "unpacked" else tmp_path
    images, maps = (
        (inner, inner) if request.param == "v1" else (inner / "Images", inner / "GroundTruth")
    )
    for name in ("1_2_s", "1_1_s"):
        write_image(images / f"{name}.bmp", np.full((4, 4, 3), 7))
        write_image(maps / f"{name}_GT.bmp", COLOURS)
    return tmp_path


def test_msrc(msrc: Path) -> None:
    source: SegmentedSource = MsrcSource(str(msrc))
    source.prepare()
    assert (source.split, source.splits(), source.names("all")) == (
        "all",
        ["all"],
        ["1_1_s", "1_2_s"],
    )
    assert int(source.image("all", 0).sum()) == 7 * 48
    (truth,) = source.ground_truths("all", 0)
    assert truth.dtype == np.int32
    # Two regions of blue and three of red: they are 8-connected.
    assert truth.tolist() == [[2, -1, -1, 3], [0, -1, 3, -1], [-1, -1, -1, -1], [1, 1, 1, 4]]


def test_msrc_lists(tmp_path: Path) -> None:
    for name in ("1_1_s", "1_2_s", "1_3_s"):
        write_image(tmp_path / f"{name}.bmp", COLOURS)
        write_image(tmp_path / f"{name}_GT.bmp", np.zeros((4, 4, 3)))
    (tmp_path / "Train.txt").write_text("1_3_s.bmp\r\n\r\n1_1_s.bmp\r\n")
    (tmp_path / "Test.txt").write_text("1_2_s\n")
    source = MsrcSource(str(tmp_path), "test")
    assert source.splits() == ["all", "train", "test"]
    assert [source.names(split) for split in source.splits()] == [
        ["1_1_s", "1_2_s", "1_3_s"],
        ["1_1_s", "1_3_s"],
        ["1_2_s"],
    ]
    assert source.ground_truths("test", 0)[0].tolist() == [[-1] * 4] * 4
    with pytest.raises(UserError, match=r"^split=val: .* has all, train, test"):
        source.names("val")
    for text, what in (
        ("1_1_s.bmp\n../x.bmp\n", r"Validation.txt: line 2 names '../x', which is not an image of"),
        ("\n", "Validation.txt: no file name"),
    ):
        (tmp_path / "Validation.txt").write_text(text)
        with pytest.raises(UserError, match=what):
            MsrcSource(str(tmp_path)).names("val")


def test_invalid_msrc_files(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.root=.*: not found there: a folder with Images/NAME.bmp"
    ):
        MsrcSource(str(tmp_path)).splits()
    write_image(tmp_path / "1_1_s.bmp", np.zeros((20, 30, 3)))
    write_image(tmp_path / "1_1_s_GT.bmp", np.zeros((30, 20, 3)))
    source = MsrcSource(str(tmp_path))
    assert (
        "1_1_s_GT.bmp: the segmentation is 30 x 20 (height x width), its image 20 x 30"
        in error_of(source, "all")
    )
    write_image(tmp_path / "1_1_s_GT.bmp", np.random.default_rng(0).integers(0, 256, (20, 30, 3)))
    assert "colors; a map has one for each class and must be saved without loss" in error_of(
        source, "all"
    )
    (tmp_path / "1_1_s_GT.bmp").write_bytes(b"BM")
    assert "1_1_s_GT.bmp: not an image" in error_of(source, "all")
    write_image(tmp_path / "1_2_s.bmp", np.zeros((20, 30, 3)))
    with pytest.raises(UserError, match=r"1_2_s_GT.bmp: no such file"):
        MsrcSource(str(tmp_path)).names("all")


def test_msrc_without_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "1_1_s.bmp", COLOURS)
    write_image(tmp_path / "1_1_s_GT.bmp", COLOURS)
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    said = error_of(MsrcSource(str(tmp_path)), "all")
    assert said.startswith("this needs SciPy")
    assert said.endswith("pip install -e '.[classic]'")


@pytest.mark.parametrize(
    "keys",
    [
        {"max_images": 0},
        {"max_pixels": 0},
        {"divisor": 0},
        {"max_images": 1.5},
        {"max_pixels": None},
    ],
)
def test_invalid_keys(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(keys))}=.*: expected a whole number"):
        BsdsSource("x", **keys)


@pytest.mark.parametrize(
    ("name", "kind", "split"), [("bsds", BsdsSource, "val"), ("msrc", MsrcSource, "all")]
)
def test_the_configs_build(name: str, kind: type, split: str) -> None:
    composed = config.compose("train", [f"data={name}", "data.root=x"])
    source = config.build_source(composed.data)
    assert isinstance(source, kind)
    assert (
        source.root,
        source.split,
        source.test_transforms,
        source.divisor,
        source.num_classes,
    ) == ("x", split, [], 32, None)
