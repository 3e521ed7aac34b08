"""Protocols of the stages of a model: their inputs and outputs.

Stages do not log, draw or access the trainer. Every stage works with zero regions and with images
without objects, and keeps its parameters in the autograd graph in these cases.
All stages except samplers are `nn.Module`s and are called through `__call__`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from maskseg.structures import (
    Batch,
    Features,
    FeatureSpec,
    Losses,
    Outputs,
    Regions,
    Samples,
    Targets,
)


class Backbone(Protocol):
    """Normalized images -> features."""

    levels: dict[str, FeatureSpec]

    def __call__(self, images: Tensor) -> Features:
        """images: f32 [N, 3, H, W], H and W multiples of the largest stride."""

    def compile(self, *args: object, **kwargs: object) -> None:
        """Compile the forward pass in place, as `nn.Module.compile` does."""


class Proposer(Protocol):
    """Features -> class-agnostic regions, and with targets the proposer's own losses."""

    @property
    def needs(self) -> str | None:
        """Data that `Batch.proposals` must hold: `proposals`, `segments`, or None."""

    def __call__(self, features: Features, batch: Batch) -> tuple[Regions, Losses]: ...


class Sampler(Protocol):
    """Proposals and ground truth -> the regions that the heads are trained on."""

    def __call__(self, proposals: Regions, targets: Targets, seeds: Tensor) -> Samples:
        """seeds: i64 [N], determine the random choices in each image (`Batch.seeds`)."""


class Pooler(Protocol):
    """Features inside boxes."""

    def __call__(self, features: Features, boxes: Tensor, image_index: Tensor) -> Tensor:
        """boxes: f32 [R, 4]; image_index: i64 [R]. Returns [R, C, S, S]."""


class Classifier(Protocol):
    """Regions -> detections. Scores, box refinement, suppression and top-k are its own choice."""

    @property
    def adds(self) -> str | None:
        """Field of `Regions` that it fills besides boxes, scores and labels; None for none."""

    def losses(self, features: Features, samples: Samples) -> Losses: ...

    def predict(self, features: Features, proposals: Regions, sizes: Tensor) -> Regions:
        """sizes: i64 [N, 2], (height, width) of the images without padding.

        Returns detections with labels, by image, then descending score.
        """


class RegionHead(Protocol):
    """Adds a field, such as masks or keypoints, to each detection."""

    @property
    def adds(self) -> str:
        """Field of `Regions` that the head fills: `masks` or `keypoints`."""

    def losses(self, features: Features, samples: Samples) -> Losses: ...

    def predict(self, features: Features, detections: Regions, sizes: Tensor) -> Regions: ...


class DenseHead(Protocol):
    """Features -> a label map of the whole image."""

    def losses(self, features: Features, batch: Batch) -> Losses: ...

    def predict(self, features: Features, batch: Batch) -> Tensor:
        """Return the label of each pixel, i64 [N, H, W], in the frame of the padded batch."""


class Segmenter(Protocol):
    """Features and pixels -> class-agnostic segments, as regions with masks."""

    def losses(self, features: Features, batch: Batch) -> Losses: ...

    def predict(self, features: Features, batch: Batch) -> Regions: ...


@runtime_checkable
class TrainableModel(Protocol):
    """A whole model that can be trained and evaluated."""

    def forward(self, batch: Batch) -> Losses:
        """Return all loss terms by name; the batch needs targets."""

    def predict(self, batch: Batch) -> Outputs:
        """Return what the model finds, in the frame of the padded batch."""

    def validate(self, batch: Batch) -> tuple[Losses, Outputs]:
        """Return the losses and the predictions of one pass through the backbone."""
