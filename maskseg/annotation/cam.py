"""Class activation maps (CAM) of image classifiers: where in an image a class is seen.

Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.

M_c(x, y) = sum_k w_k^c f_k(x, y), with the last features f and the weights w of the classification
layer. With global average pooling, the mean of the map plus the bias of the class is its logit, so
maps and logits come from the same forward pass. Maps have the resolution of the features;
`visualization.cam.resample_to_pixels` maps them to the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.backbones.resnet import load_pretrained_state
from maskseg.ops.precision import full_precision
from maskseg.structures import FeatureSpec


class ActivationModel(Protocol):
    """An image classifier with class activation maps: `CAMModel` or `ImageClassifier`."""

    level: FeatureSpec  # of the cells of the maps

    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalized images, f32 [N, 3, H, W] -> logits f32 [N, K], maps f32 [N, K, h, w]."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB pixels in 0..255, [N, 3, H, W] -> input of `activation`."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [N, K] -> scores in [0, 1]."""


class _Family(NamedTuple):
    """Networks of torchvision with the same structure.

    pattern: regular expression that matches the start of their names; modules: children that
    compute the features, in order; classifier: the classification layer, linear or a 1x1
    convolution; relu: apply ReLU to the features; stride, centre: of the cells (`FeatureSpec`).
    """

    pattern: str
    modules: tuple[str, ...]
    classifier: str
    relu: bool = False
    stride: int = 32
    centre: float = 0.5


