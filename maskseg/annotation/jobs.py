"""Mask requests of a data set, processed image by image in several processes and resumable.

Results are kept in a journal, a text file with a line of settings and then a line per image. An
incomplete last line is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maskseg.data.coco.file import Annotations, CocoFile
from maskseg.data.process_pool import (
    ImageJob,
    describe_differences,
    run_pool,
    sigterm_as_exception,
)
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.base import Rle, encode_rle, rle_to_bitmaps

Result = TypeVar("Result")  # of the work on an image, JSON-serializable
FORMAT = "maskseg annotations 1"
MODES = ("object", "class")


@dataclass(frozen=True)
class MaskRequest:
    """A mask to compute: of an object in a box, or of a class in the image (box None).

    id: of the annotation, 0 for a class; label: in 0..K-1; box: xyxy; ground_truth: the mask, if
    there is one.
    """

    id: int
    label: int
    box: tuple[float, float, float, float] | None = None
    ground_truth: Rle | None = None

    def ground_truth_mask(self) -> NDArray[np.bool_] | None:
        """The ground truth, bool [H, W]."""
        return None if self.ground_truth is None else rle_to_bitmaps([self.ground_truth])[0]


@dataclass(frozen=True)
class AnnotationJob(ImageJob):
    """An image file and the masks to compute for it."""

    requests: tuple[MaskRequest, ...] = ()


def annotation_jobs(
    file: CocoFile,
    root: str,
    max_pixels: int,
    by: str,
    ground_truth: bool,
    max_images: int | None = None,
    only_missing: bool = False,
) -> Iterator[AnnotationJob]:
    """Generate the jobs of the first `max_images` images of a file, including images without masks.

    by: one of MODES: `object` requests a mask per box, `class` a mask per class of an image. Crowds
    are not objects, but count for the classes. ground_truth: attach the masks of the file; objects
    without a mask are dropped, and so are classes of an image with such objects. only_missing:
    request no mask for objects that have one, and for classes of an image whose objects all have.
    """
    for index, record in enumerate(file.images[:max_images]):
        annotations = file.annotations(index)
        rles: list[Rle | None] = [None] * len(annotations)
        if ground_truth:
            rles = _encode_masks(annotations, record.height, record.width)
        has_mask = [only_missing and shape is not None for shape in annotations.shapes]
        if by == "object":
            requests = _object_requests(annotations, rles, has_mask)
        else:
            requests = _class_requests(annotations, rles, has_mask)
        if ground_truth:
            requests = [request for request in requests if request.ground_truth is not None]
        yield AnnotationJob(
            record.id,
            record.height,
            record.width,
            root,
            record.file_name,
            max_pixels,
            tuple(requests),
        )


def _encode_masks(annotations: Annotations, height: int, width: int) -> list[Rle | None]:
    """The mask of each annotation of an image, None for annotations without one."""
    rles: list[Rle | None] = [None] * len(annotations)
    rows = [i for i, shape in enumerate(annotations.shapes) if shape is not None]
    shapes = [shape for shape in annotations.shapes if shape is not None]
    masks = AnnotatedMasks.from_file(shapes, height, width)
    for row, rle in zip(rows, masks.to_rle(), strict=True):
        rles[row] = rle
    return rles


def _object_requests(
    annotations: Annotations, rles: Sequence[Rle | None], has_mask: Sequence[bool]
) -> list[MaskRequest]:
    """A request for each object. has_mask: the objects that need none."""
    requests = []
    for row, rle in enumerate(rles):
        if not annotations.crowd[row] and not has_mask[row]:
            x1, y1, x2, y2 = map(float, annotations.boxes[row])
            annotation_id = int(annotations.ids[row])
            label = int(annotations.labels[row])
            requests.append(MaskRequest(annotation_id, label, (x1, y1, x2, y2), rle))
    return requests


def _class_requests(
    annotations: Annotations, rles: Sequence[Rle | None], has_mask: Sequence[bool]
) -> list[MaskRequest]:
    """A request for each class. has_mask: a class needs none where all its objects have one."""
    requests = []
    lacks_mask = ~np.array(has_mask, dtype=bool)
    for label in sorted(set(annotations.labels[lacks_mask].tolist())):
        union = _union(rles, annotations.labels == label)
        requests.append(MaskRequest(0, label, None, union))
    return requests


def _union(rles: Sequence[Rle | None], rows: NDArray[np.bool_]) -> Rle | None:
    """Union of the masks of the selected rows; None if one of them has no mask."""
    selected = []
    for rle, is_selected in zip(rles, rows.tolist(), strict=True):
        if not is_selected:
            continue
        if rle is None:
            return None
        selected.append(rle)
    return encode_rle(np.asarray(rle_to_bitmaps(selected).any(axis=0)))[0]


def sha256_of(path: Path) -> str:
    """SHA-256 checksum of a file, in hexadecimal. Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def run_jobs(
    jobs: Sequence[AnnotationJob],
    work: Callable[[AnnotationJob], Result],
    journal: Path,
    settings: Mapping[str, object],
    workers: int,
    description: str,
) -> dict[int, Result]:
    """Call `work` with each job that has no result in the journal yet, and record the results.

    Args:
        jobs: one per image.
        work: returns a JSON-serializable result; all numbers must be finite.
        journal: stays after the call; the caller removes it once the results are safe.
        settings: flat plain values that determine the results.
        workers: number of processes; 0: one per CPU, 1: this process. It does not affect results.
        description: of the progress bar.

    Returns image id -> result. SIGTERM raises Interrupted. Raises UserError for a journal with
    other settings, an image that cannot be read, or a full disk.
    """
    results: dict[int, Result] = _open_journal(journal, settings)
    remaining = [job for job in jobs if job.image_id not in results]
    workers = min(workers or os.cpu_count() or 1, len(remaining))
    run = partial(_run_job, work=work)
    if workers < 2:
        new_results = (run(job) for job in remaining)
    else:
        new_results = run_pool(run, remaining, workers)
    try:
        with (
            journal.open("a", encoding="utf-8") as lines,
            sigterm_as_exception(),
            closing(new_results),
        ):
            for image_id, result in tqdm(
                new_results,
                total=len(jobs),
                initial=len(jobs) - len(remaining),
                desc=description,
                disable=None,
            ):
                lines.write(json.dumps([image_id, result], allow_nan=False) + "\n")
                lines.flush()
                results[image_id] = result
            os.fsync(lines.fileno())
    except OSError as error:
        raise UserError(
            f"{journal}: cannot be written ({error.strerror}); results so far are kept, "
            "the next run resumes from them"
        ) from error
    return {job.image_id: results[job.image_id] for job in jobs}


