"""Segments by binary codes beside other ways to cut an image, at equal numbers of segments (Ravanbakhsh et al. 2016, figure 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskseg.errors import UserError
from maskseg.evaluation.segmentation_iou import SegmentationIoU
from maskseg.inference.predictor import Prepare
from maskseg.models.rcnn import PixelModel
from maskseg.structures import Batch
from maskseg.superpixels.methods import SLIC, GraphSegments, Labels, neighbours
from maskseg.variants.hash.merging import cluster, merge_labels
from maskseg.variants.hash.segmenter import Frame, HashSegmenter

BASES = ("slic", "egs")
METHODS = ("hash", "kmeans", "egs", "slic", "superpixels")
VALUES = ("segments", "images", "best_annotator", "covering")
_CLUSTERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Seen:
    """One image as the network sees it: the level's features [C, h, w] of length one where the layer has them so, its soft codes f32 [b, h, w], and
    the frame of the image's own pixels."""

    features: Tensor
    codes: Tensor
    frame: Frame


def look(model: PixelModel, segmenter: HashSegmenter, batch: Batch) -> Seen:
    """batch: of one image."""
    features = model.features(batch)[segmenter.level]
    height, width = batch.original_sizes[0].tolist()
    scale = (batch.sizes[0] / batch.original_sizes[0]).tolist()
    vectors = segmenter.layer.vectors(features).view(*features.shape[2:], -1).permute(2, 0, 1)
    return Seen(vectors, segmenter.layer(features)[0], Frame(height, width, (scale[0], scale[1])))


def check_study(sweep: Sequence[float], scales: Sequence[float], base: str) -> None:
    """Raises UserError for arguments of a `SegmentStudy` that it cannot use."""
    whole = all(type(value) is int or (base == "egs" and type(value) is float) for value in sweep)
    numbers = (
        whole
        and all(type(value) in (int, float) for value in scales)
        and min([*sweep, *scales], default=0) > 0
    )
    if base not in BASES or not sweep or not scales or not numbers or len(set(sweep)) < len(sweep):
        raise UserError(
            f"segments: base must be {' or '.join(BASES)}, sweep and scales lists of different, positive numbers (of slic whole ones)"
        )


class SegmentStudy:
    """Segmentation IoU of each method for several numbers of superpixels.

    `hash` merges superpixels by their codes: SLIC's (base `slic`, sweep: how many), or the pieces of graph-based segmentation (`egs`, sweep: k).
    The others get as many segments as it made of that image, as near as they come: `kmeans` merges the same superpixels by clusters of their
    mean features, `egs` is graph-based segmentation at one of `scales`, `slic` asks SLIC for that many.
    `superpixels` are those that were merged. model: in evaluation mode, segmenter: its; prepare: pixels -> a batch of one.
    """

    def __init__(
        self,
        model: PixelModel,
        segmenter: HashSegmenter,
        prepare: Prepare,
        sweep: Sequence[int],
        scales: Sequence[float],
        base: str = "slic",
    ) -> None:
        check_study(sweep, scales, base)
        self.model, self.segmenter, self.prepare = model, segmenter, prepare
        self.sweep, self.scales, self.base = list(sweep), list(scales), base
        self.scores = {
            (method, value): SegmentationIoU() for method in METHODS for value in self.sweep
        }

    @torch.no_grad()
    def add(
        self, pixels: Tensor, truths: Sequence[NDArray[Any]]
    ) -> dict[int, tuple[Labels, Labels]]:
        """pixels: uint8 RGB [3, H, W]; truths: of each annotator, [H, W] -> for each value of the sweep the superpixels and what was made of them."""
        seen = self.seen(pixels)
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        graphs = [GraphSegments(k=scale)(image) for scale in self.scales]
        made = {}
        for value in self.sweep:
            superpixels = (
                SLIC(value)(image) if self.base == "slic" else GraphSegments(k=value)(image)
            )
            segments = self.hashed(seen, superpixels)
            wanted = int(segments.max()) + 1
            found = {
                "hash": segments,
                "kmeans": self.clustered(seen, superpixels, wanted),
                "egs": _nearest(graphs, wanted),
                "slic": SLIC(wanted)(image),
                "superpixels": superpixels,
            }
            for method, labels in found.items():
                self.scores[method, value].add(labels, truths)
            made[value] = (superpixels, segments)
        return made

    def seen(self, pixels: Tensor) -> Seen:
        """pixels: uint8 RGB [3, H, W]."""
        device = next(self.model.parameters()).device
        return look(self.model, self.segmenter, self.prepare(pixels).to(device))

    def hashed(self, seen: Seen, superpixels: Labels) -> Labels:
        """Superpixels -> segments, both i32 [H, W]."""
        codes = self.segmenter.means(seen.codes, superpixels, seen.frame)
        return self.segmenter.merged(codes, superpixels)[superpixels].astype(np.int32)

    def clustered(self, seen: Seen, superpixels: Labels, wanted: int) -> Labels:
        """Superpixels merged by k-means on their mean features, k such that the number of segments is next to `wanted`."""
        features = self.segmenter.means(seen.features, superpixels, seen.frame).cpu().numpy()
        pairs = neighbours(superpixels) if self.segmenter.scope == "neighbours" else None
        merges: Iterable[NDArray[np.int64]] = (
            merge_labels(cluster(features, k), pairs)
            for k in (*_CLUSTERS, len(features))
            if k <= len(features)
        )
        return _nearest([merged[superpixels].astype(np.int32) for merged in merges], wanted)

    def numbers(self) -> dict[str, dict[int, dict[str, float]]]:
        """Method -> value of the sweep -> what `SegmentationIoU.compute` gives."""
        return {
            method: {value: self.scores[method, value].compute() for value in self.sweep}
            for method in METHODS
        }


def _nearest(found: Sequence[Labels], wanted: int) -> Labels:
    """The label map whose number of segments is next to `wanted`, as a ratio."""
    return min(found, key=lambda labels: abs(float(np.log((int(labels.max()) + 1) / wanted))))


def flat(numbers: dict[str, dict[int, dict[str, float]]]) -> dict[str, float]:
    """For metrics.json: `segmentation_iou/<method>/<value of the sweep>` (the mean over all segments), and the other values behind it."""
    found = {}
    for method, rows in numbers.items():
        for value, values in rows.items():
            key = f"segmentation_iou/{method}/{value}"
            found[key] = values["segments"]
            found |= {
                f"{key}/{name}": values[name]
                for name in (*VALUES[1:], "num_segments", "images_counted")
            }
    return found


def table(numbers: dict[str, dict[int, dict[str, float]]], base: str) -> str:
    """Method by number of superpixels (of base `egs`: by k), as text."""
    names = " ".join(f"{name:>14}" for name in VALUES)
    lines = [
        f"{'method':12} {'superpixels' if base == 'slic' else 'k':>11} {'segments':>9}  IoU: {names}"
    ]
    for method, rows in numbers.items():
        for value, values in rows.items():
            cells = " ".join(f"{values[name]:14.4f}" for name in VALUES)
            lines.append(f"{method:12} {value:11} {values['num_segments']:9.1f}       {cells}")
    return "\n".join(lines)
