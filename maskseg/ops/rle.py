"""Run-length masks without bitmaps, in numpy.

COCO's RLE walks the columns of a [height, width] mask and alternates runs of zeros and ones, zeros first. Here a mask is kept as `ends`, the
cumulative sum of its run lengths: pixel (x, y) is inside if an odd number of runs ends at or before x * height + y.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
MIN_SIDE = 0.1  # pixels, of a box that a mask is cut out by
TIE = 1e-7  # of a box's side
MIN_COLUMNS = 112  # that `cover` integrates along, of boxes that are wider: with more of them it takes longer, and a target of 28 x 28
# cells differs in less than a thousandth of them


def counts_from_string(text: bytes) -> Ints:
    """Run lengths of pycocotools' compressed string (five bits a character, bit 5 = goes on; from the fourth on, differences two back).

    Raises ValueError for a string that is not of that form.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return np.zeros(0, dtype=np.int64)
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("compressed RLE has characters outside '0'..'o' or breaks off")
    last = (codes & 32) == 0
    first = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(codes.size) - np.repeat(first, np.diff(np.append(first, codes.size)))
    if place.max() > 7:
        raise ValueError("compressed RLE has a run of more than 40 bits")
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def strings_from_counts(counts: Ints, lengths: Ints) -> list[str]:
    """Run lengths of n masks, one mask after the other, `lengths` [n] of each -> pycocotools' compressed string of each (see above)."""
    first = np.cumsum(lengths) - lengths
    values = counts.copy()
    values[2:] -= counts[:-2]
    head = (first[:, None] + np.arange(3))[
        np.arange(3) < lengths[:, None]
    ]  # the first three are no differences
    values[head] = counts[head]
    # A number takes as many characters as it needs for its bits and one for the sign.
    size = 1 + np.searchsorted(
        np.int64(16) << (5 * np.arange(10)), np.where(values < 0, ~values, values), side="right"
    )
    ends = np.cumsum(size)
    text = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for digit in range(int(size.max(initial=0))):
        chosen = np.flatnonzero(size > digit)
        more = size[chosen] > digit + 1
        text[ends[chosen] - size[chosen] + digit] = (
            ((values[chosen] >> (5 * digit)) & 31) + 32 * more + 48
        )
    letters = text.tobytes().decode("ascii")
    stops = np.append(0, ends)[first + lengths].tolist()
    return [letters[a:b] for a, b in zip([0, *stops], stops, strict=False)]


def inside(ends: list[Ints], heights: Ints, widths: Ints, x: Ints, y: Ints) -> NDArray[np.bool_]:
    """Whether pixels (x, y), each i64 [n, points], lie in the n masks; False outside the masks' frames. -> bool [n, points]."""
    if not ends:
        return np.zeros(x.shape, dtype=bool)
    within = (x >= 0) & (y >= 0) & (x < widths[:, None]) & (y < heights[:, None])
    # All masks share one sorted table: each is shifted behind the one before, by its number of pixels.
    start = np.concatenate([[0], np.cumsum(heights * widths)])
    table = np.concatenate([e + s for e, s in zip(ends, start[:-1], strict=True)])
    before = np.concatenate([[0], np.cumsum([len(e) for e in ends])])[:-1]
    position = np.where(within, x * heights[:, None] + y, 0) + start[:-1, None]
    runs = np.searchsorted(table, position, side="right") - before[:, None]
    return np.asarray(within & (runs % 2 == 1))


