"""The whole forward pass. Its parts are handed to it; it knows none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskseg.models.interfaces import (
    Backbone,
    Classifier,
    DenseHead,
    Proposer,
    RegionHead,
    Sampler,
    Segmenter,
)
from maskseg.structures import Batch, Features, Losses, Outputs, Regions, Targets


class PixelModel(nn.Module):
    """What every model begins with: pixels, normalised, through a backbone. pixel_mean, pixel_std: of RGB in 0..255."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def features(self, batch: Batch) -> Features:
        """Normalised pixels, the padding set to zero (the mean), through the backbone."""
        pixels = batch.images.contiguous(memory_format=torch.channels_last)
        images = (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        rows = (
            torch.arange(images.shape[2], device=images.device)[:, None]
            < batch.sizes[:, 0, None, None]
        )
        columns = (
            torch.arange(images.shape[3], device=images.device) < batch.sizes[:, 1, None, None]
        )
        images = images * (rows & columns)[:, None]
        return cast(Backbone, self.backbone)(images)

    def compile(self, *args: Any, **keys: Any) -> None:
        """Compiles what runs on whole maps, in place (`torch.compile`). The rest has as many rows as there are objects, which differs every step."""
        self.backbone.compile(*args, **keys)


class GeneralizedRCNN(PixelModel):
    """Backbone -> proposer -> sampler -> classifier -> region heads (Mask R-CNN, section 3), and heads that see the whole image.

    Each stage is one of the Protocols in `interfaces`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        proposer: nn.Module,
        sampler: Sampler,
        classifier: nn.Module,
        heads: Mapping[str, nn.Module] | None = None,
        dense_heads: Mapping[str, nn.Module] | None = None,
        segmenter: nn.Module | None = None,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std)
        self.proposer, self.sampler, self.classifier = proposer, sampler, classifier
        self.heads, self.dense_heads = nn.ModuleDict(heads or {}), nn.ModuleDict(dense_heads or {})
        self.segmenter = segmenter

    def forward(self, batch: Batch) -> Losses:
        """Every loss term, by name. The batch must have targets. Under `no_grad` these are validation losses."""
        if batch.targets is None:
            raise ValueError(
                "forward() gives losses and needs a batch with targets; use predict() for one without"
            )
        features = self.features(batch)
        return self._losses(
            features, *cast(Proposer, self.proposer)(features, batch), batch, batch.targets
        )

    @torch.no_grad()
    def predict(self, batch: Batch) -> Outputs:
        """Detections in the frame of the padded batch; the region heads see the refined, surviving boxes only."""
        batch = replace(batch, targets=None)
        features = self.features(batch)
        return self._outputs(features, cast(Proposer, self.proposer)(features, batch)[0], batch)

    @torch.no_grad()
    def propose(self, batch: Batch) -> Regions:
        """The proposals alone, best first within an image."""
        batch = replace(batch, targets=None)
        return cast(Proposer, self.proposer)(self.features(batch), batch)[0]

    @torch.no_grad()
    def validate(self, batch: Batch) -> tuple[Losses, Outputs]:
        """What `forward` and `predict` give in evaluation mode, from one pass through the backbone and the proposer."""
        assert batch.targets is not None
        features = self.features(batch)
        proposals, losses = cast(Proposer, self.proposer)(features, batch)
        outputs = self._outputs(features, proposals, replace(batch, targets=None))
        return self._losses(features, proposals, losses, batch, batch.targets), outputs

    def _losses(
        self, features: Features, proposals: Regions, losses: Losses, batch: Batch, targets: Targets
    ) -> Losses:
        samples = self.sampler(proposals, targets, batch.draw_seeds())
        losses = losses | cast(Classifier, self.classifier).losses(features, samples)
        for head in self.heads.values():
            losses |= cast(RegionHead, head).losses(features, samples)
        for dense in self._dense():
            losses |= dense.losses(features, batch)
        return losses

    def _outputs(self, features: Features, proposals: Regions, batch: Batch) -> Outputs:
        detections = cast(Classifier, self.classifier).predict(features, proposals, batch.sizes)
        for head in self.heads.values():
            detections = cast(RegionHead, head).predict(features, detections, batch.sizes)
        semantic = {
            name: cast(DenseHead, head).predict(features, batch)
            for name, head in self.dense_heads.items()
        }
        segments = (
            None
            if self.segmenter is None
            else cast(Segmenter, self.segmenter).predict(features, batch)
        )
        return Outputs(detections, segments, semantic)

    def _dense(self) -> list[DenseHead | Segmenter]:
        found = [*self.dense_heads.values()] + ([] if self.segmenter is None else [self.segmenter])
        return [cast(DenseHead, head) for head in found]
