"""Masks that are unions of superpixels: a label map per image, and the superpixels of each mask.

A thousand segment proposals need one label map and a boolean table. All operations use the pixels
of each superpixel, read once, and the table; full-size bitmaps are never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from maskseg.masks.base import Masks, Rle, rle_to_bitmaps
from maskseg.ops import rle as rle_ops
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.ops.rle import Ints

Labels = NDArray[np.int32]
Bools = NDArray[np.bool_]

# Number of table entries processed at a time: 32 MB as float64.
BLOCK = 2**22


@dataclass(frozen=True)
class SegmentMasks:
    """n masks, each a set of superpixels of one image; all data stays on the CPU.

    maps: one per image, i32 [height, width], the superpixel 0..S-1 of each pixel, -1 for none
    (padding, outside the image);
    map_index: i64 [n], the map of each mask;
    members: bool [n, S], with the S of the image that has the most superpixels, False beyond the
    number of superpixels of an image.
    """

    maps: tuple[Labels, ...]
    map_index: Tensor
    members: Tensor

    @classmethod
    def of_image(cls, labels: NDArray[np.integer], members: Tensor) -> SegmentMasks:
        """The masks `members`, bool [n, S], over one label map [height, width].

        Raises ValueError if shapes, dtypes or numbers do not match.
        """
        count = members.shape[-1]
        if labels.ndim != 2 or members.ndim != 2 or members.dtype != torch.bool:
            raise ValueError(
                f"expected labels [h, w] and bool members [n, S], got {labels.shape} and "
                f"{members.dtype} {tuple(members.shape)}"
            )
        if labels.size and (labels.min() < -1 or labels.max() >= count):
            raise ValueError(
                f"superpixels are numbered {labels.min()}..{labels.max()}, but the members are "
                f"those of -1..{count - 1}"
            )
        map_index = torch.zeros(len(members), dtype=torch.int64)
        return cls((np.asarray(labels, dtype=np.int32),), map_index, members.cpu())

    @classmethod
    def cat(cls, masks: Sequence[SegmentMasks]) -> SegmentMasks:
        """Concatenate the masks of multiple images."""
        size = max((m.members.shape[1] for m in masks), default=0)
        maps: list[Labels] = []
        map_index = [torch.zeros(0, dtype=torch.int64)]
        members = [torch.zeros((0, size), dtype=torch.bool)]
        for m in masks:
            map_index.append(m.map_index + len(maps))
            members.append(pad(m.members, (0, size - m.members.shape[1])))
            maps += m.maps
        return cls(tuple(maps), torch.cat(map_index), torch.cat(members))

    def __len__(self) -> int:
        return len(self.map_index)

    def __getitem__(self, index: Tensor) -> SegmentMasks:
        rows = index.cpu()
        return replace(self, map_index=self.map_index[rows], members=self.members[rows])

    def to(self, device: torch.device | str) -> SegmentMasks:
        """These masks: they stay on the CPU, only crops are moved to a device."""
        del device
        return self

    def transform(self, geometry: AxisAlignedTransform) -> SegmentMasks:
        """Transform the masks into the frame of `geometry`.

        Each new pixel takes the old pixel in which its centre lies: exact for flips and crops. A
        resize loses details smaller than a pixel of the new frame. Maps without masks are not
        transformed but filled with -1.
        """
        used = set(self.map_index.tolist())
        empty = np.broadcast_to(np.int32(-1), (geometry.height, geometry.width))
        maps = [
            geometry.sample(labels, -1) if i in used else empty
            for i, labels in enumerate(self.maps)
        ]
        return replace(self, maps=tuple(maps))

    def area(self) -> Tensor:
        return self.pixel_counts().float()

    def boxes(self) -> Tensor:
        out = np.zeros((len(self), 4), dtype=np.float32)
        for rows, labels, members in self.by_map():
            first_x, last_x = _extent(labels.T, members.shape[1])
            first_y, last_y = _extent(labels, members.shape[1])
            present = np.flatnonzero(last_x > 0)
            members = members[:, present]
            nonempty = members.any(axis=1)
            if not nonempty.any():
                continue
            rows = rows[nonempty]
            members = members[nonempty]
            for side, ends, sign in (
                (0, first_x, 1),
                (1, first_y, 1),
                (2, last_x, -1),
                (3, last_y, -1),
            ):
                # Sorted from the outside, the first member is the outermost.
                order = np.argsort(sign * ends[present])
                outermost = members[:, order].argmax(axis=1)
                out[rows, side] = ends[present][order][outermost]
        return torch.from_numpy(out)

    def iou(self, other: Masks) -> Tensor:
        """Intersection over union with each mask of `other`, f32 [n, m].

        Exactly the result of `masks.base.rle_iou`; 0 for masks in frames of different sizes.
        """
        size = self.members.shape[1]
        count_common: Callable[[Labels], Tensor]
        if isinstance(other, SegmentMasks):
            other_areas = other.pixel_counts()
            count_common = partial(_common_pixels_of_segments, size=size, other=other)
        else:
            masks = [
                (tuple(rle["size"]), rle_ops.counts_from_string(rle["counts"].encode()))
                for rle in other.to_rle()
            ]
            other_areas = torch.tensor(
                [counts[1::2].sum() for _, counts in masks], dtype=torch.float64
            )
            count_common = partial(_common_pixels_of_runs, size=size, masks=masks)
        areas = self.pixel_counts()
        out = torch.zeros(len(self), len(other))
        for rows, labels, _ in self.by_map():
            common_pixels = count_common(labels)
            for block in _blocks(rows, max(size, len(other))):
                inter = self.members[block].double() @ common_pixels
                union = (areas[block, None] + other_areas - inter).clamp(min=1)
                out[block] = (inter / union).float()
        return out

    def crop_and_resize(self, boxes: Tensor, size: int) -> Tensor:
        """Crop mask i by boxes[i] and resize it to size x size.

        A cell is set if the mask contains the pixel in which the cell's centre lies.
        """
        corners = boxes.detach().cpu().numpy().astype(np.float64)
        steps = (np.arange(size) + 0.5) / size
        points = corners[:, :2, None] + steps * (corners[:, 2:, None] - corners[:, :2, None])
        out = np.zeros((len(self), size, size), dtype=np.float32)
        for rows, labels, members in self.by_map():
            cells = _labels_at(labels, points[rows, 0], points[rows, 1])
            table = _append_no_label(members)
            out[rows] = table[np.arange(len(rows))[:, None, None], cells]
        return torch.from_numpy(out).to(boxes.device)

    def to_rle(self) -> list[Rle]:
        rle_of_row: dict[int, Rle] = {}
        for rows, labels, members in self.by_map():
            # The borders of superpixels along the columns are found once per map. A mask changes
            # at some of them, and ends at the last.
            flat = labels.ravel(order="F")
            starts = np.flatnonzero(np.diff(flat, prepend=-2))
            borders = np.append(starts, flat.size)
            table = _append_no_label(members)
            texts: list[str] = []
            for block in _blocks(np.arange(len(rows)), len(borders)):
                counts, lengths = _encode_counts(table[block.numpy()], flat[starts], borders)
                texts += rle_ops.strings_from_counts(counts, lengths)
            for row, text in zip(rows, texts, strict=True):
                rle_of_row[int(row)] = {"size": list(labels.shape), "counts": text}
        return [rle_of_row[row] for row in range(len(self))]

    def to_bitmaps(self) -> NDArray[np.bool_]:
        return rle_to_bitmaps(self.to_rle())

    def label_maps(self) -> list[Labels]:
        """The mask of each pixel, one i32 [height, width] per map.

        A mask is its row among the n. Of overlapping masks the first counts; -1 for no mask.
        """
        out = [np.full_like(labels, -1) for labels in self.maps]
        for rows, labels, members in self.by_map():
            owner = np.where(members.any(axis=0), rows[members.argmax(axis=0)], -1).astype(np.int32)
            out[int(self.map_index[rows[0]])] = np.append(owner, np.int32(-1))[labels]
        return out

    def pixel_counts(self) -> Tensor:
        """Exact number of pixels of each mask, f64 [n]."""
        size = self.members.shape[1]
        out = torch.zeros(len(self), dtype=torch.float64)
        for rows, labels, _ in self.by_map():
            areas = superpixel_areas(labels, size)
            for block in _blocks(rows, size):
                out[block] = self.members[block].double() @ areas
        return out

    def by_map(self) -> Iterator[tuple[Ints, Labels, Bools]]:
        """Each map that has masks: the masks' rows i64 [k], the map, their members bool [k, S]."""
        index = self.map_index.numpy()
        members = self.members.numpy()
        for i, labels in enumerate(self.maps):
            rows = np.flatnonzero(index == i)
            if len(rows):
                yield rows, labels, members[rows]


