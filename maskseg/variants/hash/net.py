"""A network that cuts images into segments and finds no objects: a backbone and a segmenter."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from maskseg.models.interfaces import Segmenter
from maskseg.models.rcnn import PixelModel
from maskseg.structures import Batch, Outputs, no_detections


class SegmentationNet(PixelModel):
    """Backbone -> segmenter, each as in `GeneralizedRCNN`, whose detections are none here."""

    def __init__(
        self,
        backbone: nn.Module,
        segmenter: nn.Module,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std)
        self.segmenter = segmenter

    @torch.no_grad()
    def predict(self, batch: Batch) -> Outputs:
        """Segments in the frame of the padded batch."""
        return Outputs(
            no_detections(batch),
            cast(Segmenter, self.segmenter).predict(self.features(batch), batch),
        )
