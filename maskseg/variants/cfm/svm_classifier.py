"""Convolutional feature masking whose classes are linear SVMs, each against the rest, on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.ops.losses import mean_count
from maskseg.structures import Features, FeatureSpec, Losses, Samples
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.svm import NEVER


class CFMSvm(CFMClassifier):
    """Segments -> things and stuff: a `CFMClassifier` without a background class, whose layers come of one that was trained by softmax and whose last
    layer of `variants.svm`. No class shuts another one out: a segment may be several, or none.

    A score is the sigmoid of a margin: 0.5 where the margin is 0, and 0.27 where it is -1, from which on a negative costs the fit nothing. It is no
    probability. Other keys: `CFMClassifier`.
    """

    fitted_by = "tools/fit_svm.py"  # and not trained by gradients

    def __init__(
        self,
        levels: Sequence[str],
        at: Mapping[str, FeatureSpec],
        num_classes: int,
        score_threshold: float = 0.27,
        **keys: Any,
    ) -> None:
        super().__init__(levels, at, num_classes, score_threshold=score_threshold, **keys)
        self.scores = nn.Linear(self.scores.in_features, num_classes)
        nn.init.zeros_(self.scores.weight)
        nn.init.constant_(self.scores.bias, NEVER)

    def class_scores(self, logits: Tensor) -> Tensor:
        """Margins -> f32 [R, K] from 0 to 1."""
        return logits.sigmoid()

    def losses(self, features: Features, samples: Samples) -> Losses:
        """`segment_class`: the squared hinge loss, summed over the classes that were fitted, the mean over the segments; for validation alone.

        Raises UserError where a gradient is asked for.
        """
        if torch.is_grad_enabled():
            raise UserError(
                "SVMs are not trained by gradients: train model=cfm with its softmax, then tools/fit_svm.py checkpoint=... fits them"
            )
        assert samples.masks is not None
        margins = self(features, samples.boxes, samples.image_index, samples.masks)
        signs = torch.where(
            samples.labels[:, None] == torch.arange(self.num_classes, device=margins.device),
            1.0,
            -1.0,
        )
        fitted = self.scores.weight.any(dim=1)
        hinge = (1 - signs * margins).clamp(min=0)[:, fitted]
        return {"segment_class": hinge.square().sum() / mean_count(len(samples), margins)}
