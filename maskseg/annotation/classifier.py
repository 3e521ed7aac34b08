"""A multi-label image classifier, trained on image labels, with class activation maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.annotation.cam import compute_cam
from maskseg.errors import UserError
from maskseg.models.interfaces import Backbone
from maskseg.models.layers.norms import conv
from maskseg.models.rcnn import PixelModel, PixelStd
from maskseg.ops.superpixel_pooling import upsample
from maskseg.structures import (
    Batch,
    Features,
    FeatureSpec,
    Losses,
    Outputs,
    Targets,
    class_presence,
    no_detections,
)
from maskseg.values import LayerCount, PositiveInt, Size


class ImageClassHead(nn.Module):
    """Features -> logits and class activation maps of K classes.

    Convolutions, global average pooling over the cells of the image, and a linear layer.

    Args:
        num_classes: K.
        levels: names of the feature levels that are read, finest first. Several levels are
            projected to `channels` by 1x1 convolutions, resampled to the cells of the finest one
            and summed.
        feature_specs: stride, center and channels of the levels, by name.
        channels: of the convolutions.
        layers: number of 3x3 convolutions, each with `norm` and ReLU; may be 0.
        norm: see `layers.norms`.
    """

    def __init__(
        self,
        num_classes: PositiveInt,
        levels: Sequence[str],
        feature_specs: Mapping[str, FeatureSpec],
        channels: Size = 256,
        layers: LayerCount = 2,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.feature_specs = {name: feature_specs[name] for name in levels}
        strides = [spec.stride for spec in self.feature_specs.values()]
        is_unique = list(self.feature_specs) == list(levels)
        if not levels or not is_unique or strides != sorted(set(strides)):
            raise UserError(
                "image classes: levels must be distinct and the finest one first, "
                f"not {list(levels)}"
            )
        self.finest = next(iter(self.feature_specs.values()))
        self.lateral = nn.ModuleDict()
        in_channels = self.finest.channels
        if len(self.feature_specs) > 1:
            for name, spec in self.feature_specs.items():
                self.lateral[name] = conv(spec.channels, channels, 1)
            in_channels = channels
        self.convs = nn.Sequential()
        for _ in range(layers):
            self.convs.append(conv(in_channels, channels, 3, norm, relu=True))
            in_channels = channels
        self.width = in_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.classifier = nn.Linear(self.width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Features) -> Tensor:
        """Features that the maps are computed from, [N, width, h, w], on the finest level."""
        names = list(self.feature_specs)
        if not self.lateral:
            single: Tensor = self.convs(features[names[0]])
            return single
        maps = {name: layer(features[name]) for name, layer in self.lateral.items()}
        finest = maps[names[0]]
        coarser = [self._align(maps[name], self.feature_specs[name], finest) for name in names[1:]]
        summed: Tensor = self.convs(torch.stack([finest, *coarser]).sum(dim=0))
        return summed

    def _align(self, maps: Tensor, spec: FeatureSpec, finest: Tensor) -> Tensor:
        """Resample the maps of a coarser level to the cells of the finest level."""
        stride = spec.stride / self.finest.stride
        # `upsample` takes pixel coordinates: the first cell of the finest level is centered at 0.5.
        centre = (spec.centre - self.finest.centre) / self.finest.stride + 0.5
        height, width = finest.shape[2:]
        return upsample(maps, height, width, (stride, stride), (centre, centre)).to(finest.dtype)

    def cells(self, sizes: Tensor, height: int, width: int) -> Tensor:
        """Mask of the cells whose centers lie in the image, at least one per image.

        sizes: image sizes without padding, i64 [N, 2]; height, width: of the feature map, in cells.
        Returns bool [N, height, width].
        """
        inside = []
        for axis, count in enumerate((height, width)):
            index = torch.arange(count, device=sizes.device)
            centres = self.finest.centre + index * self.finest.stride
            inside.append((centres < sizes[:, axis, None]) | (index == 0))
        rows, columns = inside
        return rows[:, :, None] & columns[:, None, :]

    def scores(self, x: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and maps from the output of `forward`, see `cam.compute_cam`."""
        return compute_cam(x, self.classifier.weight, self.classifier.bias, cells)


class ImageClassifier(PixelModel):
    """Backbone -> `ImageClassHead`.

    The loss `image_class` is the binary cross-entropy, summed over classes and averaged over
    images. The classes of an image are those of its targets, including crowds; an image without
    objects is a negative for all classes. Outputs: no detections; `image_scores`, `image_maps`.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: ImageClassHead,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: PixelStd = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std)
        self.head = head
        self.level = head.finest

    def forward(self, batch: Batch) -> Losses:
        """Compute the loss. Raises ValueError for a batch without targets."""
        if batch.targets is None:
            raise ValueError(
                "forward() computes losses and needs a batch with targets; use predict() instead"
            )
        logits, _ = self.logits_and_maps(batch)
        return self._losses(logits, batch.targets)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Outputs:
        """Scores and maps of all classes."""
        return self._outputs(batch, *self.logits_and_maps(batch))

    @torch.no_grad()
    def validate(self, batch: Batch) -> tuple[Losses, Outputs]:
        """Results of `forward` and `predict` in evaluation mode, from one forward pass."""
        assert batch.targets is not None
        logits, maps = self.logits_and_maps(batch)
        return self._losses(logits, batch.targets), self._outputs(batch, logits, maps)

    @torch.no_grad()
    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits f32 [N, K] and class activation maps f32 [N, K, h, w].

        images: f32 [N, 3, H, W], normalized, without padding. The mean of a map plus the bias of
        the class is its logit.
        """
        return self.head.scores(self.head(self.backbone(images)), None)

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB pixels in 0..255, [N, 3, H, W] -> input of `activation`."""
        return (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [N, K] -> sigmoid: the classes are independent of each other."""
        return logits.sigmoid()

    def logits_and_maps(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits f32 [N, K] and maps f32 [N, K, h, w], without the cells of the padding."""
        x = self.head(self.features(batch))
        return self.head.scores(x, self.head.cells(batch.sizes, *x.shape[2:]))

    def _outputs(self, batch: Batch, logits: Tensor, maps: Tensor) -> Outputs:
        scores = self.probabilities(logits)
        return Outputs(no_detections(batch), image_scores=scores, image_maps=maps)

    def _losses(self, logits: Tensor, targets: Targets) -> Losses:
        labels = class_presence(targets, *logits.shape).to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return {"image_class": loss / len(logits)}
