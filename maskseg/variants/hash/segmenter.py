"""Segmentation by merging superpixels with equal binary codes.

Ravanbakhsh et al., "CNN-aware Binary Map for General Semantic Segmentation", ICIP 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

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
from maskseg.values import NonNegativeFloat, Range
from maskseg.variants.hash.codes import straight_through
from maskseg.variants.hash.layer import MAX_BITS, HashLayer
from maskseg.variants.hash.loss import contrastive_loss, pair_agreement, region_shares
from maskseg.variants.hash.merging import Ints, merge_codes

Labels = NDArray[np.int32]
BLOCK = 128  # channels averaged at a time
ROUNDING = 1e-3  # of a cell: image scales are ratios of whole numbers
SCOPES = ("neighbours", "anywhere")
RELAXATIONS = ("sigmoid", "straight_through")


@dataclass(frozen=True)
class Frame:
    """An image frame of height x width pixels, relative to the network's input.

    scale: (down, across) size of a pixel of this frame in pixels of the network's input.
    """

    height: int
    width: int
    scale: tuple[float, float] = (1.0, 1.0)


class HashSegmenter(nn.Module):
    """Segmenter: hash layer on a feature level -> code of each superpixel -> merged segments.

    A superpixel's code is its mean soft code, thresholded at 0.5. Superpixels whose codes differ in
    at most `radius` bits are merged (single linkage).

    Args:
        level: name of the backbone's feature level.
        feature_spec: stride, center and channels of that level.
        superpixels: image -> label map; used for batches without superpixels.
        bits, normalise: see `HashLayer`.
        radius: the maximum Hamming distance of superpixels that are merged.
        scope: `neighbours` merges superpixels that touch, `anywhere` any two of the image.
        loss_weight: weight of the fine-tuning loss (`variants.hash.loss`); with 0 the layer is
            frozen as it was fitted.
        margin: number of bits by which the loss wants codes of different regions to differ.
        relaxation: whether the loss sees soft codes (`sigmoid`) or bits with the gradient of soft
            codes (`straight_through`).
    """

    def __init__(
        self,
        level: str,
        feature_spec: FeatureSpec,
        superpixels: Superpixels,
        bits: Annotated[int, Range(ge=1, le=MAX_BITS)] = 8,
        normalise: bool = True,
        radius: Annotated[int, Range(ge=0, le=MAX_BITS)] = 0,
        scope: str = "neighbours",
        loss_weight: NonNegativeFloat = 0.0,
        margin: NonNegativeFloat = 2.0,
        relaxation: str = "sigmoid",
    ) -> None:
        super().__init__()
        # Report missing libraries now, not at the first image.
        opencv()
        scipy("sparse")
        if scope not in SCOPES or relaxation not in RELAXATIONS:
            raise UserError(
                f"segmenter: scope must be {' or '.join(SCOPES)} and relaxation "
                f"{' or '.join(RELAXATIONS)}, not {scope!r}, {relaxation!r}"
            )
        if radius < 0 or loss_weight < 0:
            raise UserError(
                "segmenter: radius and loss_weight must not be negative, "
                f"got {radius} and {loss_weight}"
            )
        self.level = level
        self.feature_spec = feature_spec
        self.superpixels = superpixels
        self.radius = radius
        self.scope = scope
        self.loss_weight = loss_weight
        self.margin = margin
        self.relaxation = relaxation
        self.layer = HashLayer(feature_spec.channels, bits, normalise)
        self.layer.requires_grad_(loss_weight > 0)

    def predict(self, features: Features, batch: Batch) -> Regions:
        """Class-agnostic segments that partition each image, the largest first.

        The score of a segment is its share of the image's area.
        """
        soft = self.layer(features[self.level])
        regions = []
        masks = []
        for i, labels in enumerate(self.superpixel_maps(batch)):
            image_regions, image_masks = self._segment_image(soft[i], labels, i)
            regions.append(image_regions)
            masks.append(image_masks)
        return Regions(
            torch.cat([r.boxes for r in regions]).to(soft.device),
            torch.cat([r.image_index for r in regions]).to(soft.device),
            torch.cat([r.scores for r in regions]).to(soft.device),
            masks=SegmentMasks.cat(masks),
        )

    def _segment_image(
        self, soft: Tensor, labels: Labels, index: int
    ) -> tuple[Regions, SegmentMasks]:
        """Segments of image `index`. soft: soft codes [b, h, w]; labels: superpixels [H, W]."""
        codes = self.superpixel_means(soft, labels, Frame(*labels.shape))
        segment = self.merge(codes, labels)
        members = torch.from_numpy(np.arange(segment.max() + 1)[:, None] == segment)
        masks = SegmentMasks.of_image(labels, members)
        share = masks.area() / labels.size
        order = share.argsort(descending=True, stable=True)
        masks = masks[order]
        return Regions(masks.boxes(), torch.full((len(order),), index), share[order]), masks

    def superpixel_means(self, maps: Tensor, labels: Labels, frame: Frame) -> Tensor:
        """Mean of maps over each superpixel of an image, f32 [S, C].

        maps: [C, h, w] on the cells of the level; labels: superpixels [H, W] in `frame`. Maps are
        interpolated bilinearly between the cells inside the frame.
        """
        numbers = torch.from_numpy(labels.astype(np.int64)).to(maps.device)
        count = int(labels.max()) + 1
        blocks = torch.split(self.crop_to_frame(maps, frame), BLOCK)
        means = [segment_means(block, numbers, count, *self._grid(frame)) for block in blocks]
        return torch.cat(means, dim=1)

    def upsample_to_frame(self, maps: Tensor, frame: Frame) -> Tensor:
        """Maps of the level [C, h, w] of an image at the pixels of the frame, f32 [C, H, W].

        Bilinear between the cells inside the frame.
        """
        cells = self.crop_to_frame(maps, frame)
        return upsample(cells, frame.height, frame.width, *self._grid(frame))

    def _grid(self, frame: Frame) -> tuple[tuple[float, float], tuple[float, float]]:
        """Stride and first center of the cells, each (down, across), in pixels of the frame."""
        down, across = frame.scale
        stride = (self.feature_spec.stride / down, self.feature_spec.stride / across)
        centre = (self.feature_spec.centre / down, self.feature_spec.centre / across)
        return stride, centre

    def crop_to_frame(self, maps: Tensor, frame: Frame) -> Tensor:
        """Crop maps of the level [C, h, w] to the cells whose centers lie in the frame.

        The cells of the batch's padding are dropped; at least one cell remains.
        """
        rows = self._cells_along(frame.height * frame.scale[0])
        columns = self._cells_along(frame.width * frame.scale[1])
        return maps[:, :rows, :columns]

    def _cells_along(self, side: float) -> int:
        """Number of cells whose centers lie within `side` pixels of the network's input."""
        cells = (side - self.feature_spec.centre) / self.feature_spec.stride
        return max(1, math.ceil(cells - ROUNDING))

    def merge(self, codes: Tensor, labels: Labels) -> Ints:
        """Merge superpixels by their soft codes, f32 [S, b]; segment of each, i64 [S]."""
        pairs = neighbours(labels) if self.scope == "neighbours" else None
        return merge_codes((codes > 0.5).cpu().numpy(), pairs, self.radius)

    def losses(self, features: Features, batch: Batch) -> Losses:
        """`hash_together` and `hash_apart` over the pairs in scope; {} if loss_weight is 0."""
        if not self.loss_weight:
            return {}
        soft = self.layer(features[self.level])
        codes = []
        pairs = []
        weights = []
        start = 0
        for i, labels in enumerate(self.superpixel_maps(batch)):
            image_codes = self.superpixel_means(soft[i], labels, Frame(*labels.shape))
            count = len(image_codes)
            image_pairs = torch.from_numpy(self._pairs_in_scope(labels, count))
            share = region_shares(region_map(batch, i), labels, count)
            weights.append(pair_agreement(share, image_pairs))
            pairs.append(image_pairs + start)
            codes.append(image_codes)
            start += count
        all_codes = torch.cat(codes)
        if self.relaxation == "straight_through":
            all_codes = straight_through(all_codes)
        terms = contrastive_loss(
            all_codes,
            torch.cat(pairs).to(all_codes.device),
            torch.cat(weights).to(all_codes.device),
            self.margin,
        )
        return {name: self.loss_weight * value for name, value in terms.items()}

    def _pairs_in_scope(self, labels: Labels, count: int) -> Ints:
        """Pairs of the `count` superpixels that may be merged, i64 [E, 2]."""
        if self.scope == "neighbours":
            return neighbours(labels)
        return np.stack(np.triu_indices(count, 1), axis=1)

    def superpixel_maps(self, batch: Batch) -> list[Labels]:
        """Superpixels of each image without its padding: the batch's, or computed here."""
        sizes = batch.sizes.tolist()
        maps = []
        if batch.superpixels is not None:
            for labels, (height, width) in zip(batch.superpixels, sizes, strict=True):
                maps.append(labels[:height, :width].cpu().numpy())
            return maps
        for image, (height, width) in zip(batch.images, sizes, strict=True):
            pixels = image[:, :height, :width].permute(1, 2, 0).cpu().numpy()
            maps.append(self.superpixels(np.ascontiguousarray(pixels)))
        return maps
