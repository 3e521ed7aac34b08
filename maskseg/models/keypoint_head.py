"""The keypoint head of Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv_stack, init_convs
from maskseg.ops.keypoints import locate_keypoints, points_to_cells
from maskseg.ops.losses import mean_count
from maskseg.ops.matching import rank_in_group
from maskseg.ops.random_keys import hash_boxes, random_keys
from maskseg.structures import Features, Losses, Regions, Samples
from maskseg.values import LayerCount, NonNegativeInt, PositiveFloat, Size


class KeypointHead(nn.Module):
    """Convolutions, a deconvolution and 2x upsampling to one heatmap per point.

    Mask R-CNN, section 5. Heatmaps are 4S x 4S.

    pooler: returns [R, in_channels, S, S].
    ranges: for each of the K classes, its range of points (first, end), empty for a class without
    points (`Categories.point_ranges`).
    max_regions: maximum number of regions per image in the loss, a random sample; 0: all of the
    foreground.
    loss_weight: factor of the loss, which starts at log((4S)^2) and may dominate the other terms.

    Raises UserError if no class has points or for a `loss_weight` of 0 or less.
    """

    pooler: Pooler
    adds = "keypoints"
    class_points: Tensor  # bool [K + 1, P], the points of each class; the last row is background

    def __init__(
        self,
        pooler: Pooler,
        ranges: Sequence[Sequence[NonNegativeInt]] | None,
        in_channels: Size = 256,
        channels: Size = 512,
        layers: LayerCount = 8,
        norm: str | None = None,
        max_regions: NonNegativeInt = 0,
        loss_weight: PositiveFloat = 1.0,
    ) -> None:
        super().__init__()
        ranges = ranges or ()
        self.num_points = max((int(end) for _, end in ranges), default=0)
        if not self.num_points:
            raise UserError(
                "the keypoint head needs a category with keypoints: "
                "~model/heads@model.heads.keypoint removes the head"
            )
        if not loss_weight > 0:
            raise UserError(f"keypoint head: loss_weight must be above 0, not {loss_weight}")
        self.pooler = pooler
        self.max_regions = max_regions
        self.loss_weight = loss_weight
        self.convs = conv_stack(in_channels, channels, layers, norm)
        self.deconv = nn.ConvTranspose2d(
            channels if layers else in_channels, self.num_points, 4, stride=2, padding=1
        )
        init_convs(self)
        class_points = torch.zeros((len(ranges) + 1, self.num_points), dtype=torch.bool)
        for row, (start, end) in zip(class_points, ranges, strict=False):
            row[int(start) : int(end)] = True
        self.register_buffer("class_points", class_points, persistent=False)

    def forward(self, features: Features, boxes: Tensor, image_index: Tensor) -> Tensor:
        """Return logits f32 [R, P, 4S, 4S]."""
        x = self.convs(self.pooler(features, boxes, image_index))
        return F.interpolate(
            self.deconv(x).float(), scale_factor=2.0, mode="bilinear", align_corners=False
        )

    def losses(self, features: Features, samples: Samples) -> Losses:
        """Return `keypoint`: cross-entropy over the cells, the mean over the points.

        Only visible points inside their region count. Raises UserError for targets without
        keypoints.
        """
        if samples.targets.keypoints is None:
            raise UserError(
                "the keypoint head needs keypoints, but the data has none: "
                "remove the head (~model/heads@model.heads.keypoint)"
            )
        regions = self.select_regions(samples)
        logits = self(features, regions.boxes, regions.image_index).flatten(2)
        size = round(logits.shape[2] ** 0.5) if len(logits) else 1
        points = samples.targets.keypoints[regions.matched_gt]
        cell, valid = points_to_cells(points, regions.boxes, size)
        valid &= self.class_points[regions.labels]
        loss = F.cross_entropy(logits[valid], cell[valid], reduction="sum")
        # Without valid points, the parameters stay in the graph and get zero gradients.
        loss = loss + 0.0 * logits.sum()
        return {"keypoint": self.loss_weight * loss / mean_count(int(valid.sum()), logits)}

    def select_regions(self, samples: Samples) -> Samples:
        """Return the foreground regions of classes with points, at most `max_regions` per image.

        Those with the smallest random keys are selected.
        """
        keep = torch.nonzero(self.class_points[samples.labels].any(dim=1)).squeeze(1)
        if self.max_regions:
            seeds = samples.seeds[samples.image_index[keep]]
            key = random_keys(seeds, hash_boxes(samples.boxes[keep]))
            keep = keep[rank_in_group(samples.image_index[keep], key) < self.max_regions]
        return replace(
            samples,
            boxes=samples.boxes[keep],
            image_index=samples.image_index[keep],
            labels=samples.labels[keep],
            matched_gt=samples.matched_gt[keep],
        )

    def predict(
        self,
        features: Features,
        detections: Regions,
        sizes: Tensor,  # noqa: ARG002 - in the signature of `RegionHead`
    ) -> Regions:
        """Return the detections with `keypoints` f32 [D, P, 3]: x, y, score.

        Points that do not belong to the class are zero.
        """
        assert detections.labels is not None
        keypoints = detections.boxes.new_zeros((len(detections), self.num_points, 3))
        class_points = self.class_points[detections.labels]
        rows = torch.nonzero(class_points.any(dim=1)).squeeze(1)
        boxes = detections.boxes[rows]
        located = locate_keypoints(self(features, boxes, detections.image_index[rows]), boxes)
        keypoints[rows] = located * class_points[rows][..., None]
        return replace(detections, keypoints=keypoints)
