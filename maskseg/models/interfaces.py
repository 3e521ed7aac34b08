"""The slots of a model: what a stage is given and what it gives back. None of them logs, draws or knows the trainer.

Every stage works with zero regions and with images without objects, and then still keeps its parameters in the graph.
Stages are `nn.Module`s; `__call__` is what they are called by.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from maskseg.structures import Batch, Features, FeatureSpec, Losses, Regions, Samples, Targets


class Backbone(Protocol):
    """Normalised images -> features."""

    levels: dict[str, FeatureSpec]

    def __call__(self, images: Tensor) -> Features:
        """images: f32 [N, 3, H, W], H and W multiples of the largest stride."""


class Proposer(Protocol):
    """Features -> class-agnostic regions; with targets, also its own losses (RPN, a file, bottom-up segments)."""

    def __call__(self, features: Features, batch: Batch) -> tuple[Regions, Losses]: ...


class Sampler(Protocol):
    """Proposals and truth -> the regions that the heads learn from."""

    def __call__(self, proposals: Regions, targets: Targets, seeds: Tensor) -> Samples:
        """seeds: i64 [N], from which what is drawn of an image follows (`Batch.seeds`)."""


class Pooler(Protocol):
    """Features inside boxes: [R, 4], [R] -> [R, C, S, S]."""

    def __call__(self, features: Features, boxes: Tensor, image_index: Tensor) -> Tensor: ...


class Classifier(Protocol):
    """Regions -> detections: scores, refined boxes, suppression, top-K are its own rule."""

    def losses(self, features: Features, samples: Samples) -> Losses: ...

    def predict(self, features: Features, proposals: Regions, sizes: Tensor) -> Regions:
        """sizes: i64 [N, 2], the images without padding. -> detections, with labels, by image and descending score."""


class RegionHead(Protocol):
    """Adds something to each detection."""

    adds: str  # the field of `Regions` that it fills: masks, keypoints

    def losses(self, features: Features, samples: Samples) -> Losses: ...

    def predict(self, features: Features, detections: Regions, sizes: Tensor) -> Regions: ...


class DenseHead(Protocol):
    """Features -> a map over the whole image."""

    def losses(self, features: Features, batch: Batch) -> Losses: ...

    def predict(self, features: Features, batch: Batch) -> Tensor:
        """-> [N, K, H, W] in the frame of the padded batch."""


class Segmenter(Protocol):
    """Features and pixels -> class-agnostic segments, as regions with masks."""

    def losses(self, features: Features, batch: Batch) -> Losses: ...

    def predict(self, features: Features, batch: Batch) -> Regions: ...


class Fitter(Protocol):
    """Parameters that are learnt without gradients (ITQ, SVM): sees features in pieces, then solves."""

    def update(self, vectors: Tensor) -> None:
        """vectors: f32 [n, C]."""

    def fit(self) -> None: ...
