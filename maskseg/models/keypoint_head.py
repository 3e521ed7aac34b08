"""The keypoint head of Mask R-CNN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv
from maskseg.ops.keypoints import cells_of, locate
from maskseg.ops.losses import mean_count
from maskseg.ops.matching import rank_in_group
from maskseg.ops.random_keys import box_places, random_keys
from maskseg.structures import Features, Losses, Regions, Samples


class KeypointHead(nn.Module):
    """Convolutions, a deconvolution and a bilinear x2 to one heatmap a point (Mask R-CNN, section 5).

    pooler gives [R, in_channels, S, S]; heatmaps are 4S x 4S. ranges: of each of the K classes, which of the points are its own, (first, past the
    last), equal for one without points (`Categories.point_ranges`); num_points: how many there are in all. max_regions: regions of an image that
    are learnt from, at random (0: all of the foreground). loss_weight: a factor of the loss, which begins at
    log((4S)^2) and may outweigh the others.
    """

    adds = "keypoints"

    def __init__(
        self,
        pooler: nn.Module,
        ranges: Sequence[Sequence[int]] | None,
        in_channels: int = 256,
        channels: int = 512,
        layers: int = 8,
        norm: str | None = None,
        max_regions: int = 0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        ranges = ranges or ()
        self.num_points = max((int(stop) for _, stop in ranges), default=0)
        if not self.num_points:
            raise UserError(
                "the keypoint head needs a category with keypoints: ~model/heads@model.heads.keypoint takes the head away"
            )
        if not loss_weight > 0:
            raise UserError(f"keypoint head: loss_weight must be above 0, not {loss_weight}")
        self.pooler, self.max_regions, self.loss_weight = pooler, max_regions, loss_weight
        self.convs = nn.Sequential(
            *(
                conv(in_channels if i == 0 else channels, channels, 3, norm, relu=True)
                for i in range(layers)
            )
        )
        self.deconv = nn.ConvTranspose2d(
            channels if layers else in_channels, self.num_points, 4, stride=2, padding=1
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        own = torch.zeros(
            (len(ranges) + 1, self.num_points), dtype=torch.bool
        )  # the last row is background
        for row, (start, stop) in zip(own, ranges, strict=False):
            row[int(start) : int(stop)] = True
        self.register_buffer("own", own, persistent=False)

    own: Tensor

    def forward(self, features: Features, boxes: Tensor, image_index: Tensor) -> Tensor:
        """-> logits f32 [R, P, 4S, 4S]."""
        x = self.convs(cast(Pooler, self.pooler)(features, boxes, image_index))
        return F.interpolate(
            self.deconv(x).float(), scale_factor=2.0, mode="bilinear", align_corners=False
        )

    def losses(self, features: Features, samples: Samples) -> Losses:
        """`keypoint`: cross-entropy over the cells of each visible point that lies in its region, the mean over these points."""
        if samples.targets.keypoints is None:
            raise UserError(
                "the keypoint head needs keypoints, but the data has none: remove the head (~model/heads@model.heads.keypoint)"
            )
        own = self._learnt(samples)
        logits = self(features, own.boxes, own.image_index).flatten(2)
        size = round(logits.shape[2] ** 0.5) if len(logits) else 1
        cell, valid = cells_of(samples.targets.keypoints[own.matched], own.boxes, size)
        valid &= self.own[own.labels]
        summed = F.cross_entropy(logits[valid], cell[valid], reduction="sum") + 0.0 * logits.sum()
        return {"keypoint": self.loss_weight * summed / mean_count(int(valid.sum()), logits)}

    def _learnt(self, samples: Samples) -> Samples:
        """Foreground of classes with points, at most `max_regions` an image: those with the smallest hash, as elsewhere."""
        keep = torch.nonzero(self.own[samples.labels].any(dim=1)).squeeze(1)
        if self.max_regions:
            key = random_keys(
                samples.seeds[samples.image_index[keep]], box_places(samples.boxes[keep])
            )
            keep = keep[rank_in_group(samples.image_index[keep], key) < self.max_regions]
        fields = {
            name: getattr(samples, name)[keep]
            for name in ("boxes", "image_index", "labels", "matched")
        }
        return replace(samples, **fields)

    def predict(self, features: Features, detections: Regions, sizes: Tensor) -> Regions:  # noqa: ARG002 - the slot's signature
        """Adds `keypoints` f32 [D, P, 3] (x, y, score), zeros for points that are not the class' own."""
        assert detections.labels is not None
        found = detections.boxes.new_zeros((len(detections), self.num_points, 3))
        rows = torch.nonzero(self.own[detections.labels].any(dim=1)).squeeze(1)
        boxes = detections.boxes[rows]
        located = locate(self(features, boxes, detections.image_index[rows]), boxes)
        found[rows] = located * self.own[detections.labels[rows]][..., None]
        return replace(detections, keypoints=found)
