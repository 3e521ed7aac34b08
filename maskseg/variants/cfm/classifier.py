"""Convolutional feature masking (CFM).

Segment masks are applied to the feature map, and the masked features are pooled and classified. The
convolutions never see a mask.

Source: Dai, He, Sun, "Convolutional Feature Masking for Joint Object and Stuff Segmentation",
CVPR 2015.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.masks.base import Masks
from maskseg.masks.superpixel import SegmentMasks
from maskseg.ops.losses import mean_count
from maskseg.ops.roi_align import (
    BinGrid,
    MaskAtCells,
    assign_levels,
    masked_roi_align,
    roi_align_levels,
)
from maskseg.structures import Features, FeatureSpec, Losses, Regions, Samples
from maskseg.values import Fraction, PositiveInt
from maskseg.variants.cfm.layers import build_paths
from maskseg.variants.cfm.mask_nms import nms_by_mask_iou
from maskseg.variants.cfm.projection import SuperpixelCells, project_superpixels
from maskseg.variants.cfm.pyramid_ops import MIN_ROWS, pool_pyramid
from maskseg.variants.cfm.settings import MaskingSettings, MLPSettings, PoolerSettings

# Inputs of the fully connected layers per block of segments. Blocks stay below 32 MB: from this
# size on, the allocator maps and unmaps memory at each use.
BLOCK_INPUTS = 2**23 - 2**20
SAMPLES_PER_BIN = 4  # per direction, of a mask that is resampled to the bins of its box


class CFMClassifier(nn.Module):
    """Classify segments as things, stuff or background by softmax. Implements `Classifier`.

    levels: names of the feature levels that are read, finest first. With several levels, a segment
        is read from the level of its box's size.
    feature_specs: stride, center and channels of the levels, by name.
    num_classes: K, without background.
    pooler, masking, mlp: settings of the pooling, of the use of the masks and of the fully
        connected layers; None: their defaults.
    score_threshold: classes with a higher score become detections.
    nms_threshold: mask IoU above which the lower-scoring segment of a class is suppressed.
    max_detections: at most this many things per image, applied by `CFMNet`.

    Raises UserError for arguments that do not fit together.
    """

    adds = "masks"

    def __init__(
        self,
        levels: Sequence[str],
        feature_specs: Mapping[str, FeatureSpec],
        num_classes: PositiveInt,
        pooler: PoolerSettings | None = None,
        masking: MaskingSettings | None = None,
        mlp: MLPSettings | None = None,
        score_threshold: Fraction = 0.05,
        nms_threshold: Fraction = 0.3,
        max_detections: PositiveInt = 100,
    ) -> None:
        super().__init__()
        self.feature_specs = {name: feature_specs[name] for name in levels}
        self.num_classes = num_classes
        self.pooler = pooler or PoolerSettings()
        self.masking = masking or MaskingSettings()
        _check_masked_sides(self.masking, self.pooler)
        _check_levels(self.feature_specs)
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections

        mlp = mlp or MLPSettings()
        channels = next(iter(self.feature_specs.values())).channels
        self.inputs = channels * sum(side * side for side in self.pooler.pyramid)
        paths = self.masking.layer_paths()
        self.layers = build_paths(paths, channels, self.pooler.pyramid, mlp)
        self.scores = nn.Linear(mlp.width * len(paths), num_classes + 1)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.zeros_(self.scores.bias)

    @property
    def strides(self) -> list[int]:
        """The strides of the levels in pixels, finest first."""
        return [spec.stride for spec in self.feature_specs.values()]

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> Tensor:
        """Compute class logits, f32 [R, K + 1], background last."""
        vectors, positions = self._vectors_and_positions(features, boxes, image_index, masks)
        logits: Tensor = self.scores(vectors)
        return logits.float()[positions]

    def compute_vectors(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> Tensor:
        """Compute the inputs of the last layer, [R, width] or, with two paths, [R, 2 width]."""
        vectors, positions = self._vectors_and_positions(features, boxes, image_index, masks)
        return vectors[positions]

    def _vectors_and_positions(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """Compute the vectors in the order of computation, and each segment's position in it.

        In inference, segments with equal boxes are computed one after the other, so that their box
        is pooled once. Positions: i64 [R].
        """
        mask_at_cells: MaskAtCells | None = None
        if self.masking.uses("segment"):
            mask_at_cells = self.mask_at_cells(features, masks)
        count = len(boxes)
        order = torch.arange(count, device=boxes.device)
        if not self.training:
            level = self.assign_levels(boxes)
            keys = torch.cat([level[:, None], image_index[:, None], boxes], dim=1)
            order = torch.unique(keys, dim=0, return_inverse=True)[1].argsort()
        # Blocks of a few hundred segments: the vectors of thousands at once would be memory that
        # the system has to hand out anew each time. Blocks of fewer than MIN_ROWS would be slow.
        num_blocks = max(1, min(-(-count * self.inputs // BLOCK_INPUTS), count // MIN_ROWS))
        vectors = [
            self._block_vectors(
                features, boxes[rows], image_index[rows], masks[rows], mask_at_cells, rows
            )
            for rows in order.tensor_split(num_blocks)
        ]
        return torch.cat(vectors), order.argsort()

    def _block_vectors(
        self,
        features: Features,
        boxes: Tensor,
        image_index: Tensor,
        masks: Masks,
        mask_at_cells: MaskAtCells | None,
        rows: Tensor,
    ) -> Tensor:
        """Compute the vectors of one block of segments.

        rows: i64 [n], the numbers by which `mask_at_cells` knows the segments of the block.
        """
        if self.masking.design == "pool_first":
            return self._mask_pooled_bins(features, boxes, image_index, masks)
        level = self.assign_levels(boxes)
        is_new_box = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
        # In training, dropout needs independent draws for each segment.
        if not self.training:
            is_new_box[1:] = (boxes[1:] != boxes[:-1]).any(dim=1) | (
                image_index[1:] != image_index[:-1]
            )
        first = torch.nonzero(is_new_box).squeeze(1)
        if mask_at_cells is None:
            bins = [self.pool_boxes(features, boxes[first], image_index[first], level[first])]
        else:
            unmasked_rows = first if self.masking.uses("box") else None
            masks_of_block = partial(_mask_of_rows, mask_at_cells, rows.cpu())
            bins = self.pool_masked(
                features, boxes, image_index, level, masks_of_block, unmasked_rows
            )
        vectors = {
            path: self.layers[path](pool_pyramid(path_bins, self.pooler.pyramid))
            for path, path_bins in zip(self.masking.layer_paths(), bins, strict=True)
        }
        if "box" in vectors:
            vectors["box"] = vectors["box"][is_new_box.cumsum(0) - 1]
        return torch.cat(list(vectors.values()), dim=1)

    def _mask_pooled_bins(
        self, features: Features, boxes: Tensor, image_index: Tensor, masks: Masks
    ) -> Tensor:
        """Compute the vectors of the design "pool_first"."""
        level = self.assign_levels(boxes)
        bins = self.pool_boxes(features, boxes, image_index, level)
        fine_mask = masks.crop_and_resize(boxes, SAMPLES_PER_BIN * self.pooler.size)[:, None]
        parts = []
        pyramid = self.pooler.pyramid
        for side, part in zip(pyramid, pool_pyramid(bins, pyramid), strict=True):
            if side in self.masking.masked_sides:
                mask = (F.adaptive_avg_pool2d(fine_mask, side) > self.masking.threshold).to(part)
                parts.append(part * mask)
            else:
                parts.append(part)
        vectors: Tensor = self.layers["both"](parts)
        return vectors

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Assign each box to a level by its size: i64 [R], 0 is the finest level."""
        strides = self.strides
        lowest = int(log2(strides[0]))
        highest = int(log2(strides[-1]))
        return assign_levels(boxes, lowest, highest, self.pooler.canonical_size) - lowest

    def pool_boxes(
        self, features: Features, boxes: Tensor, image_index: Tensor, level: Tensor
    ) -> Tensor:
        """Pool the unmasked maps by RoIAlign: [R, C, size, size]."""
        return roi_align_levels(
            [features[name] for name in self.feature_specs],
            self.strides,
            self._align_boxes(boxes, level),
            image_index,
            level,
            self.pooler.size,
            self.pooler.sampling_ratio,
            True,
        )

    def pool_masked(
        self,
        features: Features,
        boxes: Tensor,
        image_index: Tensor,
        level: Tensor,
        mask_at_cells: MaskAtCells,
        unmasked_rows: Tensor | None = None,
    ) -> list[Tensor]:
        """Pool the masked maps by RoIAlign and, for `unmasked_rows`, also the unmasked maps.

        unmasked_rows: i64 [n], ascending, or None. -> [R, C, size, size] and, if there are
        `unmasked_rows`, [n, C, size, size].
        """
        return masked_roi_align(
            [features[name] for name in self.feature_specs],
            self.strides,
            self._align_boxes(boxes, level),
            image_index,
            level,
            mask_at_cells,
            BinGrid(self.pooler.size, self.pooler.sampling_ratio, aligned=True),
            unmasked_rows,
        )

    def _align_boxes(self, boxes: Tensor, level: Tensor) -> Tensor:
        """Shift boxes by stride / 2 - center, so that RoIAlign samples at the true cell centers.

        RoIAlign assumes that cell i is centered at (i + 0.5) * stride.
        """
        shifts = [0.5 * spec.stride - spec.centre for spec in self.feature_specs.values()]
        return boxes + boxes.new_tensor(shifts)[level, None]

    def mask_at_cells(self, features: Features, masks: Masks) -> MaskAtCells:
        """Build the lookup of mask values at cells: `project_masks`, evaluated only where needed.

        -> a function of level, mask i64 [T] and cell i64 [T] that returns f32 [T]. Raises UserError
        for masks that are not made of superpixels.
        """
        segments = _require_superpixels(masks)
        labels_of_images = [torch.from_numpy(labels) for labels in segments.maps]
        statistic = self.masking.statistic
        threshold = self.masking.threshold
        cells_of_levels: list[list[SuperpixelCells]] = []
        for name, spec in self.feature_specs.items():
            shape = (features[name].shape[2], features[name].shape[3])
            cells_of_levels.append(
                [
                    SuperpixelCells.from_labels(
                        labels, shape, spec.stride, spec.centre, statistic, threshold
                    )
                    for labels in labels_of_images
                ]
            )

        def lookup(level: int, mask: Tensor, cell: Tensor) -> Tensor:
            cells_of_images = cells_of_levels[level]
            if len(cells_of_images) == 1:
                return cells_of_images[0].project_at(segments.members, mask, cell)
            values = torch.zeros(len(mask))
            for image, cells in enumerate(cells_of_images):
                rows = torch.nonzero(segments.map_index[mask] == image).squeeze(1)
                values[rows] = cells.project_at(segments.members, mask[rows], cell[rows])
            return values

        return lookup

    def project_masks(self, masks: Masks, shape: tuple[int, int], spec: FeatureSpec) -> Tensor:
        """Project masks to the cells of a map of `shape` (h, w): f32 [R, h, w] of 0 and 1."""
        segments = _require_superpixels(masks)
        projected = torch.zeros((len(masks), *shape))
        for image, labels in enumerate(segments.maps):
            rows = torch.nonzero(segments.map_index == image).squeeze(1)
            if len(rows):
                projected[rows] = project_superpixels(
                    torch.from_numpy(labels),
                    segments.members[rows],
                    shape,
                    spec.stride,
                    spec.centre,
                    self.masking.statistic,
                    self.masking.threshold,
                )
        return projected

    def losses(self, features: Features, samples: Samples) -> Losses:
        """Compute `segment_class`: the mean cross-entropy over the segments."""
        assert samples.masks is not None
        logits = self(features, samples.boxes, samples.image_index, samples.masks)
        loss = F.cross_entropy(logits, samples.labels, reduction="sum")
        return {"segment_class": loss / mean_count(len(samples), logits)}

    def class_scores(self, logits: Tensor) -> Tensor:
        """Convert logits to scores in [0, 1]: f32 [R, K], without background."""
        return logits.softmax(dim=1)[:, :-1]

    def predict(
        self,
        features: Features,
        proposals: Regions,
        sizes: Tensor,  # noqa: ARG002 - in the signature of `Classifier`
    ) -> Regions:
        """Classify proposals: things and stuff with masks, by image and descending score.

        The number of detections is not limited, because `CFMNet` pastes the label map from all of
        them.
        """
        assert proposals.masks is not None
        logits = self(features, proposals.boxes, proposals.image_index, proposals.masks)
        scores = self.class_scores(logits)
        row, label = torch.nonzero(scores > self.score_threshold).unbind(1)
        detections = replace(proposals[row], scores=scores[row, label], labels=label)
        return detections[nms_by_mask_iou(detections, self.nms_threshold)]


