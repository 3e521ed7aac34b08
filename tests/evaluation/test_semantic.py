"""Semantic metrics: literals, brute force, torchmetrics, merged processes, and the table."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from maskseg.evaluation.semantic import SemanticConfusion

MEANS = ["mIoU", "frequency_weighted_IoU", "pixel_accuracy", "mean_accuracy"]


def maps(seed, classes, shape=(24, 31), min_label=-1):
    """A prediction and a ground truth that often agree; labels min_label..classes-1."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(min_label, classes, shape)
    return np.where(rng.random(shape) < 0.6, truth, rng.integers(min_label, classes, shape)), truth


def accumulate(classes, *pairs):
    confusion = SemanticConfusion(classes)
    for predicted, truth in pairs:
        confusion.add(predicted, truth)
    return confusion


def test_literal():
    truth = np.array([[0, 0, 0, 0, 1], [1, 1, 2, -1, -1]])
    predicted = np.array([[0, 0, 0, 1, 1], [1, -1, 0, 2, -1]])
    confusion = accumulate(3, (predicted, truth))
    assert confusion.matrix.tolist() == [[3, 1, 0, 0], [0, 2, 0, 1], [1, 0, 0, 0]]
    assert confusion.compute(num_things=1) == pytest.approx(
        {
            "mIoU": (3 / 5 + 2 / 4 + 0) / 3,
            "mIoU_things": 3 / 5,
            "mIoU_stuff": (2 / 4 + 0) / 2,
            "frequency_weighted_IoU": (4 * 3 / 5 + 3 * 2 / 4 + 0) / 8,
            "pixel_accuracy": 5 / 8,
            "mean_accuracy": (3 / 4 + 2 / 3 + 0) / 3,
        },
        abs=1e-15,
    )
    assert confusion.per_class() == [
        {"label": 0, "iou": 3 / 5, "accuracy": 3 / 4, "pixels": 4, "predicted_pixels": 4},
        {"label": 1, "iou": 2 / 4, "accuracy": 2 / 3, "pixels": 3, "predicted_pixels": 3},
        {"label": 2, "iou": 0, "accuracy": 0, "pixels": 1, "predicted_pixels": 0},
    ]


def test_no_class_is_a_miss_and_no_false_positive():
    confusion = accumulate(2, (np.array([[-1, -1, 0, 1]]), np.array([[0, 1, 0, 1]])))
    assert [row["iou"] for row in confusion.per_class()] == [0.5, 0.5]
    assert [row["predicted_pixels"] for row in confusion.per_class()] == [1, 1]
    assert confusion.compute() == dict.fromkeys(MEANS, 0.5)


