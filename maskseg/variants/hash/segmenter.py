"""Superpixels merged where their binary codes are equal (Ravanbakhsh et al., "CNN-aware Binary Map for General Semantic Segmentation", 2016)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskseg.data.region_map import region_map
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentMasks
from maskseg.ops.superpixel_pooling import segment_means, upsample
from maskseg.structures import Batch, Features, FeatureSpec, Losses, Regions
from maskseg.superpixels.methods import Superpixels, neighbours
from maskseg.superpixels.opencv import opencv, scipy
from maskseg.variants.hash.codes import straight_through
from maskseg.variants.hash.layer import HashLayer
from maskseg.variants.hash.loss import agreement, contrast, shares
from maskseg.variants.hash.merging import merge

Labels = NDArray[np.int32]
BLOCK = 128  # channels that are averaged at a time
ROUNDING = 1e-3  # of a cell: scales are ratios of whole numbers
SCOPES, RELAXATIONS = ("neighbours", "anywhere"), ("sigmoid", "straight_through")


@dataclass(frozen=True)
class Frame:
    """A picture of (height, width) pixels whose pixel is `scale` (down, across) pixels of the one that the network saw."""

    height: int
    width: int
    scale: tuple[float, float] = (1.0, 1.0)


class HashSegmenter(nn.Module):
    """Hash layer on one feature level -> binary map -> the code of each superpixel -> segments: a `Segmenter`.

    level: its name; at: what the backbone says of it. superpixels: image -> label map, used where the batch brings none. A superpixel's code is
    its mean soft code, cut at 0.5. Superpixels whose codes differ in at most `radius` bits are merged (single linkage): those that touch
    (scope `neighbours`) or any of the image (`anywhere`). loss_weight: of the fine-tuning loss (`hash_loss`), 0 for none, and then the layer
    stays as it was fitted; margin: bits by which codes of different regions are to differ; relaxation: whether the loss sees soft codes
    (`sigmoid`) or bits with the gradient of soft codes (`straight_through`).
    """

    def __init__(
        self,
        level: str,
        at: FeatureSpec,
        superpixels: Superpixels,
        bits: int = 8,
        normalise: bool = True,
        radius: int = 0,
        scope: str = "neighbours",
        loss_weight: float = 0.0,
        margin: float = 2.0,
        relaxation: str = "sigmoid",
    ) -> None:
        super().__init__()
        opencv(), scipy("sparse")  # told now, not at the first image
        if scope not in SCOPES or relaxation not in RELAXATIONS:
            raise UserError(
                f"segmenter: scope must be {' or '.join(SCOPES)} and relaxation {' or '.join(RELAXATIONS)}, not {scope!r}, {relaxation!r}"
            )
        if radius < 0 or loss_weight < 0:
            raise UserError(
                f"segmenter: radius and loss_weight must not be negative, got {radius} and {loss_weight}"
            )
        self.level, self.at, self.superpixels = level, at, superpixels
        self.radius, self.scope, self.loss_weight, self.margin, self.relaxation = (
            radius,
            scope,
            loss_weight,
            margin,
            relaxation,
        )
        self.layer = HashLayer(at.channels, bits, normalise)
        self.layer.requires_grad_(loss_weight > 0)

    def predict(self, features: Features, batch: Batch) -> Regions:
        """-> class-agnostic segments that cover each image without overlap, the largest first; scores: their share of the image."""
        soft = self.layer(features[self.level])
        found = [
            self._segments(soft[i], labels, i) for i, labels in enumerate(self.label_maps(batch))
        ]
        regions = [region for region, _ in found]
        return Regions(
            torch.cat([r.boxes for r in regions]).to(soft.device),
            torch.cat([r.image_index for r in regions]).to(soft.device),
            torch.cat([r.scores for r in regions]).to(soft.device),
            masks=SegmentMasks.cat([masks for _, masks in found]),
        )

    def _segments(self, soft: Tensor, labels: Labels, index: int) -> tuple[Regions, SegmentMasks]:
        codes = self.means(soft, labels, Frame(*labels.shape))
        segment = self.merged(codes, labels)
        members = torch.from_numpy(np.arange(segment.max() + 1)[:, None] == segment)
        masks = SegmentMasks.of_image(labels, members)
        share = masks.area() / labels.size
        order = share.argsort(descending=True, stable=True)
        masks = masks[order]
        return Regions(masks.boxes(), torch.full((len(order),), index), share[order]), masks

    def means(self, maps: Tensor, labels: Labels, frame: Frame) -> Tensor:
        """Maps of the level [C, h, w] of one image, its superpixels [H, W] in `frame` -> the mean over each, f32 [S, C]."""
        numbers, count = (
            torch.from_numpy(labels.astype(np.int64)).to(maps.device),
            int(labels.max()) + 1,
        )
        parts = torch.split(self.cells_inside(maps, frame), BLOCK)
        return torch.cat(
            [segment_means(part, numbers, count, *self._grid(frame)) for part in parts], dim=1
        )

    def of_pixels(self, maps: Tensor, frame: Frame) -> Tensor:
        """Maps of the level [C, h, w] of one image -> at the pixels of the frame, bilinear between the cells inside it, f32 [C, H, W]."""
        return upsample(
            self.cells_inside(maps, frame), frame.height, frame.width, *self._grid(frame)
        )

    def _grid(self, frame: Frame) -> tuple[tuple[float, float], tuple[float, float]]:
        """Stride and first centre of the cells, (down, across), in the frame's pixels."""
        down, across = frame.scale
        return (self.at.stride / down, self.at.stride / across), (
            self.at.centre / down,
            self.at.centre / across,
        )

    def cells_inside(self, maps: Tensor, frame: Frame) -> Tensor:
        """Of maps of the level [C, h, w] the cells whose centre lies in the frame, without those of the padding."""
        sides = (frame.height * frame.scale[0], frame.width * frame.scale[1])
        down, across = (
            max(1, math.ceil((side - self.at.centre) / self.at.stride - ROUNDING)) for side in sides
        )
        return maps[:, :down, :across]

    def merged(self, codes: Tensor, labels: Labels) -> NDArray[np.int64]:
        """Soft codes f32 [S, b] of the superpixels -> which segment each belongs to, i64 [S]."""
        pairs = neighbours(labels) if self.scope == "neighbours" else None
        return merge((codes > 0.5).cpu().numpy(), pairs, self.radius)

    def losses(self, features: Features, batch: Batch) -> Losses:
        """`hash_together` and `hash_apart` over the pairs that could be merged; nothing where loss_weight is 0."""
        if not self.loss_weight:
            return {}
        soft = self.layer(features[self.level])
        codes, pairs, weights, start = [], [], [], 0
        for i, labels in enumerate(self.label_maps(batch)):
            own = self.means(soft[i], labels, Frame(*labels.shape))
            near = (
                neighbours(labels)
                if self.scope == "neighbours"
                else np.stack(np.triu_indices(len(own), 1), axis=1)
            )
            near_here = torch.from_numpy(near)
            weights.append(agreement(shares(region_map(batch, i), labels, len(own)), near_here))
            pairs.append(near_here + start)
            codes.append(own)
            start += len(own)
        seen = torch.cat(codes)
        seen = straight_through(seen) if self.relaxation == "straight_through" else seen
        terms = contrast(
            seen, torch.cat(pairs).to(seen.device), torch.cat(weights).to(seen.device), self.margin
        )
        return {name: self.loss_weight * value for name, value in terms.items()}

    def label_maps(self, batch: Batch) -> list[Labels]:
        """The superpixels of each image, without its padding: the batch's, or made here."""
        sizes = batch.sizes.tolist()
        if batch.superpixels is not None:
            return [
                m[:h, :w].cpu().numpy() for m, (h, w) in zip(batch.superpixels, sizes, strict=True)
            ]
        pictures = (
            image[:, :h, :w].permute(1, 2, 0).cpu().numpy()
            for image, (h, w) in zip(batch.images, sizes, strict=True)
        )
        return [self.superpixels(np.ascontiguousarray(picture)) for picture in pictures]
