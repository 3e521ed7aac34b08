"""Folders of segment proposals: round trips, interrupted and resumed runs, errors."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from made.runs import ROOT, alive, children
from PIL import Image

from maskseg.data.process_pool import ImageJob
from maskseg.errors import UserError
from maskseg.files.locks import lock
from maskseg.masks.superpixel import SegmentProposals
from maskseg.variants.cfm import store
from maskseg.variants.cfm import store as segment_store
from maskseg.variants.cfm.hierarchy import HierarchicalGrouping
from maskseg.variants.cfm.store import (
    MAX_MEMBERS,
    SegmentStore,
    check_settings,
    missing_images,
    read_segments,
    write_store,
)

SIZE = (24, 32)
METHOD = HierarchicalGrouping(superpixel_area=0.01)
KEYS = {"data": "/x/train.json", "method.sigma": 0.5}


def proposals(
    height: int, width: int, superpixels: int, count: int, seed: int = 0
) -> SegmentProposals:
    rng = np.random.default_rng(seed)
    labels = (
        rng.permutation(np.arange(height * width) % superpixels)
        .reshape(height, width)
        .astype(np.int32)
    )
    return SegmentProposals(labels, rng.random((count, superpixels)) < 0.3)


def same(one: SegmentProposals, other: SegmentProposals) -> bool:
    arrays = zip((one.labels, one.members), (other.labels, other.members), strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all()) for a, b in arrays
    )


class Made:
    """A job that loads the proposals that the method returns."""

    def __init__(self, image_id: int, proposals: SegmentProposals) -> None:
        self.image_id = image_id
        self.proposals = proposals
        self.height, self.width = proposals.labels.shape

    def load(self) -> SegmentProposals:
        return self.proposals


def identity(proposals: SegmentProposals) -> SegmentProposals:
    return proposals


def pictures(folder: Path, count: int) -> list[ImageJob]:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize(SIZE[::-1], Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return [ImageJob(i, *SIZE, str(folder), f"{i}.png") for i in range(count)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def memory() -> Iterator[Callable[[], int]]:
    """The peak memory in bytes since the previous call."""

    def peak() -> int:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return most

    tracemalloc.start()
    yield peak
    tracemalloc.stop()


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, SegmentProposals]:
    """A file of segments and its proposals."""
    stored_proposals = proposals(10, 12, 20, 7)
    write_store(tmp_path / "store", [Made(1, stored_proposals)], identity, KEYS, 1)
    return tmp_path / "store" / "1.npz", stored_proposals


@pytest.mark.parametrize(
    "shape",
    [
        (10, 12, 20, 7),
        (1, 1, 1, 1),
        (3, 5, 8, 0),
        (300, 300, 90_000, 2),
        (256, 256, 2**16, 1),
        (9, 9, 9, 3),
    ],
)
def test_round_trip(tmp_path: Path, shape: tuple[int, int, int, int]) -> None:
    stored_proposals = proposals(*shape)
    jobs = [Made(7, stored_proposals), Made(-3, stored_proposals), Made(2**40, stored_proposals)]
    written = write_store(tmp_path / "a" / "store", jobs, identity, KEYS, 1)
    assert written.num_written == 3
    assert sorted(contents(tmp_path / "a" / "store")) == sorted(
        ["7.npz", "-3.npz", f"{2**40}.npz", "settings.json"]
    )
    store = pickle.loads(
        pickle.dumps(
            SegmentStore(tmp_path / "a" / "store", [(j.image_id, j.height, j.width) for j in jobs])
        )
    )
    for job in jobs:
        assert same(store.load(job.image_id, job.height, job.width), stored_proposals)
    with np.load(tmp_path / "a" / "store" / "7.npz", allow_pickle=False) as arrays:
        assert arrays["labels"].dtype == (np.uint16 if shape[2] <= 2**16 else np.int32)
        assert (arrays["labels"] == stored_proposals.labels).all()
        assert arrays["shape"].tolist() == [shape[0], shape[1], shape[3], shape[2]]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    jobs = pictures(tmp_path, 5)
    write_store(tmp_path / "one", jobs, METHOD, KEYS, 1)
    write_store(tmp_path / "two", jobs, METHOD, KEYS, 2)
    assert len(contents(tmp_path / "one")) == 6
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert same(SegmentStore(tmp_path / "two", [(3, *SIZE)]).load(3, *SIZE), METHOD(jobs[3].load()))


def test_existing_files_are_skipped(tmp_path: Path) -> None:
    store = tmp_path / "store"
    given = [Made(i, proposals(6, 7, 5, 3, i)) for i in range(4)]
    write_store(store, given[:2], identity, KEYS, 1)
    before = contents(store)
    asked = []

    def method(stored_proposals: SegmentProposals) -> SegmentProposals:
        asked.append(stored_proposals)
        return stored_proposals

    (store / "1.npz").write_bytes(before["1.npz"][:-5])
    assert missing_images(store, range(4)) == ([2, 3], 4)
    assert write_store(store, given, method, KEYS, 1).num_written == 3
    assert asked == [given[1].proposals, given[2].proposals, given[3].proposals]
    assert {name: contents(store)[name] for name in before} == before
    assert write_store(store, given, method, KEYS, 1).num_written == 0
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), None),
        (OSError(errno.ENOSPC, "No space left"), r"could not be written \(No space"),
    ],
)
def test_interruption_in_the_middle_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str | None
) -> None:
    store = tmp_path / "store"
    given = [Made(i, proposals(6, 7, 5, 3, i)) for i in range(3)]
    write_store(store, given[:1], identity, KEYS, 1)
    before = contents(store)

    def half(file: IO[bytes], **_: Any) -> None:
        file.write(before["0.npz"][:50])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", half)
        with pytest.raises(UserError if message else KeyboardInterrupt, match=message):
            write_store(store, given, identity, KEYS, 1)
    assert contents(store) == before
    (store / "unfinished").mkdir()
    (store / "unfinished" / ".1.npz.99999999.tmp").touch()  # of a killed process
    assert write_store(store, given, identity, KEYS, 1).num_written == 2
    assert sorted(contents(store)) == ["0.npz", "1.npz", "2.npz", "settings.json"]


def test_damaged_files_are_named(stored: tuple[Path, SegmentProposals]) -> None:
    path, stored_proposals = stored
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            UserError,
            match=r"1\.npz: the segments are damaged .*; delete it and run tools/propose\.py again",
        ):
            read_segments(path, 10, 12)
    unchanged = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(UserError):
            assert same(read_segments(path, 10, 12), stored_proposals), place
            unchanged += 1  # dates and other metadata are ignored
    assert unchanged < 0.3 * len(whole)
    path.unlink()
    with pytest.raises(UserError, match=r"1\.npz: there are no segments of this image"):
        read_segments(path, 10, 12)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_unreadable_files_are_not_regenerated(
    stored: tuple[Path, SegmentProposals], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, stored_proposals = stored
    whole = path.read_bytes()

    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(segment_store.zipfile, "ZipFile", refused)
    for call in (
        lambda: read_segments(path, 10, 12),
        lambda: write_store(path.parent, [Made(1, stored_proposals)], identity, KEYS, 1),
    ):
        with pytest.raises(
            UserError, match=rf"1\.npz: the segments cannot be read \({os.strerror(number)}\)"
        ):
            call()
    assert path.read_bytes() == whole
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(
        UserError, match=rf"settings\.json: cannot be read \({os.strerror(number)}\)"
    ):
        check_settings(path.parent, KEYS)


@pytest.mark.parametrize("call", ["mkdir", "replace"])
def test_folders_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = tmp_path / "store"
    given = [Made(i, proposals(6, 7, 5, 3, i)) for i in range(2)]
    write_store(store, given[:1], identity, KEYS, 1)
    before = (store / "0.npz").read_bytes()
    original = getattr(Path, call)

    def refused(path: Path, *given: Any, **keys: Any) -> Any:
        if path.parts[-2:] in ((store.name, "unfinished"), ("unfinished", "1.npz")):
            raise OSError(errno.EROFS, "Read-only file system")
        return original(path, *given, **keys)

    monkeypatch.setattr(Path, call, refused)
    with pytest.raises(
        UserError,
        match=r"store/1\.npz: the segments could not be written \(Read-only file system\)",
    ):
        write_store(store, given, identity, KEYS, 1)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in store.glob("*.npz")} == {"0.npz": before}
    assert write_store(store, given, identity, KEYS, 1).num_written == 1


@pytest.mark.parametrize("times", [1, 2])
def test_another_machine_may_remove_the_unfinished_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    store = tmp_path / "store"
    given = Made(1, proposals(6, 7, 5, 3))
    left = [0] * times
    original = segment_store.replacing

    def late(path: Path, what: str) -> Any:
        if left:
            left.pop()
            path.parent.rmdir()
        return original(path, what)

    monkeypatch.setattr(segment_store, "replacing", late)
    if times == 1:
        assert write_store(store, [given], identity, KEYS, 1).num_written == 1
        assert same(read_segments(store / "1.npz", 6, 7), given.proposals)
    else:
        with pytest.raises(
            UserError, match=r"1\.npz: the segments could not be written \(No such file"
        ):
            write_store(store, [given], identity, KEYS, 1)


def test_another_images_size(stored: tuple[Path, SegmentProposals]) -> None:
    with pytest.raises(
        UserError,
        match=r"1\.npz: these are segments of an image of 10 x 12 \(height x width\), not 12 x 10;"
        r" delete it",
    ):
        read_segments(stored[0], 12, 10)


def crafted(path: Path, **arrays: Any) -> None:
    """Write a file of a store with some arrays replaced by other arrays or by bytes."""
    content: dict[str, Any] = {
        "shape": np.array([10, 12, 2, 20]),
        "labels": np.zeros((10, 12), dtype=np.uint16),
        "members": np.zeros((2, 3), dtype=np.uint8),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in (content | arrays).items():
            stream = io.BytesIO()
            if not isinstance(value, bytes):
                np.lib.format.write_array(stream, value)
            archive.writestr(
                f"{name}.npy", value if isinstance(value, bytes) else stream.getvalue()
            )


def header(shape: tuple[int, ...], kind: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"shape": np.array([10, 12, 2])}, "not enough values"),
        ({"shape": np.array([10, 12, 2, 20], dtype=np.float64)}, "shape is <f8"),
        ({"shape": np.array([10, 12, -1, 20])}, "-1 segments"),
        ({"shape": np.array([10, 12, 2**40, 2**40])}, f"{2**40} segments of {2**40} superpixels"),
        ({"shape": np.array([10, 12, 2, 2000])}, "cannot reshape"),
        (
            {"labels": np.full((10, 12), 20, dtype=np.uint16)},
            r"superpixels 20\.\.20, the members are those of 0\.\.19",
        ),
        ({"labels": np.full((10, 12), -1, dtype=np.int32)}, r"superpixels -1\.\.-1"),
        ({"labels": np.zeros((12, 9), dtype=np.uint16)}, "cannot reshape"),
        ({"labels": header((2**34,), "<i4")}, "labels is <i4"),
        ({"labels": header((10, 12), "|O") + b"cos\nsystem\n"}, r"labels is \|O"),
        (
            {"labels": np.zeros(10**7, dtype=np.uint16)},
            "labels has 20000128 bytes, at most 480 are expected",
        ),
        (
            {"members": np.zeros((2000, 2000), dtype=np.uint8)},
            "members has 4000128 bytes, at most 6 are expected",
        ),
        ({"members": b"no array"}, "the magic string is not correct"),
    ],
)
def test_files_with_false_sizes_take_no_memory(
    tmp_path: Path, memory: Callable[[], int], arrays: dict[str, Any], message: str
) -> None:
    crafted(tmp_path / "1.npz")
    assert read_segments(tmp_path / "1.npz", 10, 12).members.shape == (2, 20)
    crafted(tmp_path / "1.npz", **arrays)
    memory()
    with pytest.raises(UserError, match=f"the segments are damaged .*{message}"):
        read_segments(tmp_path / "1.npz", 10, 12)
    assert memory() < 2e6


def test_a_decompression_bomb_is_not_unpacked(tmp_path: Path, memory: Callable[[], int]) -> None:
    """A decompression bomb: the header of the member states a small size."""
    path = tmp_path / "1.npz"
    crafted(path, labels=header((10, 12), "<u2") + bytes(5 * 10**7))
    content = path.read_bytes()
    stated = struct.pack("<I", len(header((10, 12), "<u2")) + 5 * 10**7)
    assert content.count(stated) == 2
    path.write_bytes(content.replace(stated, struct.pack("<I", len(header((10, 12), "<u2")) + 240)))
    memory()
    with pytest.raises(UserError, match="damaged"):
        read_segments(path, 10, 12)
    assert memory() < 2e6


def test_too_many_segments_are_not_written(tmp_path: Path) -> None:
    many = SegmentProposals(
        np.zeros((1, 1), dtype=np.int32), np.broadcast_to(False, (MAX_MEMBERS // 2 + 1, 2))
    )
    with pytest.raises(UserError, match=r"1\.npz: \d+ segments of 2 superpixels are too many"):
        write_store(tmp_path / "store", [Made(1, many)], identity, KEYS, 1)


def test_stores_that_do_not_fit(tmp_path: Path) -> None:
    store = tmp_path / "store"
    given = [Made(i, proposals(6, 7, 5, 3, i)) for i in (1, 2)]
    write_store(store, given, identity, KEYS, 1)
    with pytest.raises(
        UserError,
        match=r"store has no segments of image 5 \(2 of 3 images are missing\);"
        r" run tools/propose\.py to create them",
    ):
        SegmentStore(store, [(1, 6, 7), (5, 6, 7), (9, 6, 7)])
    with pytest.raises(UserError, match=r"absent: there is no folder of segments"):
        SegmentStore(tmp_path / "absent", [])
    other = {"data": "/y/train.json", "method.sigma": 0.5, "method.scales": [1.0]}
    message = (
        r"data='/x/train\.json' there, '/y/train\.json' here;"
        r" method\.scales=None there, \[1\.0\] here\): choose another folder or delete"
    )
    for refused in (
        lambda: check_settings(store, other),
        lambda: write_store(store, given, identity, other, 1),
    ):
        with pytest.raises(UserError, match=message):
            refused()
    check_settings(store, KEYS)
    (store / "settings.json").write_text(json.dumps({**KEYS, "format": "maskseg segments 0"}))
    with pytest.raises(UserError, match=r"format='maskseg segments 0' there"):
        check_settings(store, KEYS)


def test_settings_depend_on_the_images_not_on_their_location(tmp_path: Path) -> None:
    settings = {"data": "train.json", "images": "2, abc", "method.sigma": 0.5}
    write_store(tmp_path, [], identity, settings, 1)
    check_settings(tmp_path, settings | {"data": "renamed.json"})
    with pytest.raises(UserError, match=r"\(images='2, abc' there, '2, abd' here\)"):
        check_settings(tmp_path, settings | {"images": "2, abd"})
    # A folder without this key: the name of the file is compared.
    (tmp_path / "settings.json").write_text(
        json.dumps({"format": "maskseg segments 1", "data": "/x/train.json", "method.sigma": 0.5})
    )
    check_settings(tmp_path, settings)
    with pytest.raises(UserError, match=r"\(data='train\.json' there, 'val\.json' here\)"):
        check_settings(tmp_path, settings | {"data": "val.json"})
    with pytest.raises(UserError, match=r"\(method\.sigma=0\.5 there, 0\.8 here\)"):
        check_settings(tmp_path, settings | {"method.sigma": 0.8})


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": "something else"}'])
def test_folders_with_other_content(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(
        UserError, match=r"settings\.json: not the settings of a folder of segments"
    ):
        write_store(tmp_path, [], identity, KEYS, 1)
    (tmp_path / "settings.json").rename(tmp_path / "picture.png")
    with pytest.raises(
        UserError, match=r"exists and is no folder of segments \(it has no settings\.json\)"
    ):
        write_store(tmp_path, [], identity, KEYS, 1)


def test_folders_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/store: the folder cannot be created"):
        write_store(tmp_path / "file" / "store", [], identity, KEYS, 1)


SLOW = """
import os, time
import numpy
from maskseg.masks.superpixel import SegmentProposals
from maskseg.superpixels.methods import relabel

