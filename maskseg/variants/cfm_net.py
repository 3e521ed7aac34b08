"""The model of convolutional feature masking: segments in, things with masks and a map of things and stuff out."""

from __future__ import annotations

from typing import Any, cast

from maskseg.interfaces import Classifier, Features
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Outputs, Regions
from maskseg.variants.segment_nms import pasted


class CFMNet(GeneralizedRCNN):
    """`GeneralizedRCNN` whose proposer gives segments and whose classifier knows things and stuff; no region heads: the segments are the masks.

    num_things: the first so many classes have instances, which are the detections; the rest is stuff. Outputs.semantic["classes"]: the label of
    each pixel, i64 [N, H, W], -1 for none.
    """

    def __init__(self, num_things: int, **stages: Any) -> None:
        super().__init__(**stages)
        self.num_things = num_things

    def _outputs(self, features: Features, proposals: Regions, batch: Batch) -> Outputs:
        found = cast(Classifier, self.classifier).predict(features, proposals, batch.sizes)
        height, width = batch.images.shape[-2:]
        assert found.labels is not None
        semantic = pasted(found, batch.sizes, height, width)
        return Outputs(found[found.labels < self.num_things], semantic={"classes": semantic})
