"""AlexNet as a trunk: its first two linear layers are converted to convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from maskseg.errors import UserError
from maskseg.models.backbones.plain import Conv, PlainTrunk, Stage
from maskseg.values import Range


class AlexNet(PlainTrunk):
    """Images -> {conv3, conv4, conv5} at stride 16 and {fc6, fc7} at stride 32, after their ReLU.

    conv1 and conv2, at strides 4 and 8, are available too.

    The network is torchvision's, from "One weird trick for parallelizing convolutional neural
    networks" (Krizhevsky, 2014). fc6 and fc7 are convolved over the image (FCN, section 3.1),
    without dropout.

    levels: the returned levels. Stages after the last one are not built; fc6 and fc7 have 96% of
    the parameters.
    fc6_padding: cells of zero padding around the input of fc6, which has 6 x 6 windows. With 3,
    sides that are multiples of 32 give H / 32 x W / 32 cells of fc6 and fc7, with centres evenly
    spaced over the image. With 0, only complete windows are evaluated as in torchvision, where a
    224 x 224 image gives one cell; no cell is then centred in the outer 112 pixels of a larger
    image. Cells whose window lies inside the image are equal for both.
    weights, frozen_stages: of the seven stages conv1 .. conv5, fc6, fc7, see `PlainTrunk`.

    Raises UserError for a `fc6_padding` outside 0..5, and as `PlainTrunk`.
    """

    def __init__(
        self,
        weights: str | None = None,
        levels: Sequence[str] = ("conv3", "conv4", "conv5", "fc6", "fc7"),
        fc6_padding: Annotated[int, Range(ge=0, le=5)] = 3,
        frozen_stages: Annotated[int, Range(ge=0, le=7)] = 0,
    ) -> None:
        if not 0 <= fc6_padding <= 5:
            raise UserError(
                f"fc6_padding must be 0 to 5, not {fc6_padding}: "
                "a window of 6 cells must contain at least one cell of the image"
            )
        stages = {
            "conv1": Stage(0, (Conv("features.0", 64, kernel=11, stride=4, padding=2),)),
            "conv2": Stage(3, (Conv("features.3", 192, kernel=5, padding=2),)),
            "conv3": Stage(3, (Conv("features.6", 384, kernel=3, padding=1),)),
            "conv4": Stage(0, (Conv("features.8", 256, kernel=3, padding=1),)),
            "conv5": Stage(0, (Conv("features.10", 256, kernel=3, padding=1),)),
            "fc6": Stage(3, (Conv("classifier.1", 4096, kernel=6, padding=fc6_padding),)),
            "fc7": Stage(0, (Conv("classifier.4", 4096, kernel=1),)),
        }
        super().__init__("alexnet", stages, levels, weights, frozen_stages)