def slow(image):
    if int(image[0, 0, 0]) == int(os.environ.get("DIES_AT", -1)):
        os._exit(9)
    time.sleep(float(os.environ["SECONDS"]))
    labels = relabel(image[..., 0].astype("int32"))
    return SegmentProposals(labels, numpy.eye(labels.max() + 1, dtype=bool))
"""
RUN = """
import sys
from pathlib import Path
from maskseg import cli
from maskseg.data.process_pool import ImageJob
from maskseg.variants.cfm.store import write_store
from segments_slow import slow

def main(words):
    folder = Path(__file__).parent
    jobs = [ImageJob(i, 24, 32, str(folder / "pictures"), f"{i}.png") for i in range(12)]
    return write_store(folder / words[0], jobs, slow, {"a": 1}, int(words[1])).num_written

if __name__ == "__main__":
    sys.exit(cli.run(main, "usage"))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a slow method and a script that calls it.

    `whole` is what the script writes without an interruption.
    """
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "pictures").mkdir()
    pictures(folder / "pictures", 12)
    (folder / "segments_slow.py").write_text(SLOW)
    (folder / "segments_run.py").write_text(RUN)
    assert run_in_process(folder, "whole") == 12
    return folder


def run_in_process(folder: Path, store: str) -> int:
    """Run the script in this process. -> the number of files written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("SECONDS", "0")
        return int(importlib.import_module("segments_run").main([store, "1"]))


