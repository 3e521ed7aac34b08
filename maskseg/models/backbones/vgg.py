"""VGG-16: the convolutions as a trunk, the linear layers as the start of a region classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from maskseg.models.backbones.plain import Conv, PlainTrunk, Stage, torchvision_state
from maskseg.models.box_head import FCTrunk

_BLOCKS = {
    "conv1": (64, (0, 2)),
    "conv2": (128, (5, 7)),
    "conv3": (256, (10, 12, 14)),
    "conv4": (512, (17, 19, 21)),
    "conv5": (512, (24, 26, 28)),
}
_STAGES = {  # channels and places in torchvision's `features` -> stages
    name: Stage(
        0 if name == "conv1" else 2,
        tuple(Conv(f"features.{i}", channels, kernel=3, padding=1) for i in places),
    )
    for name, (channels, places) in _BLOCKS.items()
}


class VGG16(PlainTrunk):
    """Images -> {conv3, conv4, conv5} at strides 4, 8, 16 (and conv1, conv2 at 1 and 2), each a block's last ReLU (VGG, table 1, D).

    The last pooling is left out, as regions are pooled there instead (SPP-net, Fast R-CNN, CFM).
    levels: those that come out; what is behind the last one is not built.
    weights, frozen_stages: of the five blocks (Fast R-CNN freezes 2), see `PlainTrunk`. IMAGENET1K_FEATURES of torchvision were trained on
    pixels without division by a deviation: pixel_mean [123, 117, 104], pixel_std [1, 1, 1].
    """

    def __init__(
        self,
        weights: str | None = None,
        levels: Sequence[str] = ("conv3", "conv4", "conv5"),
        frozen_stages: int = 0,
    ) -> None:
        super().__init__("vgg16", _STAGES, levels, weights, frozen_stages)


def fc_trunk(weights: str | None = None) -> FCTrunk:
    """fc6 and fc7 over regions of conv5 pooled to 7 x 7, without dropout. weights: as the trunk's; they need a classifier, so not
    IMAGENET1K_FEATURES."""
    trunk = FCTrunk(in_channels=512, size=7, width=4096, layers=2)
    if weights is not None:
        trunk.load_state_dict(fc_state(weights))
    return trunk


def fc_state(weights: str) -> dict[str, Tensor]:
    """The state dict of `fc_trunk`: of torchvision's classifier, fc6 f32 [4096, 512 * 7 * 7] and fc7 [4096, 4096] with their biases. Raises
    UserError for weights without them."""
    shapes = {
        "layers.0.weight": (4096, 512 * 7 * 7),
        "layers.0.bias": (4096,),
        "layers.1.weight": (4096, 4096),
        "layers.1.bias": (4096,),
    }
    return torchvision_state(
        "vgg16", weights, {"layers.0": "classifier.0", "layers.1": "classifier.3"}, shapes
    )
