"""The segmentations of a COCO file, packed into flat arrays.

COCO's training file has 55 million coordinates. As Python lists they take several gigabytes, and
every worker of a data loader copies them as soon as it touches the reference counts. Here they are
one array. Run lengths stay the compressed strings of the file until an image is requested.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from maskseg.masks.annotated import Polygons, RunLengths
from maskseg.masks.base import Rle, rle_from_counts
from maskseg.ops.rle import (
    Ints,
    boxes_from_counts,
    counts_from_string,
    counts_from_strings,
)

Floats = NDArray[np.float64]
NONE, POLYGONS, RLE = range(3)  # kinds of segmentations
MIN_COORDINATES = 6  # three points; a polygon with fewer has no area
_CHUNK = 1_000_000  # characters of RLEs that are decoded at once, to bound the memory
_COORDINATE_LIMIT = 1e7  # px; keeps the products in `clip_polygon` finite


class SegmentationError(ValueError):
    """An invalid segmentation: `kind` groups the problems of a file, `detail` is about this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


class SegmentationPacker:
    """Collects the segmentations of a file one by one, in the form in which JSON has them."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.kinds = array("b")
        self.part_counts = array("q")  # polygons of each row
        self.coord_counts = array("q")  # coordinates of each polygon
        self.coords = array("d")
        self.text_lengths = array("q")
        self.text = bytearray()
        self.heights = array("q")
        self.widths = array("q")

    def add(self, segmentation: object) -> None:
        """Add polygons, an RLE, or nothing (None, []).

        Raises SegmentationError for anything else; an empty row is added in that case.
        """
        parts: list[array[float]] = []
        text = b""
        height = 0
        width = 0
        try:
            if isinstance(segmentation, dict):
                text, height, width = self._parse_rle(segmentation)
            elif isinstance(segmentation, list):
                parts = [_parse_polygon(part) for part in segmentation]
            elif segmentation is not None:
                raise SegmentationError(
                    "segmentation that is neither polygons nor RLE", type(segmentation).__name__
                )
        finally:  # an invalid segmentation gets a row too: rows and annotations stay aligned
            self._append(parts, text, height, width)

    def _append(self, parts: list[array[float]], text: bytes, height: int, width: int) -> None:
        for part in parts:
            self.coords.extend(part)
            self.coord_counts.append(len(part))
        self.part_counts.append(len(parts))
        self.text += text
        self.text_lengths.append(len(text))
        self.heights.append(height)
        self.widths.append(width)
        if text:
            self.kinds.append(RLE)
        elif parts:
            self.kinds.append(POLYGONS)
        else:
            self.kinds.append(NONE)

    def _parse_rle(self, rle: Mapping[str, object]) -> tuple[bytes, int, int]:
        """Return compressed counts, height and width.

        The size is checked before the counts, so that a huge mask costs nothing.
        """
        height, width = self._parse_size(rle.get("size"))
        counts = rle.get("counts")
        if isinstance(counts, str) and counts:
            try:
                return counts.encode("ascii"), height, width
            except UnicodeEncodeError as error:
                raise SegmentationError(
                    "RLE that cannot be decoded", "characters outside ASCII"
                ) from error
        if not isinstance(counts, list) or not counts:
            raise SegmentationError("RLE without counts", f"counts {counts!r}"[:80])
        try:
            values = np.frombuffer(array("q", counts), dtype=np.int64)
        except (TypeError, OverflowError) as error:
            raise SegmentationError("RLE counts that are not integers", str(error)) from error
        check_counts(values, height, width)
        return rle_from_counts(values, height, width)["counts"].encode(), height, width

    def _parse_size(self, size: object) -> tuple[int, int]:
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(type(side) is int and side > 0 for side in size)
        ):
            raise SegmentationError(
                "RLE without a size of two positive integers", f"size {size!r}"[:80]
            )
        height, width = size
        if height * width > self.max_pixels:
            raise SegmentationError(
                "RLE of more pixels than data.max_pixels",
                f"{height} x {width}, the limit is {self.max_pixels}",
            )
        return height, width

    def to_segmentations(self) -> Segmentations:
        """Return everything that was added, as arrays."""
        # Not every numpy wraps an empty buffer.
        coords = np.frombuffer(self.coords, dtype=np.float64) if self.coords else np.zeros(0)
        text = np.frombuffer(self.text, dtype=np.uint8) if self.text else np.zeros(0, np.uint8)
        return Segmentations(
            kinds=np.array(self.kinds, dtype=np.int8),
            part_starts=_to_starts(self.part_counts),
            coord_starts=_to_starts(self.coord_counts),
            coords=coords,
            text_starts=_to_starts(self.text_lengths),
            text=text,
            heights=np.array(self.heights, dtype=np.int64),
            widths=np.array(self.widths, dtype=np.int64),
        )


@dataclass(frozen=True)
class Segmentations:
    """A segmentations in flat arrays.

    Row a consists of the polygons part_starts[a] : part_starts[a + 1], or of the characters
    text_starts[a] : text_starts[a + 1] of a compressed RLE.

    kinds: i8 [A], NONE, POLYGONS or RLE; part_starts: i64 [A + 1];
    coord_starts: i64 [polygons + 1], start of each polygon in `coords`;
    coords: f64 [numbers], alternating x and y, px;
    text_starts: i64 [A + 1]; text: u8 [characters];
    heights, widths: i64 [A], the sizes that the RLEs state, 0 for other kinds;
    clipped: for rows whose polygons cross the image's border, the clipped polygons.
    """

    kinds: NDArray[np.int8]
    part_starts: Ints
    coord_starts: Ints
    coords: Floats
    text_starts: Ints
    text: NDArray[np.uint8]
    heights: Ints
    widths: Ints
    clipped: dict[int, tuple[Floats, ...]] = field(default_factory=dict)

    def polygons(self, row: int) -> tuple[Floats, ...]:
        """Return the polygons of a row, each f64 [points, 2], without those of < 3 points."""
        if row in self.clipped:
            return self.clipped[row]
        bounds = self.coord_starts[self.part_starts[row] : self.part_starts[row + 1] + 1].tolist()
        return tuple(
            self.coords[start:stop].reshape(-1, 2)
            for start, stop in pairwise(bounds)
            if stop - start >= MIN_COORDINATES
        )

    def counts(self, row: int) -> Ints:
        """Return the run lengths of a row.

        Raises SegmentationError if they do not describe a mask of the stated size.
        """
        try:
            counts = counts_from_string(self._text_of(row))
        except ValueError as error:
            raise SegmentationError("RLE that cannot be decoded", str(error)) from error
        check_counts(counts, int(self.heights[row]), int(self.widths[row]))
        return counts

    def rle_boxes(self, rows: Ints) -> tuple[Floats, NDArray[np.bool_]]:
        """Return the tight boxes of RLE masks, and which of them are valid.

        rows: i64 [n]. Returns f64 [n, 4], xyxy, zeros for a mask that is empty or invalid, and
        bool [n]; `counts` raises the error of an invalid one.
        """
        boxes = np.zeros((len(rows), 4))
        is_valid = np.zeros(len(rows), dtype=bool)
        ends = np.cumsum(self.text_starts[rows + 1] - self.text_starts[rows])
        first = 0
        while first < len(rows):
            limit = _CHUNK + (ends[first - 1] if first else 0)
            stop = max(int(np.searchsorted(ends, limit, side="right")), first + 1)
            chunk = slice(first, stop)
            boxes[chunk], is_valid[chunk] = self._rle_boxes(rows[chunk])
            first = stop
        return boxes, is_valid

    def _rle_boxes(self, rows: Ints) -> tuple[Floats, NDArray[np.bool_]]:
        texts = [self._text_of(row) for row in rows.tolist()]
        starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        counts, count_starts = counts_from_strings(text, starts)
        heights = self.heights[rows]
        num_pixels = heights * self.widths[rows]
        row_of_count = np.repeat(np.arange(len(rows)), np.diff(count_starts))
        # Bound each count before summing: the sum of unbounded ones may overflow.
        is_out = (counts < 0) | (counts > num_pixels[row_of_count])
        is_valid = np.diff(count_starts) > 0
        is_valid[row_of_count[is_out]] = False
        totals = np.zeros(len(rows), dtype=np.int64)
        has_counts = np.flatnonzero(np.diff(count_starts))
        if len(has_counts):
            totals[has_counts] = np.add.reduceat(counts, count_starts[has_counts])
        is_valid &= totals == num_pixels
        boxes = boxes_from_counts(np.where(is_out, 0, counts), count_starts, heights)
        boxes[~is_valid] = 0
        return boxes, is_valid

    def shape(self, row: int) -> Polygons | RunLengths | None:
        """Return the mask of a row."""
        if self.kinds[row] == NONE:
            return None
        if self.kinds[row] == POLYGONS:
            return Polygons(self.polygons(row))
        ends = np.cumsum(self.counts(row))
        return RunLengths(ends, int(self.heights[row]), int(self.widths[row]))

    def to_coco(self, row: int) -> list[list[float]] | Rle:
        """Return the mask of a row as COCO's JSON has it: polygons, compressed RLE, or []."""
        if self.kinds[row] == RLE:
            size = [int(self.heights[row]), int(self.widths[row])]
            return {"size": size, "counts": self._text_of(row).decode()}
        if self.kinds[row] == POLYGONS:
            return [polygon.ravel().tolist() for polygon in self.polygons(row)]
        return []

    def _text_of(self, row: int) -> bytes:
        return self.text[self.text_starts[row] : self.text_starts[row + 1]].tobytes()


