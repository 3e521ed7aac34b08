"""Masks made of superpixels: a map of numbers an image, and which superpixels each mask has.

A thousand segment proposals take one label map and a boolean table. What is asked of the masks follows from the pixels of each superpixel, looked
at once, and from the table; their full-size bitmaps are never made.
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

from maskseg.masks.base import Masks, Rle
from maskseg.ops import rle
from maskseg.ops.geometry import Geometry
from maskseg.ops.rle import Ints

Labels = NDArray[np.int32]
Bools = NDArray[np.bool_]
BLOCK = 2**22  # entries of the tables that are worked on together: 32 MB as float64


@dataclass(frozen=True)
class SegmentMasks:
    """n masks, each a set of superpixels of one image. All of it stays on the CPU.

    maps: of each image, i32 [height, width], the superpixel 0..S-1 of each pixel, -1 where there is none (padding, outside of the image);
    map_index: i64 [n], the map of each mask; members: bool [n, S], S of the image that has most, False beyond an image's own.
    """

    maps: tuple[Labels, ...]
    map_index: Tensor
    members: Tensor

    @classmethod
    def of_image(cls, labels: NDArray[np.integer], members: Tensor) -> SegmentMasks:
        """The masks `members` bool [n, S] over one label map [height, width]. Raises ValueError where the two do not go together."""
        known = members.shape[-1]
        if labels.ndim != 2 or members.ndim != 2 or members.dtype != torch.bool:
            raise ValueError(
                f"needs labels [h, w] and bool members [n, S], got {labels.shape} and {members.dtype} {tuple(members.shape)}"
            )
        if labels.size and (labels.min() < -1 or labels.max() >= known):
            raise ValueError(
                f"superpixels are numbered {labels.min()}..{labels.max()}, the members are those of -1..{known - 1}"
            )
        return cls(
            (np.asarray(labels, dtype=np.int32),),
            torch.zeros(len(members), dtype=torch.int64),
            members.cpu(),
        )

    @classmethod
    def cat(cls, masks: Sequence[SegmentMasks]) -> SegmentMasks:
        """The masks of several images, one after the other."""
        most = max((m.members.shape[1] for m in masks), default=0)
        starts = np.cumsum([0, *(len(m.maps) for m in masks)]).tolist()
        index = [m.map_index + start for m, start in zip(masks, starts, strict=False)]
        members = [pad(m.members, (0, most - m.members.shape[1])) for m in masks]
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            tuple(x for m in masks for x in m.maps),
            torch.cat([none, *index]),
            torch.cat([none.bool().view(0, most), *members]),
        )

    def __len__(self) -> int:
        return len(self.map_index)

    def __getitem__(self, index: Tensor) -> SegmentMasks:
        here = index.cpu()
        return replace(self, map_index=self.map_index[here], members=self.members[here])

    def to(self, device: torch.device | str) -> SegmentMasks:
        del device  # stays on the CPU: only what is cut out moves
        return self

    def warp(self, geometry: Geometry) -> SegmentMasks:
        """Each pixel of the new frame is that of the old one in which its centre lies: exact for flips and crops. The maps are sampled anew,
        so a resize loses what is smaller than a pixel of the new frame. Maps of which no mask is left are not looked at: all -1."""
        used, none = (
            set(self.map_index.tolist()),
            np.broadcast_to(np.int32(-1), (geometry.height, geometry.width)),
        )
        return replace(
            self,
            maps=tuple(
                geometry.sample(labels, -1) if i in used else none
                for i, labels in enumerate(self.maps)
            ),
        )

    def area(self) -> Tensor:
        return self._areas().float()

    def boxes(self) -> Tensor:
        out = np.zeros((len(self), 4), dtype=np.float32)
        for rows, labels, members in self._by_map():
            first_x, last_x = _extent(labels.T, members.shape[1])
            first_y, last_y = _extent(labels, members.shape[1])
            there = np.flatnonzero(last_x > 0)
            members = members[:, there]
            seen = members.any(axis=1)
            if not seen.any():
                continue
            rows, members = rows[seen], members[seen]
            for side, ends, sign in (
                (0, first_x, 1),
                (1, first_y, 1),
                (2, last_x, -1),
                (3, last_y, -1),
            ):
                order = np.argsort(sign * ends[there])
                out[rows, side] = ends[there][order][
                    members[:, order].argmax(axis=1)
                ]  # the outermost member
        return torch.from_numpy(out)

    def iou(self, other: Masks) -> Tensor:
        """Exactly what `masks.rle_iou` gives of the RLEs; 0 for masks in frames of different sizes, which share no pixel."""
        size = self.members.shape[1]
        cover: Callable[[Labels], Tensor]
        if isinstance(other, SegmentMasks):
            theirs, cover = other._areas(), partial(_cover_of_segments, size=size, other=other)
        else:
            masks = [
                (tuple(r["size"]), rle.counts_from_string(r["counts"].encode()))
                for r in other.to_rle()
            ]
            theirs = torch.tensor([counts[1::2].sum() for _, counts in masks], dtype=torch.float64)
            cover = partial(_cover_of_runs, size=size, masks=masks)
        own, out = self._areas(), torch.zeros(len(self), len(other))
        for rows, labels, _ in self._by_map():
            covered = cover(labels)
            for some in _blocks(rows, max(size, len(other))):
                common = self.members[some].double() @ covered
                out[some] = (common / (own[some, None] + theirs - common).clamp(min=1)).float()
        return out

    def crop_resize(self, boxes: Tensor, size: int) -> Tensor:
        """A cell is set where the pixel in which its centre lies is."""
        corners = boxes.detach().cpu().numpy().astype(np.float64)
        steps = (np.arange(size) + 0.5) / size
        points = corners[:, :2, None] + steps * (corners[:, 2:, None] - corners[:, :2, None])
        out = np.zeros((len(self), size, size), dtype=np.float32)
        for rows, labels, members in self._by_map():
            found = _look_up(labels, points[rows, 0], points[rows, 1])
            out[rows] = _with_none(members)[np.arange(len(rows))[:, None, None], found]
        return torch.from_numpy(out).to(boxes.device)

    def to_rle(self) -> list[Rle]:
        out: list[Rle] = [{}] * len(self)
        for rows, labels, members in self._by_map():
            # Where a superpixel ends, down the columns, is found once; a mask changes at some of these places, and ends at the last.
            flat = labels.ravel(order="F")
            starts = np.flatnonzero(np.diff(flat, prepend=-2))
            table, pieces, borders = _with_none(members), flat[starts], np.append(starts, flat.size)
            texts: list[str] = []
            for some in _blocks(np.arange(len(rows)), len(borders)):
                texts += rle.strings_from_counts(*_counts(table[some.numpy()], pieces, borders))
            for row, text in zip(rows, texts, strict=True):
                out[row] = {"size": list(labels.shape), "counts": text}
        return out

    def label_maps(self) -> list[Labels]:
        """Of each map, the mask that has each pixel, i32 [height, width]: its row among the n, the first of several, -1 where there is none."""
        out = [np.full_like(labels, -1) for labels in self.maps]
        for rows, labels, members in self._by_map():
            owner = np.where(members.any(axis=0), rows[members.argmax(axis=0)], -1).astype(np.int32)
            out[int(self.map_index[rows[0]])] = np.append(owner, np.int32(-1))[labels]
        return out

    def _areas(self) -> Tensor:
        """Pixels of each mask, f64 [n], exact."""
        out, size = torch.zeros(len(self), dtype=torch.float64), self.members.shape[1]
        for rows, labels, _ in self._by_map():
            pixels = superpixel_areas(labels, size)
            for some in _blocks(rows, size):
                out[some] = self.members[some].double() @ pixels
        return out

    def _by_map(self) -> Iterator[tuple[Ints, Labels, Bools]]:
        """Of each map that has masks: their rows i64 [k], the map, their members bool [k, S]."""
        index, members = self.map_index.numpy(), self.members.numpy()
        for i, labels in enumerate(self.maps):
            rows = np.flatnonzero(index == i)
            if len(rows):
                yield rows, labels, members[rows]


def _blocks(rows: Ints, width: int) -> tuple[Tensor, ...]:
    """The rows in parts, so that a table of `width` columns holds about BLOCK entries of each."""
    return torch.split(torch.from_numpy(rows), max(1, BLOCK // max(width, 1)))


def _with_none(members: Bools) -> Bools:
    """A last column, False, for the label -1."""
    return np.pad(members, ((0, 0), (0, 1)))


def _look_up(labels: Labels, x: NDArray[np.floating], y: NDArray[np.floating]) -> Labels:
    """The labels at columns x [n, w] and rows y [n, h], continuous pixels; -1 outside. -> i32 [n, h, w]."""
    height, width = labels.shape
    column = np.where((x >= 0) & (x < width), x, width).astype(np.int64)
    row = np.where((y >= 0) & (y < height), y, height).astype(np.int64)
    return np.pad(labels, ((0, 1), (0, 1)), constant_values=-1)[row[:, :, None], column[:, None, :]]


def superpixel_areas(labels: Labels, size: int) -> Tensor:
    """Pixels of each superpixel, f64 [size]. As float64, sums of them are exact, and no autocast or lower precision of products touches them."""
    return torch.from_numpy(np.bincount(labels.ravel() + 1, minlength=size + 1)[1:]).double()


def _extent(labels: Labels, size: int) -> tuple[Ints, Ints]:
    """The first row of each superpixel and the one past its last, i64 [size] each; 0 and 0 for one without pixels."""
    seen = np.zeros((size + 1, len(labels)), dtype=bool)
    seen[labels, np.arange(len(labels))[:, None]] = True  # -1 falls into the last row
    seen = seen[:-1]
    return seen.argmax(axis=1), np.where(
        seen.any(axis=1), len(labels) - seen[:, ::-1].argmax(axis=1), 0
    )


def _cover_of_segments(labels: Labels, size: int, other: SegmentMasks) -> Tensor:
    """Pixels of each superpixel that each of m other masks covers, f64 [size, m]; none where the frames have different sizes."""
    out = torch.zeros((size, len(other)), dtype=torch.float64)
    for columns, theirs, members in other._by_map():
        table = torch.from_numpy(members).double().T
        if theirs is labels:
            shared = min(size, len(table))  # a map has no superpixel beyond either's S
            out[:shared, columns] = superpixel_areas(labels, shared)[:, None] * table[:shared]
        elif theirs.shape == labels.shape:
            pairs = (labels + 1).astype(np.int64) * (len(table) + 1) + (theirs + 1)
            common = np.bincount(pairs.ravel(), minlength=(size + 1) * (len(table) + 1)).reshape(
                size + 1, -1
            )[1:, 1:]
            out[:, columns] = torch.from_numpy(common).double() @ table
    return out


def _cover_of_runs(
    labels: Labels, size: int, masks: Sequence[tuple[tuple[int, ...], Ints]]
) -> Tensor:
    """The same for m masks as frame (height, width) and run lengths, one bitmap at a time."""
    out = np.zeros((size, len(masks)))
    flat = labels.ravel(order="F") + 1
    for i, (frame, counts) in enumerate(masks):
        if frame == labels.shape:
            inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
            out[:, i] = np.bincount(flat[inside], minlength=size + 1)[1:]
    return torch.from_numpy(out)


def _counts(table: Bools, pieces: Labels, borders: Ints) -> tuple[Ints, Ints]:
    """Run lengths of n masks, one mask after the other, and how many of each (see `runs.strings_from_counts`).

    table: bool [n, S + 1]; pieces: the superpixel of each of R pieces of the columns; borders: i64 [R + 1], where each begins, and the end.
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


@dataclass(frozen=True)
class SegmentProposals:
    """Segments of an image [H, W] as sets of superpixels, the best first.

    labels: i32 [H, W], the superpixel 0..S-1 of each pixel; members: bool [R, S], the superpixels of each segment.
    """

    labels: Labels
    members: Bools

    def __len__(self) -> int:
        return len(self.members)

    def areas(self) -> Ints:
        """Pixels of each segment, i64 [R]."""
        return self.members @ np.bincount(self.labels.ravel(), minlength=self.members.shape[1])

    def nbytes(self) -> int:
        """What both arrays take in memory."""
        return self.labels.nbytes + self.members.nbytes