_STAGES = ("layer1", "layer2", "layer3", "layer4")
_FAMILIES = (
    _Family(r"(wide_)?resne(x)?t\d", ("conv1", "bn1", "relu", "maxpool", *_STAGES), "fc"),
    _Family("squeezenet1_0", ("features",), "classifier.1", stride=16, centre=17.5),
    _Family("squeezenet1_1", ("features",), "classifier.1", stride=16, centre=15.5),
    # The 2 x 2 average pooling between the stages of DenseNet shifts the cell centers.
    _Family("densenet", ("features",), "classifier", relu=True, centre=14.5),
    _Family("mobilenet_v2", ("features",), "classifier.1"),
    _Family("efficientnet", ("features",), "classifier.1"),
    _Family("regnet", ("stem", "trunk_output"), "fc"),
    _Family("shufflenet_v2", ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5"), "fc"),
)
# Keys in torchvision's published DenseNet files have a dot that its modules no longer have.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12])\.")


class CAMModel(nn.Module):
    """A torchvision classifier with class activation maps, always in evaluation mode.

    Supports networks whose classification layer, linear or a 1x1 convolution, is next to global
    average pooling.

    name: torchvision's name of the network; weights: a name of torchvision's weights for it
    (DEFAULT, IMAGENET1K_V1, ...; downloaded once), a file with a state dict, whose classification
    layer may have any number of classes, or None for random weights.
    class_names: of the K classes if they are ImageNet's, else [].

    Raises UserError for an unsupported network or for weights that do not fit.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, name: str = "squeezenet1_1", weights: str | None = "DEFAULT") -> None:
        super().__init__()
        if name not in supported_networks():
            raise UserError(
                f"class activation maps of {name!r}: only average pooling may stand between the "
                "features and a linear or 1x1 convolution layer; torchvision's networks of that "
                f"kind are {', '.join(supported_networks())}"
            )
        self.family = next(family for family in _FAMILIES if re.match(family.pattern, name))
        num_classes = 1000
        state = None
        if weights is not None:
            state = _rename_keys(load_pretrained_state(name, weights))
            class_weight = state.get(f"{self.family.classifier}.weight")
            if isinstance(class_weight, Tensor):
                num_classes = len(class_weight)
        net = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        self.net = net.eval().requires_grad_(False)
        if state is not None:
            _load(self.net, state, f"weights {weights!r} do not fit {name}")
        channels = self.classifier.weight.shape[1]
        self.level = FeatureSpec(self.family.stride, self.family.centre, channels)
        self._register_pixel_statistics(name)
        names = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
        self.class_names: list[str] = list(names) if num_classes == len(names) else []

    def _register_pixel_statistics(self, name: str) -> None:
        """Register mean and standard deviation of pixels in 0..255 that the weights expect."""
        preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        for key, values in (("pixel_mean", preset.mean), ("pixel_std", preset.std)):
            self.register_buffer(key, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)

    @property
    def classifier(self) -> nn.Linear | nn.Conv2d:
        """The classification layer, a linear layer or a 1x1 convolution."""
        layer = self.net.get_submodule(self.family.classifier)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        return layer

    def train(self, mode: bool = True) -> CAMModel:
        """Stay in evaluation mode: the network is never trained here."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and class activation maps.

        images: f32 [N, 3, H, W], normalized. Returns logits f32 [N, K], those of torchvision's
        forward, and maps f32 [N, K, h, w]. SqueezeNet has a ReLU between its convolution and the
        pooling; its map is the input of the pooling, whose mean is the logit.
        """
        x = images
        for module in self.family.modules:
            x = self.net.get_submodule(module)(x)
        if self.family.relu:
            x = F.relu(x)
        if isinstance(self.classifier, nn.Conv2d):
            maps = F.relu(self.classifier(x))
            return maps.mean(dim=(2, 3)), maps
        return compute_cam(x, self.classifier.weight, self.classifier.bias)

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB pixels in 0..255, [N, 3, H, W] -> input of `activation`."""
        return (pixels.float() - self.pixel_mean) / self.pixel_std

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [N, K] -> softmax: ImageNet's images have one class each."""
        return logits.softmax(dim=1)


def supported_networks() -> list[str]:
    """Names of the torchvision networks that `CAMModel` supports."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if _is_supported(name)]


def _is_supported(name: str) -> bool:
    return any(re.match(family.pattern, name) for family in _FAMILIES)


@full_precision
def compute_cam(
    features: Tensor, weight: Tensor, bias: Tensor, cells: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute logits and class activation maps from features, in full precision.

    features: [N, C, h, w]; weight: [K, C]; bias: [K]; cells: valid cells, bool [N, h, w], None for
    all. Returns logits f32 [N, K] and maps f32 [N, K, h, w], zero at invalid cells. The mean of a
    map over the valid cells plus the bias is the logit.
    """
    maps = F.conv2d(features.float(), weight.float()[:, :, None, None])
    if cells is None:
        return maps.mean(dim=(2, 3)) + bias.float(), maps
    maps = maps * cells[:, None]
    return maps.sum(dim=(2, 3)) / cells.sum(dim=(1, 2))[:, None] + bias.float(), maps


def merge_classes(
    logits: Tensor, maps: Tensor, probabilities: Tensor, members: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge a classifier's classes into classes of another data set.

    Each of the G new classes is the union of some of the K classes, such as all breeds of dogs for
    `dog`. Its logit and map are those of the member with the highest logit, so the mean of the map
    plus the bias is still the logit; its probability is the sum of the members' probabilities.

    logits, probabilities: [N, K]; maps: [N, K, h, w]; members: G non-empty lists of class indices.
    Returns logits [N, G], maps [N, G, h, w] and probabilities [N, G].
    """
    images = torch.arange(len(logits), device=logits.device)
    class_logits = []
    class_maps = []
    class_probabilities = []
    for group in members:
        indices = list(group)
        best = torch.tensor(group, device=logits.device)[logits[:, indices].argmax(dim=1)]
        class_logits.append(logits[images, best])
        class_maps.append(maps[images, best])
        class_probabilities.append(probabilities[:, indices].sum(dim=1))
    return (
        torch.stack(class_logits, dim=1),
        torch.stack(class_maps, dim=1),
        torch.stack(class_probabilities, dim=1),
    )


def _rename_keys(state: dict[str, object]) -> dict[str, object]:
    """Rename the keys of old state dicts to those of torchvision's current modules."""
    return {_OLD_DENSENET.sub(r"\1\2.", key): value for key, value in state.items()}


def _load(net: nn.Module, state: dict[str, object], problem: str) -> None:
    """Load a state dict and check it. Raises UserError, with `problem` first in the message."""
    try:
        missing, unexpected = net.load_state_dict(state, strict=False)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise UserError(f"{problem}: {reason}") from error
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(
            f"{problem}: {len(missing)} tensors are missing ({missing[:3]}), "
            f"{len(unexpected)} are unexpected ({unexpected[:3]})"
        )
    for key, value in net.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{problem}: {key} has values that are not finite")
