"""Segment proposals of a data set on disk: a folder with one file an image, made in parallel; a run that was killed goes on where it was."""

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
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maskseg.data.process_pool import differences, pooled, terminable
from maskseg.errors import UserError
from maskseg.files import parse_json, replacing, write_json
from maskseg.masks.superpixel import SegmentProposals

FORMAT = "maskseg segments 1"
SETTINGS, UNFINISHED = "settings.json", "unfinished"
MAX_ENTRIES = 2**28  # of the members of one image, one byte each in memory
HEADER = 1024  # bytes of an array in a file that are not its numbers, at most
MAKES = "tools/propose.py makes"


class Job(Protocol):
    """An image that proposals are wanted of; height and width in pixels."""

    @property
    def image_id(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    def load(self) -> Any:
        """What the method is called with. Raises UserError."""


class Jobs(Protocol):
    """Some of them, made as they are asked for or not."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Job]: ...


@dataclass(frozen=True)
class Written:
    """made: images whose file was not there, or damaged; seconds: of a CPU that one of them took, 0 where none was made."""

    made: int
    seconds: float


class UnreadableError(UserError):
    """A file of segments that the system does not let one read: it may be whole, so it is not made again."""


class SegmentStore:
    """The folder that `write_store` made, for readers. It holds a path alone, so that each process of a loader may have one.

    images: id, height and width of those that are asked for. Raises UserError where one of them has no file.
    """

    def __init__(self, folder: Path | str, images: Iterable[tuple[int, int, int]]) -> None:
        self.folder = Path(folder)
        if store_settings(self.folder) is None:
            raise UserError(f"{folder}: no such folder of segments; {MAKES} one")
        lacking, count = missing(self.folder, (number for number, _, _ in images))
        if lacking:
            raise UserError(
                f"{folder} has no segments of image {lacking[0]} ({len(lacking)} of {count} images are missing); {MAKES} them"
            )

    def of(self, image_id: int, height: int, width: int) -> SegmentProposals:
        """Those of an image of height x width pixels. Raises UserError for a file that is missing, damaged, or of an image of another size."""
        return read_segments(_path(self.folder, image_id), height, width)


def missing(folder: Path, image_ids: Iterable[int]) -> tuple[list[int], int]:
    """Those of the ids that have no file in the folder, and how many ids there are. The files are not looked into."""
    wanted, names = list(image_ids), set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - a hundred thousand names
    return [number for number in wanted if _path(folder, number).name not in names], len(wanted)


def store_settings(folder: Path) -> dict[str, Any] | None:
    """What the segments of a folder were made with; None where it is empty or not there. Raises UserError for a folder of something else."""
    path = folder / SETTINGS
    try:
        found = parse_json(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir()):
            raise UserError(
                f"{folder} exists and is no folder of segments (it has no {SETTINGS}): choose another one"
            ) from None
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(
            f"{path}: not the settings of a folder of segments ({error}): choose another folder or delete this one"
        ) from error
    if not isinstance(found, dict) or not str(found.get("format")).startswith(
        FORMAT.rpartition(" ")[0]
    ):
        raise UserError(f"{path}: not the settings of a folder of segments: choose another folder")
    return found


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError, which names the keys, where the segments of the folder were made with other settings (flat, plain values).

    Where there is a key `images`, which says what the data set's images are, `data`, the name of its file, does not count: a data set may be moved.
    Folders that have no such key have a path as `data`, of which the name counts; sizes are checked where segments are read.
    """
    found, own = store_settings(folder), _with_format(settings)
    if found is not None and "images" in own:
        if "images" in found:
            found["data"] = own.get("data")
        else:
            found |= {"images": own["images"], "data": Path(str(found.get("data"))).name}
    told = "" if found is None else differences(found, own)
    if told:
        raise UserError(
            f"{folder} holds segments made otherwise ({told}): choose another folder or delete this one"
        )


def write_store(
    folder: Path,
    jobs: Jobs,
    method: Callable[[Any], SegmentProposals],
    settings: Mapping[str, Any],
    workers: int,
) -> Written:
    """Calls `method` with what each job loads and writes the results; an image whose file is there and in order is passed over.

    settings: flat, plain values by which the results follow from the images; workers: processes, 0 for one a CPU, 1 for this one alone. The results
    do not depend on their number. Whenever it is stopped, each file is whole, and the next call goes on; SIGTERM raises Interrupted.
    Raises UserError where the folder was made with other settings, an image cannot be read, or the disk is full.
    """
    check_settings(folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made ({error.strerror})") from error
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, _with_format(settings))
    make = partial(_make, folder=folder, method=method)
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    results = (make(job) for job in jobs) if workers < 2 else pooled(make, jobs, workers)
    try:
        with (
            terminable(),
            closing(results),
            tqdm(results, total=len(jobs), desc="segments", disable=None) as bar,
        ):
            taken = [seconds for seconds in bar if seconds is not None]
    finally:
        with suppress(OSError):  # another process may still write there
            (folder / UNFINISHED).rmdir()
    return Written(len(taken), sum(taken) / max(len(taken), 1))


def read_segments(path: Path, height: int, width: int) -> SegmentProposals:
    """The proposals of a file. Nothing is unpacked before the sizes that it states are found to be those of height x width pixels."""
    mend = f"delete it: {MAKES} it again"
    try:
        with zipfile.ZipFile(path) as archive:
            rows, columns, count, superpixels = (
                int(side) for side in _array(archive, "shape", HEADER, ("<i8",))
            )
            if (rows, columns) != (height, width):
                raise UserError(
                    f"{path}: these are segments of an image of {rows} x {columns} (height x width), not {height} x {width}; {mend}"
                )
            if min(count, superpixels) < 0 or count * superpixels > MAX_ENTRIES:
                raise ValueError(f"{count} segments of {superpixels} superpixels")
            labels = (
                _array(archive, "labels", 4 * height * width, ("<u2", "<i4"))
                .reshape(height, width)
                .astype(np.int32)
            )
            packed = -(-superpixels // 8)
            members = np.unpackbits(
                _array(archive, "members", count * packed, ("|u1",)).reshape(count, packed),
                axis=1,
                count=superpixels,
            )
        if labels.min() < 0 or labels.max() >= superpixels:
            raise ValueError(
                f"superpixels {labels.min()}..{labels.max()}, the members are those of 0..{superpixels - 1}"
            )
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: there are no segments of this image; {MAKES} them") from error
    except Exception as error:  # zip files raise almost anything on damaged data
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # EINVAL: it says that it goes on where no file can
            raise UnreadableError(
                f"{path}: the segments cannot be read ({error.strerror})"
            ) from error
        raise UserError(f"{path}: the segments are damaged ({error}); {mend}") from error
    return SegmentProposals(labels, members.view(bool))


def _array(archive: zipfile.ZipFile, name: str, most: int, kinds: Sequence[str]) -> NDArray[Any]:
    """An array of one of `kinds` of numbers, at most `most` bytes of them. Read to its end: the checksum tells of damage."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > most + HEADER or info.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError(f"{name} has {info.file_size} bytes, at most {most} are expected")
    with archive.open(info) as stream:
        content = stream.read(
            info.file_size
        )  # never more, whatever the compressed bytes would give
    start = io.BytesIO(content)
    np.lib.format.read_magic(start)
    shape, _, kind = np.lib.format.read_array_header_1_0(start)
    if kind.str not in kinds or math.prod(shape) * kind.itemsize != len(content) - start.tell():
        raise ValueError(f"{name} is {kind.str} {list(shape)} in {len(content)} bytes")
    return np.frombuffer(content, kind, offset=start.tell()).reshape(shape)


def _path(folder: Path, image_id: int) -> Path:
    return folder / f"{image_id}.npz"


def _with_format(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return dict(json.loads(json.dumps({"format": FORMAT, **settings})))


def _make(job: Job, *, folder: Path, method: Callable[[Any], SegmentProposals]) -> float | None:
    """-> the seconds of a CPU that it took, None where there was nothing to do. Runs in a worker."""
    path = _path(folder, job.image_id)
    try:
        read_segments(path, job.height, job.width)
        return None
    except UnreadableError:
        raise
    except UserError:  # not there, damaged, or of another size
        pass
    start = time.process_time()
    found = method(job.load())
    seconds = time.process_time() - start
    if (
        found.labels.shape != (job.height, job.width)
        or found.labels.min() < 0
        or found.labels.max() >= found.members.shape[1]
    ):
        raise ValueError(
            f"{path}: labels {found.labels.shape} do not go with the image or with members {found.members.shape}"
        )
    _write(path, found)
    return seconds


def _write(path: Path, found: SegmentProposals) -> None:
    count, superpixels = found.members.shape
    if count * superpixels > MAX_ENTRIES:
        raise UserError(
            f"{path}: {count} segments of {superpixels} superpixels are too many; method.max_proposals takes the best of them"
        )
    kind = "<u2" if superpixels <= 2**16 else "<i4"
    shape = np.array([*found.labels.shape, count, superpixels], dtype="<i8")
    labels, members = found.labels.astype(kind), np.packbits(found.members, axis=1)
    # Beside the others, the search for what killed runs left would go through all names of the folder, for each file.
    unfinished = path.parent / UNFINISHED / path.name
    for last in (False, True):
        try:
            unfinished.parent.mkdir(exist_ok=True)
            with replacing(unfinished, "the segments") as file:
                np.savez_compressed(file, shape=shape, labels=labels, members=members)
            with suppress(FileNotFoundError):  # another process has made the same and moved it
                unfinished.replace(path)
            return
        except OSError as error:
            raise UserError(
                f"{path}: the segments could not be written ({error.strerror}); the next run goes on"
            ) from error
        except UserError as error:  # another machine that was done may remove the folder before there is a file in it
            if last or not isinstance(error.__cause__, FileNotFoundError):
                raise
