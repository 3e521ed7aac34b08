"""Metrics of proposed masks against literals and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryJaccardIndex

from maskseg.annotation.metrics import (
    COLUMNS,
    OBJECT_IOU_ANY_SIZE,
    AnnotationScores,
    annotation_table,
    class_lines,
    confusion_counts,
)


def test_counts() -> None:
    proposed = np.array([[1, 1, 0], [0, 0, 1]], dtype=bool)
    truth = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    assert confusion_counts(proposed, truth) == (2, 1, 1, 2)
    assert confusion_counts(~truth, truth) == (0, 3, 3, 0)
    with pytest.raises(ValueError, match="cannot be compared"):
        confusion_counts(proposed, truth[:1])


def test_the_means_by_hand() -> None:
    scores = AnnotationScores(3, min_area=5)
    scores.add(0, (6, 2, 2, 90))  # IoU 0.6
    scores.add(0, (1, 0, 1, 98))  # small: counts for the pooled metrics only
    scores.add(2, (20, 0, 0, 80))
    scores.add(2, (0, 0, 10, 90))
    means = scores.compute()
    iou = (7 / 12, 20 / 30)
    accuracy = (195 / 200, 190 / 200)
    assert means["mIoU"] == pytest.approx(np.mean(iou))
    assert means["mean_accuracy"] == pytest.approx(np.mean(accuracy))
    assert means["frequency_weighted_IoU"] == pytest.approx((10 * iou[0] + 30 * iou[1]) / 40)
    assert means["object_IoU"] == pytest.approx((0.6 + 1 + 0) / 3)
    assert means["class_object_IoU"] == pytest.approx((0.6 + 0.5) / 2)
    assert means[OBJECT_IOU_ANY_SIZE] == pytest.approx((0.6 + 0.5 + 1 + 0) / 4)
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


def test_without_masks_and_without_ground_truth() -> None:
    assert set(AnnotationScores(4).compute().values()) == {-1.0}
    scores = AnnotationScores(1)
    scores.add(0, (0, 9, 0, 91))
    means = scores.compute()
    assert (
        means["mIoU"],
        means["frequency_weighted_IoU"],
        means["object_IoU"],
        means[OBJECT_IOU_ANY_SIZE],
    ) == (0, -1, -1, -1)
    assert np.isfinite(list(means.values())).all()


def test_pooled_iou_is_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    scores, other = AnnotationScores(1), BinaryJaccardIndex()
    for height in (5, 30, 41):
        proposed, truth = rng.random((2, height, 20)) < 0.4
        scores.add(0, confusion_counts(proposed, truth))
        other.update(torch.from_numpy(proposed), torch.from_numpy(truth))
    assert scores.compute()["mIoU"] == pytest.approx(float(other.compute()))


def test_the_table_names_missing_weights() -> None:
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
