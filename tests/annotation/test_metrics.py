"""The measures of proposed masks against literals, torchmetrics and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryJaccardIndex

from maskseg.annotation.metrics import (
    ANY_SIZE,
    COLUMNS,
    AnnotationScores,
    agreement,
    annotation_table,
    class_lines,
)


def test_counts() -> None:
    found = np.array([[1, 1, 0], [0, 0, 1]], dtype=bool)
    truth = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    assert agreement(found, truth) == (2, 1, 1, 2)
    assert agreement(~truth, truth) == (0, 3, 3, 0)
    with pytest.raises(ValueError, match="cannot be compared"):
        agreement(found, truth[:1])


def test_the_means_by_hand() -> None:
    scores = AnnotationScores(3, min_area=5)
    scores.add(0, (6, 2, 2, 90))  # IoU 0.6
    scores.add(0, (1, 0, 1, 98))  # small: pooled alone
    scores.add(2, (20, 0, 0, 80))
    scores.add(2, (0, 0, 10, 90))
    found = scores.compute()
    iou = (7 / 12, 20 / 30)
    accuracy = (195 / 200, 190 / 200)
    assert found["mIoU"] == pytest.approx(np.mean(iou))
    assert found["mean_accuracy"] == pytest.approx(np.mean(accuracy))
    assert found["frequency_weighted_IoU"] == pytest.approx((10 * iou[0] + 30 * iou[1]) / 40)
    assert found["object_IoU"] == pytest.approx((0.6 + 1 + 0) / 3)
    assert found["class_object_IoU"] == pytest.approx((0.6 + 0.5) / 2)
    assert found[ANY_SIZE] == pytest.approx((0.6 + 0.5 + 1 + 0) / 4)
    first, none, third = scores.per_class()
    assert first == pytest.approx(
        {
            "label": 0,
            "iou": iou[0],
            "accuracy": accuracy[0],
            "object_iou": 0.6,
            "objects": 1,
            "true_pixels": 10,
        }
    )
    assert none == {
        "label": 1,
        "iou": -1,
        "accuracy": -1,
        "object_iou": -1,
        "objects": 0,
        "true_pixels": 0,
    }
    assert third["objects"] == 2


def test_nothing_and_nothing_true() -> None:
    assert set(AnnotationScores(4).compute().values()) == {-1.0}
    scores = AnnotationScores(1)
    scores.add(0, (0, 9, 0, 91))
    found = scores.compute()
    assert (
        found["mIoU"],
        found["frequency_weighted_IoU"],
        found["object_IoU"],
        found[ANY_SIZE],
    ) == (0, -1, -1, -1)
    assert np.isfinite(list(found.values())).all()


def test_pooled_iou_is_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    scores, other = AnnotationScores(1), BinaryJaccardIndex()
    for height in (5, 30, 41):
        found, truth = rng.random((2, height, 20)) < 0.4
        scores.add(0, agreement(found, truth))
        other.update(torch.from_numpy(found), torch.from_numpy(truth))
    assert scores.compute()["mIoU"] == pytest.approx(float(other.compute()))


def test_the_table_says_what_is_lacking() -> None:
    scores = AnnotationScores(2)
    scores.add(1, (2000, 0, 0, 5))
    text = annotation_table({"grabcut": scores.compute(), "cam": "needs weights"})
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["grabcut", *["1.000"] * 5],
        ["cam", "needs", "weights"],
    ]
    assert all(meaning in text for meaning in COLUMNS.values())
    lines = class_lines(["dog", "cat"], scores.per_class()).splitlines()
    assert [line.split() for line in lines] == [
        ["class", "IoU", "accuracy", "objects", "number"],
        ["cat", *["1.000"] * 3, "1"],
    ]
