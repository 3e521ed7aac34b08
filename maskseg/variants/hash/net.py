"""A network that segments images and detects no objects: a backbone and a segmenter."""

from __future__ import annotations

import torch

from maskseg.models.interfaces import Backbone, Segmenter
from maskseg.models.rcnn import PixelModel, PixelStd
from maskseg.structures import Batch, Outputs, no_detections


class SegmentationNet(PixelModel):
    """Backbone -> segmenter, both as in `GeneralizedRCNN`; the outputs contain no detections."""

    def __init__(
        self,
        backbone: Backbone,
        segmenter: Segmenter,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: PixelStd = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std)
        self.segmenter = segmenter

    @torch.no_grad()
    def predict(self, batch: Batch) -> Outputs:
        """Segments, in the frame of the padded batch."""
        segments = self.segmenter.predict(self.features(batch), batch)
        return Outputs(no_detections(batch), segments)
