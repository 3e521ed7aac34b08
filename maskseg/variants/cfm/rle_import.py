"""Segment proposals of another program, from a JSON file of masks in COCO's results format."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from maskseg.data.coco.checks import ImageRecord
from maskseg.data.coco.packed_segmentations import (
    MIN_COORDINATES,
    NONE,
    RLE,
    SegmentationError,
    SegmentationPacker,
    clip_polygon,
)
from maskseg.data.coco.parse import as_int64
from maskseg.data.image_files import MAX_PIXELS
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.masks.superpixel import SegmentProposals
from maskseg.ops import rle
from maskseg.ops.rle import Ints
from maskseg.superpixels.methods import relabel

BLOCK = 2**22  # pixels per block of lookups


@dataclass(frozen=True)
class MaskJob:
    """The proposals of an image, the best first. The argument of `segments_from_masks`.

    ends: for each mask, the column-major pixel indices at which it begins and ends, i64 [n].
    """

    image_id: int
    height: int
    width: int
    ends: list[Ints]

    def load(self) -> MaskJob:
        """Return the job itself: the file has already been read."""
        return self


class RleFile:
    """The proposals of a JSON list of {"image_id", "segmentation", "score"}.

    Segmentations are RLE, compressed or not, or polygons, which are clipped to the image. Iterating
    yields one job per image.

    images: the images to yield.
    known: all images that the file may refer to.
    max_proposals: at most this many masks per image, the best by score; of equal scores, the
        earlier one. Masks without a pixel are dropped.
    max_pixels: largest permitted size of an RLE.

    Raises UserError, which names the index of the entry (from 0), for a file of another form, an
    unknown image, a mask of another size, or a mask that cannot be decoded.
    """

    def __init__(
        self,
        path: Path,
        images: Sequence[ImageRecord],
        known: Iterable[ImageRecord],
        max_proposals: int,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.path = path
        self.images = list(images)
        self.max_proposals = max_proposals
        self._known = {record.id: record for record in known}
        self._packer = SegmentationPacker(max_pixels)
        self._ids = array("q")
        self._scores = array("d")
        self._read()
        self._packed = self._packer.to_segmentations()
        self._rows = self._rows_by_image()
        for row in range(len(self._ids)):
            self._decode(row)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[MaskJob]:
        for record in self.images:
            decoded = map(self._decode, self._rows[record.id].tolist())
            nonempty = (ends for ends in decoded if len(ends))
            best = list(islice(nonempty, self.max_proposals))
            yield MaskJob(record.id, record.height, record.width, best)

    def _rows_by_image(self) -> dict[int, Ints]:
        """The entries of each image, by descending score."""
        # lexsort is stable: by image, then by score, then by position in the file.
        rows = np.lexsort((-np.array(self._scores), np.array(self._ids)))
        ids = np.array(self._ids, dtype=np.int64)[rows]
        image_ids = [record.id for record in self.images]
        starts = np.searchsorted(ids, image_ids, "left")
        ends = np.searchsorted(ids, image_ids, "right")
        return {
            image_id: rows[start:end]
            for image_id, start, end in zip(image_ids, starts, ends, strict=True)
        }

    def _read(self) -> None:
        """Parse the file.

        Entries are packed during parsing: as Python objects, they would take many times the size of
        the file.
        """
        try:
            tree = parse_json(self.path.read_text(encoding="utf-8-sig"), object_hook=self._pack)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: not JSON: the file is cut short or damaged ({error})"
            ) from error
        # `_pack` has replaced each entry by None; anything else is not an entry.
        is_list = isinstance(tree, list)
        if not is_list or any(entry is not None for entry in tree) or len(tree) != len(self._ids):
            raise UserError(
                f'{self.path}: not a JSON list of {{"image_id", "segmentation", "score"}}'
            )

    def _pack(self, values: dict[str, Any]) -> Any:
        """Pack an entry and return None; return any other object of the file unchanged.

        The JSON parser calls this for every object, inner ones first.
        """
        if "image_id" not in values:
            return values
        entry = f"{self.path}: entry {len(self._ids)}"
        image_id = as_int64(values["image_id"])
        score = values.get("score")
        if image_id is None or image_id not in self._known:
            text = f"{values['image_id']!r}"[:80]
            raise UserError(f"{entry}: image {text} is not in the dataset")
        if not _is_finite(score):
            text = f"{score!r}"[:80]
            raise UserError(f"{entry} (image {image_id}): the score is not a number but {text}")
        self._ids.append(image_id)
        self._scores.append(score)
        try:
            self._packer.add(values.get("segmentation"))
        except SegmentationError as error:
            raise _entry_error(entry, image_id, error) from error
        return None

    def _decode(self, row: int) -> Ints:
        """Return where the mask of an entry begins and ends, see `_change_points`."""
        record = self._known[self._ids[row]]
        packed = self._packed
        try:
            if packed.kinds[row] == NONE:
                raise SegmentationError("there is no segmentation")
            if packed.kinds[row] != RLE:
                return _rasterize(self._polygons(row), record)
            size = (packed.heights[row], packed.widths[row])
            if size != (record.height, record.width):
                raise SegmentationError(
                    "RLE of another size than its image",
                    f"{size[0]} x {size[1]}, the image is {record.height} x {record.width}"
                    " (height x width)",
                )
            return _change_points(packed.counts(row))
        except SegmentationError as error:
            raise _entry_error(f"{self.path}: entry {row}", record.id, error) from error

    def _polygons(self, row: int) -> Polygons:
        """Return the polygons of an entry. Raises SegmentationError."""
        packed = self._packed
        first, last = packed.part_starts[row : row + 2]
        starts = packed.coord_starts
        lengths = np.diff(starts[first : last + 1])
        if not np.isfinite(packed.coords[starts[first] : starts[last]]).all():
            raise SegmentationError("polygon with NaN or infinity")
        if (lengths % 2 == 1).any() or (lengths < MIN_COORDINATES).any():
            raise SegmentationError(
                "polygon with an odd number of coordinates or of fewer than 3 points"
            )
        return Polygons(packed.polygons(row))


def segments_from_masks(job: MaskJob) -> SegmentProposals:
    """Express masks as sets of superpixels.

    A superpixel is a set of pixels that are in the same masks; without any mask, the whole image.
    """
    # Each mask gets a random number of 128 bits. A pixel's code is the exclusive or of the numbers
    # of its masks, which changes only where a mask begins or ends.
    keys = np.random.default_rng(0).integers(2**64, size=(len(job.ends), 2), dtype=np.uint64)
    codes = np.zeros((job.height * job.width, 2), dtype=np.uint64)
    for ends, key in zip(job.ends, keys, strict=True):
        codes[ends] ^= key
    codes = np.bitwise_xor.accumulate(codes, axis=0)
    code_index = np.unique(codes.view([("", np.uint64)] * 2), return_inverse=True)[1]
    labels = relabel(code_index.reshape(job.width, job.height).T)
    count = int(labels.max()) + 1
    # One pixel of each superpixel tells which masks contain all of it.
    pixels = np.empty(count, dtype=np.int64)
    pixels[labels.ravel()] = np.arange(labels.size)
    y, x = np.divmod(pixels, job.width)
    members = np.zeros((len(job.ends), count), dtype=bool)
    block_size = max(1, BLOCK // count)
    for start in range(0, len(members), block_size):
        block = job.ends[start : start + block_size]
        members[start : start + block_size] = rle.contains_points(
            block,
            np.full(len(block), job.height, dtype=np.int64),
            np.full(len(block), job.width, dtype=np.int64),
            np.tile(x, (len(block), 1)),
            np.tile(y, (len(block), 1)),
        )
    return SegmentProposals(labels, members)


def _is_finite(score: object) -> TypeGuard[int | float]:
    """Whether a score is a finite number. JSON also has integers that are too large for a float."""
    if not isinstance(score, int | float) or isinstance(score, bool):
        return False
    return abs(score) <= sys.float_info.max  # false for NaN


def _rasterize(polygons: Polygons, record: ImageRecord) -> Ints:
    """Rasterize polygons, clipped to the image, see `_change_points`."""
    clipped = [clip_polygon(part, record.height, record.width) for part in polygons.parts]
    parts = tuple(part for part in clipped if len(part))
    if not parts:
        return np.zeros(0, dtype=np.int64)
    masks = AnnotatedMasks.from_file([Polygons(parts)], record.height, record.width)
    counts = masks.to_rle()[0]["counts"]
    return _change_points(rle.counts_from_string(counts.encode()))


def _change_points(counts: Ints) -> Ints:
    """Convert run lengths to the column-major indices where a mask begins and ends, ascending.

    Without the end of the image; empty for a mask without a pixel.
    """
    ends, times = np.unique(np.cumsum(counts), return_counts=True)
    # Runs of length 0 repeat an end; an even number of changes at one index cancels out.
    return np.asarray(ends[:-1][times[:-1] % 2 == 1])


def _entry_error(entry: str, image_id: int, error: SegmentationError) -> UserError:
    detail = f" ({error.detail})" if error.detail else ""
    return UserError(f"{entry} (image {image_id}): {error.kind}{detail}")
