"""A folder of segment proposals: one file per image, written in parallel and resumable."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maskseg.data.process_pool import describe_differences, run_pool, sigterm_as_exception
from maskseg.errors import UserError, describe_error
from maskseg.files import parse_json, replacing, write_json
from maskseg.files.locks import lock
from maskseg.masks.superpixel import SegmentProposals

Value = TypeVar("Value")  # what a job loads, such as an image
Value_co = TypeVar("Value_co", covariant=True)

FORMAT = "maskseg segments 1"
SETTINGS_FILE = "settings.json"
UNFINISHED_FOLDER = "unfinished"
LOCK_NAME = ".lock"  # held while the settings are written
MAX_MEMBERS = 2**28  # segments x superpixels of an image, one byte each in memory
MAX_HEADER_BYTES = 1024  # of an array in a file, beside its numbers


class SegmentJob(Protocol[Value_co]):
    """An image whose proposals are to be computed; height and width in pixels."""

    @property
    def image_id(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    def load(self) -> Value_co:
        """Return the argument for the method. Raises UserError."""


class SegmentJobs(Protocol[Value_co]):
    """A sized iterable of jobs, which may be created while iterating."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[SegmentJob[Value_co]]: ...


@dataclass(frozen=True)
class WriteSummary:
    """The result of `write_store`.

    num_written: images whose file was missing or damaged.
    seconds: mean CPU time for one of them, 0 if there are none.
    """

    num_written: int
    seconds: float


class UnreadableError(UserError):
    """OS-level read error. The file may be intact, so it is not regenerated."""


class SegmentStore:
    """Reads a folder that `write_store` has written.

    Holds only a path, so that each process of a data loader can have a copy.

    images: id, height and width of the images that will be read.

    Raises UserError if the folder does not exist or one of the images has no file.
    """

    def __init__(self, folder: Path | str, images: Iterable[tuple[int, int, int]]) -> None:
        self.folder = Path(folder)
        if store_settings(self.folder) is None:
            raise UserError(
                f"{folder}: there is no folder of segments; run tools/propose.py to create one"
            )
        absent, count = missing_images(self.folder, (image_id for image_id, _, _ in images))
        if absent:
            raise UserError(
                f"{folder} has no segments of image {absent[0]} ({len(absent)} of {count} images"
                " are missing); run tools/propose.py to create them"
            )

    def load(self, image_id: int, height: int, width: int) -> SegmentProposals:
        """Read the proposals of an image of height x width pixels.

        Raises UserError for a file that is missing, damaged, or of an image of another size.
        """
        return read_segments(_file_path(self.folder, image_id), height, width)


def missing_images(folder: Path, image_ids: Iterable[int]) -> tuple[list[int], int]:
    """Return the ids that have no file in the folder, and the number of all ids.

    The contents of the files are not checked.
    """
    ids = list(image_ids)
    # os.listdir, because a folder may have hundreds of thousands of files.
    names = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208
    return [number for number in ids if _file_path(folder, number).name not in names], len(ids)


def store_settings(folder: Path) -> dict[str, object] | None:
    """Read the settings that the segments of a folder were computed with.

    None if the folder is empty or missing. Raises UserError for a folder with other content.
    """
    path = folder / SETTINGS_FILE
    try:
        settings = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir()):
            raise UserError(
                f"{folder} exists and is no folder of segments (it has no {SETTINGS_FILE}):"
                " choose another folder"
            ) from None
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(
            f"{path}: not the settings of a folder of segments ({error}): choose another folder or"
            " delete this one"
        ) from error
    prefix = FORMAT.rpartition(" ")[0]
    if not isinstance(settings, dict) or not str(settings.get("format")).startswith(prefix):
        raise UserError(f"{path}: not the settings of a folder of segments: choose another folder")
    return settings


