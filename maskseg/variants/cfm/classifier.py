"""Convolutional feature masking (Dai, He, Sun, "Convolutional Feature Masking for Joint Object and Stuff Segmentation", CVPR 2015): segments mask the
feature map, and what is left is pooled and classified. The convolutions never see a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import log2
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.masks.base import Masks
from maskseg.masks.superpixel import SegmentMasks
from maskseg.ops.losses import mean_count
from maskseg.ops.roi_align import AtCells, assign_levels, masked_roi_align, roi_align_levels
from maskseg.structures import Features, FeatureSpec, Losses, Regions, Samples
from maskseg.variants.cfm.layers import connected_paths
from maskseg.variants.cfm.mask_nms import nms_of_masks
from maskseg.variants.cfm.projection import SuperpixelCells, project_superpixels
from maskseg.variants.cfm.pyramid_ops import MANY, pooled_pyramid

DESIGNS, PATHS = ("full_map", "pool_first"), ("segment", "box")
BLOCK = (
    2**23 - 2**20
)  # inputs of the layers that are worked on together: under the 32 MB from which on memory is handed out anew
FINE = 4  # samples a bin and direction, of a mask that is scaled to the bins of its box


class CFMClassifier(nn.Module):
    """Segments -> things and stuff, by softmax over K classes and background: a `Classifier`.

    levels: those that are read, finest first; at: what the backbone says of them, by name. With several, a segment is read from that of its box's
    size (canonical_size pixels go to stride 16). Spatial pyramid pooling: RoIAlign of the box to `size` x `size` bins, then the largest of 1, 4,
    9 ... of them, for each of `pyramid`.

    design `full_map` (section 3.3a): the mask is projected to the cells of the map (statistic, threshold: `ops.projection`), masked cells are
    pooled and go through fully connected layers; beside them the box's cells, through layers of their own. `pool_first` (3.3b): the box's bins of
    the pyramid levels `masked` are masked after pooling, one path of layers sees all. paths: which of `segment` and `box` there are (full_map).
    width, layers, dropout, weights (VGG-16's): of the fully connected layers of each path, see `connected_paths`.

    Inference: classes with a score above `score_threshold` -> of segments of a class that overlap by more than `nms_threshold` mask IoU the best.
    max_detections: so many things of an image are detections (`CFMNet`).
    """

    adds = "masks"

    def __init__(
        self,
        levels: Sequence[str],
        at: Mapping[str, FeatureSpec],
        num_classes: int,
        design: str = "full_map",
        paths: Sequence[str] = PATHS,
        size: int = 6,
        pyramid: Sequence[int] = (6, 3, 2, 1),
        masked: Sequence[int] = (6,),
        statistic: str = "mean",
        threshold: float = 0.5,
        sampling_ratio: int = 2,
        canonical_size: float = 224.0,
        width: int = 512,
        layers: int = 2,
        dropout: float = 0.0,
        weights: str | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.3,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if (
            design not in DESIGNS
            or not paths
            or not set(paths) <= set(PATHS)
            or (design == "pool_first" and "segment" not in paths)
        ):
            raise UserError(
                f"cfm: design must be one of {DESIGNS} and paths some of {PATHS}, pool_first with segment, not {design!r}, {list(paths)}"
            )
        if (
            not pyramid
            or any(s < 1 or size % s for s in pyramid)
            or not set(masked) <= set(pyramid)
        ):
            raise UserError(
                f"cfm: each of pyramid divides size={size}, and masked are some of them, not {list(pyramid)} and {list(masked)}"
            )
        self.at, self.num_classes, self.design, self.paths = (
            {name: at[name] for name in levels},
            num_classes,
            design,
            [p for p in PATHS if p in paths],
        )
        self.size, self.pyramid, self.masked = size, list(pyramid), list(masked)
        self.statistic, self.threshold, self.sampling_ratio, self.canonical_size = (
            statistic,
            threshold,
            sampling_ratio,
            canonical_size,
        )
        strides = [level.stride for level in self.at.values()]
        if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise UserError(
                f"cfm: each of levels has twice the stride of the one before, not {', '.join(self.at)} of strides {strides}"
            )
        channels = {level.channels for level in self.at.values()}
        if len(channels) != 1:
            raise UserError(
                f"cfm: the levels {', '.join(self.at)} must have the same number of channels, not {sorted(channels)}"
            )
        kinds = self.paths if design == "full_map" else ["both"]
        self.inputs = max(channels) * sum(side * side for side in self.pyramid)
        self.layers = connected_paths(
            kinds, channels.pop(), self.pyramid, width, layers, dropout, weights
        )
        self.scores = nn.Linear(width * len(kinds), num_classes + 1)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.zeros_(self.scores.bias)
        self.score_threshold, self.nms_threshold, self.max_detections = (
            score_threshold,
            nms_threshold,
            max_detections,
        )

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> Tensor:
        """-> class logits f32 [R, K + 1], background last."""
        vectors, order = self._vectors(features, boxes, image_index, masks)
        return cast(Tensor, self.scores(vectors)).float()[order]

    def vectors(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> Tensor:
        """What the last layer sees of each segment, [R, width or 2 width]."""
        vectors, order = self._vectors(features, boxes, image_index, masks)
        return vectors[order]

    def _vectors(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """`vectors` in some order, and where each segment's is, i64 [R]: for inference, those of equal boxes are side by side."""
        inside = (
            self._inside(features, masks)
            if self.design == "full_map" and "segment" in self.paths
            else None
        )
        count, order = len(boxes), torch.arange(len(boxes), device=boxes.device)
        if not self.training:
            places = torch.cat([self._assign(boxes)[:, None], image_index[:, None], boxes], dim=1)
            order = torch.unique(places, dim=0, return_inverse=True)[1].argsort()
        # A few hundred segments at a time: thousands of vectors at once are memory that the system has to hand out anew each time.
        blocks = order.tensor_split(
            max(1, min(-(-count * self.inputs // BLOCK), count // MANY))
        )  # none too small to be fast
        found = [
            self._block(features, boxes[rows], image_index[rows], masks[rows], inside, rows)
            for rows in blocks
        ]
        return torch.cat(found), order.argsort()

    def _block(
        self,
        features: Features,
        boxes: Tensor,
        image_index: Tensor,
        masks: Masks,
        inside: AtCells | None,
        rows: Tensor,
    ) -> Tensor:
        """`vectors` of some segments, `rows` of those that `inside` knows."""
        level = self._assign(boxes)
        if self.design == "pool_first":
            bins = self._pooled(features, boxes, image_index, level)
            fine = masks.crop_resize(boxes, FINE * self.size)[:, None]
            parts = []
            for side, part in zip(self.pyramid, pooled_pyramid(bins, self.pyramid), strict=True):
                own = (
                    (F.adaptive_avg_pool2d(fine, side) > self.threshold).to(part)
                    if side in self.masked
                    else None
                )
                parts.append(part if own is None else part * own)
            return cast(Tensor, self.layers["both"](parts))
        new = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        if not self.training:  # where dropout draws for each segment
            new[1:] = (boxes[1:] != boxes[:-1]).any(dim=1) | (image_index[1:] != image_index[:-1])
        first = torch.nonzero(new).squeeze(1)
        if inside is None:
            both = [self._pooled(features, boxes[first], image_index[first], level[first])]
        else:
            wanted = first if "box" in self.paths else None
            both = self._masked(
                features, boxes, image_index, level, partial(_of_rows, inside, rows.cpu()), wanted
            )
        found = {
            path: self.layers[path](pooled_pyramid(own, self.pyramid))
            for path, own in zip(self.paths, both, strict=True)
        }
        if "box" in found:
            found["box"] = found["box"][new.cumsum(0) - 1]
        return torch.cat(list(found.values()), dim=1)

    def _assign(self, boxes: Tensor) -> Tensor:
        """The level of each box, i64 [R], counted from the finest one."""
        strides = [level.stride for level in self.at.values()]
        lowest, highest = int(log2(strides[0])), int(log2(strides[-1]))
        return assign_levels(boxes, lowest, highest, self.canonical_size) - lowest

    def _pooled(
        self, features: Features, boxes: Tensor, image_index: Tensor, level: Tensor
    ) -> Tensor:
        """RoIAlign of the maps, [R, C, size, size]."""
        maps, strides = [features[name] for name in self.at], [at.stride for at in self.at.values()]
        return roi_align_levels(
            maps,
            strides,
            self._placed(boxes, level),
            image_index,
            level,
            self.size,
            self.sampling_ratio,
            True,
        )

    def _masked(
        self,
        features: Features,
        boxes: Tensor,
        image_index: Tensor,
        level: Tensor,
        inside: AtCells,
        whole: Tensor | None = None,
    ) -> list[Tensor]:
        """RoIAlign of the masked maps and, of the regions `whole`, of the maps."""
        maps, strides = [features[name] for name in self.at], [at.stride for at in self.at.values()]
        boxes = self._placed(boxes, level)
        return masked_roi_align(
            maps,
            strides,
            boxes,
            image_index,
            level,
            inside,
            self.size,
            self.sampling_ratio,
            True,
            whole,
        )

    def _placed(self, boxes: Tensor, level: Tensor) -> Tensor:
        """To RoIAlign cell i lies at (i + 0.5) * stride, which is not where a trunk says that it looks."""
        return (
            boxes
            + boxes.new_tensor([0.5 * at.stride - at.centre for at in self.at.values()])[
                level, None
            ]
        )

    def _inside(self, features: Features, masks: Masks) -> AtCells:
        """What says where the masks are on the cells of each level: the values of `projected` at some places of them."""
        if not isinstance(masks, SegmentMasks):
            raise UserError("cfm: segments are masks of superpixels")
        labels, rule = (
            [torch.from_numpy(labels) for labels in masks.maps],
            (self.statistic, self.threshold),
        )
        shapes = [(features[name].shape[2], features[name].shape[3]) for name in self.at]
        places = list(zip(shapes, self.at.values(), strict=True))
        cells = [
            [SuperpixelCells.of(own, shape, at.stride, at.centre, *rule) for own in labels]
            for shape, at in places
        ]

        def at_cells(level: int, mask: Tensor, cell: Tensor) -> Tensor:
            if len(cells[level]) == 1:
                return cells[level][0].at(masks.members, mask, cell)
            out = torch.zeros(len(mask))
            for image, own in enumerate(cells[level]):
                here = torch.nonzero(masks.map_index[mask] == image).squeeze(1)
                out[here] = own.at(masks.members, mask[here], cell[here])
            return out

        return at_cells

    def projected(self, masks: Masks, shape: tuple[int, int], at: FeatureSpec) -> Tensor:
        """Masks on the cells of a map of `shape`, f32 [R, h, w] of 0 and 1."""
        if not isinstance(masks, SegmentMasks):
            raise UserError("cfm: segments are masks of superpixels")
        out = torch.zeros((len(masks), *shape))
        for image, labels in enumerate(masks.maps):
            rows = torch.nonzero(masks.map_index == image).squeeze(1)
            if len(rows):
                number = torch.from_numpy(labels)
                members = masks.members[rows]
                out[rows] = project_superpixels(
                    number, members, shape, at.stride, at.centre, self.statistic, self.threshold
                )
        return out

    def losses(self, features: Features, samples: Samples) -> Losses:
        """`segment_class`: cross-entropy, the mean over the segments."""
        assert samples.masks is not None
        logits = self(features, samples.boxes, samples.image_index, samples.masks)
        return {
            "segment_class": F.cross_entropy(logits, samples.labels, reduction="sum")
            / mean_count(len(samples), logits)
        }

    def class_scores(self, logits: Tensor) -> Tensor:
        """Logits -> f32 [R, K] from 0 to 1."""
        return logits.softmax(dim=1)[:, :-1]

    def predict(self, features: Features, proposals: Regions, sizes: Tensor) -> Regions:  # noqa: ARG002 - the slot's signature
        """-> things and stuff with masks, by image and descending score, as many as there are: the map is pasted from all of them."""
        assert proposals.masks is not None
        scores = self.class_scores(
            self(features, proposals.boxes, proposals.image_index, proposals.masks)
        )
        row, label = torch.nonzero(scores > self.score_threshold).unbind(1)
        found = replace(proposals[row], scores=scores[row, label], labels=label)
        return found[nms_of_masks(found, self.nms_threshold)]


def _of_rows(inside: AtCells, rows: Tensor, level: int, mask: Tensor, cell: Tensor) -> Tensor:
    """`inside` of masks that are numbered within `rows`."""
    return inside(level, rows[mask], cell)
