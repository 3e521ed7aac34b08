"""Pasting of mask grids straight to run lengths: S x S grids over boxes, in numpy, all at once.

Along a column of pixels, a bilinearly enlarged grid is a piecewise linear function between the
grid's rows. The S values at that column alone determine where it crosses the threshold, and the
crossings are the run lengths: the work is columns x S instead of columns x rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

# Number of columns processed at a time: a few megabytes, whatever the number and size of the boxes.
_COLUMNS = 1 << 14
# Limit of the coordinates of boxes in pixels; larger and infinite ones are clipped to it.
_MAX_COORDINATE = 1e9


class Axis(NamedTuple):
    """One axis of n masks, each field [n].

    low, high: range of pixels in the frame (high is exclusive). Pixel i is at sample
    (i - start) * step + shift of the grid with a border of one sample (its first sample is 0).
    """

    low: Ints
    high: Ints
    start: Floats
    step: Floats
    shift: float


def paste_bilinear_counts(
    grids: Singles, boxes: Singles, frames: Ints, mode: str, threshold: float
) -> tuple[Ints, Ints]:
    """Run lengths of the pixels where the bilinearly resampled grids are at least `threshold`.

    grids: f32 [n, S, S] (NaN counts as 0); boxes: f32 [n, 4] xyxy; frames: i64 [n, 2] (height,
    width); mode: as in `ops.paste.paste_crop`; threshold: 0 or less selects all values above 0.
    Returns COCO's run lengths (column by column, zeros first) of all masks, concatenated, and the
    number of runs of each mask, i64 [n].
    Raises ValueError for another mode.
    """
    size = grids.shape[-1]
    limit = _MAX_COORDINATE
    corners = np.clip(np.nan_to_num(boxes), -limit, limit).astype(np.float32)
    x = _axis(corners[:, 0::2], frames[:, 1], size, mode)
    y = _axis(corners[:, 1::2], frames[:, 0], size, mode)
    # A border of zeros serves both modes: the values fade into it (continuous), or it is pasted
    # too (torchvision). Columns come first.
    padded = np.pad(np.nan_to_num(grids).transpose(0, 2, 1), ((0, 0), (1, 1), (1, 1)))
    widths = np.where(y.high > y.low, np.maximum(x.high - x.low, 0), 0)
    lowest = np.float32(max(threshold, 1e-30))
    group = np.cumsum(widths) // _COLUMNS
    borders = [0, *(np.flatnonzero(np.diff(group)) + 1), len(grids)]
    masks = []
    places = []
    for start, stop in pairwise(borders):
        rows = range(start, stop)
        mask, place = _find_crossings(padded, x, y, frames[:, 0], widths, rows, lowest)
        masks.append(mask)
        places.append(place)
    return _counts_from_crossings(
        np.concatenate(masks), np.concatenate(places), frames.prod(axis=1)
    )


def _axis(ends: Singles, length: Ints, size: int, mode: str) -> Axis:
    """One axis of the masks.

    ends: f32 [n, 2], start and end of the boxes; length: [n], length of the frames; size: of the
    grid.
    """
    if mode == "torchvision":
        # In single precision as in torchvision, because the result is rounded to whole pixels.
        half = (ends[:, 1] - ends[:, 0]) * np.float32(0.5) * np.float32((size + 2) / size)
        centre = (ends[:, 1] + ends[:, 0]) * np.float32(0.5)
        low = (centre - half).astype(np.int64)
        last = (centre + half).astype(np.int64)
        high = np.maximum(last, low) + 1
        start = low.astype(np.float64) - 0.5
        step = (size + 2) / (high - low)
        shift = -0.5
    elif mode == "continuous":
        first, end = ends.astype(np.float64).T
        start = first - 0.5
        step = size / np.maximum(end - first, 1e-6)
        shift = 0.5
        low = np.floor(first - 0.5 / step).astype(np.int64)
        high = np.ceil(end + 0.5 / step).astype(np.int64)
    else:
        raise ValueError(f"paste mode must be continuous or torchvision, not {mode!r}")
    return Axis(np.maximum(low, 0), np.minimum(high, length), start, step, shift)


def _find_crossings(
    padded: Singles,
    x: Axis,
    y: Axis,
    heights: Ints,
    widths: Ints,
    rows: range,
    threshold: np.float32,
) -> tuple[Ints, Ints]:
    """Find where the masks `rows` begin and end in each of their columns.

    padded: [n, S + 2, S + 2], columns first; widths: [n], number of columns of each mask.
    Returns the mask, and column * height + row of the first pixel beyond the crossing, both
    i64 [crossings], by mask, column and row.
    """
    last = padded.shape[-1] - 1
    width = widths[rows.start : rows.stop]
    mask = np.repeat(np.arange(rows.start, rows.stop), width)
    offset = x.low[rows.start : rows.stop] - np.cumsum(width) + width
    column = np.arange(len(mask)) + np.repeat(offset, width)
    sample = np.clip((column - x.start[mask]) * x.step[mask] + x.shift, 0, last)
    left = np.minimum(sample.astype(np.int64), last - 1)
    lines = padded.reshape(-1, last + 1)
    index = mask * (last + 1) + left
    before = lines.take(index, axis=0)
    values = lines.take(index + 1, axis=0)
    values -= before
    values *= (sample - left).astype(np.float32)[:, None]
    values += before

    # There is no crossing between two columns: both ends of a column are on the border.
    values = values.ravel()
    inside = values >= threshold
    place = np.flatnonzero(inside[1:] != inside[:-1])
    line, sample_above = np.divmod(place, last + 1)
    above = values[place].astype(np.float64)
    below = values[place + 1].astype(np.float64)
    mask = mask[line]
    sample_row = sample_above + (threshold - above) / (below - above) - y.shift
    row = sample_row / y.step[mask] + y.start[mask]
    # A mask begins at the first pixel at or after the crossing and ends at the first pixel after
    # it, because a value equal to the threshold is inside.
    row = np.where(above < threshold, np.ceil(row), np.floor(row) + 1)
    row = np.clip(row, y.low[mask], y.high[mask]).astype(np.int64)
    return mask, column[line] * heights[mask] + row


def _counts_from_crossings(mask: Ints, place: Ints, pixels: Ints) -> tuple[Ints, Ints]:
    """Run lengths, and number of runs of each mask; pixels: [n], number of pixels of the frames."""
    # The masks follow one another on one line of numbers.
    base = np.cumsum(pixels + 1) - (pixels + 1)
    ends = np.maximum.accumulate(place + base[mask])
    # Two crossings at one place cancel out: a run between two pixels, or a run that continues from
    # the bottom of a column to the top of the next.
    first = np.flatnonzero(np.diff(ends, prepend=-1))
    first = first[np.diff(first, append=len(ends)) % 2 == 1]
    ends = ends[first]
    mask = mask[first]
    behind = np.cumsum(np.bincount(mask, minlength=len(pixels)))
    ends = np.insert(ends, behind, base + pixels)
    mask = np.insert(mask, behind, np.arange(len(pixels)))
    # A mask that reaches the last pixel has its final end already.
    distinct = np.diff(ends, prepend=-1) > 0
    ends = ends[distinct]
    mask = mask[distinct]
    lengths = np.bincount(mask, minlength=len(pixels))
    counts = np.diff(ends, prepend=0)
    heads = np.cumsum(lengths) - lengths
    counts[heads] = ends[heads] - base
    return counts, lengths