def start(
    folder: Path, store: str, workers: int, seconds: float, **environment: str
) -> subprocess.Popen[str]:
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{folder}",
        "OMP_NUM_THREADS": "1",
        "SECONDS": str(seconds),
        **environment,
    }
    command = [sys.executable, "segments_run.py", store, str(workers)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [
        (signal.SIGKILL, 2, -9),
        (signal.SIGTERM, 1, 143),
        pytest.param(signal.SIGTERM, 2, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, 130, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes(place: Path, number: int, workers: int, code: int) -> None:
    name = f"store{number}_{workers}"
    process = start(place, name, workers, 0.3)
    store = place / name
    end = time.monotonic() + 100
    while len(list(store.glob("*.npz"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    below = children(process.pid)
    (os.killpg if number == signal.SIGINT else os.kill)(
        process.pid, number
    )  # a terminal sends Ctrl-C to all processes
    returncode, output = finish(process)
    assert returncode == code, output
    while any(alive(pid) for pid in below):  # they exit by themselves
        assert time.monotonic() < end
        time.sleep(0.01)
    whole = contents(place / "whole")
    written = {path.name: path.read_bytes() for path in store.glob("*.npz")}
    assert 3 <= len(written) < 12
    assert all(whole[name] == content for name, content in written.items())
    assert run_in_process(place, name) == 12 - len(written)
    assert contents(store) == whole


@pytest.mark.slow
def test_a_dead_worker_is_reported(place: Path) -> None:
    with Image.open(place / "pictures" / "7.png") as image:
        dies = str(np.asarray(image)[0, 0, 0])
    code, output = finish(start(place, "dead", 2, 0.0, DIES_AT=dies))
    assert code == 2
    assert output.splitlines()[-1].startswith(
        "error: a worker process has died, possibly out of memory"
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_is_reported(tmp_path: Path, workers: int) -> None:
    jobs = pictures(tmp_path, 3)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"1\.png: "):
        write_store(tmp_path / "store", jobs, METHOD, KEYS, workers)
    assert "1.npz" not in contents(tmp_path / "store")


def test_invalid_results_are_not_written(tmp_path: Path) -> None:
    stored_proposals = proposals(6, 7, 5, 3)
    for wrong in (
        SegmentProposals(stored_proposals.labels[:5], stored_proposals.members),
        SegmentProposals(stored_proposals.labels, stored_proposals.members[:, :4]),
    ):
        job = Made(1, wrong)
        job.height = 6
        with pytest.raises(
            ValueError, match=r"1\.npz: labels \(\d, 7\) do not fit the image or members"
        ):
            write_store(tmp_path / "store", [job], identity, KEYS, 1)
    assert list(contents(tmp_path / "store")) == ["settings.json"]


def test_a_second_job_sees_the_settings_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Guards against: two jobs that begin at once each find no settings, and the second one
    # overwrites those of the first.
    write = store.write_json

    def begin_another(path: Path, values: object) -> None:
        write(path, values)
        with (
            pytest.raises(UserError, match="in use"),
            lock(path.with_name(store.LOCK_NAME), "in use"),
        ):
            pass

    monkeypatch.setattr(store, "write_json", begin_another)
    store.write_store(tmp_path / "a", [], METHOD, {"k": 1}, 1)
    with pytest.raises(UserError, match="made with other settings"):
        store.write_store(tmp_path / "a", [], METHOD, {"k": 2}, 1)
    assert not (tmp_path / "a" / store.LOCK_NAME).exists()
