"""Work on the objects of a data set, image by image, in several processes, which goes on after a kill.

What is done is kept in a journal, a text file: a line of settings, then a line an image. A line that was cut off counts as not there.
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
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maskseg.data.coco.file import CocoFile
from maskseg.data.process_pool import ImageJob, differences, pooled, terminable
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.masks.annotated import FileMasks
from maskseg.masks.base import Rle, encoded, rle_to_bitmaps

FORMAT = "maskseg annotations 1"
BY = ("object", "class")


@dataclass(frozen=True)
class Wanted:
    """What a mask is wanted of: an object in a box, or a class in the image (box None).

    id: the annotation's; 0 for a class; label: in 0..K-1; truth: its mask, where there is one.
    """

    id: int
    label: int
    box: tuple[float, float, float, float] | None = None
    truth: Rle | None = None

    def true_mask(self) -> NDArray[np.bool_] | None:
        """bool [H, W]."""
        return None if self.truth is None else rle_to_bitmaps([self.truth])[0]


@dataclass(frozen=True)
class AnnotationJob(ImageJob):
    """An image file and what masks are wanted of in it."""

    wanted: tuple[Wanted, ...] = ()


def annotation_jobs(
    file: CocoFile, root: str, max_pixels: int, by: str, truth: bool, most: int | None = None
) -> Iterator[AnnotationJob]:
    """The jobs of the (first `most`) images of a file, one after the other, images without any too; crowds are no objects, but show their class.

    by: `object`, each by its box, or `class`, each class of an image once; truth: with the masks of the file; objects without one, and classes of an
    image whose objects do not all have one, are then left out.
    """
    for index, record in enumerate(file.images[:most]):
        found = file.annotations(index)
        rles: list[Rle | None] = [None] * len(found)
        if truth:
            there = [i for i, shape in enumerate(found.shapes) if shape is not None]
            shapes = [shape for shape in found.shapes if shape is not None]
            for i, rle in zip(
                there,
                FileMasks.from_file(shapes, record.height, record.width).to_rle(),
                strict=True,
            ):
                rles[i] = rle
        if by == "object":
            boxes = [tuple(map(float, box)) for box in found.boxes]
            rows = zip(
                found.ids.tolist(),
                found.labels.tolist(),
                boxes,
                rles,
                found.crowd.tolist(),
                strict=True,
            )
            wanted = [
                Wanted(number, label, cast(Any, box), rle)
                for number, label, box, rle, crowd in rows
                if not crowd
            ]
        else:
            wanted = [
                Wanted(0, label, None, _union(rles, found.labels == label))
                for label in sorted(set(found.labels.tolist()))
            ]
        wanted = [one for one in wanted if one.truth is not None or not truth]
        yield AnnotationJob(
            record.id,
            record.height,
            record.width,
            root,
            record.file_name,
            max_pixels,
            tuple(wanted),
        )


def _union(rles: Sequence[Rle | None], rows: NDArray[np.bool_]) -> Rle | None:
    """Of the masks of some rows; None where one has none."""
    own = [rle for rle, here in zip(rles, rows.tolist(), strict=True) if here]
    if any(rle is None for rle in own):
        return None
    return encoded(np.asarray(rle_to_bitmaps(cast("list[Rle]", own)).any(axis=0)))[0]


def file_mark(path: Path) -> str:
    """What changes with a file's content. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def work_through(
    jobs: Sequence[AnnotationJob],
    work: Callable[[AnnotationJob], Any],
    journal: Path,
    settings: Mapping[str, Any],
    workers: int,
    what: str,
) -> dict[int, Any]:
    """Calls `work` with each job whose result is not in the journal, and writes that there. -> image id -> result.

    work: -> plain values, not a number that is not finite; settings: flat, plain values that the results follow from; workers: processes, 0 for one
    a CPU, 1 for this one alone: the results do not depend on it; what: on the progress bar. SIGTERM raises Interrupted. The journal stays:
    whoever has kept the results removes it. Raises UserError for a journal of other settings, an image that cannot be read, a disk that is full.
    """
    results = _begin(journal, settings)
    left = [job for job in jobs if job.image_id not in results]
    workers = min(workers or os.cpu_count() or 1, len(left))
    make = partial(_make, work=work)
    made = (make(job) for job in left) if workers < 2 else pooled(make, left, workers)
    try:
        with journal.open("a", encoding="utf-8") as lines, terminable(), closing(made):
            for number, result in tqdm(
                made, total=len(jobs), initial=len(jobs) - len(left), desc=what, disable=None
            ):
                lines.write(json.dumps([number, result], allow_nan=False) + "\n")
                lines.flush()
                results[number] = result
            os.fsync(lines.fileno())
    except OSError as error:
        raise UserError(
            f"{journal}: cannot be written ({error.strerror}); what was made is kept, the next run goes on"
        ) from error
    return {job.image_id: results[job.image_id] for job in jobs}


def _make(job: AnnotationJob, *, work: Callable[[AnnotationJob], Any]) -> tuple[int, Any]:
    return job.image_id, work(job)


def _begin(journal: Path, settings: Mapping[str, Any]) -> dict[int, Any]:
    """What an earlier run of the same settings left; the journal then ends with a whole line."""
    own = json.loads(json.dumps({"format": FORMAT, **settings}))
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        text = journal.read_bytes() if journal.exists() else b""
        lines, whole = [], 0
        for line in text.split(b"\n")[:-1]:
            try:
                lines.append(parse_json(line))
            except ValueError:
                break
            whole += len(line) + 1
        if not lines:
            with journal.open("w", encoding="utf-8") as file:
                file.write(json.dumps(own) + "\n")
            return {}
        _check(journal, lines[0], own)
        os.truncate(journal, whole)
    except OSError as error:
        raise UserError(f"{journal}: cannot be written ({error.strerror})") from error
    return {int(number): result for number, result in lines[1:]}


def _check(journal: Path, found: Any, own: Mapping[str, Any]) -> None:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{journal}: not the journal of an unfinished run: choose another output")
    if told := differences(found, own):
        raise UserError(
            f"{journal}: an unfinished run was made otherwise ({told}): delete it or choose another output"
        )