def _run_job(job: AnnotationJob, *, work: Callable[[AnnotationJob], Result]) -> tuple[int, Result]:
    return job.image_id, work(job)


def _open_journal(journal: Path, settings: Mapping[str, object]) -> dict[int, Any]:
    """Read the results of an earlier run with the same settings, or start a new journal.

    An incomplete last line is cut off, as is everything from a damaged line on.
    """
    header = json.loads(json.dumps({"format": FORMAT, **settings}))
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        text = journal.read_bytes() if journal.exists() else b""
        lines: list[Any] = []
        length = 0
        for line in text.split(b"\n")[:-1]:
            try:
                entry = parse_json(line)
            except ValueError:
                break
            if lines and not _is_result(entry):
                break
            lines.append(entry)
            length += len(line) + 1
        if not lines:
            with journal.open("w", encoding="utf-8") as file:
                file.write(json.dumps(header) + "\n")
            return {}
        _check_header(journal, lines[0], header)
        os.truncate(journal, length)
    except OSError as error:
        raise UserError(f"{journal}: cannot be written ({error.strerror})") from error
    return dict(lines[1:])


def _is_result(entry: object) -> bool:
    """Whether a line of a journal is an image id and a result."""
    return isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int


def _check_header(journal: Path, stored: object, current: Mapping[str, object]) -> None:
    """Raise UserError for a file that is not a journal, or whose settings differ."""
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UserError(f"{journal}: not the journal of an unfinished run: choose another output")
    differences = describe_differences(stored, current)
    if differences:
        raise UserError(
            f"{journal}: an unfinished run had other settings ({differences}): delete it or choose "
            "another output"
        )
