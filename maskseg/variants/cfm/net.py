"""The model of convolutional feature masking."""

from __future__ import annotations

from typing import Annotated, Unpack

from maskseg.errors import UserError
from maskseg.models.rcnn import GeneralizedRCNN, RCNNStages
from maskseg.ops.nms import top_per_group
from maskseg.structures import Batch, Features, Outputs, Regions
from maskseg.values import NonNegativeInt, Range
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.mask_nms import paste_labels


class CFMNet(GeneralizedRCNN):
    """Classify segments into things with masks and a label map of things and stuff.

    A `GeneralizedRCNN` whose proposer yields segments and whose classifier knows things and stuff.
    It has no region heads: the segments are the masks.

    num_things: the first `num_things` classes have instances, of which the best become detections;
        the other classes are stuff.
    background_label: label of the pixels that no segment covers, e.g. the background class of VOC;
        -1 for none.

    Outputs.semantic["classes"]: label of each pixel, i64 [N, H, W], -1 for none and for padding.
    """

    classifier: CFMClassifier

    def __init__(
        self,
        num_things: NonNegativeInt,
        background_label: Annotated[int, Range(ge=-1, le=1_000_000_000)] = -1,
        **stages: Unpack[RCNNStages],
    ) -> None:
        super().__init__(**stages)
        num_classes = self.classifier.num_classes
        if not -1 <= background_label < num_classes:
            raise UserError(
                f"model.background_label must be the label of a class, 0 to {num_classes - 1}, or"
                f" -1 for none, not {background_label}"
            )
        self.num_things = num_things
        self.background_label = background_label

    def build_outputs(self, features: Features, proposals: Regions, batch: Batch) -> Outputs:
        """Classify proposals, paste the label map from all segments, and keep the best things."""
        segments = self.classifier.predict(features, proposals, batch.sizes)
        assert segments.labels is not None
        semantic = paste_labels(segments, batch.sizes, *batch.images.shape[-2:])
        for label_map, (height, width) in zip(semantic, batch.sizes.tolist(), strict=True):
            visible = label_map[:height, :width]
            visible[visible < 0] = self.background_label
        things = segments[segments.labels < self.num_things]
        best = top_per_group(things.scores, things.image_index, self.classifier.max_detections)
        return Outputs(things[best], semantic={"classes": semantic})
