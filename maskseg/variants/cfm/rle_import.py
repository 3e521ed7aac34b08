"""Segment proposals that another program made, from a JSON file of masks in the form of COCO's results."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from maskseg.data.coco.checks import ImageRecord
from maskseg.data.coco.packed_segmentations import (
    MIN_COORDINATES,
    NONE,
    RLE,
    Packer,
    SegmentationError,
    clip_polygon,
)
from maskseg.data.coco.parse import integer
from maskseg.data.image_files import MAX_PIXELS
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.masks.annotated import FileMasks, Polygons
from maskseg.masks.superpixel import SegmentProposals
from maskseg.ops import rle as runs
from maskseg.ops.rle import Ints
from maskseg.superpixels.methods import renumbered

BLOCK = 2**22  # pixels that are looked up together


@dataclass(frozen=True)
class RunJob:
    """The proposals of an image, the best first: of each the pixels, down the columns, at which it begins and ends. `from_runs` takes it."""

    image_id: int
    height: int
    width: int
    ends: list[Ints]

    def load(self) -> RunJob:
        """Itself: all of it was in the file."""
        return self


class RleFile:
    """The proposals of a JSON list of {"image_id", "segmentation", "score"}: RLE, compressed or not, or polygons, which are cut at the border.

    images: those that are asked for, one job each; known: all that the file may name. max_proposals: of each image the best so many by score, the
    earlier one of equal ones; masks without a pixel are left out. Raises UserError, which names the place of the entry (from 0), for a file that is
    none, an image that is not known, a mask of another size, or one that cannot be decoded.
    """

    def __init__(
        self,
        path: Path,
        images: Sequence[ImageRecord],
        known: Iterable[ImageRecord],
        max_proposals: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path, self.images, self.max_proposals = path, list(images), max_proposals
        self._known = {record.id: record for record in known}
        self._packer, self._ids, self._scores = Packer(max_pixels), array("q"), array("d")
        self._read()
        self._packed = self._packer.packed()
        rows = np.lexsort(
            (-np.array(self._scores), np.array(self._ids))
        )  # stable: by image, then by score
        ids = np.array(self._ids, dtype=np.int64)[rows]
        wanted = [record.id for record in self.images]
        first, last = (np.searchsorted(ids, wanted, side) for side in ("left", "right"))
        self._rows = {number: rows[a:b] for number, a, b in zip(wanted, first, last, strict=True)}
        for row in range(len(self._ids)):
            self._ends(row)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[RunJob]:
        for record in self.images:
            found = (ends for ends in map(self._ends, self._rows[record.id].tolist()) if len(ends))
            yield RunJob(
                record.id, record.height, record.width, list(islice(found, self.max_proposals))
            )

    def _read(self) -> None:
        """Entries are packed while the JSON is parsed: as Python objects they would take many times the file."""
        try:
            tree = parse_json(self.path.read_text(encoding="utf-8-sig"), object_hook=self._pack)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: not JSON: the file is cut short or damaged ({error})"
            ) from error
        if (
            not isinstance(tree, list)
            or any(entry is not None for entry in tree)
            or len(tree) != len(self._ids)
        ):
            raise UserError(
                f'{self.path}: not a JSON list of {{"image_id", "segmentation", "score"}}'
            )

    def _pack(self, values: dict[str, Any]) -> Any:
        """Every object of the file comes by here, inner ones first. -> None for an entry, which is packed."""
        if "image_id" not in values:
            return values
        place, number, score = (
            f"{self.path}: entry {len(self._ids)}",
            integer(values["image_id"]),
            values.get("score"),
        )
        if number is None or number not in self._known:
            raise UserError(f"{place}: image {values['image_id']!r} is not in the data set")
        if (
            not isinstance(score, int | float)
            or isinstance(score, bool)
            or not math.isfinite(score)
        ):
            raise UserError(f"{place} (image {number}): the score is not a number but {score!r}")
        self._ids.append(number)
        self._scores.append(score)
        try:
            self._packer.add(values.get("segmentation"))
        except SegmentationError as error:
            raise _refused(place, number, error) from error
        return None

    def _ends(self, row: int) -> Ints:
        """Of an entry, as `_of_counts` has them."""
        record, packed = self._known[self._ids[row]], self._packed
        try:
            if packed.kinds[row] == NONE:
                raise SegmentationError("there is no segmentation")
            if packed.kinds[row] != RLE:
                return _rasterised(self._polygons(row), record)
            if (packed.heights[row], packed.widths[row]) != (record.height, record.width):
                stated = f"{packed.heights[row]} x {packed.widths[row]}, the image is {record.height} x {record.width} (height x width)"
                raise SegmentationError("RLE of another size than its image", stated)
            return _of_counts(packed.counts(row))
        except SegmentationError as error:
            raise _refused(f"{self.path}: entry {row}", record.id, error) from error

    def _polygons(self, row: int) -> Polygons:
        packed = self._packed
        first, last = packed.part_starts[row : row + 2]
        lengths = np.diff(packed.coord_starts[first : last + 1])
        if not np.isfinite(
            packed.coords[packed.coord_starts[first] : packed.coord_starts[last]]
        ).all():
            raise SegmentationError("polygon with NaN or infinity")
        if (lengths % 2 == 1).any() or (lengths < MIN_COORDINATES).any():
            raise SegmentationError(
                "polygon with an odd number of coordinates or of fewer than 3 points"
            )
        return Polygons(packed.polygons(row))


def from_runs(job: RunJob) -> SegmentProposals:
    """The masks over superpixels that are the sets of pixels in the same masks; without any mask, over one."""
    # Each mask has a number of 128 random bits; a pixel's is the exclusive or of those of its masks, which change where runs end.
    keys = np.random.default_rng(0).integers(2**64, size=(len(job.ends), 2), dtype=np.uint64)
    codes = np.zeros((job.height * job.width, 2), dtype=np.uint64)
    for ends, key in zip(job.ends, keys, strict=True):
        codes[ends] ^= key
    codes = np.bitwise_xor.accumulate(codes, axis=0)
    which = np.unique(codes.view([("", np.uint64)] * 2), return_inverse=True)[1]
    labels = renumbered(which.reshape(job.width, job.height).T)
    count = int(labels.max()) + 1
    pixels = np.empty(count, dtype=np.int64)
    pixels[labels.ravel()] = np.arange(labels.size)  # one of each superpixel
    y, x = np.divmod(pixels, job.width)
    members = np.zeros((len(job.ends), count), dtype=bool)
    block = max(1, BLOCK // count)
    for start in range(0, len(members), block):
        some = job.ends[start : start + block]
        sides = (np.full(len(some), side, dtype=np.int64) for side in (job.height, job.width))
        members[start : start + block] = runs.inside(
            some, *sides, *(np.tile(c, (len(some), 1)) for c in (x, y))
        )
    return SegmentProposals(labels, members)


def _rasterised(polygons: Polygons, record: ImageRecord) -> Ints:
    parts = tuple(
        part
        for part in (clip_polygon(p, record.height, record.width) for p in polygons.parts)
        if len(part)
    )
    if not parts:
        return np.zeros(0, dtype=np.int64)
    (rle,) = FileMasks.from_file([Polygons(parts)], record.height, record.width).to_rle()
    return _of_counts(runs.counts_from_string(rle["counts"].encode()))


def _of_counts(counts: Ints) -> Ints:
    """Where a mask begins and ends along its columns, ascending, the end of the image left out: nothing for a mask without a pixel."""
    ends, times = np.unique(np.cumsum(counts), return_counts=True)
    return np.asarray(
        ends[:-1][times[:-1] % 2 == 1]
    )  # an even number of runs that end at one place changes nothing


def _refused(place: str, image_id: int, error: SegmentationError) -> UserError:
    return UserError(
        f"{place} (image {image_id}): {error.kind}{f' ({error.detail})' if error.detail else ''}"
    )