def check_settings(folder: Path, settings: Mapping[str, object]) -> None:
    """Check that the segments of the folder were computed with these settings.

    With a key `images`, which identifies the images of the dataset, the key `data` (the name of the
    dataset's file) is ignored, because a dataset may be moved. Older folders have no such key, and
    a path as `data`, of which the name is compared; sizes are checked when segments are read.

    settings: flat, plain values.

    Raises UserError, which names the keys that differ.
    """
    stored = store_settings(folder)
    if stored is None:
        return
    current = _with_format(settings)
    if "images" in current:
        if "images" in stored:
            stored["data"] = current.get("data")
        else:
            stored["images"] = current["images"]
            stored["data"] = Path(str(stored.get("data"))).name
    differences = describe_differences(stored, current)
    if differences:
        raise UserError(
            f"{folder} holds segments made with other settings ({differences}): choose another"
            " folder or delete this one"
        )


def write_store(
    folder: Path,
    jobs: SegmentJobs[Value],
    method: Callable[[Value], SegmentProposals],
    settings: Mapping[str, object],
    workers: int,
) -> WriteSummary:
    """Call `method` with what each job loads, and write the results.

    Images with a valid file are skipped. Whenever the call is interrupted, each file is complete,
    and the next call resumes; SIGTERM raises Interrupted.

    settings: flat, plain values that, with the images, determine the results.
    workers: number of processes; 0: one per CPU, 1: this process only. Results do not depend on it.

    Raises UserError if the folder was written with other settings, an image cannot be read, or the
    disk is full.
    """
    check_settings(folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be created ({error.strerror})") from error
    # Another job may have begun here with other settings: the second one must see the first's.
    with lock(folder / LOCK_NAME, f"{folder}: in use", lambda: None):
        check_settings(folder, settings)
        if not (folder / SETTINGS_FILE).exists():
            write_json(folder / SETTINGS_FILE, _with_format(settings))
    write = partial(_write_one, folder=folder, method=method)
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    results = (write(job) for job in jobs) if workers < 2 else run_pool(write, jobs, workers)
    try:
        with (
            sigterm_as_exception(),
            closing(results),
            tqdm(results, total=len(jobs), desc="segments", disable=None) as bar,
        ):
            cpu_seconds = [seconds for seconds in bar if seconds is not None]
    finally:
        with suppress(OSError):  # another process may still be writing there
            (folder / UNFINISHED_FOLDER).rmdir()
    return WriteSummary(len(cpu_seconds), sum(cpu_seconds) / max(len(cpu_seconds), 1))


def read_segments(path: Path, height: int, width: int) -> SegmentProposals:
    """Read the proposals of a file, of an image of height x width pixels.

    Nothing is decompressed before the sizes in the file are checked. Raises UserError for a file
    that is missing, damaged or of another size, UnreadableError if the system cannot read it.
    """
    advice = "delete it and run tools/propose.py again"
    try:
        with zipfile.ZipFile(path) as archive:
            header = _read_array(archive, "shape", MAX_HEADER_BYTES, ("<i8",))
            rows, columns, count, superpixels = (int(side) for side in header)
            if (rows, columns) != (height, width):
                raise UserError(
                    f"{path}: these are segments of an image of {rows} x {columns}"
                    f" (height x width), not {height} x {width}; {advice}"
                )
            if min(count, superpixels) < 0 or count * superpixels > MAX_MEMBERS:
                raise ValueError(f"{count} segments of {superpixels} superpixels")
            numbers = _read_array(archive, "labels", 4 * height * width, ("<u2", "<i4"))
            labels = numbers.reshape(height, width).astype(np.int32)
            row_bytes = -(-superpixels // 8)
            packed = _read_array(archive, "members", count * row_bytes, ("|u1",))
            packed = packed.reshape(count, row_bytes)
            members = np.unpackbits(packed.view(np.uint8), axis=1, count=superpixels)
        if labels.min() < 0 or labels.max() >= superpixels:
            raise ValueError(
                f"superpixels {labels.min()}..{labels.max()}, the members are those of"
                f" 0..{superpixels - 1}"
            )
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: there are no segments of this image; run tools/propose.py to create them"
        ) from error
    except Exception as error:  # zipfile raises almost anything on damaged data
        # A damaged archive may point outside its file; seeking there raises EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UnreadableError(
                f"{path}: the segments cannot be read ({error.strerror})"
            ) from error
        raise UserError(
            f"{path}: the segments are damaged ({describe_error(error)}); {advice}"
        ) from error
    return SegmentProposals(labels, members.view(bool))


