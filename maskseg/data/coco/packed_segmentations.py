"""The segmentations of a COCO file, packed: flat arrays instead of a Python object for every number.

COCO's training file has 55 million coordinates. As Python lists they take several gigabytes, and every worker of a data loader copies them
as it counts references. Here they are one array; run lengths stay the compressed strings they came as, until an image is asked for.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.masks.annotated import Polygons, Runs
from maskseg.masks.base import rle_from_counts
from maskseg.ops.rle import Ints, counts_from_string, spans

Floats = NDArray[np.float64]
NONE, POLYGONS, RLE = range(3)  # kinds of a segmentation
MIN_COORDINATES = 6  # of a polygon that is one


class SegmentationError(ValueError):
    """What is wrong with one segmentation: `kind` groups the problems of a file, `detail` tells this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Packer:
    """Takes the segmentations of a file one after the other, as JSON gives them."""

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.kinds, self.parts, self.lengths = array("b"), array("q"), array("q")
        self.coords, self.strings, self.text = array("d"), array("q"), bytearray()
        self.heights, self.widths = array("q"), array("q")

    def add(self, segmentation: Any) -> None:
        """Polygons, an RLE, or nothing (None, []). Raises SegmentationError for what is neither; then nothing is stored for it."""
        parts: list[array[float]] = []
        text, height, width = b"", 0, 0
        try:
            if isinstance(segmentation, dict):
                text, height, width = self._rle(segmentation)
            elif isinstance(segmentation, list):
                parts = [_numbers(part) for part in segmentation]
            elif segmentation is not None:
                raise SegmentationError(
                    "segmentation that is neither polygons nor RLE", type(segmentation).__name__
                )
        finally:  # a row even for a bad one, so that rows and annotations stay in step
            for part in parts:
                self.coords.extend(part)
                self.lengths.append(len(part))
            self.parts.append(len(parts))
            self.text += text
            self.strings.append(len(text))
            self.heights.append(height)
            self.widths.append(width)
            self.kinds.append(RLE if text else POLYGONS if parts else NONE)

    def _rle(self, rle: dict[str, Any]) -> tuple[bytes, int, int]:
        """Compressed counts, height, width. The size is judged before any count is looked at."""
        size, counts = rle.get("size"), rle.get("counts")
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(type(v) is int and v > 0 for v in size)
        ):
            raise SegmentationError(
                "RLE without a size of two positive integers", f"size {size!r}"[:80]
            )
        height, width = size
        if height * width > self.max_pixels:
            raise SegmentationError(
                "RLE of more pixels than data.max_pixels",
                f"{height} x {width}, the cap is {self.max_pixels}",
            )
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

    def packed(self) -> Segmentations:
        """What was added, as arrays."""
        return Segmentations(
            kinds=np.array(self.kinds, dtype=np.int8),
            part_starts=_starts(self.parts),
            coord_starts=_starts(self.lengths),
            coords=np.frombuffer(self.coords, dtype=np.float64) if self.coords else np.zeros(0),
            text_starts=_starts(self.strings),
            text=np.frombuffer(self.text, dtype=np.uint8)
            if self.text
            else np.zeros(0, dtype=np.uint8),
            heights=np.array(self.heights, dtype=np.int64),
            widths=np.array(self.widths, dtype=np.int64),
        )