@dataclass(frozen=True)
class SegmentProposals:
    """Segments of an image [H, W] as sets of superpixels, by descending score.

    labels: i32 [H, W], the superpixel 0..S-1 of each pixel;
    members: bool [R, S], the superpixels of each segment.
    """

    labels: Labels
    members: Bools

    def __len__(self) -> int:
        return len(self.members)

    def areas(self) -> Ints:
        """Number of pixels of each segment, i64 [R]."""
        return self.members @ np.bincount(self.labels.ravel(), minlength=self.members.shape[1])

    def nbytes(self) -> int:
        """Memory of both arrays in bytes."""
        return self.labels.nbytes + self.members.nbytes


def superpixel_areas(labels: Labels, size: int) -> Tensor:
    """Number of pixels of each superpixel, f64 [size].

    In float64 their sums are exact, and neither autocast nor a lower precision of matrix products
    applies.
    """
    return torch.from_numpy(np.bincount(labels.ravel() + 1, minlength=size + 1)[1:]).double()


def _blocks(rows: Ints, width: int) -> tuple[Tensor, ...]:
    """Split the rows so that a table of `width` columns has about BLOCK entries per part."""
    return torch.split(torch.from_numpy(rows), max(1, BLOCK // max(width, 1)))


def _append_no_label(members: Bools) -> Bools:
    """Append a column of False, which the label -1 selects."""
    return np.pad(members, ((0, 0), (0, 1)))


def _labels_at(labels: Labels, x: NDArray[np.floating], y: NDArray[np.floating]) -> Labels:
    """Labels at columns x [n, w] and rows y [n, h] in continuous pixels, i32 [n, h, w].

    -1 outside the map.
    """
    height, width = labels.shape
    column = np.where((x >= 0) & (x < width), x, width).astype(np.int64)
    row = np.where((y >= 0) & (y < height), y, height).astype(np.int64)
    padded = np.pad(labels, ((0, 1), (0, 1)), constant_values=-1)
    return padded[row[:, :, None], column[:, None, :]]


def _extent(labels: Labels, size: int) -> tuple[Ints, Ints]:
    """First row and end (exclusive) of each superpixel, i64 [size] each.

    Both are 0 for an empty superpixel.
    """
    in_row = np.zeros((size + 1, len(labels)), dtype=bool)
    in_row[labels, np.arange(len(labels))[:, None]] = True
    in_row = in_row[:-1]  # drops the label -1
    first = in_row.argmax(axis=1)
    end = len(labels) - in_row[:, ::-1].argmax(axis=1)
    return first, np.where(in_row.any(axis=1), end, 0)


def _common_pixels_of_segments(labels: Labels, size: int, other: SegmentMasks) -> Tensor:
    """Number of pixels that each superpixel shares with each of m other masks, f64 [size, m].

    0 for frames of different sizes.
    """
    out = torch.zeros((size, len(other)), dtype=torch.float64)
    for columns, other_labels, members in other.by_map():
        table = torch.from_numpy(members).double().T
        if other_labels is labels:
            # A map has no superpixel beyond the S of either side.
            shared = min(size, len(table))
            out[:shared, columns] = superpixel_areas(labels, shared)[:, None] * table[:shared]
        elif other_labels.shape == labels.shape:
            num_columns = len(table) + 1
            pairs = (labels + 1).astype(np.int64) * num_columns + (other_labels + 1)
            common = np.bincount(pairs.ravel(), minlength=(size + 1) * num_columns)
            common = common.reshape(size + 1, -1)[1:, 1:]
            out[:, columns] = torch.from_numpy(common).double() @ table
    return out


def _common_pixels_of_runs(
    labels: Labels, size: int, masks: Sequence[tuple[tuple[int, ...], Ints]]
) -> Tensor:
    """`_common_pixels_of_segments` for masks as frame (height, width) and run lengths.

    One bitmap is made at a time.
    """
    out = np.zeros((size, len(masks)))
    flat = labels.ravel(order="F") + 1
    for i, (frame, counts) in enumerate(masks):
        if frame == labels.shape:
            inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
            out[:, i] = np.bincount(flat[inside], minlength=size + 1)[1:]
    return torch.from_numpy(out)


def _encode_counts(table: Bools, pieces: Labels, borders: Ints) -> tuple[Ints, Ints]:
    """Run lengths of n masks, concatenated, and the number of runs of each mask.

    table: bool [n, S + 1]; pieces: [P], superpixel of each piece of the columns;
    borders: i64 [P + 1], the start of each piece, and the end.
    """
    inside = table[:, pieces]
    change = np.diff(inside, axis=1, prepend=False, append=False)
    change[:, -1] = True
    ends = borders[np.nonzero(change)[1]]
    lengths = np.count_nonzero(change, axis=1)
    counts = np.diff(ends, prepend=0)
    first = np.cumsum(lengths) - lengths
    counts[first] = ends[first]
    return counts, lengths
