"""GeneralizedRCNN. Stages are injected; this file depends only on `interfaces`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Required, TypedDict, TypeVar, cast

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
from maskseg.values import PositiveFloat

S = TypeVar("S")


PixelStd = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class RCNNStages(TypedDict, total=False):
    """The arguments of `GeneralizedRCNN`."""

    backbone: Required[Backbone]
    proposer: Required[Proposer]
    sampler: Required[Sampler]
    classifier: Required[Classifier]
    heads: Mapping[str, RegionHead] | None
    dense_heads: Mapping[str, DenseHead] | None
    segmenter: Segmenter | None
    pixel_mean: tuple[float, float, float]
    pixel_std: PixelStd


class PixelModel(nn.Module):
    """Base of all models: normalizes the pixels and passes them through a backbone.

    pixel_mean, pixel_std: of the RGB channels, in 0..255.
    """

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pixel_mean: tuple[float, float, float],
        pixel_std: PixelStd,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def features(self, batch: Batch) -> Features:
        """Return the backbone's features of the normalized images; padding is 0 (the mean)."""
        pixels = batch.images.contiguous(memory_format=torch.channels_last)
        images = (pixels.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        heights = batch.sizes[:, 0, None, None]
        widths = batch.sizes[:, 1, None, None]
        rows = torch.arange(images.shape[2], device=images.device)[:, None] < heights
        columns = torch.arange(images.shape[3], device=images.device) < widths
        images = images * (rows & columns)[:, None]
        return self.backbone(images)

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile the backbone in place (`torch.compile`).

        The later stages stay uncompiled: their tensors have one row per object, so the shapes
        change in every step.
        """
        self.backbone.compile(*args, **kwargs)


class GeneralizedRCNN(PixelModel):
    """Backbone -> proposer -> sampler -> classifier -> region heads (Mask R-CNN, section 3).

    Optionally also dense heads and a segmenter, which use the features of the whole image.
    Each stage implements one of the Protocols in `interfaces`.
    """

    proposer: Proposer
    sampler: Sampler
    classifier: Classifier
    heads: Mapping[str, RegionHead]
    dense_heads: Mapping[str, DenseHead]
    segmenter: Segmenter | None

    def __init__(
        self,
        backbone: Backbone,
        proposer: Proposer,
        sampler: Sampler,
        classifier: Classifier,
        heads: Mapping[str, RegionHead] | None = None,
        dense_heads: Mapping[str, DenseHead] | None = None,
        segmenter: Segmenter | None = None,
        pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: PixelStd = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__(backbone, pixel_mean, pixel_std)
        self.proposer = proposer
        self.sampler = sampler
        self.classifier = classifier
        self.heads = _module_dict(heads)
        self.dense_heads = _module_dict(dense_heads)
        self.segmenter = segmenter

    def forward(self, batch: Batch) -> Losses:
        """Return all loss terms by name. Under `no_grad` these are validation losses.

        Raises ValueError for a batch without targets.
        """
        if batch.targets is None:
            raise ValueError(
                "forward() computes losses and needs a batch with targets; use predict() without"
            )
        features = self.features(batch)
        proposals, losses = self.proposer(features, batch)
        return self._losses(features, proposals, losses, batch, batch.targets)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Outputs:
        """Return the outputs in the frame of the padded batch.

        The region heads see only the refined boxes that are left after suppression.
        """
        batch = replace(batch, targets=None)
        features = self.features(batch)
        proposals, _ = self.proposer(features, batch)
        return self.build_outputs(features, proposals, batch)

    @torch.no_grad()
    def propose(self, batch: Batch) -> Regions:
        """Return the proposals only, best first within an image."""
        batch = replace(batch, targets=None)
        proposals, _ = self.proposer(self.features(batch), batch)
        return proposals

    @torch.no_grad()
    def validate(self, batch: Batch) -> tuple[Losses, Outputs]:
        """Return the results of `forward` and `predict` in evaluation mode.

        Backbone and proposer run only once.
        """
        assert batch.targets is not None
        features = self.features(batch)
        proposals, losses = self.proposer(features, batch)
        outputs = self.build_outputs(features, proposals, replace(batch, targets=None))
        return self._losses(features, proposals, losses, batch, batch.targets), outputs

    def _losses(
        self, features: Features, proposals: Regions, losses: Losses, batch: Batch, targets: Targets
    ) -> Losses:
        samples = self.sampler(proposals, targets, batch.seeds_or_zeros())
        losses = losses | self.classifier.losses(features, samples)
        for head in self.heads.values():
            losses |= head.losses(features, samples)
        for dense_head in self.dense_heads.values():
            losses |= dense_head.losses(features, batch)
        if self.segmenter is not None:
            losses |= self.segmenter.losses(features, batch)
        return losses

    def build_outputs(self, features: Features, proposals: Regions, batch: Batch) -> Outputs:
        """Run all stages after the proposer in inference."""
        detections = self.classifier.predict(features, proposals, batch.sizes)
        for head in self.heads.values():
            detections = head.predict(features, detections, batch.sizes)
        semantic = {name: head.predict(features, batch) for name, head in self.dense_heads.items()}
        segments = None if self.segmenter is None else self.segmenter.predict(features, batch)
        return Outputs(detections, segments, semantic)


def _module_dict(stages: Mapping[str, S] | None) -> Mapping[str, S]:
    """Return an `nn.ModuleDict` of the stages, typed by the Protocol of its values."""
    modules = nn.ModuleDict(cast(Mapping[str, nn.Module], stages or {}))
    return cast(Mapping[str, S], modules)
