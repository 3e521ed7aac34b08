"""Convolutional feature masking with one-vs-rest linear SVMs on frozen features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.ops.losses import mean_count
from maskseg.structures import Features, FeatureSpec, Losses, Samples
from maskseg.values import Fraction, PositiveInt
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.settings import MaskingSettings, MLPSettings, PoolerSettings
from maskseg.variants.cfm.svm import ABSENT_MARGIN


class CFMSvm(CFMClassifier):
    """Classify segments as things and stuff by one-vs-rest SVMs.

    A `CFMClassifier` without a background class. Its layers come from a classifier that was trained
    with softmax, its last layer from `svm.OneVsRestSVM`. Classes do not exclude each other: a
    segment may belong to multiple classes, or to none.

    A score is the sigmoid of a margin, not a probability: 0.5 at margin 0, and 0.27 at margin -1,
    beyond which a negative costs the fit nothing. Other arguments: see `CFMClassifier`.
    """

    fitted_by = "tools/fit_svm.py"  # it is not trained by gradients

    def __init__(
        self,
        levels: Sequence[str],
        feature_specs: Mapping[str, FeatureSpec],
        num_classes: PositiveInt,
        pooler: PoolerSettings | None = None,
        masking: MaskingSettings | None = None,
        mlp: MLPSettings | None = None,
        score_threshold: Fraction = 0.27,
        nms_threshold: Fraction = 0.3,
        max_detections: PositiveInt = 100,
    ) -> None:
        super().__init__(
            levels,
            feature_specs,
            num_classes,
            pooler,
            masking,
            mlp,
            score_threshold,
            nms_threshold,
            max_detections,
        )
        self.scores = nn.Linear(self.scores.in_features, num_classes)
        nn.init.zeros_(self.scores.weight)
        nn.init.constant_(self.scores.bias, ABSENT_MARGIN)

    def class_scores(self, logits: Tensor) -> Tensor:
        """Convert margins to scores in [0, 1]: f32 [R, K]."""
        return logits.sigmoid()

    def losses(self, features: Features, samples: Samples) -> Losses:
        """Compute `segment_class` for validation: the squared hinge loss.

        Summed over the classes that were fitted, averaged over the segments. Raises UserError if
        gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise UserError(
                "SVMs are not trained by gradients: train model=cfm with its softmax, then run"
                " tools/fit_svm.py checkpoint=... to fit them"
            )
        assert samples.masks is not None
        margins = self(features, samples.boxes, samples.image_index, samples.masks)
        classes = torch.arange(self.num_classes, device=margins.device)
        signs = torch.where(samples.labels[:, None] == classes, 1.0, -1.0)
        is_fitted = self.scores.weight.any(dim=1)
        hinge = (1 - signs * margins).clamp(min=0)[:, is_fitted]
        return {"segment_class": hinge.square().sum() / mean_count(len(samples), margins)}