def _read_array(
    archive: zipfile.ZipFile, name: str, max_bytes: int, dtypes: Sequence[str]
) -> NDArray[np.integer]:
    """Read an array of one of `dtypes` with at most `max_bytes` of data.

    Reads to the end of the member, so that its checksum is verified. Raises ValueError.
    """
    info = archive.getinfo(f"{name}.npy")
    compressions = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if info.file_size > max_bytes + MAX_HEADER_BYTES or info.compress_type not in compressions:
        raise ValueError(f"{name} has {info.file_size} bytes, at most {max_bytes} are expected")
    with archive.open(info) as stream:
        # The limit holds whatever the compressed data expands to.
        content = stream.read(info.file_size)
    start = io.BytesIO(content)
    np.lib.format.read_magic(start)
    shape, _, dtype = np.lib.format.read_array_header_1_0(start)
    num_bytes = len(content) - start.tell()
    if dtype.str not in dtypes or math.prod(shape) * dtype.itemsize != num_bytes:
        raise ValueError(f"{name} is {dtype.str} {list(shape)} in {len(content)} bytes")
    return np.frombuffer(content, dtype, offset=start.tell()).reshape(shape)


def _file_path(folder: Path, image_id: int) -> Path:
    return folder / f"{image_id}.npz"


def _with_format(settings: Mapping[str, object]) -> dict[str, object]:
    """Add the format, and convert the values to what JSON returns (tuples become lists)."""
    return dict(json.loads(json.dumps({"format": FORMAT, **settings})))


def _write_one(
    job: SegmentJob[Value], *, folder: Path, method: Callable[[Value], SegmentProposals]
) -> float | None:
    """Compute and write the segments of one image. Runs in a worker process.

    -> CPU seconds, None if the file already exists and is valid.
    """
    path = _file_path(folder, job.image_id)
    try:
        read_segments(path, job.height, job.width)
        return None
    except UnreadableError:
        raise
    except UserError:  # missing, damaged, or of another size
        pass
    start = time.process_time()
    proposals = method(job.load())
    seconds = time.process_time() - start
    labels = proposals.labels
    num_superpixels = proposals.members.shape[1]
    if (
        labels.shape != (job.height, job.width)
        or labels.min() < 0
        or labels.max() >= num_superpixels
    ):
        raise ValueError(
            f"{path}: labels {labels.shape} do not fit the image or members"
            f" {proposals.members.shape}"
        )
    _write_segments(path, proposals)
    return seconds


def _write_segments(path: Path, proposals: SegmentProposals) -> None:
    """Write a file atomically. Raises UserError."""
    count, superpixels = proposals.members.shape
    if count * superpixels > MAX_MEMBERS:
        raise UserError(
            f"{path}: {count} segments of {superpixels} superpixels are too many;"
            " method.max_proposals limits them to the best"
        )
    dtype = "<u2" if superpixels <= 2**16 else "<i4"
    shape = np.array([*proposals.labels.shape, count, superpixels], dtype="<i8")
    labels = proposals.labels.astype(dtype)
    members = np.packbits(proposals.members, axis=1)
    # A folder of its own, because `replacing` searches the folder for leftovers of killed runs: in
    # the store, it would list all files for each file.
    unfinished = path.parent / UNFINISHED_FOLDER / path.name
    for is_last_attempt in (False, True):
        try:
            unfinished.parent.mkdir(exist_ok=True)
            with replacing(unfinished, "the segments") as file:
                np.savez_compressed(file, shape=shape, labels=labels, members=members)
            # Another process may have written the same file and moved it.
            with suppress(FileNotFoundError):
                unfinished.replace(path)
            return
        except OSError as error:
            raise UserError(
                f"{path}: the segments could not be written ({error.strerror}); the next run"
                " resumes here"
            ) from error
        except UserError as error:
            # A machine that has finished may remove the folder before there is a file in it.
            if is_last_attempt or not isinstance(error.__cause__, FileNotFoundError):
                raise