def cover(ends: list[Ints], heights: Ints, widths: Ints, boxes: Floats, size: int) -> Floats:
    """The share of each cell that n masks cover, f64 [n, size, size], exactly; 0 outside the masks' frames.

    boxes: f64 [n, 4] (xyxy, pixels, of positive extent), mask i's own, which is divided into size x size cells. Of a box of more columns
    of pixels than `MIN_COLUMNS` and four a cell, that many are taken, evenly spaced.

    The number of ones before a place of the column-major order is piecewise linear in it: of each column, the differences between the
    cells' borders come from one interpolation. Cumulative sums over the columns are piecewise linear in x.
    """
    if not ends:
        return np.zeros((0, size, size))
    number = len(ends)
    x0, y0, x1, y1 = boxes.T
    steps = np.arange(size + 1) / size
    first = np.floor(x0).clip(0, widths).astype(np.int64)
    count = (
        np.ceil(x1).clip(0, widths).astype(np.int64) - first
    )  # columns of pixels that the box touches
    most = size * max(4, -(-MIN_COLUMNS // size))
    wide = x1 - x0 > most
    strips = np.where(wide, most, count)
    strip_width = np.where(wide, (x1 - x0) / most, 1.0)
    before = np.cumsum(strips) - strips

    owner = np.repeat(np.arange(number), strips)
    strip = np.arange(len(owner)) - before[owner]
    column = np.where(
        wide[owner],
        np.floor(x0[owner] + (strip + 0.5) * strip_width[owner]).astype(np.int64),
        first[owner] + strip,
    )
    column = column.clip(-1, widths[owner])  # of wide ones some may lie outside of the frame
    outside = (column < 0) | (column == widths[owner])

    # All masks share one table of ones, each mask behind the one before.
    start = np.concatenate([[0], np.cumsum(heights * widths)])
    places = np.concatenate([[0], *(e + s for e, s in zip(ends, start[:-1], strict=True))])
    lengths = np.diff(places, prepend=0)
    is_one = np.concatenate([[False], *(np.arange(len(e)) % 2 == 1 for e in ends)])
    ones = np.cumsum(lengths * is_one)
    y = (y0[:, None] + steps * (y1 - y0)[:, None]).clip(0, heights[:, None])
    place = (start[owner] + np.where(outside, 0, column) * heights[owner])[:, None] + y[owner]
    in_column = np.diff(np.interp(place, places, ones), axis=1)
    in_column[outside] = 0

    total = np.zeros((len(owner) + 1, size))
    np.cumsum(in_column, axis=0, out=total[1:])
    x = x0[:, None] + steps * (x1 - x0)[:, None]
    border = np.where(wide[:, None], most * steps, (x - first[:, None]).clip(0, count[:, None]))
    whole = np.floor(border).astype(np.int64)
    row = before[:, None] + whole
    until = total[row]
    until += (border - whole)[..., None] * (total[np.minimum(row + 1, len(owner))] - until)
    cell = (x1 - x0) * (y1 - y0) / size**2
    return np.asarray(
        np.diff(until, axis=1).transpose(0, 2, 1) * (strip_width / cell)[:, None, None]
    )


def moved_cover(ends: list[Ints], sizes: Ints, affine: Floats, boxes: Floats, size: int) -> Floats:
    """`cover` of masks that were moved: f64 [n, size, size].

    sizes: i64 [n, 2] (height, width) of the masks' own frames; affine: f64 [n, 4] (scale_x, shift_x, scale_y, shift_y) from there to the
    present frame; boxes: f64 [n, 4] in the present frame. The cells are moved by a ten-millionth of the box, always the same way in the mask's
    own frame, so that of those that would be covered by just a half neither more nor less count as foreground.
    """
    scale, shift = affine[:, [0, 2]], affine[:, [1, 3]]
    far = np.maximum(boxes[:, 2:], boxes[:, :2] + MIN_SIDE)
    corners = np.stack([(boxes[:, :2] - shift) / scale, (far - shift) / scale])
    low, high = corners.min(axis=0), corners.max(axis=0)
    nudge = TIE * (high - low)
    shares = cover(
        ends, sizes[:, 0], sizes[:, 1], np.concatenate([low + nudge, high + nudge], axis=1), size
    )
    mirrored_x, mirrored_y = (scale < 0).T
    shares[mirrored_x] = shares[mirrored_x][:, :, ::-1]
    shares[mirrored_y] = shares[mirrored_y][:, ::-1]
    return shares


def spans(ends: Ints, height: int) -> tuple[Ints, Ints, Ints]:
    """The mask as vertical pieces: columns, tops and bottoms (exclusive), each i64 [pieces], column by column."""
    starts, stops = ends[:-1:2], ends[1::2]
    starts, stops = starts[: len(stops)], stops
    full = stops > starts
    starts, stops = starts[full], stops[full]
    first, last = starts // height, (stops - 1) // height
    pieces = last - first + 1
    column = (
        np.repeat(first, pieces)
        + np.arange(pieces.sum())
        - np.repeat(np.cumsum(pieces) - pieces, pieces)
    )
    top = np.maximum(np.repeat(starts, pieces), column * height) - column * height
    bottom = np.minimum(np.repeat(stops, pieces), (column + 1) * height) - column * height
    return column, top, bottom


def counts_from_crop(crop: NDArray[np.bool_], x0: int, y0: int, height: int, width: int) -> Ints:
    """Run lengths of a [height, width] mask that is `crop` at column x0, row y0 and zero elsewhere."""
    rows, columns = crop.shape
    if not crop.any():
        return np.array([height * width], dtype=np.int64)
    padded = np.zeros((columns, rows + 2), dtype=np.int8)
    padded[:, 1:-1] = crop.T
    change = np.diff(padded, axis=1)
    column, start = np.nonzero(change == 1)
    _, stop = np.nonzero(change == -1)
    offset = (x0 + column) * height + y0
    start, stop = start + offset, stop + offset
    joined = (
        start[1:] == stop[:-1]
    )  # a run that goes on from the bottom of a column to the top of the next
    start, stop = start[np.append(True, ~joined)], stop[np.append(~joined, True)]
    borders = np.stack([start, stop], axis=1).ravel()
    ends = np.concatenate([borders, [height * width]]) if borders[-1] < height * width else borders
    return np.diff(ends, prepend=0)
