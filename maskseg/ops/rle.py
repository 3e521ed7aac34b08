"""Run-length encoded masks in numpy, without bitmaps.

COCO's RLE traverses a [height, width] mask column by column and alternates runs of zeros and ones,
zeros first. Here a mask is stored as `ends`, the cumulative sum of its run lengths: pixel (x, y) is
inside if an odd number of runs ends at or before x * height + y.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Minimum side of a box from which a mask is cropped, in pixels.
MIN_SIDE = 0.1
# Shift of the cells that decides ties, as a fraction of the box's side.
TIE_SHIFT = 1e-7
# Number of columns that `cell_coverage` integrates over for wide boxes. More columns take longer
# and change less than a thousandth of the cells of a 28 x 28 target.
MIN_COLUMNS = 112
# Largest number of characters of one run in the compressed string: 8 times 5 bits.
_MAX_CHARACTERS = 8


def counts_from_string(text: bytes) -> Ints:
    """Decode pycocotools' compressed string into run lengths.

    A character has five bits; its sixth bit says that the number continues. From the fourth run on,
    numbers are differences from the run two places before.
    Raises ValueError for an invalid string.
    """
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if codes.size == 0:
        return np.zeros(0, dtype=np.int64)
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("compressed RLE has characters outside '0'..'o' or is truncated")
    last = (codes & 32) == 0
    first = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(codes.size) - np.repeat(first, np.diff(np.append(first, codes.size)))
    if place.max() >= _MAX_CHARACTERS:
        raise ValueError("compressed RLE has a run of more than 40 bits")
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[last] + 1)), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def counts_from_strings(text: NDArray[np.uint8], starts: Ints) -> tuple[Ints, Ints]:
    """Decode the strings of n masks at once, each as `counts_from_string` does.

    text: the strings, concatenated; starts: i64 [n + 1], start of each string.
    Returns the run lengths, concatenated, and i64 [n + 1], the start of each mask's. An invalid
    string has none, as an empty one.
    """
    codes = text.astype(np.int64) - 48
    lengths = np.diff(starts)
    row_of_code = np.repeat(np.arange(len(lengths)), lengths)
    is_last = (codes & 32) == 0
    is_bad = (codes < 0) | (codes > 63)
    is_bad[starts[1:][lengths > 0] - 1] |= ~is_last[starts[1:][lengths > 0] - 1]
    # Number of characters before this one that belong to the same number.
    positions = np.arange(codes.size)
    after_last = np.concatenate([[0], np.where(is_last[:-1], positions[1:], 0)]).astype(np.int64)
    place = positions - np.maximum.accumulate(after_last[: codes.size])
    is_bad |= place >= _MAX_CHARACTERS
    bad_rows = np.zeros(len(lengths), dtype=bool)
    bad_rows[row_of_code[is_bad]] = True
    if bad_rows.any():
        kept = ~bad_rows[row_of_code]
        kept_lengths = np.where(bad_rows, 0, lengths)
        return counts_from_strings(text[kept], np.append(0, np.cumsum(kept_lengths)))
    first = np.flatnonzero(place == 0)
    value_starts = np.searchsorted(first, starts)
    if not first.size:
        return np.zeros(0, dtype=np.int64), value_starts
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[is_last] & 16) != 0
    values = values - np.where(negative, np.int64(1) << (5 * (place[is_last] + 1)), 0)
    row = row_of_code[first]
    index = np.arange(len(values)) - value_starts[row]
    for parity in (index % 2 == 1, (index % 2 == 0) & (index > 0)):
        values[parity] = _cumulate_by_row(values[parity], row[parity])
    return values, value_starts


def _cumulate_by_row(values: Ints, row: Ints) -> Ints:
    """Cumulative sums that start again at each row; `row` ascends."""
    sums = np.cumsum(values)
    first = np.flatnonzero(np.diff(row, prepend=-1))
    before = np.concatenate([[0], sums])[first]
    return np.asarray(sums - np.repeat(before, np.diff(np.append(first, len(values)))))


def boxes_from_counts(counts: Ints, starts: Ints, heights: Ints) -> Floats:
    """Return the tight boxes xyxy of n masks, f64 [n, 4]; zeros for a mask without pixels.

    counts: valid run lengths, concatenated; starts: i64 [n + 1]; heights: i64 [n].
    """
    boxes = np.zeros((len(heights), 4))
    row = np.repeat(np.arange(len(heights)), np.diff(starts))
    ends = _cumulate_by_row(counts, row)
    index = np.arange(len(counts)) - starts[row]
    is_run = (index % 2 == 1) & (counts > 0)
    row = row[is_run]
    if not len(row):
        return boxes
    height = heights[row]
    first_column, top = np.divmod(ends[is_run] - counts[is_run], height)
    last_column, bottom = np.divmod(ends[is_run] - 1, height)
    continues = last_column > first_column  # in the next column
    top[continues] = 0
    bottom[continues] = height[continues] - 1
    first = np.flatnonzero(np.diff(row, prepend=-1))
    boxes[row[first]] = np.stack(
        [
            np.minimum.reduceat(first_column, first),
            np.minimum.reduceat(top, first),
            np.maximum.reduceat(last_column, first) + 1,
            np.maximum.reduceat(bottom, first) + 1,
        ],
        axis=1,
    )
    return boxes


def strings_from_counts(counts: Ints, lengths: Ints) -> list[str]:
    """Encode run lengths into pycocotools' compressed strings, the inverse of `counts_from_string`.

    counts: run lengths of n masks, concatenated; lengths: [n], number of runs of each mask.
    """
    first = np.cumsum(lengths) - lengths
    values = counts.copy()
    values[2:] -= counts[:-2]
    # The first three runs of a mask are not differences.
    head = (first[:, None] + np.arange(3))[np.arange(3) < lengths[:, None]]
    values[head] = counts[head]
    # A number takes as many characters as its bits and one sign bit need.
    magnitude = np.where(values < 0, ~values, values)
    size = 1 + np.searchsorted(np.int64(16) << (5 * np.arange(10)), magnitude, side="right")
    ends = np.cumsum(size)
    text = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for digit in range(int(size.max(initial=0))):
        rows = np.flatnonzero(size > digit)
        more = size[rows] > digit + 1
        bits = (values[rows] >> (5 * digit)) & 31
        text[ends[rows] - size[rows] + digit] = bits + 32 * more + 48
    letters = text.tobytes().decode("ascii")
    stops = np.append(0, ends)[first + lengths].tolist()
    return [letters[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]


def contains_points(
    ends: list[Ints], heights: Ints, widths: Ints, x: Ints, y: Ints
) -> NDArray[np.bool_]:
    """Whether n masks contain the pixels (x, y), each i64 [n, points], bool [n, points].

    False outside the masks' frames.
    """
    if not ends:
        return np.zeros(x.shape, dtype=bool)
    within = (x >= 0) & (y >= 0) & (x < widths[:, None]) & (y < heights[:, None])
    # All masks share one sorted table: each is shifted by the number of pixels before it.
    start = np.concatenate([[0], np.cumsum(heights * widths)])
    table = np.concatenate([e + s for e, s in zip(ends, start[:-1], strict=True)])
    runs_before = np.concatenate([[0], np.cumsum([len(e) for e in ends])])[:-1]
    position = np.where(within, x * heights[:, None] + y, 0) + start[:-1, None]
    num_ended = np.searchsorted(table, position, side="right") - runs_before[:, None]
    return np.asarray(within & (num_ended % 2 == 1))


def cell_coverage(
    ends: list[Ints], heights: Ints, widths: Ints, boxes: Floats, size: int
) -> Floats:
    """Exact share of each grid cell that a mask covers, f64 [n, size, size].

    boxes: f64 [n, 4] (xyxy, pixels, of positive extent), one per mask, divided into size x size
    cells. A mask is 0 outside its frame. A box wider than `MIN_COLUMNS` and four columns per cell
    is integrated over that many evenly spaced columns.

    The number of ones before a position in column-major order is a piecewise linear function of the
    position: one interpolation gives, for each column, its differences between the cells' borders.
    Cumulative sums over the columns are piecewise linear in x.
    """
    if not ends:
        return np.zeros((0, size, size))
    number = len(ends)
    x0, y0, x1, y1 = boxes.T
    steps = np.arange(size + 1) / size
    first = np.floor(x0).clip(0, widths).astype(np.int64)
    # Number of pixel columns that the box touches.
    count = np.ceil(x1).clip(0, widths).astype(np.int64) - first
    max_strips = size * max(4, -(-MIN_COLUMNS // size))
    wide = x1 - x0 > max_strips
    strips = np.where(wide, max_strips, count)
    strip_width = np.where(wide, (x1 - x0) / max_strips, 1.0)
    before = np.cumsum(strips) - strips

    owner = np.repeat(np.arange(number), strips)
    strip = np.arange(len(owner)) - before[owner]
    wide_column = np.floor(x0[owner] + (strip + 0.5) * strip_width[owner]).astype(np.int64)
    column = np.where(wide[owner], wide_column, first[owner] + strip)
    # Strips of wide boxes may lie outside the frame.
    column = column.clip(-1, widths[owner])
    outside = (column < 0) | (column == widths[owner])

    y = (y0[:, None] + steps * (y1 - y0)[:, None]).clip(0, heights[:, None])
    start = np.concatenate([[0], np.cumsum(heights * widths)])
    column_start = start[owner] + np.where(outside, 0, column) * heights[owner]
    places, ones = _cumulative_ones(ends, start)
    in_column = np.diff(np.interp(column_start[:, None] + y[owner], places, ones), axis=1)
    in_column[outside] = 0

    total = np.zeros((len(owner) + 1, size))
    np.cumsum(in_column, axis=0, out=total[1:])
    x = x0[:, None] + steps * (x1 - x0)[:, None]
    narrow_border = (x - first[:, None]).clip(0, count[:, None])
    border = np.where(wide[:, None], max_strips * steps, narrow_border)
    whole = np.floor(border).astype(np.int64)
    row = before[:, None] + whole
    until = total[row]
    until += (border - whole)[..., None] * (total[np.minimum(row + 1, len(owner))] - until)
    cell_area = (x1 - x0) * (y1 - y0) / size**2
    columns_first = np.diff(until, axis=1)
    return np.asarray(columns_first.transpose(0, 2, 1) * (strip_width / cell_area)[:, None, None])


def _cumulative_ones(ends: list[Ints], start: Ints) -> tuple[Ints, Ints]:
    """The masks as one table, each after the other: positions of the run ends and the ones before.

    start: i64 [n + 1], the first position of each mask.
    """
    places = np.concatenate([[0], *(e + s for e, s in zip(ends, start[:-1], strict=True))])
    lengths = np.diff(places, prepend=0)
    is_one = np.concatenate([[False], *(np.arange(len(e)) % 2 == 1 for e in ends)])
    return places, np.cumsum(lengths * is_one)


def transformed_cell_coverage(
    ends: list[Ints], sizes: Ints, affine: Floats, boxes: Floats, size: int
) -> Floats:
    """`cell_coverage` of transformed masks, f64 [n, size, size].

    sizes: i64 [n, 2] (height, width) of the masks' original frames; affine: f64 [n, 4] (scale_x,
    shift_x, scale_y, shift_y) from there to the current frame; boxes: f64 [n, 4] in the current
    frame. The cells are shifted by a ten-millionth of the box, always in the same direction of the
    original frame. This breaks ties: cells that are covered by exactly a half become neither more
    nor less often foreground when the mask is flipped.
    """
    scale = affine[:, [0, 2]]
    shift = affine[:, [1, 3]]
    far = np.maximum(boxes[:, 2:], boxes[:, :2] + MIN_SIDE)
    corners = np.stack([(boxes[:, :2] - shift) / scale, (far - shift) / scale])
    low = corners.min(axis=0)
    high = corners.max(axis=0)
    tie_shift = TIE_SHIFT * (high - low)
    shifted = np.concatenate([low + tie_shift, high + tie_shift], axis=1)
    shares = cell_coverage(ends, sizes[:, 0], sizes[:, 1], shifted, size)
    mirrored_x, mirrored_y = (scale < 0).T
    shares[mirrored_x] = shares[mirrored_x][:, :, ::-1]
    shares[mirrored_y] = shares[mirrored_y][:, ::-1]
    return shares


def column_spans(ends: Ints, height: int) -> tuple[Ints, Ints, Ints]:
    """The mask as vertical spans: column, top and bottom (exclusive), each i64 [spans]."""
    starts = ends[:-1:2]
    stops = ends[1::2]
    starts = starts[: len(stops)]
    nonempty = stops > starts
    starts = starts[nonempty]
    stops = stops[nonempty]
    first = starts // height
    last = (stops - 1) // height
    spans = last - first + 1
    span_in_run = np.arange(spans.sum()) - np.repeat(np.cumsum(spans) - spans, spans)
    column = np.repeat(first, spans) + span_in_run
    top = np.maximum(np.repeat(starts, spans), column * height) - column * height
    bottom = np.minimum(np.repeat(stops, spans), (column + 1) * height) - column * height
    return column, top, bottom


def counts_from_crop(crop: NDArray[np.bool_], x0: int, y0: int, height: int, width: int) -> Ints:
    """Run lengths of a [height, width] mask that is `crop` at (x0, y0) and 0 elsewhere."""
    rows, columns = crop.shape
    if not crop.any():
        return np.array([height * width], dtype=np.int64)
    padded = np.zeros((columns, rows + 2), dtype=np.int8)
    padded[:, 1:-1] = crop.T
    change = np.diff(padded, axis=1)
    column, start = np.nonzero(change == 1)
    _, stop = np.nonzero(change == -1)
    offset = (x0 + column) * height + y0
    start = start + offset
    stop = stop + offset
    # A run may continue from the bottom of a column to the top of the next.
    joined = start[1:] == stop[:-1]
    start = start[np.append(True, ~joined)]
    stop = stop[np.append(~joined, True)]
    ends = np.stack([start, stop], axis=1).ravel()
    if ends[-1] < height * width:
        ends = np.concatenate([ends, [height * width]])
    return np.diff(ends, prepend=0)