def _check_masked_sides(masking: MaskingSettings, pooler: PoolerSettings) -> None:
    if not set(masking.masked_sides) <= set(pooler.pyramid):
        raise UserError(
            "cfm: masking.masked_sides must be some of"
            f" pooler.pyramid={list(pooler.pyramid)}, not {list(masking.masked_sides)}"
        )


def _check_levels(feature_specs: Mapping[str, FeatureSpec]) -> None:
    names = ", ".join(feature_specs)
    strides = [spec.stride for spec in feature_specs.values()]
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
        raise UserError(
            f"cfm: each of levels must have twice the stride of the one before, not {names} of"
            f" strides {strides}"
        )
    channels = {spec.channels for spec in feature_specs.values()}
    if len(channels) != 1:
        raise UserError(
            f"cfm: the levels {names} must have the same number of channels, not {sorted(channels)}"
        )


def _require_superpixels(masks: Masks) -> SegmentMasks:
    """Return the masks as masks of superpixels. Raises UserError for masks of another kind."""
    if not isinstance(masks, SegmentMasks):
        raise UserError("cfm: segments must be masks of superpixels (SegmentMasks)")
    return masks


def _mask_of_rows(
    mask_at_cells: MaskAtCells, rows: Tensor, level: int, mask: Tensor, cell: Tensor
) -> Tensor:
    """Evaluate `mask_at_cells` for masks that are numbered within `rows`, i64 [n]."""
    return mask_at_cells(level, rows[mask], cell)