def check_counts(counts: Ints, height: int, width: int) -> None:
    """Raise SegmentationError unless `counts` are the run lengths of a height x width mask."""
    if len(counts) and counts.min() < 0:
        raise SegmentationError("RLE with negative counts", f"{int(counts.min())}")
    # Bound each count before summing: the sum of unbounded ones may overflow to the right value.
    bounded = not len(counts) or counts.max() <= height * width
    total = int(counts.sum()) if bounded else None
    if total != height * width:
        actual = "more" if total is None else total
        raise SegmentationError(
            "RLE whose counts do not sum to the mask's pixels",
            f"{actual} instead of {height} x {width} = {height * width}",
        )


def clip_polygon(points: Floats, height: int, width: int) -> Floats:
    """Clip a polygon f64 [points, 2] to the image (Sutherland and Hodgman 1974).

    Returns one polygon, [0, 2] if nothing is inside the image. Parts that the border separates
    stay connected by edges along it, which enclose no area.
    """
    points = points.clip(-_COORDINATE_LIMIT, _COORDINATE_LIMIT)
    borders = (
        (0, 1.0, 0.0),
        (0, -1.0, float(width)),
        (1, 1.0, 0.0),
        (1, -1.0, float(height)),
    )
    for axis, sign, bound in borders:
        if not len(points):
            break
        points = _clip_at(points, axis, sign, bound)
    if len(points) >= 3 and (points.max(axis=0) > points.min(axis=0)).all():
        return points
    return np.zeros((0, 2))


