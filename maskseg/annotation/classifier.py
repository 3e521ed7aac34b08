"""A classifier of images, learnt from what they show and not where: several classes an image, and a class activation map of each (`variants.cam`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.annotation.cam import weighted
from maskseg.errors import UserError
from maskseg.models.interfaces import Backbone
from maskseg.models.layers.norms import conv
from maskseg.models.rcnn import PixelModel
from maskseg.ops.superpixel_pooling import upsample
from maskseg.structures import (
    Batch,
    Features,
    FeatureSpec,
    Losses,
    Outputs,
    Targets,
    no_detections,
    present,
)


class ImageClassHead(nn.Module):
    """Features -> logits and maps of K classes: convolutions, the mean over the image's cells, a linear layer.

    levels: those that are read, finest first; at: what the backbone says of them, by name. Several are brought to `channels` by 1x1 convolutions,
    laid over each other at the finest one's cells and added. layers: 3x3 convolutions of `channels` behind that, with `norm` and ReLU; 0 for none.
    """

    def __init__(
        self,
        num_classes: int,
        levels: Sequence[str],
        at: Mapping[str, FeatureSpec],
        channels: int = 256,
        layers: int = 2,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.at = {name: at[name] for name in levels}
        strides = [level.stride for level in self.at.values()]
        if not levels or list(self.at) != list(levels) or strides != sorted(set(strides)):
            raise UserError(
                f"image classes: levels must be different ones, the finest first, not {list(levels)}"
            )
        self.finest = next(iter(self.at.values()))
        several = len(self.at) > 1
        self.lateral = nn.ModuleDict(
            {name: conv(level.channels, channels, 1) for name, level in self.at.items()}
            if several
            else {}
        )
        width = channels if several else self.finest.channels
        self.convs = nn.Sequential(
            *(
                conv(width if i == 0 else channels, channels, 3, norm, relu=True)
                for i in range(layers)
            )
        )
        self.width = channels if layers else width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.classifier = nn.Linear(self.width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, features: Features) -> Tensor:
        """-> what the maps are made of, [N, width, h, w] at the finest level's cells."""
        if not self.lateral:
            return cast(Tensor, self.convs(features[next(iter(self.at))]))
        maps = {name: layer(features[name]) for name, layer in self.lateral.items()}
        first = maps[next(iter(maps))]
        added = [
            first,
            *(self._aligned(maps[name], self.at[name], first) for name in list(maps)[1:]),
        ]
        return cast(Tensor, self.convs(torch.stack(added).sum(dim=0)))

    def _aligned(self, maps: Tensor, level: FeatureSpec, like: Tensor) -> Tensor:
        """A coarser level's map at the finest one's cells."""
        stride = level.stride / self.finest.stride
        centre = (
            level.centre - self.finest.centre
        ) / self.finest.stride + 0.5  # a cell is a pixel there
        return upsample(maps, like.shape[2], like.shape[3], (stride, stride), (centre, centre)).to(
            like.dtype
        )

    def cells(self, sizes: Tensor, height: int, width: int) -> Tensor:
        """The cells whose centres lie in the image, at least one. sizes: i64 [N, 2], the images without padding. -> bool [N, height, width]."""
        inside = []
        for axis, count in enumerate((height, width)):
            number = torch.arange(count, device=sizes.device)
            inside.append(
                (self.finest.centre + number * self.finest.stride < sizes[:, axis, None])
                | (number == 0)
            )
        return inside[0][:, :, None] & inside[1][:, None, :]

    def scores(self, x: Tensor, cells: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and maps of what `forward` gives, see `cam.weighted`."""
        return weighted(x, self.classifier.weight, self.classifier.bias, cells)


class ImageClassifier(PixelModel):
    """Backbone -> `ImageClassHead`. Loss `image_class`: binary cross-entropy of each class, summed over classes, averaged over images.

    The classes of an image are those of its targets; a crowd shows its class as well as single objects do, and an image without objects shows none.
    Outputs: no detections; `image_scores` and `image_maps`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ImageClassHead,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std)
        self.head = head
        self.level = head.finest

    def forward(self, batch: Batch) -> Losses:
        """The loss. The batch must have targets."""
        if batch.targets is None:
            raise ValueError(
                "forward() gives losses and needs a batch with targets; use predict() for one without"
            )
        x = self.head(self.features(batch))
        return self._losses(
            self.head.scores(x, self.head.cells(batch.sizes, *x.shape[2:]))[0], batch.targets
        )

    @torch.no_grad()
    def predict(self, batch: Batch) -> Outputs:
        """Scores and maps of every class."""
        return self._outputs(batch)[1]

    @torch.no_grad()
    def validate(self, batch: Batch) -> tuple[Losses, Outputs]:
        """What `forward` and `predict` give in evaluation mode, from one pass."""
        assert batch.targets is not None
        logits, outputs = self._outputs(batch)
        return self._losses(logits, batch.targets), outputs

    @torch.no_grad()
    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: f32 [N, 3, H, W], normalised, without padding. -> logits f32 [N, K], maps f32 [N, K, h, w]; a map's mean plus the class' bias is
        the logit."""
        return self.head.scores(self.head(cast(Backbone, self.backbone)(images)), None)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 RGB [N, 3, H, W] -> what `activation` takes."""
        return (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [N, K] -> sigmoid: each class is there or not."""
        return logits.sigmoid()

    def _outputs(self, batch: Batch) -> tuple[Tensor, Outputs]:
        x = self.head(self.features(batch))
        logits, maps = self.head.scores(x, self.head.cells(batch.sizes, *x.shape[2:]))
        return logits, Outputs(
            no_detections(batch), image_scores=self.probabilities(logits), image_maps=maps
        )

    def _losses(self, logits: Tensor, targets: Targets) -> Losses:
        wanted = present(targets, *logits.shape).to(logits.dtype)
        return {
            "image_class": F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            / len(logits)
        }