@dataclass(frozen=True)
class Segmentations:
    """A segmentations in flat arrays; row a has the polygon parts part_starts[a] : part_starts[a + 1], and so on.

    kinds: i8 [A]; part_starts: i64 [A + 1]; coord_starts: i64 [parts + 1]; coords: f64 [numbers], x and y in turn, px;
    text_starts: i64 [A + 1]; text: u8 [characters] of compressed RLE; heights, widths: i64 [A], the sizes that the RLEs state;
    clipped: rows whose polygons were cut at the image's border, and what is left of them.
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
        """The parts of a row, each f64 [points, 2]; parts of less than three points are left out."""
        if row in self.clipped:
            return self.clipped[row]
        ends = self.coord_starts[self.part_starts[row] : self.part_starts[row + 1] + 1].tolist()
        return tuple(
            self.coords[a:b].reshape(-1, 2) for a, b in pairwise(ends) if b - a >= MIN_COORDINATES
        )

    def counts(self, row: int) -> Ints:
        """Run lengths of a row. Raises SegmentationError where they are not those of a mask of the stated size."""
        text = self.text[self.text_starts[row] : self.text_starts[row + 1]].tobytes()
        try:
            counts = counts_from_string(text)
        except ValueError as error:
            raise SegmentationError("RLE that cannot be decoded", str(error)) from error
        check_counts(counts, int(self.heights[row]), int(self.widths[row]))
        return counts

    def shape(self, row: int) -> Polygons | Runs | None:
        """The mask of a row."""
        if self.kinds[row] == NONE:
            return None
        if self.kinds[row] == POLYGONS:
            return Polygons(self.polygons(row))
        return Runs(np.cumsum(self.counts(row)), int(self.heights[row]), int(self.widths[row]))

    def to_coco(self, row: int) -> list[list[float]] | dict[str, Any]:
        """The mask of a row as COCO's JSON has it: polygons, or compressed RLE; [] where there is none."""
        if self.kinds[row] == RLE:
            text = self.text[self.text_starts[row] : self.text_starts[row + 1]].tobytes().decode()
            return {"size": [int(self.heights[row]), int(self.widths[row])], "counts": text}
        return (
            [p.ravel().tolist() for p in self.polygons(row)] if self.kinds[row] == POLYGONS else []
        )


def check_counts(counts: Ints, height: int, width: int) -> None:
    """Raises SegmentationError unless `counts` are the run lengths of a height x width mask."""
    if len(counts) and counts.min() < 0:
        raise SegmentationError("RLE with negative counts", f"{int(counts.min())}")
    # Each is bounded before they are summed: the sum of unbounded ones may wrap round to the right one.
    total = int(counts.sum()) if not len(counts) or counts.max() <= height * width else None
    if total != height * width:
        found = "more" if total is None else total
        raise SegmentationError(
            "RLE whose counts do not sum to the mask's pixels",
            f"{found} instead of {height} x {width} = {height * width}",
        )


def runs_box(counts: Ints, height: int) -> Floats:
    """The tight box xyxy of a mask given as run lengths, f64 [4]; zeros for an empty one."""
    column, top, bottom = spans(np.cumsum(counts), height)
    if not len(column):
        return np.zeros(4)
    return np.array([column[0], top.min(), column[-1] + 1, bottom.max()], dtype=np.float64)


def clip_polygon(points: Floats, height: int, width: int) -> Floats:
    """What lies inside the image of a polygon f64 [points, 2], as one polygon (Sutherland and Hodgman 1974); [0, 2] where nothing does.

    Pieces that the border separates stay joined by edges along it, which enclose nothing.
    """
    points = points.clip(-1e7, 1e7)  # keeps the products below finite
    for axis, sign, bound in (
        (0, 1.0, 0.0),
        (0, -1.0, float(width)),
        (1, 1.0, 0.0),
        (1, -1.0, float(height)),
    ):
        if not len(points):
            break
        distance = sign * (points[:, axis] - bound)  # positive inside
        following, after = np.roll(points, -1, axis=0), np.roll(distance, -1)
        crosses = (distance > 0) & (after < 0) | (distance < 0) & (after > 0)
        share = np.where(crosses, distance / np.where(crosses, distance - after, 1.0), 0.0)
        cut = points + share[:, None] * (following - points)
        cut[:, axis] = bound
        candidates = np.stack([points, cut], axis=1).reshape(-1, 2)
        points = candidates[np.stack([distance >= 0, crosses], axis=1).ravel()]
    low, high = (
        (points.min(axis=0), points.max(axis=0)) if len(points) else (np.zeros(2), np.zeros(2))
    )
    return points if len(points) >= 3 and (high > low).all() else np.zeros((0, 2))


def _numbers(part: Any) -> array[float]:
    """One polygon as an array of doubles."""
    if not isinstance(part, list):
        raise SegmentationError("polygon that is not a list of numbers", f"{part!r}"[:80])
    try:
        return array("d", part)
    except (TypeError, OverflowError) as error:
        raise SegmentationError("polygon that is not a list of numbers", str(error)) from error


def _starts(lengths: array[int]) -> Ints:
    return np.concatenate(
        [np.zeros(1, dtype=np.int64), np.cumsum(np.array(lengths, dtype=np.int64))]
    )
