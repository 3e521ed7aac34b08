"""VGG-16: its convolutions as a trunk, and the weights of its fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from maskseg.models.backbones.plain import Conv, PlainTrunk, Stage, load_torchvision_state
from maskseg.values import Range

# Name of each block -> channels, and positions of its convolutions in torchvision's `features`.
_BLOCKS = {
    "conv1": (64, (0, 2)),
    "conv2": (128, (5, 7)),
    "conv3": (256, (10, 12, 14)),
    "conv4": (512, (17, 19, 21)),
    "conv5": (512, (24, 26, 28)),
}


class VGG16(PlainTrunk):
    """Images -> {conv3, conv4, conv5} at strides 4, 8, 16, each after its block's last ReLU.

    conv1 and conv2, at strides 1 and 2, are available too. The network is VGG, table 1, column D.
    The last pooling is omitted: regions are pooled there instead (SPP-net, Fast R-CNN, CFM).

    levels: the returned levels; blocks after the last one are not built.
    weights, frozen_stages: of the five blocks (Fast R-CNN freezes 2), see `PlainTrunk`.
    torchvision's IMAGENET1K_FEATURES were trained on pixels that are not divided by a standard
    deviation: they need pixel_mean [123, 117, 104] and pixel_std [1, 1, 1].
    """

    def __init__(
        self,
        weights: str | None = None,
        levels: Sequence[str] = ("conv3", "conv4", "conv5"),
        frozen_stages: Annotated[int, Range(ge=0, le=5)] = 0,
    ) -> None:
        super().__init__("vgg16", _stages(), levels, weights, frozen_stages)


def _stages() -> dict[str, Stage]:
    stages = {}
    for name, (channels, positions) in _BLOCKS.items():
        convs = [Conv(f"features.{i}", channels, kernel=3, padding=1) for i in positions]
        stages[name] = Stage(0 if name == "conv1" else 2, tuple(convs))
    return stages


def load_fc_state(weights: str) -> dict[str, Tensor]:
    """Load the fully connected layers fc6 and fc7 of torchvision's VGG-16.

    weights: as of `VGG16`.
    Returns `layers.0.weight` f32 [4096, 512 * 7 * 7] for fc6, `layers.1.weight` f32 [4096, 4096]
    for fc7, and their biases.
    Raises UserError for weights without them, such as IMAGENET1K_FEATURES.
    """
    shapes = {
        "layers.0.weight": (4096, 512 * 7 * 7),
        "layers.0.bias": (4096,),
        "layers.1.weight": (4096, 4096),
        "layers.1.bias": (4096,),
    }
    sources = {"layers.0": "classifier.0", "layers.1": "classifier.3"}
    return load_torchvision_state("vgg16", weights, sources, shapes)
