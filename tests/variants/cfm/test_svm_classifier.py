"""`CFMSvm`: its features, detections, validation losses, and the refusal of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.data.collate import concatenate_regions, segment_regions
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.structures import Features, FeatureSpec, Regions, Samples, Targets
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.settings import MLPSettings
from maskseg.variants.cfm.svm import OneVsRestSVM
from maskseg.variants.cfm.svm_classifier import CFMSvm

CLASSES = 3
LEVELS = {"p2": FeatureSpec(4, 0.5, 5)}
KEYS: dict[str, Any] = {
    "levels": ["p2"],
    "feature_specs": LEVELS,
    "num_classes": CLASSES,
    "mlp": MLPSettings(width=8),
}
NONE = torch.zeros(0, dtype=torch.int64)
TARGETS = Targets(torch.zeros(0, 4), NONE, NONE, NONE.bool())
SIZES = torch.tensor([[32, 32], [32, 32]])


def regions(count: int, image: int = 0) -> Regions:
    """Random sets of the 8 x 8-pixel squares of a 32 x 32 image."""
    labels = (np.arange(32)[:, None] // 8 * 4 + np.arange(32) // 8).astype(np.int32)
    members = np.random.default_rng(image).random((count, 16)) < 0.3
    members[:, image] = True
    return segment_regions(SegmentProposals(labels, members), image)


def maps() -> Features:
    return {"p2": torch.randn((2, 5, 8, 8), generator=torch.Generator().manual_seed(3))}


def vectors_of(model: CFMClassifier, segments: Regions) -> Tensor:
    assert segments.masks is not None
    with torch.no_grad():
        return model.compute_vectors(maps(), segments.boxes, segments.image_index, segments.masks)


def samples_of(segments: Regions, labels: Tensor) -> Samples:
    return Samples(
        segments.boxes,
        segments.image_index,
        labels,
        torch.zeros_like(labels),
        CLASSES,
        TARGETS,
        NONE,
        segments.masks,
    )


def margins_are(model: CFMSvm, segments: Regions, expected: Tensor) -> None:
    """Set the weights so that segments have these margins [R, K].

    R is at most the number of features.
    """
    vectors = vectors_of(model, segments)
    with torch.no_grad():
        model.scores.weight.copy_(
            torch.linalg.lstsq(vectors.double(), expected.double()).solution.T
        )
        model.scores.bias.zero_()
        torch.testing.assert_close(model.scores(vectors), expected, atol=1e-4, rtol=1e-4)


def test_features_are_those_of_the_softmax_model() -> None:
    softmax = CFMClassifier(**KEYS)
    model = CFMSvm(**KEYS)
    segments = regions(6)
    model.layers.load_state_dict(softmax.layers.state_dict())
    assert torch.equal(vectors_of(softmax, segments), vectors_of(model, segments))
    assert model.scores.weight.shape == (CLASSES, softmax.scores.in_features)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_before_a_fit_nothing_is_found(threshold: float) -> None:
    segments = CFMSvm(**KEYS, score_threshold=threshold).predict(
        maps(), concatenate_regions([regions(6), regions(4, 1)]), SIZES
    )
    assert len(segments) == 0
    assert segments.labels is not None


def test_a_segment_has_each_class_above_the_threshold() -> None:
    torch.manual_seed(0)
    model = CFMSvm(**KEYS, score_threshold=0.5, nms_threshold=1.0)
    segments = regions(4)
    expected = torch.tensor(
        [[1.0, 2.0, -1.0], [-3.0, -0.1, -2.0], [0.1, -1.0, 3.0], [-1.0, -1.0, 0.5]]
    )
    margins_are(model, segments, expected)
    detections = model.predict(maps(), segments, SIZES[:1])
    assert detections.labels is not None
    assert detections.labels.tolist() == [2, 1, 0, 2, 0]  # of margins 3, 2, 1, 0.5 and 0.1
    torch.testing.assert_close(
        detections.scores, torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]).sigmoid(), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(detections.boxes, segments.boxes[[2, 0, 0, 3, 2]])
    model.score_threshold = 0.27  # a margin of -1 is a score of 0.269
    detections = model.predict(maps(), segments, SIZES[:1])
    assert len(detections) == 6
    assert detections.scores[-1].item() == pytest.approx(
        torch.tensor(-0.1).sigmoid().item(), abs=1e-4
    )


def test_suppression_is_that_of_the_softmax_model() -> None:
    torch.manual_seed(0)
    model = CFMSvm(**KEYS, nms_threshold=0.3)
    segments = regions(1)
    twice = concatenate_regions([segments, regions(1, 1)])[torch.tensor([0, 0, 1])]
    with torch.no_grad():
        model.scores.bias.copy_(torch.tensor([0.0, 1.0, -5.0]))
    detections = model.predict(maps(), twice, SIZES)
    assert detections.labels is not None
    assert detections.image_index.tolist() == [0, 0, 1, 1]
    assert detections.labels.tolist() == [1, 0, 1, 0]


def test_fitted_classes_are_detected() -> None:
    torch.manual_seed(0)
    model = CFMSvm(**KEYS, score_threshold=0.5, nms_threshold=1.0)
    segments = concatenate_regions([regions(6), regions(6, 1)])
    labels = torch.arange(12) % (CLASSES + 1)
    fitter = OneVsRestSVM(model.scores, cost=1e4)
    fitter.update(vectors_of(model, segments), labels)
    fitter.fit()
    assert fitter.result is not None
    assert fitter.result.error == [0.0] * CLASSES
    detections = model.predict(maps(), segments, SIZES)
    assert detections.labels is not None
    expected = [
        (row.tolist(), int(label))
        for row, label in zip(segments.boxes, labels, strict=True)
        if label < CLASSES
    ]
    assert sorted(
        (row.tolist(), int(label))
        for row, label in zip(detections.boxes, detections.labels, strict=True)
    ) == sorted(expected)


def test_the_loss_of_a_validation_is_the_hinge() -> None:
    torch.manual_seed(0)
    model = CFMSvm(**KEYS)
    segments = regions(3)
    margins_are(
        model, segments, torch.tensor([[2.0, 0.5, -2.0], [-2.0, -2.0, 0.0], [-1.0, 0.0, -3.0]])
    )
    samples = samples_of(segments, torch.tensor([0, 1, CLASSES]))
    with torch.no_grad():
        (loss,) = model.losses(maps(), samples).values()
        assert float(loss) == pytest.approx((1.5**2 + 3.0**2 + 1.0**2 + 1.0**2) / 3, rel=1e-3)
        model.scores.weight[1] = 0  # as for a class without positives
        model.scores.bias[1] = -1000
        assert float(model.losses(maps(), samples)["segment_class"]) == pytest.approx(
            1.0**2 / 3, rel=1e-3
        )
        nothing = model.losses(maps(), samples_of(segments[NONE], NONE))
    assert float(nothing["segment_class"]) == 0


def test_training_raises() -> None:
    with pytest.raises(
        UserError,
        match=r"not trained by gradients: .* tools/fit_svm\.py checkpoint=\.\.\. to fit them",
    ):
        CFMSvm(**KEYS).losses(maps(), samples_of(regions(3), torch.tensor([0, 1, 2])))
