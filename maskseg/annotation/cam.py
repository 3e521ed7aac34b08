"""Class activation maps (Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016): where in an image a class is seen, from
the pass that gives its score.

M_c(x, y) = sum_k w_k^c f_k(x, y) of the last features f and the classifier's weights w. Average pooling makes the map's mean, plus the class' bias,
the score. Maps are as coarse as the features; `at_pixels` lays them over the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.backbones.resnet import pretrained_state
from maskseg.ops.precision import full_precision
from maskseg.structures import FeatureSpec


class ActivationModel(Protocol):
    """A classifier of images with maps: torchvision's (`CAMModel`) or one that was trained here (`ImageClassifier`)."""

    level: FeatureSpec  # of the maps' cells

    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: f32 [N, 3, H, W], normalised. -> logits f32 [N, K], maps f32 [N, K, h, w]."""

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 RGB [N, 3, H, W] -> what `activation` takes."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [N, K] -> scores in [0, 1]."""


class _Family(NamedTuple):
    """Networks of torchvision's. names: how their names begin; parts: children that make the features, in order; layer: the last one, linear or a 1x1
    convolution; relu: it stands behind the parts; stride, centre: of the cells (`receptive.Field`)."""

    names: str
    parts: tuple[str, ...]
    layer: str
    relu: bool = False
    stride: int = 32
    centre: float = 0.5


_STAGES = ("layer1", "layer2", "layer3", "layer4")
_FAMILIES = (
    _Family(r"(wide_)?resne(x)?t\d", ("conv1", "bn1", "relu", "maxpool", *_STAGES), "fc"),
    _Family("squeezenet1_0", ("features",), "classifier.1", stride=16, centre=17.5),
    _Family("squeezenet1_1", ("features",), "classifier.1", stride=16, centre=15.5),
    _Family(
        "densenet", ("features",), "classifier", relu=True, centre=14.5
    ),  # 2 x 2 means between its stages
    _Family("mobilenet_v2", ("features",), "classifier.1"),
    _Family("efficientnet", ("features",), "classifier.1"),
    _Family("regnet", ("stem", "trunk_output"), "fc"),
    _Family("shufflenet_v2", ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"), "fc"),
)
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12])\."
)  # of torchvision's published files


class CAMModel(nn.Module):
    """torchvision's classifier `name`, in evaluation mode: those whose last layer is linear, or a 1x1 convolution, around average pooling.

    weights: a name of torchvision's weights for it (DEFAULT, IMAGENET1K_V1 ...; downloaded once), a file with a state dict of that network, whose
    last layer may have any number of classes, or None for noise. names: of the K classes, where they are ImageNet's.
    Raises UserError for another network, or weights that do not fit.
    """

    def __init__(self, name: str = "squeezenet1_1", weights: str | None = "DEFAULT") -> None:
        super().__init__()
        if name not in supported():
            raise UserError(
                f"class activation maps of {name!r}: a linear or 1x1-convolution layer must follow, or precede, average pooling alone; torchvision's "
                f"networks of that kind are {', '.join(supported())}"
            )
        self.family = next(f for f in _FAMILIES if re.match(f.names, name))
        state = None if weights is None else _renamed(pretrained_state(name, weights))
        last = None if state is None else state.get(f"{self.family.layer}.weight")
        count = 1000 if not isinstance(last, Tensor) else len(last)
        self.net = (
            torchvision.models.get_model(name, weights=None, num_classes=count)
            .eval()
            .requires_grad_(False)
        )
        if state is not None:
            _load(self.net, state, f"weights {weights!r} do not fit {name}")
        self.level = FeatureSpec(self.family.stride, self.family.centre, self.layer.weight.shape[1])
        self._set_pixels(name)
        categories = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
        self.names: list[str] = list(categories) if count == len(categories) else []

    def _set_pixels(self, name: str) -> None:
        """The mean and deviation of pixels in 0..255 that all weights of the network are for."""
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        self.register_buffer(
            "pixel_mean", torch.tensor(preset.mean).view(3, 1, 1) * 255, persistent=False
        )
        self.register_buffer(
            "pixel_std", torch.tensor(preset.std).view(3, 1, 1) * 255, persistent=False
        )

    @property
    def layer(self) -> Any:
        """The last one with weights."""
        return self.net.get_submodule(self.family.layer)

    def train(self, mode: bool = True) -> CAMModel:
        """It stays in evaluation mode: nothing here is learnt."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: f32 [N, 3, H, W], normalised. -> logits f32 [N, K] as torchvision's forward gives them, maps f32 [N, K, h, w].

        Of SqueezeNet, whose convolution has a ReLU before the pooling, the map is what is pooled: its mean is the score.
        """
        x = images
        for part in self.family.parts:
            x = self.net.get_submodule(part)(x)
        if self.family.relu:
            x = F.relu(x)
        if isinstance(self.layer, nn.Conv2d):
            maps = F.relu(self.layer(x))
            return maps.mean(dim=(2, 3)), maps
        return weighted(x, self.layer.weight, self.layer.bias)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 RGB [N, 3, H, W] -> what `activation` takes."""
        return (pixels.float() - cast(Tensor, self.pixel_mean)) / cast(Tensor, self.pixel_std)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [N, K] -> softmax: ImageNet's images have one class each."""
        return logits.softmax(dim=1)


