"""Annotated masks: polygons and run lengths as they are in the file, moved by an affine map.

A flip, resize or crop changes only the affine map. Full-size bitmaps are made for plots and for
other libraries, never during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from maskseg.masks.base import Floats, Masks, Rle, rle_from_counts, rle_iou, rle_to_bitmaps
from maskseg.ops import rle as rle_ops
from maskseg.ops.geometry import AxisAlignedTransform


@dataclass(frozen=True)
class Polygons:
    """One instance as polygons, each f64 [points, 2] (x, y); the mask is their union."""

    parts: tuple[Floats, ...]


@dataclass(frozen=True)
class RunLengths:
    """One instance as run lengths in a frame of height x width pixels.

    ends: i64 [runs], cumulative run lengths (see `ops.rle`).
    """

    ends: NDArray[np.int64]
    height: int
    width: int


class AnnotatedMasks:
    """Polygons and run lengths, mixed, with an affine map from the file's frame to the current.

    affine: f64 [n, 4] (scale_x, shift_x, scale_y, shift_y);
    frames: i64 [n, 2] (height, width) of the current frames.
    """

    def __init__(
        self, shapes: Sequence[Polygons | RunLengths], affine: Floats, frames: NDArray[np.int64]
    ) -> None:
        self.shapes = list(shapes)
        self.affine = affine
        self.frames = frames

    @classmethod
    def from_file(
        cls, shapes: Sequence[Polygons | RunLengths], height: int, width: int
    ) -> AnnotatedMasks:
        """The masks of one image of height x width pixels, in its own frame."""
        affine = np.full((len(shapes), 4), (1.0, 0.0, 1.0, 0.0))
        frames = np.full((len(shapes), 2), (height, width), dtype=np.int64)
        return cls(shapes, affine, frames)

    @classmethod
    def cat(cls, masks: Sequence[AnnotatedMasks]) -> AnnotatedMasks:
        """Concatenate the masks of multiple images."""
        shapes = []
        for m in masks:
            shapes += m.shapes
        affine = np.concatenate([np.zeros((0, 4)), *(m.affine for m in masks)])
        frames = np.concatenate([np.zeros((0, 2), np.int64), *(m.frames for m in masks)])
        return cls(shapes, affine, frames)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: Tensor) -> AnnotatedMasks:
        rows = np.asarray(index.detach().cpu().numpy())
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return AnnotatedMasks([self.shapes[i] for i in rows], self.affine[rows], self.frames[rows])

    def to(self, device: torch.device | str) -> AnnotatedMasks:
        """These masks: they stay on the CPU, only crops are moved to a device."""
        del device
        return self

    def transform(self, geometry: AxisAlignedTransform) -> AnnotatedMasks:
        g = geometry
        scale = (g.scale_x, g.scale_x, g.scale_y, g.scale_y)
        shift = (0.0, g.shift_x, 0.0, g.shift_y)
        frames = np.full((len(self), 2), (g.height, g.width), dtype=np.int64)
        return AnnotatedMasks(self.shapes, self.affine * scale + shift, frames)

    def boxes(self) -> Tensor:
        out = np.zeros((len(self), 4))
        for i, shape in enumerate(self.shapes):
            if isinstance(shape, RunLengths):
                out[i], _ = self._clipped_box_and_area(i, shape)
            else:
                out[i] = self._polygon_box(i, shape)
        return torch.from_numpy(out.astype(np.float32))

    def area(self) -> Tensor:
        areas = []
        for i, shape in enumerate(self.shapes):
            if isinstance(shape, RunLengths):
                areas.append(self._clipped_box_and_area(i, shape)[1])
            else:
                areas.append(float(coco_mask.area(self._encode(i))))
        return torch.tensor(areas, dtype=torch.float32)

    def iou(self, other: Masks) -> Tensor:
        return rle_iou(self.to_rle(), other.to_rle())

    def to_rle(self) -> list[Rle]:
        return [self._encode(i) for i in range(len(self))]

    def to_bitmaps(self) -> NDArray[np.bool_]:
        return rle_to_bitmaps(self.to_rle())

    def crop_and_resize(self, boxes: Tensor, size: int) -> Tensor:
        """Crop mask i by boxes[i] and resize it to size x size.

        Polygons are rasterized in the frame of the box, as in detectron2's
        `rasterize_polygons_within_box`. Of run lengths, a cell is set if the mask covers at least
        half of it; the coverage is exact, and ties depend on the original frame
        (`ops.rle.transformed_cell_coverage`).
        """
        corners = boxes.detach().cpu().numpy().astype(np.float64)
        out = np.zeros((len(self), size, size), dtype=np.float32)
        is_runs = np.array([isinstance(s, RunLengths) for s in self.shapes], dtype=bool)
        polygon_rows = np.flatnonzero(~is_runs)
        if len(polygon_rows):
            self._rasterize_polygons(polygon_rows, corners[polygon_rows], out)
        run_rows = np.flatnonzero(is_runs)
        if len(run_rows):
            ends, sizes = self._runs_of(run_rows)
            coverage = rle_ops.transformed_cell_coverage(
                ends, sizes, self.affine[run_rows], corners[run_rows], size
            )
            out[run_rows] = coverage >= 0.5
        return torch.from_numpy(out).to(boxes.device)

    def _transformed_parts(self, i: int, shape: Polygons) -> list[Floats]:
        """Polygons of mask i in the current frame."""
        return [part * self.affine[i, 0::2] + self.affine[i, 1::2] for part in shape.parts]

    def _polygon_box(self, i: int, shape: Polygons) -> Floats:
        """Tight box of the polygons of mask i, f64 [4]."""
        points = np.concatenate(self._transformed_parts(i, shape))
        box = np.concatenate([points.min(axis=0), points.max(axis=0)])
        is_clipped = (box < 0).any() or (box[2:] > self.frames[i, ::-1]).any()
        if is_clipped:
            # The corners of the clipped polygon are unknown, so its pixels decide.
            x, y, width, height = coco_mask.toBbox(self._encode(i))
            box = np.array([x, y, x + width, y + height])
        return box

    def _rasterize_polygons(
        self, rows: NDArray[np.int64], boxes: Floats, out: NDArray[np.float32]
    ) -> None:
        """Rasterize the polygon masks `rows` in the frames of their boxes f64 [n, 4].

        Writes to out[rows], f32 [n, size, size]. All polygons are rasterized in one library call.
        """
        size = out.shape[-1]
        parts: list[Floats] = []
        num_parts = []
        for i in rows:
            shape = self.shapes[i]
            assert isinstance(shape, Polygons)
            parts += shape.parts
            num_parts.append(len(shape.parts))
        row_of_part = np.repeat(np.arange(len(rows)), num_parts)
        lengths = [len(part) for part in parts]
        row_of_point = np.repeat(row_of_part, lengths)
        affine = self.affine[rows]
        scale = size / np.maximum(boxes[:, 2:] - boxes[:, :2], rle_ops.MIN_SIDE)
        points = np.concatenate(parts) * affine[row_of_point, 0::2] + affine[row_of_point, 1::2]
        flat = ((points - boxes[row_of_point, :2]) * scale[row_of_point]).ravel()
        ends = (2 * np.cumsum(lengths)).tolist()
        polygons = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        cells = coco_mask.decode(coco_mask.frPyObjects(polygons, size, size)).transpose(2, 0, 1)
        is_first = np.diff(row_of_part, prepend=-1) > 0
        out[rows] = cells[is_first]
        for i in np.flatnonzero(~is_first):
            target = out[rows[row_of_part[i]]]
            np.maximum(target, cells[i], out=target)

    def _runs_of(
        self, rows: NDArray[np.int64]
    ) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Cumulative run lengths of the run-length masks `rows`, and the sizes of their frames.

        The sizes are i64 [n, 2], (height, width).
        """
        ends = []
        sizes = []
        for i in rows:
            shape = self.shapes[i]
            assert isinstance(shape, RunLengths)
            ends.append(shape.ends)
            sizes.append((shape.height, shape.width))
        return ends, np.array(sizes, dtype=np.int64)

    def _sample(
        self, i: int, x: NDArray[np.floating], y: NDArray[np.floating]
    ) -> NDArray[np.bool_]:
        """Run-length mask i at columns x [w] and rows y [h] of the current frame, bool [h, w]."""
        scale_x, shift_x, scale_y, shift_y = self.affine[i]
        column = np.floor((x - shift_x) / scale_x).astype(np.int64)
        row = np.floor((y - shift_y) / scale_y).astype(np.int64)
        ends, sizes = self._runs_of(np.array([i]))
        shape = (len(row), len(column))
        points_x = np.broadcast_to(column[None, :], shape).reshape(1, -1)
        points_y = np.broadcast_to(row[:, None], shape).reshape(1, -1)
        inside = rle_ops.contains_points(ends, sizes[:, 0], sizes[:, 1], points_x, points_y)
        return inside.reshape(shape)

    def _clipped_box_and_area(self, i: int, shape: RunLengths) -> tuple[Floats, float]:
        """Box f64 [4] and area of run-length mask i inside its frame, from the runs alone."""
        column, top, bottom = rle_ops.column_spans(shape.ends, shape.height)
        scale_x, shift_x, scale_y, shift_y = self.affine[i]
        height, width = self.frames[i]
        x = np.stack([column * scale_x + shift_x, (column + 1) * scale_x + shift_x])
        y = np.stack([top * scale_y + shift_y, bottom * scale_y + shift_y])
        x = np.sort(x, axis=0).clip(0, width)
        y = np.sort(y, axis=0).clip(0, height)
        areas = (x[1] - x[0]) * (y[1] - y[0])
        visible = areas > 0
        if not visible.any():
            return np.zeros(4), 0.0
        x = x[:, visible]
        y = y[:, visible]
        box = np.array([x[0].min(), y[0].min(), x[1].max(), y[1].max()])
        return box, float(areas.sum())

    def _encode(self, i: int) -> Rle:
        """Compressed RLE of mask i."""
        shape = self.shapes[i]
        height = int(self.frames[i, 0])
        width = int(self.frames[i, 1])
        if isinstance(shape, Polygons):
            parts = [part.ravel() for part in self._transformed_parts(i, shape)]
            rle = coco_mask.merge(coco_mask.frPyObjects(parts, height, width))
            return {"size": [height, width], "counts": rle["counts"].decode()}
        x0, y0, x1, y1 = self._clipped_box_and_area(i, shape)[0]
        left = int(x0)
        top = int(y0)
        x = np.arange(left, int(np.ceil(x1))) + 0.5
        y = np.arange(top, int(np.ceil(y1))) + 0.5
        crop = self._sample(i, x, y)
        counts = rle_ops.counts_from_crop(crop, left, top, height, width)
        return rle_from_counts(counts, height, width)