def test_classes_that_do_not_occur():
    # 0 and 1 are in both maps, 2 is only predicted, 3 occurs nowhere, 4 is only predicted at
    # unlabeled pixels.
    confusion = accumulate(5, (np.array([[0, 1, 2, 1, 4]]), np.array([[0, 1, 1, 1, -1]])))
    means = confusion.compute()
    assert means["mIoU"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert means["mean_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert means["frequency_weighted_IoU"] == pytest.approx((1 + 3 * 2 / 3) / 4)
    assert [(row["iou"], row["accuracy"]) for row in confusion.per_class()[2:]] == [
        (0, -1),
        (-1, -1),
        (-1, -1),
    ]


@pytest.mark.parametrize("classes", [1, 2, 7, 200])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
def test_matrix_equals_a_loop(classes, dtype):
    predicted, truth = maps(classes, min(classes, np.iinfo(dtype).max + 1))
    expected = np.zeros((classes, classes + 1), dtype=np.int64)
    for predicted_label, true in zip(
        predicted.ravel().tolist(), truth.ravel().tolist(), strict=True
    ):
        if true >= 0:
            expected[true, predicted_label] += 1  # -1 is the last column
    pair = predicted.astype(dtype), truth.astype(dtype)
    np.testing.assert_array_equal(accumulate(classes, pair).matrix, expected)
    np.testing.assert_array_equal(
        accumulate(classes, tuple(torch.from_numpy(m) for m in pair)).matrix, expected
    )


def test_unsigned_maps():
    confusion = accumulate(256, (np.full((2, 3), 255, np.uint8), np.full((2, 3), 255, np.uint16)))
    assert confusion.matrix[255, 255] == 6
    assert confusion.matrix.sum() == 6


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_means_equal_torchmetrics(classes):
    metrics = pytest.importorskip("torchmetrics.classification")
    pairs = [maps(seed, classes) for seed in range(3)]
    # torchmetrics does not support pixels without a class.
    pairs = [(np.where(predicted < 0, 0, predicted), truth) for predicted, truth in pairs]

    def theirs(metric, **keys):
        metric = metric(num_classes=classes, ignore_index=-1, **keys)
        for predicted, truth in pairs:
            metric.update(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
        return metric.compute().tolist()

    jaccard = metrics.MulticlassJaccardIndex
    accuracy = metrics.MulticlassAccuracy
    confusion = accumulate(classes, *pairs)
    means = confusion.compute()
    rows = confusion.per_class()
    assert all(row["pixels"] for row in rows)
    assert means["mIoU"] == pytest.approx(theirs(jaccard, average="macro"), abs=1e-6)
    assert means["frequency_weighted_IoU"] == pytest.approx(
        theirs(jaccard, average="weighted"), abs=1e-6
    )
    assert means["pixel_accuracy"] == pytest.approx(theirs(accuracy, average="micro"), abs=1e-6)
    assert means["mean_accuracy"] == pytest.approx(theirs(accuracy, average="macro"), abs=1e-6)
    # The micro IoU: correct pixels over the union of both maps.
    assert means["pixel_accuracy"] / (2 - means["pixel_accuracy"]) == pytest.approx(
        theirs(jaccard, average="micro"), abs=1e-6
    )
    assert [row["iou"] for row in rows] == pytest.approx(theirs(jaccard, average="none"), abs=1e-6)
    assert [row["accuracy"] for row in rows] == pytest.approx(
        theirs(accuracy, average="none"), abs=1e-6
    )


def test_pixels_without_a_class_equal_another_class_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.classification")
    predicted, truth = maps(0, 6)
    theirs = metrics.MulticlassJaccardIndex(num_classes=7, ignore_index=-1, average="none")
    theirs.update(
        *(torch.from_numpy(m)[None] for m in (np.where(predicted < 0, 6, predicted), truth))
    )
    rows = accumulate(6, (predicted, truth)).per_class()
    assert (predicted[truth >= 0] < 0).any()
    assert [row["iou"] for row in rows] == pytest.approx(theirs.compute()[:6].tolist(), abs=1e-6)


def test_one_image_equals_mean_iou_of_torchmetrics():
    """MeanIoU averages over images, so that it equals mIoU for one image."""
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    predicted, truth = maps(1, 5, min_label=0)
    theirs = segmentation.MeanIoU(num_classes=5, input_format="index")
    theirs.update(torch.from_numpy(predicted)[None], torch.from_numpy(truth)[None])
    assert accumulate(5, (predicted, truth)).compute()["mIoU"] == pytest.approx(
        theirs.compute().item(), abs=1e-6
    )


def test_accuracy_of_torchmetrics_counts_classes_that_are_only_predicted():
    metrics = pytest.importorskip("torchmetrics.classification")
    predicted, truth = np.array([[0, 1, 2, 1]]), np.array([[0, 1, 1, 1]])
    theirs = metrics.MulticlassAccuracy(num_classes=3, average="macro")(
        torch.from_numpy(predicted), torch.from_numpy(truth)
    )
    assert theirs.item() == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert accumulate(3, (predicted, truth)).compute()["mean_accuracy"] == pytest.approx(
        (1 + 2 / 3) / 2
    )


def test_merging_in_any_order():
    pairs = [maps(seed, 9) for seed in range(12)]
    parts = [accumulate(9, *pairs[i::3]) for i in (2, 0, 1)]
    parts.append(SemanticConfusion(9))  # without images
    merged = SemanticConfusion(9)
    for part in parts:
        merged.merge(json.loads(json.dumps(part.state())))
    assert merged.state() == accumulate(9, *pairs).state()
    assert merged.compute(4) == accumulate(9, *pairs).compute(4)


def test_counts_are_exact_beyond_the_precision_of_floats():
    merged = SemanticConfusion(1)
    merged.merge([[2**53, 0]])
    merged.add(np.zeros((1, 1), int), np.zeros((1, 1), int))
    assert merged.state() == [[2**53 + 1, 0]]


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(np.zeros((0, 4), int), np.zeros((0, 4), int))],
        [(np.ones((2, 2), int), np.full((2, 2), -1))],
    ],
)
def test_without_a_labelled_pixel(pairs):
    confusion = accumulate(2, *pairs)
    assert confusion.compute() == dict.fromkeys(MEANS, 0.0)
    assert set(confusion.compute(1).values()) == {0.0}
    assert [(row["iou"], row["accuracy"], row["pixels"]) for row in confusion.per_class()] == [
        (-1, -1, 0)
    ] * 2
    assert "cat                  -         -      0.00      0.00" in confusion.table(["cat", "dog"])


