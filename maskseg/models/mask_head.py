"""The mask head of Mask R-CNN."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from maskseg.errors import UserError
from maskseg.masks.base import Masks, rle_to_bitmaps
from maskseg.masks.predicted import SoftMasks
from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv
from maskseg.ops.losses import mean_count
from maskseg.structures import Features, Losses, Regions, Samples


class MaskHead(nn.Module):
    """Convolutions, a deconvolution and one mask a class (or one for all: `class_agnostic`) (Mask R-CNN, section 3).

    pooler gives [R, in_channels, S, S]; masks are 2S x 2S. target_rule: `crop` cuts the truth out in the region's frame (detectron2),
    `roi_align` resamples its bitmap as torchvision does. paste_rule, interpolation, threshold: how a soft mask becomes pixels
    (`ops.paste.paste_crop`; torchvision has its own rule, `continuous` is detectron2's).
    """

    adds = "masks"

    def __init__(
        self,
        pooler: nn.Module,
        num_classes: int,
        in_channels: int = 256,
        channels: int = 256,
        layers: int = 4,
        class_agnostic: bool = False,
        norm: str | None = None,
        target_rule: str = "crop",
        paste_rule: str = "continuous",
        interpolation: str = "bilinear",
        threshold: float = 0.5,
    ) -> None:
        super().__init__()
        if target_rule not in TARGET_RULES:
            raise UserError(
                f"mask head: target_rule must be {' or '.join(TARGET_RULES)}, not {target_rule!r}"
            )
        if paste_rule not in ("continuous", "torchvision") or interpolation not in (
            "bilinear",
            "bicubic",
        ):
            raise UserError(
                f"mask head: no paste_rule {paste_rule!r} with interpolation {interpolation!r}"
            )
        self.pooler = pooler
        self.convs = nn.Sequential(
            *(
                conv(in_channels if i == 0 else channels, channels, 3, norm, relu=True)
                for i in range(layers)
            )
        )
        self.deconv = nn.ConvTranspose2d(channels if layers else in_channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, 1 if class_agnostic else num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.target_rule = target_rule
        self.paste_rule, self.interpolation, self.threshold = paste_rule, interpolation, threshold

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor, labels: Tensor
    ) -> Tensor:
        """-> logits of each region's own class, f32 [R, 2S, 2S]."""
        x = F.relu(
            self.deconv(self.convs(cast(Pooler, self.pooler)(features, boxes, image_index))),
            inplace=True,
        )
        if self.predictor.out_channels == 1:
            return cast(Tensor, self.predictor(x))[:, 0].float()
        return own_channel(
            x, self.predictor.weight, cast(Tensor, self.predictor.bias), labels
        ).float()

    def losses(self, features: Features, samples: Samples) -> Losses:
        """`mask`: binary cross-entropy of foreground regions, the mean over their cells."""
        if samples.targets.masks is None:
            raise UserError(
                "the mask head needs ground truth masks, but the data has boxes only: remove the head (~model/heads@model.heads.mask)"
            )
        own = samples.foreground()
        logits = self(features, own.boxes, own.image_index, own.labels)
        with torch.no_grad():
            wanted = TARGET_RULES[self.target_rule](
                samples.targets.masks, own.matched, own.boxes, logits.shape[-1]
            )
        return {
            "mask": F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            / mean_count(logits.numel(), logits)
        }

    def predict(self, features: Features, detections: Regions, sizes: Tensor) -> Regions:
        """Adds `masks`: soft grids over the detections' boxes."""
        assert detections.labels is not None
        logits = self(features, detections.boxes, detections.image_index, detections.labels)
        frames = sizes[detections.image_index]
        masks = SoftMasks(
            logits.sigmoid(),
            detections.boxes,
            frames,
            self.paste_rule,
            self.interpolation,
            self.threshold,
        )
        return replace(detections, masks=masks)


def own_channel(x: Tensor, weight: Tensor, bias: Tensor, channel: Tensor) -> Tensor:
    """One output channel of a 1x1 convolution, another one of each row: x [R, C, S, S], weight [K, C, 1, 1], bias [K], channel i64 [R] ->
    [R, S, S].

    All K of each would be K times the work: of LVIS' 1203 classes, 300 regions would need a gigabyte.
    """
    # An embedding, as its gradient is summed in a fixed order: that of an index is not, in several threads.
    own, shift = F.embedding(channel, weight.flatten(1)), F.embedding(channel, bias[:, None])
    return torch.baddbmm(shift[:, None].to(x.dtype), own[:, None].to(x.dtype), x.flatten(2)).view(
        len(x), *x.shape[2:]
    )


def crop_targets(masks: Masks, matched: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Masks `matched` [R] cut out by boxes [R, 4] -> f32 [R, size, size] of 0 and 1."""
    return masks[matched].crop_resize(boxes, size)


def roi_align_targets(masks: Masks, matched: Tensor, boxes: Tensor, size: int) -> Tensor:
    """RoIAlign of the masks' bitmaps, not aligned, as torchvision's `project_masks_on_boxes` -> f32 [R, size, size] in [0, 1]."""
    if len(matched) == 0:
        return boxes.new_zeros((0, size, size))
    needed, row = torch.unique(matched, return_inverse=True)
    single = [rle_to_bitmaps([rle])[0] for rle in masks[needed].to_rle()]
    bitmaps = np.zeros(
        (len(single), 1, max(m.shape[0] for m in single) + 1, max(m.shape[1] for m in single) + 1),
        dtype=np.float32,
    )
    for canvas, mask in zip(bitmaps, single, strict=True):
        # The last row and column are repeated once: RoIAlign clamps at an image's border, and the canvas may go on behind it.
        canvas[0, : mask.shape[0] + 1, : mask.shape[1] + 1] = np.pad(
            mask, ((0, 1), (0, 1)), mode="edge"
        )
    rois = torch.cat([row[:, None].to(boxes), boxes], dim=1)
    return torch.as_tensor(
        roi_align(torch.from_numpy(bitmaps).to(boxes.device), rois, (size, size), 1.0)[:, 0]
    )


TARGET_RULES = {"crop": crop_targets, "roi_align": roi_align_targets}
