"""The mask head of Mask R-CNN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from maskseg.errors import UserError
from maskseg.masks.base import Masks, rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids
from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv_stack, init_convs
from maskseg.ops.linear import class_linear
from maskseg.ops.losses import mean_count
from maskseg.structures import Features, Losses, Regions, Samples
from maskseg.values import Fraction, LayerCount, PositiveInt, Size

PASTE_MODES = ("continuous", "torchvision")
INTERPOLATIONS = ("bilinear", "bicubic")


class MaskHead(nn.Module):
    """Convolutions, a deconvolution and one mask per class (Mask R-CNN, section 3).

    pooler: returns [R, in_channels, S, S]; masks are 2S x 2S.
    class_agnostic: one mask for all classes.
    target_mode: `crop` crops the ground truth mask to the region (detectron2), `roi_align`
    resamples its bitmap (torchvision).
    paste_mode, interpolation, threshold: how a mask grid is converted to pixels, see
    `ops.paste.paste_crop` (`continuous` is detectron2's mode).

    Raises UserError for unknown modes.
    """

    pooler: Pooler
    adds = "masks"

    def __init__(
        self,
        pooler: Pooler,
        num_classes: PositiveInt,
        in_channels: Size = 256,
        channels: Size = 256,
        layers: LayerCount = 4,
        class_agnostic: bool = False,
        norm: str | None = None,
        target_mode: str = "crop",
        paste_mode: str = "continuous",
        interpolation: str = "bilinear",
        threshold: Fraction = 0.5,
    ) -> None:
        super().__init__()
        if target_mode not in TARGET_MODES:
            raise UserError(
                f"mask head: target_mode must be {' or '.join(TARGET_MODES)}, not {target_mode!r}"
            )
        if paste_mode not in PASTE_MODES or interpolation not in INTERPOLATIONS:
            raise UserError(
                f"mask head: no paste_mode {paste_mode!r} with interpolation {interpolation!r}"
            )
        self.pooler = pooler
        self.convs = conv_stack(in_channels, channels, layers, norm)
        self.deconv = nn.ConvTranspose2d(channels if layers else in_channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, 1 if class_agnostic else num_classes, 1)
        init_convs(self)
        self.target_mode = target_mode
        self.paste_mode = paste_mode
        self.interpolation = interpolation
        self.threshold = threshold

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor, labels: Tensor
    ) -> Tensor:
        """Return the mask logits of each region's class, f32 [R, 2S, 2S]."""
        x = self.convs(self.pooler(features, boxes, image_index))
        x = F.relu(self.deconv(x), inplace=True)
        if self.predictor.out_channels == 1:
            logits: Tensor = self.predictor(x)[:, 0]
            return logits.float()
        assert self.predictor.bias is not None
        return select_class_logits(x, self.predictor.weight, self.predictor.bias, labels).float()

    def losses(self, features: Features, samples: Samples) -> Losses:
        """Return `mask`: binary cross-entropy, the mean over all cells of the foreground regions.

        Raises UserError for targets without masks.
        """
        if samples.targets.masks is None:
            raise UserError(
                "the mask head needs ground truth masks, but the data has boxes only: "
                "remove the head (~model/heads@model.heads.mask)"
            )
        foreground = samples.foreground()
        logits = self(features, foreground.boxes, foreground.image_index, foreground.labels)
        with torch.no_grad():
            make_targets = TARGET_MODES[self.target_mode]
            targets = make_targets(
                samples.targets.masks, foreground.matched_gt, foreground.boxes, logits.shape[-1]
            )
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return {"mask": loss / mean_count(logits.numel(), logits)}

    def predict(self, features: Features, detections: Regions, sizes: Tensor) -> Regions:
        """Return the detections with `masks`, probabilities on grids over their boxes."""
        assert detections.labels is not None
        logits = self(features, detections.boxes, detections.image_index, detections.labels)
        masks = MaskGrids(
            logits.sigmoid(),
            detections.boxes,
            sizes[detections.image_index],
            self.paste_mode,
            self.interpolation,
            self.threshold,
        )
        return replace(detections, masks=masks)


def select_class_logits(x: Tensor, weight: Tensor, bias: Tensor, label: Tensor) -> Tensor:
    """Compute one output channel of a 1x1 convolution per row: [R, C, S, S] -> [R, S, S].

    weight: [K, C, 1, 1]; bias: [K]; label: i64 [R], the channel of each row.
    All K channels would need K times the work: with the 1203 classes of LVIS, 300 regions would
    need a gigabyte.
    """
    logits = class_linear(x.flatten(2), weight.flatten(1)[:, None], bias[:, None], label)
    return logits.view(len(x), *x.shape[2:])


def crop_targets(masks: Masks, matched_gt: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop the masks `matched_gt` [R] to boxes [R, 4]: f32 [R, size, size] of 0 and 1."""
    return masks[matched_gt].crop_and_resize(boxes, size)


def roi_align_targets(masks: Masks, matched_gt: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Resample the bitmaps of masks `matched_gt` [R]: f32 [R, size, size] in [0, 1].

    RoIAlign without alignment, as torchvision's `project_masks_on_boxes`. boxes: [R, 4].
    """
    if len(matched_gt) == 0:
        return boxes.new_zeros((0, size, size))
    distinct, row = torch.unique(matched_gt, return_inverse=True)
    bitmaps = [rle_to_bitmaps([rle])[0] for rle in masks[distinct].to_rle()]
    height = max(bitmap.shape[0] for bitmap in bitmaps)
    width = max(bitmap.shape[1] for bitmap in bitmaps)
    canvases = np.zeros((len(bitmaps), 1, height + 1, width + 1), dtype=np.float32)
    for canvas, bitmap in zip(canvases, bitmaps, strict=True):
        # Repeat the last row and column once: RoIAlign clamps at the border of an image, but the
        # canvas may continue beyond it.
        padded = np.pad(bitmap, ((0, 1), (0, 1)), mode="edge")
        canvas[0, : padded.shape[0], : padded.shape[1]] = padded
    rois = torch.cat([row[:, None].to(boxes), boxes], dim=1)
    images = torch.from_numpy(canvases).to(boxes.device)
    return torch.as_tensor(roi_align(images, rois, (size, size), 1.0)[:, 0])


TARGET_MODES = {"crop": crop_targets, "roi_align": roi_align_targets}