def _clip_at(points: Floats, axis: int, sign: float, bound: float) -> Floats:
    """Clip a polygon at one line; sign 1: keep what is above the bound, -1: what is below."""
    distance = sign * (points[:, axis] - bound)  # positive inside
    next_points = np.roll(points, -1, axis=0)
    next_distance = np.roll(distance, -1)
    leaves = (distance > 0) & (next_distance < 0)
    enters = (distance < 0) & (next_distance > 0)
    crosses = leaves | enters
    fraction = np.where(crosses, distance / np.where(crosses, distance - next_distance, 1.0), 0.0)
    crossings = points + fraction[:, None] * (next_points - points)
    crossings[:, axis] = bound
    candidates = np.stack([points, crossings], axis=1).reshape(-1, 2)
    return candidates[np.stack([distance >= 0, crosses], axis=1).ravel()]


def _parse_polygon(part: object) -> array[float]:
    """Return one polygon as an array of doubles."""
    if not isinstance(part, list):
        raise SegmentationError("polygon that is not a list of numbers", f"{part!r}"[:80])
    try:
        return array("d", part)
    except (TypeError, OverflowError) as error:
        raise SegmentationError("polygon that is not a list of numbers", str(error)) from error


def _to_starts(lengths: array[int]) -> Ints:
    """Return the start of each row, and the end of the last: i64 [len + 1]."""
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    return np.concatenate([np.zeros(1, dtype=np.int64), ends])