def supported() -> list[str]:
    """Names of torchvision's networks that `CAMModel` takes."""
    return [
        n
        for n in torchvision.models.list_models(module=torchvision.models)
        if any(re.match(f.names, n) for f in _FAMILIES)
    ]


@full_precision
def weighted(
    features: Tensor, weight: Tensor, bias: Tensor, cells: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """features: [N, C, h, w]; weight: [K, C]; bias: [K]; cells: bool [N, h, w], those that count, None for all.
    -> logits f32 [N, K], maps f32 [N, K, h, w], zero where cells do not count; a map's mean over the others plus the bias is the logit."""
    maps = F.conv2d(features.float(), weight.float()[:, :, None, None])
    if cells is None:
        return maps.mean(dim=(2, 3)) + bias.float(), maps
    maps = maps * cells[:, None]
    return maps.sum(dim=(2, 3)) / cells.sum(dim=(1, 2))[:, None] + bias.float(), maps


def translated(
    logits: Tensor, maps: Tensor, probabilities: Tensor, members: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Classes of another data set, each the union of some of a classifier's K: members, such as all breeds of dogs for `dog`.

    Logit and map are those of the member with the highest logit, the class that the classifier would name, so that the map's mean plus its bias
    is still the score; the probability is the sum of the members' (softmax). logits, probabilities: [N, K]; maps: [N, K, h, w]; members: G lists
    of classes, none empty. -> [N, G], [N, G, h, w], [N, G].
    """
    images = torch.arange(len(logits), device=logits.device)
    best = [
        torch.tensor(own, device=logits.device)[logits[:, list(own)].argmax(dim=1)]
        for own in members
    ]
    sums = torch.stack([probabilities[:, list(own)].sum(dim=1) for own in members], dim=1)
    return (
        torch.stack([logits[images, b] for b in best], dim=1),
        torch.stack([maps[images, b] for b in best], dim=1),
        sums,
    )


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    """The names of torchvision's present modules."""
    return {_OLD_DENSENET.sub(r"\1\2.", key): value for key, value in state.items()}


def _load(net: nn.Module, state: dict[str, Any], wrong: str) -> None:
    try:
        missing, left = net.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{wrong}: {(str(error).splitlines() or [''])[-1].strip()}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or left:
        raise UserError(
            f"{wrong}: {len(missing)} tensors are missing ({missing[:3]}), {len(left)} left over ({left[:3]})"
        )
    bad = [key for key, value in net.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        raise UserError(f"{wrong}: {bad[0]} has values that are not finite")