def test_invalid_arguments():
    confusion = SemanticConfusion(3)
    zeros = np.zeros((2, 2), dtype=int)
    with pytest.raises(
        ValueError, match=r"\(2, 3\) cannot be compared with true ones of shape \(2, 2\)"
    ):
        confusion.add(np.zeros((2, 3), dtype=int), zeros)
    with pytest.raises(ValueError, match="true labels must be integers, not float64"):
        confusion.add(zeros, zeros.astype(float))
    with pytest.raises(ValueError, match=r"predicted labels must be in -1..2, got 0 to 3"):
        confusion.add(np.array([[0, 3], [1, 1]]), zeros)
    with pytest.raises(ValueError, match="got -2 to 0"):
        confusion.add(zeros, np.array([[0, -2], [0, 0]]))
    assert confusion.matrix.sum() == 0
    with pytest.raises(
        ValueError, match=r"3 classes cannot be merged with a matrix of shape \(2, 3\)"
    ):
        confusion.merge(SemanticConfusion(2).state())
    with pytest.raises(ValueError, match="3 classes need as many names, got 1"):
        confusion.table(["cat"])
    with pytest.raises(ValueError, match="at least one"):
        SemanticConfusion(0)


def test_table_literal():
    truth = np.array([[0, 0, 0, 0, 1], [1, 1, 2, -1, -1]])
    predicted = np.array([[0, 0, 0, 1, 1], [1, -1, 0, 2, -1]])
    confusion = accumulate(4, (predicted, truth))
    assert confusion.table(
        ["cat", "dog", "sky", "a name that is longer than others"], num_things=2
    ).splitlines() == [
        "mIoU                   mean over classes    0.367",
        "mIoU_things            of the things        0.550",
        "mIoU_stuff             of the stuff         0.000",
        "frequency_weighted_IoU by true pixels       0.487",
        "pixel_accuracy         share of pixels      0.625",
        "mean_accuracy          mean over classes    0.472",
        "",
        "things                         IoU  accuracy    true %   pred. %",
        "cat                          0.600     0.750     50.00     50.00",
        "dog                          0.500     0.667     37.50     37.50",
        "",
        "stuff                          IoU  accuracy    true %   pred. %",
        "sky                          0.000     0.000     12.50      0.00",
        "a name that is longer t…         -         -      0.00      0.00",
    ]
    lines = confusion.table(["cat", "dog", "sky", "sea"]).splitlines()
    assert [line.split()[0] for line in lines if line] == [
        *MEANS,
        "class",
        "cat",
        "dog",
        "sky",
        "sea",
    ]
    heads = [
        line.split()[0]
        for line in confusion.table(["cat", "dog", "sky", "sea"], num_things=4).splitlines()
        if line.endswith("pred. %")
    ]
    assert heads == ["things"]


def test_table_columns():
    confusion = SemanticConfusion(40)
    names = [f"class {i}" for i in range(40)]
    tables = {
        width: confusion.table(names, width=width).splitlines()[5:] for width in (60, 110, 170)
    }
    assert {width: len(lines) for width, lines in tables.items()} == {60: 41, 110: 21, 170: 15}
    assert all(len(line) <= width for width, lines in tables.items() for line in lines)
    assert [part.split("  ")[0].strip() for part in tables[110][1].split("class")[1:]] == [
        "0",
        "20",
    ]
    assert tables[170][-1].split("class")[1].split()[0] == "13"  # the last block is not full
