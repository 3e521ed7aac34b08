"""Pasting soft masks without pixels: S x S grids over boxes -> run lengths in the image, in numpy, all masks at once.

Down a column of pixels a bilinearly enlarged grid is a chain of straight lines between the grid's rows. Where they cross the threshold follows
from the S values at that column alone, and the crossings are the run lengths: the work is columns x S, not columns x rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Singles = NDArray[np.float32]

_COLUMNS = 1 << 14  # at a time: a few megabytes, whatever the size and number of the boxes
_FAR = 1e9  # pixels: so far out a box may lie; further ones, and infinite ones, are brought here


class Axis(NamedTuple):
    """One axis of n masks, each field [n]: pixels low to high (exclusive) of the frame; pixel i is at sample (i - start) * step + shift of the grid
    with a border of one sample (its first sample is 0)."""

    low: Ints
    high: Ints
    start: Floats
    step: Floats
    shift: float


def outlines(
    grids: Singles, boxes: Singles, frames: Ints, rule: str, threshold: float
) -> tuple[Ints, Ints]:
    """Run lengths of the pixels where the bilinearly resampled grids are at least `threshold`, as COCO has them (columns first, zeros first).

    grids: f32 [n, S, S] (NaN counts as 0); boxes: f32 [n, 4] xyxy; frames: i64 [n, 2] (height, width); rule: as in `ops.paste.paste_crop`;
    threshold: one of 0 or less takes all values above 0. -> the run lengths of all masks, one mask after the other; how many each has, i64 [n].
    Raises ValueError for another rule.
    """
    size = grids.shape[-1]
    ends = np.clip(np.nan_to_num(boxes), -_FAR, _FAR).astype(np.float32)
    x, y = (_axis(ends[:, i::2], frames[:, 1 - i], size, rule) for i in (0, 1))
    # A border of zeros serves both rules: the values fade into it (continuous), or it is pasted too (torchvision). Columns come first.
    padded = np.pad(np.nan_to_num(grids).transpose(0, 2, 1), ((0, 0), (1, 1), (1, 1)))
    widths = np.where(y.high > y.low, np.maximum(x.high - x.low, 0), 0)
    lowest = np.float32(max(threshold, 1e-30))
    group = np.cumsum(widths) // _COLUMNS
    cuts = [0, *(np.flatnonzero(np.diff(group)) + 1), len(grids)]
    found = [
        _crossings(padded, x, y, frames[:, 0], widths, range(a, b), lowest)
        for a, b in pairwise(cuts)
    ]
    mask, place = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _counts(mask, place, frames.prod(axis=1))


def _axis(ends: Singles, length: Ints, size: int, rule: str) -> Axis:
    """ends: f32 [n, 2], where the boxes start and end; length: [n], of the frames."""
    if rule == "torchvision":  # in single precision, as the result is cut to whole pixels
        half = (ends[:, 1] - ends[:, 0]) * np.float32(0.5) * np.float32((size + 2) / size)
        centre = (ends[:, 1] + ends[:, 0]) * np.float32(0.5)
        low, last = (centre - half).astype(np.int64), (centre + half).astype(np.int64)
        high = np.maximum(last, low) + 1
        start, step, shift = low.astype(np.float64) - 0.5, (size + 2) / (high - low), -0.5
    elif rule == "continuous":
        first, end = ends.astype(np.float64).T
        start, step, shift = first - 0.5, size / np.maximum(end - first, 1e-6), 0.5
        low, high = (
            np.floor(first - 0.5 / step).astype(np.int64),
            np.ceil(end + 0.5 / step).astype(np.int64),
        )
    else:
        raise ValueError(f"paste rule must be continuous or torchvision, not {rule!r}")
    return Axis(np.maximum(low, 0), np.minimum(high, length), start, step, shift)


def _crossings(
    padded: Singles,
    x: Axis,
    y: Axis,
    heights: Ints,
    widths: Ints,
    some: range,
    threshold: np.float32,
) -> tuple[Ints, Ints]:
    """Where the masks `some` begin and end in each of their columns: the mask, and column * height + row of the first pixel beyond, both [crossings]
    in the order of masks, columns and rows.

    padded: [n, S + 2, S + 2], columns first; widths: [n], columns of each mask.
    """
    last = padded.shape[-1] - 1
    width = widths[some.start : some.stop]
    mask = np.repeat(np.arange(some.start, some.stop), width)
    column = np.arange(len(mask)) + np.repeat(
        x.low[some.start : some.stop] - np.cumsum(width) + width, width
    )
    sample = np.clip((column - x.start[mask]) * x.step[mask] + x.shift, 0, last)
    left = np.minimum(sample.astype(np.int64), last - 1)
    lines = padded.reshape(-1, last + 1)
    index = mask * (last + 1) + left
    before, values = lines.take(index, axis=0), lines.take(index + 1, axis=0)
    values -= before
    values *= (sample - left).astype(np.float32)[:, None]
    values += before

    values = values.ravel()
    inside = values >= threshold
    place = np.flatnonzero(
        inside[1:] != inside[:-1]
    )  # none between two columns: their ends are on the border
    line, sample_above = np.divmod(place, last + 1)
    above, below = values[place].astype(np.float64), values[place + 1].astype(np.float64)
    mask = mask[line]
    row = (sample_above + (threshold - above) / (below - above) - y.shift) / y.step[mask] + y.start[
        mask
    ]
    # The first pixel at or after the crossing where the mask begins, the first one after it where it ends: a value equal to the threshold is inside.
    row = np.where(above < threshold, np.ceil(row), np.floor(row) + 1)
    return mask, column[line] * heights[mask] + np.clip(row, y.low[mask], y.high[mask]).astype(
        np.int64
    )


def _counts(mask: Ints, place: Ints, pixels: Ints) -> tuple[Ints, Ints]:
    """Crossings -> run lengths and how many each mask has. pixels: [n], of the masks' frames."""
    base = np.cumsum(pixels + 1) - (
        pixels + 1
    )  # behind one another, so that all masks are one line of numbers
    ends = np.maximum.accumulate(place + base[mask])
    # Two crossings at one place cancel: a run between two pixels, and one that goes on from the bottom of a column to the top of the next.
    first = np.flatnonzero(np.diff(ends, prepend=-1))
    first = first[np.diff(first, append=len(ends)) % 2 == 1]
    ends, mask = ends[first], mask[first]
    behind = np.cumsum(np.bincount(mask, minlength=len(pixels)))
    ends, mask = (
        np.insert(ends, behind, base + pixels),
        np.insert(mask, behind, np.arange(len(pixels))),
    )
    once = np.diff(ends, prepend=-1) > 0  # a mask that reaches the last pixel has that end already
    ends, mask = ends[once], mask[once]
    lengths = np.bincount(mask, minlength=len(pixels))
    counts = np.diff(ends, prepend=0)
    heads = np.cumsum(lengths) - lengths
    counts[heads] = ends[heads] - base
    return counts, lengths
