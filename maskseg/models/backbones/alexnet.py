"""AlexNet as a trunk: torchvision's network, its first two linear layers turned into convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from maskseg.errors import UserError
from maskseg.models.backbones.plain import Conv, PlainTrunk, Stage


class AlexNet(PlainTrunk):
    """Images -> {conv3, conv4, conv5} at stride 16 and {fc6, fc7} at stride 32 (and conv1, conv2 at 4 and 8), all after their ReLU.

    The network is the one of "One weird trick for parallelizing convolutional neural networks"; fc6 and fc7 are convolved over the image (FCN,
    section 3.1), without dropout.
    fc6_padding: cells of zeros around what fc6's 6 x 6 windows read. 3: sides of a multiple of 32 give H / 32 x W / 32 cells of fc6 and fc7, whose
    centres lie evenly over the whole image. 0: whole windows only, as in torchvision, of whose classifier a 224 x 224 image then gives the one
    cell; the outer 112 pixels of a larger one are the centre of none. A cell reads the same with both where its window lies inside.
    levels: those that come out; what is behind the last one is not built (fc6 and fc7 are 96% of the parameters).
    weights, frozen_stages: of the seven (conv1 .. conv5, fc6, fc7), see `PlainTrunk`.
    """

    def __init__(
        self,
        weights: str | None = None,
        levels: Sequence[str] = ("conv3", "conv4", "conv5", "fc6", "fc7"),
        fc6_padding: int = 3,
        frozen_stages: int = 0,
    ) -> None:
        if not 0 <= fc6_padding <= 5:
            raise UserError(
                f"fc6_padding must be 0 to 5, not {fc6_padding}: a window of 6 cells must see one of the image"
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
