"""The head: masks with the help of their boundaries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.masks.predicted import MaskGrids
from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv_stack, init_convs
from maskseg.models.mask_head import crop_targets, select_class_logits
from maskseg.ops.losses import mean_count
from maskseg.plugins import register
from maskseg.structures import Features, Losses, Regions, Samples


@register("part")
class BoundaryHead(nn.Module):
    """Masks and their boundaries (Cheng et al., "Boundary-preserving Mask R-CNN", ECCV 2020).

    The branch of the boundary reads the features of the mask, and the mask is predicted from the
    features of both. The boundary is class-agnostic and used in training only.

    pooler: returns [R, in_channels, S, S]; masks are 2S x 2S.
    boundary_weight: factor of the loss of the boundary.
    """

    pooler: Pooler
    adds = "masks"

    def __init__(
        self,
        pooler: Pooler,
        num_classes: int,
        in_channels: int = 256,
        channels: int = 256,
        layers: int = 2,
        norm: str | None = None,
        boundary_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise UserError(f"boundary head: layers must be at least 1, not {layers}")
        self.pooler = pooler
        self.mask_convs = conv_stack(in_channels, channels, layers, norm)
        self.boundary_convs = conv_stack(channels, channels, layers, norm)
        self.mask_deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.boundary_deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.mask_predictor = nn.Conv2d(channels, num_classes, 1)
        self.boundary_predictor = nn.Conv2d(channels, 1, 1)
        init_convs(self)
        self.boundary_weight = boundary_weight

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of masks (of each region's class) and boundaries, [R, 2S, 2S] each."""
        x = self.mask_convs(self.pooler(features, boxes, image_index))
        boundary = self.boundary_convs(x)
        mask = F.relu(self.mask_deconv(x + boundary))
        weight = self.mask_predictor.weight
        bias = self.mask_predictor.bias
        assert bias is not None
        mask_logits = select_class_logits(mask, weight, bias, labels)
        boundary_logits = self.boundary_predictor(F.relu(self.boundary_deconv(boundary)))[:, 0]
        return mask_logits.float(), boundary_logits.float()

    def losses(self, features: Features, samples: Samples) -> Losses:
        """Return `mask`, the binary cross-entropy, and `boundary`, the same plus the Dice loss."""
        if samples.targets.masks is None:
            raise UserError("the boundary head needs ground truth masks, but the data has boxes")
        foreground = samples.foreground()
        mask_logits, boundary_logits = self(
            features, foreground.boxes, foreground.image_index, foreground.labels
        )
        with torch.no_grad():
            masks = crop_targets(
                samples.targets.masks,
                foreground.matched_gt,
                foreground.boxes,
                mask_logits.shape[-1],
            )
            boundaries = find_boundaries(masks)
        cells = mean_count(mask_logits.numel(), mask_logits)
        rows = mean_count(len(mask_logits), mask_logits)
        boundary = cross_entropy_sum(boundary_logits, boundaries) / cells
        boundary = boundary + dice_sum(boundary_logits.sigmoid(), boundaries) / rows
        return {
            "mask": cross_entropy_sum(mask_logits, masks) / cells,
            "boundary": boundary * self.boundary_weight,
        }

    def predict(self, features: Features, detections: Regions, sizes: Tensor) -> Regions:
        """Return the detections with `masks`, probabilities on grids over their boxes."""
        assert detections.labels is not None
        logits, _ = self(features, detections.boxes, detections.image_index, detections.labels)
        image_sizes = sizes[detections.image_index]
        return replace(detections, masks=MaskGrids(logits.sigmoid(), detections.boxes, image_sizes))


def find_boundaries(masks: Tensor) -> Tensor:
    """Mark the cells of masks [R, S, S] of 0 and 1 that have a neighbor outside: f32 [R, S, S].

    Cells beyond the border of the grid count as the nearest cell inside.
    """
    padded = F.pad(masks[:, None], (1, 1, 1, 1), mode="replicate")
    eroded = -F.max_pool2d(-padded, kernel_size=3, stride=1)[:, 0]
    return masks - eroded


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """The binary cross-entropy, summed over all cells."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def dice_sum(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The Dice loss (Milletari et al. 2016), summed over the R rows of [R, S, S]."""
    overlap = (probabilities * targets).sum(dim=(1, 2))
    total = (probabilities**2).sum(dim=(1, 2)) + (targets**2).sum(dim=(1, 2))
    return (1 - (2 * overlap + 1) / (total + 1)).sum()
