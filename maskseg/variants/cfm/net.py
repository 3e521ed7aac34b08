"""The model of convolutional feature masking: segments in, things with masks and a map of things and stuff out."""

from __future__ import annotations

from typing import Any, cast

from maskseg.errors import UserError
from maskseg.models.interfaces import Classifier
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops.nms import top_per_group
from maskseg.structures import Batch, Features, Outputs, Regions
from maskseg.variants.cfm.mask_nms import pasted


class CFMNet(GeneralizedRCNN):
    """`GeneralizedRCNN` whose proposer gives segments and whose classifier knows things and stuff; no region heads: the segments are the masks.

    num_things: the first so many classes have instances, the best of which are the detections; the rest is stuff. Outputs.semantic["classes"]: the
    label of each pixel, i64 [N, H, W], where no segment is `unclaimed` (VOC's background is a class of the maps), -1 for none and outside.
    """

    def __init__(self, num_things: int, unclaimed: int = -1, **stages: Any) -> None:
        super().__init__(**stages)
        classes = cast(Any, self.classifier).num_classes
        if not -1 <= unclaimed < classes:
            raise UserError(
                f"model.unclaimed must be the label of a class, 0 to {classes - 1}, or -1 for none, not {unclaimed}"
            )
        self.num_things, self.unclaimed = num_things, unclaimed

    def _outputs(self, features: Features, proposals: Regions, batch: Batch) -> Outputs:
        found = cast(Classifier, self.classifier).predict(features, proposals, batch.sizes)
        height, width = batch.images.shape[-2:]
        assert found.labels is not None
        semantic = pasted(found, batch.sizes, height, width)
        for classes, (tall, wide) in zip(semantic, batch.sizes.tolist(), strict=True):
            own = classes[:tall, :wide]
            own[own < 0] = self.unclaimed
        things = found[found.labels < self.num_things]
        best = top_per_group(
            things.scores, things.image_index, cast(Any, self.classifier).max_detections
        )
        return Outputs(things[best], semantic={"classes": semantic})
