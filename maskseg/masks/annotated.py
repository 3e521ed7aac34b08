"""Masks behind one Protocol: as they came from a file (polygons, RLE), and soft grids in a box's frame (predictions).

A mask lives in a frame of (height, width) pixels. Moving it (flip, resize, crop) only changes an affine map; full-size bitmaps are made
where a picture or another library needs them, never to train.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from maskseg.masks.base import Floats, Masks, Rle, rle_from_counts, rle_iou
from maskseg.ops import rle as runs
from maskseg.ops.geometry import Geometry


@dataclass(frozen=True)
class Polygons:
    """One instance as polygons, each f64 [points, 2] (x, y); their union is the mask."""

    parts: tuple[Floats, ...]


@dataclass(frozen=True)
class Runs:
    """One instance as run lengths: `ends` i64 [runs] (see `ops.runs`) in a frame of height x width pixels."""

    ends: NDArray[np.int64]
    height: int
    width: int


class FileMasks:
    """Masks as they came from the file, polygons and run lengths mixed, with the affine map from the file's frame to the present one."""

    def __init__(
        self, shapes: Sequence[Polygons | Runs], affine: Floats, frames: NDArray[np.int64]
    ) -> None:
        """affine: [n, 4] (scale_x, shift_x, scale_y, shift_y); frames: [n, 2] (height, width) of the present frames."""
        self.shapes, self.affine, self.frames = list(shapes), affine, frames

    @classmethod
    def from_file(cls, shapes: Sequence[Polygons | Runs], height: int, width: int) -> FileMasks:
        """The masks of one image, in its own frame."""
        n = len(shapes)
        return cls(
            shapes,
            np.full((n, 4), (1.0, 0.0, 1.0, 0.0)),
            np.full((n, 2), (height, width), dtype=np.int64),
        )

    @classmethod
    def cat(cls, masks: Sequence[FileMasks]) -> FileMasks:
        """The masks of several images, one after the other."""
        shapes = [s for m in masks for s in m.shapes]
        affine = np.concatenate([np.zeros((0, 4)), *(m.affine for m in masks)])
        return cls(
            shapes, affine, np.concatenate([np.zeros((0, 2), np.int64), *(m.frames for m in masks)])
        )

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: Tensor) -> FileMasks:
        rows = np.asarray(index.detach().cpu().numpy())
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return FileMasks([self.shapes[i] for i in rows], self.affine[rows], self.frames[rows])

    def to(self, device: torch.device | str) -> FileMasks:
        del device  # stays on the CPU: only what is cut out moves
        return self

    def warp(self, geometry: Geometry) -> FileMasks:
        g = geometry
        affine = self.affine * (g.scale_x, g.scale_x, g.scale_y, g.scale_y) + (
            0.0,
            g.shift_x,
            0.0,
            g.shift_y,
        )
        return FileMasks(
            self.shapes, affine, np.full((len(self), 2), (g.height, g.width), dtype=np.int64)
        )

    def boxes(self) -> Tensor:
        out = np.zeros((len(self), 4))
        for i, shape in enumerate(self.shapes):
            if isinstance(shape, Runs):
                out[i] = self._clipped_spans(i)[0]
                continue
            points = np.concatenate(self._moved(i))
            out[i] = *points.min(axis=0), *points.max(axis=0)
            if (out[i] < 0).any() or (
                out[i, 2:] > self.frames[i, ::-1]
            ).any():  # cut by the frame: ask the pixels
                x, y, w, h = coco_mask.toBbox(self._rle(i))
                out[i] = x, y, x + w, y + h
        return torch.from_numpy(out.astype(np.float32))

    def area(self) -> Tensor:
        areas = [
            float(coco_mask.area(self._rle(i)))
            if isinstance(shape, Polygons)
            else self._clipped_spans(i)[1]
            for i, shape in enumerate(self.shapes)
        ]
        return torch.tensor(areas, dtype=torch.float32)

    def iou(self, other: Masks) -> Tensor:
        return rle_iou(self.to_rle(), other.to_rle())

    def to_rle(self) -> list[Rle]:
        return [self._rle(i) for i in range(len(self))]

    def crop_resize(self, boxes: Tensor, size: int) -> Tensor:
        """Polygons are rasterised in the box's frame (as detectron2's `rasterize_polygons_within_box`); of run lengths, a cell is set where
        the mask covers at least half of it, exactly; at just a half it is set where the file's mask lies to the right or below."""
        corners = boxes.detach().cpu().numpy().astype(np.float64)
        out = np.zeros((len(self), size, size), dtype=np.float32)
        is_run = np.array([isinstance(s, Runs) for s in self.shapes], dtype=bool)
        if len(which := np.flatnonzero(~is_run)):
            self._rasterise(which, corners[which], out)
        if len(which := np.flatnonzero(is_run)):
            chosen = [s for s in (self.shapes[i] for i in which) if isinstance(s, Runs)]
            sizes = np.array([(s.height, s.width) for s in chosen], dtype=np.int64)
            out[which] = (
                runs.moved_cover(
                    [s.ends for s in chosen], sizes, self.affine[which], corners[which], size
                )
                >= 0.5
            )
        return torch.from_numpy(out).to(boxes.device)

    def _moved(self, i: int) -> list[Floats]:
        shape = self.shapes[i]
        assert isinstance(shape, Polygons)
        return [p * self.affine[i, 0::2] + self.affine[i, 1::2] for p in shape.parts]

    def _rasterise(self, which: NDArray[np.int64], boxes: Floats, out: NDArray[np.float32]) -> None:
        """Polygon masks `which` in the frames of their boxes f64 [n, 4] -> out[which], f32 [n, size, size], in one call of the library."""
        size = out.shape[-1]
        found = [s.parts for s in (self.shapes[i] for i in which) if isinstance(s, Polygons)]
        parts = [part for own in found for part in own]
        row = np.repeat(np.arange(len(which)), [len(own) for own in found])  # of each part
        lengths = [len(part) for part in parts]
        point = np.repeat(row, lengths)
        affine, scale = (
            self.affine[which],
            size / np.maximum(boxes[:, 2:] - boxes[:, :2], runs.MIN_SIDE),
        )
        points = np.concatenate(parts) * affine[point, 0::2] + affine[point, 1::2]
        flat = ((points - boxes[point, :2]) * scale[point]).ravel()
        ends = (2 * np.cumsum(lengths)).tolist()
        outlines = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        cells = coco_mask.decode(coco_mask.frPyObjects(outlines, size, size)).transpose(2, 0, 1)
        first = np.diff(row, prepend=-1) > 0
        out[which] = cells[first]
        for i in np.flatnonzero(~first):
            np.maximum(out[which[row[i]]], cells[i], out=out[which[row[i]]])

    def _sample(
        self, which: NDArray[np.int64], x: NDArray[Any], y: NDArray[Any]
    ) -> NDArray[np.bool_]:
        """Run-length masks `which` at columns x [n, w] and rows y [n, h] of the present frame -> bool [n, h, w]."""
        sx, tx, sy, ty = (c[:, None] for c in self.affine[which].T)
        column = np.floor((x - tx) / sx).astype(np.int64)
        row = np.floor((y - ty) / sy).astype(np.int64)
        chosen = [s for s in (self.shapes[i] for i in which) if isinstance(s, Runs)]
        sizes = np.array([(s.height, s.width) for s in chosen], dtype=np.int64)
        shape = (len(which), row.shape[1], column.shape[1])
        points_x = np.broadcast_to(column[:, None, :], shape).reshape(len(which), -1)
        points_y = np.broadcast_to(row[:, :, None], shape).reshape(len(which), -1)
        return runs.inside(
            [s.ends for s in chosen], sizes[:, 0], sizes[:, 1], points_x, points_y
        ).reshape(shape)

    def _clipped_spans(self, i: int) -> tuple[Floats, float]:
        """Box and area of a run-length mask inside its frame, from the runs alone."""
        shape = self.shapes[i]
        assert isinstance(shape, Runs)
        column, top, bottom = runs.spans(shape.ends, shape.height)
        sx, tx, sy, ty = self.affine[i]
        height, width = self.frames[i]
        x = np.sort(np.stack([column * sx + tx, (column + 1) * sx + tx]), axis=0).clip(0, width)
        y = np.sort(np.stack([top * sy + ty, bottom * sy + ty]), axis=0).clip(0, height)
        pieces = (x[1] - x[0]) * (y[1] - y[0])
        seen = pieces > 0
        if not seen.any():
            return np.zeros(4), 0.0
        x, y = x[:, seen], y[:, seen]
        return np.array([x[0].min(), y[0].min(), x[1].max(), y[1].max()]), float(pieces.sum())

    def _rle(self, i: int) -> Rle:
        height, width = (int(v) for v in self.frames[i])
        if isinstance(self.shapes[i], Polygons):
            parts = [p.ravel() for p in self._moved(i)]
            rle = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
            return {"size": [height, width], "counts": rle["counts"].decode()}
        x0, y0, x1, y1 = self._clipped_spans(i)[0]
        left, top, right, bottom = int(x0), int(y0), int(np.ceil(x1)), int(np.ceil(y1))
        x, y = np.arange(left, right)[None] + 0.5, np.arange(top, bottom)[None] + 0.5
        crop = self._sample(np.array([i]), x, y)[0]
        return rle_from_counts(runs.counts_from_crop(crop, left, top, height, width), height, width)
