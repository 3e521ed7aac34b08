"""Segmentation IoU: literals, brute force, merged processes, and the benchmark suite."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from maskseg.benchmarks.report import table
from maskseg.benchmarks.segmentation_iou import segmentation_iou
from maskseg.evaluation.segmentation_iou import SegmentationIoU, best_ious


def brute_force_ious(segments: np.ndarray, truth: np.ndarray) -> tuple[list[float], list[int]]:
    labelled = truth >= 0
    best = []
    areas = []
    for number in sorted(set(truth[labelled].tolist())):
        mask = truth == number
        ious = []
        for other in set(segments[labelled].tolist()):
            other_mask = (segments == other) & labelled
            ious.append((mask & other_mask).sum() / (mask | other_mask).sum())
        best.append(float(max(ious)))
        areas.append(int(mask.sum()))
    return best, areas


def test_best_ious_literal() -> None:
    truth = np.array([[0, 0, 0, 5, 5, -1], [0, 0, 0, 5, 5, -1]])
    segments = np.array([[7, 7, 2, 2, 2, 2], [7, 7, 2, 2, 2, 9]])
    iou, areas = best_ious(segments, truth)
    # Two pixels of segment 2 are unlabeled and do not count.
    assert iou.tolist() == [4 / 6, 4 / 6]
    assert areas.tolist() == [6, 4]
    assert (iou.dtype, areas.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("limit", [2, 9, 60, 10**6, 2**62])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_best_ious_equal_brute_force(limit: int, dtype: type) -> None:
    rng = np.random.default_rng(0)
    limit = min(limit, int(np.iinfo(dtype).max))
    for height, width in ((1, 1), (1, 30), (13, 17)):
        choices = rng.integers(0, limit, 12)  # few labels with gaps, in blocks of several pixels
        segments = np.kron(
            rng.choice(choices, (height, width)), np.ones((2, 3), dtype=np.int64)
        ).astype(dtype)
        truth = (
            np.kron(rng.choice(choices, (width, height)), np.ones((2, 3), dtype=np.int64))
            .reshape(segments.shape)
            .astype(dtype)
        )
        if np.issubdtype(dtype, np.signedinteger):
            truth[rng.random(truth.shape) < 0.3] = -rng.integers(1, 4)
        iou, areas = best_ious(segments, truth)
        expected, pixels = brute_force_ious(segments, truth)
        assert iou.tolist() == pytest.approx(expected, abs=1e-15)
        assert areas.tolist() == pixels


def test_one_segment_per_pixel() -> None:
    pixels = np.arange(200 * 300).reshape(200, 300)  # too many pairs for a table
    iou, areas = best_ious(pixels, pixels[::-1])
    assert iou.tolist() == areas.tolist() == [1.0] * 60000


def test_no_labelled_pixel() -> None:
    for shape in ((3, 4), (0, 0)):
        iou, areas = best_ious(np.zeros(shape, dtype=np.int32), np.full(shape, -1, dtype=np.int32))
        assert (iou.shape, areas.shape) == ((0,), (0,))


def test_invalid_maps() -> None:
    zeros = np.zeros((3, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        best_ious(zeros, zeros.T)
    with pytest.raises(ValueError, match="labels of segments must be at least 0, got -1"):
        best_ious(zeros - 1, zeros)
    with pytest.raises(ValueError, match="truth must be integers, not float64"):
        best_ious(zeros, zeros * 0.5)


def test_means_literal() -> None:
    # One image with two annotators, one with a single segment, one without labels.
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    metric = SegmentationIoU()
    metric.add(
        segments,
        [
            np.array([[0, 0, 1, 1, 1, 1, 1, 1]]),
            np.array([[0, 0, 0, 0, 1, 1, 1, 1]]),
            np.full((1, 8), -1),
        ],
    )
    metric.add(segments, [np.array([[3, 3, 3, 3, -1, -1, -1, -1]])])
    metric.add(segments, [np.full((1, 8), -1)])
    metric.add(segments, [])
    means = metric.compute()
    first = (1 + 1) / 2
    second = (1 / 2 + 4 / 6) / 2
    assert means == pytest.approx(
        {
            "segments": (1 + 1 + 1 / 2 + 4 / 6 + 1 / 2) / 5,
            "images": ((first + second) / 2 + 1 / 2) / 2,
            "best_annotator": (first + 1 / 2) / 2,
            "covering": ((1 + (4 * 1 / 2 + 4 * 4 / 6) / 8) / 2 + 1 / 2) / 2,
            "num_segments": 2.0,
            "images_counted": 2.0,
        },
        abs=1e-15,
    )


def test_covering_weights_by_area() -> None:
    metric = SegmentationIoU()
    metric.add(np.array([[0, 1, 2, 2, 2, 2, 2, 2]]), [np.array([[0, 0, 1, 1, 1, 1, 1, 1]])])
    means = metric.compute()
    assert means["images"] == (0.5 + 1.0) / 2
    assert means["covering"] == (2 * 0.5 + 6 * 1.0) / 8
    assert means["num_segments"] == 3.0


def test_no_image() -> None:
    assert set(SegmentationIoU().compute().values()) == {0.0}
    assert list(SegmentationIoU().compute()) == [
        "segments",
        "images",
        "best_annotator",
        "covering",
        "num_segments",
        "images_counted",
    ]


def test_merging_in_any_order_is_bit_identical() -> None:
    rng = np.random.default_rng(0)
    images = [
        (rng.integers(0, 40, (20, 30)), [rng.integers(-1, 9, (20, 30)) for _ in range(3)])
        for _ in range(30)
    ]
    alone = SegmentationIoU()
    for image in images:
        alone.add(*image)
    for seed in range(5):
        random.Random(seed).shuffle(images)
        parts = [SegmentationIoU() for _ in range(4)]
        for i, image in enumerate(images):
            parts[i % 3].add(*image)  # the last part stays empty
        merged = SegmentationIoU()
        for part in parts:
            merged.merge(part.state())
        assert merged.compute() == alone.compute()


def test_benchmark_suite_compares_with_brute_force() -> None:
    report = segmentation_iou(
        SimpleNamespace(rounds=1), counts=(12, 30), true=5, height=40, width=60
    )
    assert [list(case["seconds"]) for case in report["cases"]] == [["pair by pair", "maskseg"]] * 2
    assert all(case["agreement"]["largest difference"] < 1e-15 for case in report["cases"])
    assert "30 segments, 5 true ones, 60 x 40" in table(report)
