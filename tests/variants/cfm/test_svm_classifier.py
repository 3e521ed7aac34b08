"""SVMs on masked features: whose features they are, which segments are found, losses of a validation, no training."""

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
from maskseg.variants.cfm.svm import OneVsRestSVM
from maskseg.variants.cfm.svm_classifier import CFMSvm

CLASSES = 3
LEVELS = {"p2": FeatureSpec(4, 0.5, 5)}
KEYS: dict[str, Any] = {"levels": ["p2"], "at": LEVELS, "num_classes": CLASSES, "width": 8}
NONE = torch.zeros(0, dtype=torch.int64)
TARGETS = Targets(torch.zeros(0, 4), NONE, NONE, NONE.bool())
SIZES = torch.tensor([[32, 32], [32, 32]])


def regions(count: int, image: int = 0) -> Regions:
    """Sets of the 8 x 8-pixel squares of a 32 x 32 image."""
    labels = (np.arange(32)[:, None] // 8 * 4 + np.arange(32) // 8).astype(np.int32)
    members = np.random.default_rng(image).random((count, 16)) < 0.3
    members[:, image] = True
    return segment_regions(SegmentProposals(labels, members), image)


def maps() -> Features:
    return {"p2": torch.randn((2, 5, 8, 8), generator=torch.Generator().manual_seed(3))}


def vectors_of(model: CFMClassifier, found: Regions) -> Tensor:
    assert found.masks is not None
    with torch.no_grad():
        return model.vectors(maps(), found.boxes, found.image_index, found.masks)


def samples_of(found: Regions, labels: Tensor) -> Samples:
    return Samples(
        found.boxes,
        found.image_index,
        labels,
        torch.zeros_like(labels),
        CLASSES,
        TARGETS,
        NONE,
        found.masks,
    )


def margins_are(model: CFMSvm, found: Regions, wanted: Tensor) -> None:
    """Weights with which segments have the margins [R, K], R at most as many as features."""
    vectors = vectors_of(model, found)
    with torch.no_grad():
        model.scores.weight.copy_(torch.linalg.lstsq(vectors.double(), wanted.double()).solution.T)
        model.scores.bias.zero_()
        torch.testing.assert_close(model.scores(vectors), wanted, atol=1e-4, rtol=1e-4)


def test_features_are_those_of_the_softmax_model() -> None:
    softmax, model, found = CFMClassifier(**KEYS), CFMSvm(**KEYS), regions(6)
    model.layers.load_state_dict(softmax.layers.state_dict())
    assert torch.equal(vectors_of(softmax, found), vectors_of(model, found))
    assert model.scores.weight.shape == (CLASSES, softmax.scores.in_features)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_before_a_fit_nothing_is_found(threshold: float) -> None:
    found = CFMSvm(**KEYS, score_threshold=threshold).predict(
        maps(), concatenate_regions([regions(6), regions(4, 1)]), SIZES
    )
    assert len(found) == 0
    assert found.labels is not None


def test_a_segment_is_each_class_above_the_threshold() -> None:
    torch.manual_seed(0)
    model, found = CFMSvm(**KEYS, score_threshold=0.5, nms_threshold=1.0), regions(4)
    wanted = torch.tensor(
        [[1.0, 2.0, -1.0], [-3.0, -0.1, -2.0], [0.1, -1.0, 3.0], [-1.0, -1.0, 0.5]]
    )
    margins_are(model, found, wanted)
    kept = model.predict(maps(), found, SIZES[:1])
    assert kept.labels is not None
    assert kept.labels.tolist() == [2, 1, 0, 2, 0]  # of margins 3, 2, 1, 0.5 and 0.1
    torch.testing.assert_close(
        kept.scores, torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]).sigmoid(), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(kept.boxes, found.boxes[[2, 0, 0, 3, 2]])
    model.score_threshold = 0.27  # a margin of -1 is a score of 0.269
    kept = model.predict(maps(), found, SIZES[:1])
    assert len(kept) == 6
    assert kept.scores[-1].item() == pytest.approx(torch.tensor(-0.1).sigmoid().item(), abs=1e-4)


def test_suppression_is_that_of_the_softmax_model() -> None:
    torch.manual_seed(0)
    model, found = CFMSvm(**KEYS, nms_threshold=0.3), regions(1)
    twice = concatenate_regions([found, regions(1, 1)])[torch.tensor([0, 0, 1])]
    with torch.no_grad():
        model.scores.bias.copy_(torch.tensor([0.0, 1.0, -5.0]))
    kept = model.predict(maps(), twice, SIZES)
    assert kept.labels is not None
    assert kept.image_index.tolist() == [0, 0, 1, 1]
    assert kept.labels.tolist() == [1, 0, 1, 0]


def test_what_is_fitted_is_found() -> None:
    torch.manual_seed(0)
    model, found = (
        CFMSvm(**KEYS, score_threshold=0.5, nms_threshold=1.0),
        concatenate_regions([regions(6), regions(6, 1)]),
    )
    labels = torch.arange(12) % (CLASSES + 1)
    fitter = OneVsRestSVM(model.scores, cost=1e4)
    fitter.update(vectors_of(model, found), labels)
    fitter.fit()
    assert fitter.result is not None
    assert fitter.result.error == [0.0] * CLASSES
    kept = model.predict(maps(), found, SIZES)
    assert kept.labels is not None
    own = [
        (row.tolist(), int(label))
        for row, label in zip(found.boxes, labels, strict=True)
        if label < CLASSES
    ]
    assert sorted(
        (row.tolist(), int(label)) for row, label in zip(kept.boxes, kept.labels, strict=True)
    ) == sorted(own)


def test_the_loss_of_a_validation_is_the_hinge() -> None:
    torch.manual_seed(0)
    model, found = CFMSvm(**KEYS), regions(3)
    margins_are(
        model, found, torch.tensor([[2.0, 0.5, -2.0], [-2.0, -2.0, 0.0], [-1.0, 0.0, -3.0]])
    )
    samples = samples_of(found, torch.tensor([0, 1, CLASSES]))
    with torch.no_grad():
        (loss,) = model.losses(maps(), samples).values()
        assert float(loss) == pytest.approx((1.5**2 + 3.0**2 + 1.0**2 + 1.0**2) / 3, rel=1e-3)
        model.scores.weight[1] = 0  # as of a class without positives
        model.scores.bias[1] = -1000
        assert float(model.losses(maps(), samples)["segment_class"]) == pytest.approx(
            1.0**2 / 3, rel=1e-3
        )
        nothing = model.losses(maps(), samples_of(found[NONE], NONE))
    assert float(nothing["segment_class"]) == 0


def test_no_training() -> None:
    with pytest.raises(
        UserError,
        match=r"not trained by gradients: .* tools/fit_svm\.py checkpoint=\.\.\. fits them",
    ):
        CFMSvm(**KEYS).losses(maps(), samples_of(regions(3), torch.tensor([0, 1, 2])))
