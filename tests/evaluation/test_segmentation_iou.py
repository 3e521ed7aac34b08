"""The best IoU of each segment of the truth: literals, brute force, joined processes, and the suite beside brute force."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from maskseg.benchmarks.report import table
from maskseg.benchmarks.segmentation_iou import segmentation_iou
from maskseg.evaluation.segmentation_iou import SegmentationIoU, best_ious


def by_brute_force(segments: np.ndarray, truth: np.ndarray) -> tuple[list[float], list[int]]:
    labelled = truth >= 0
    best, areas = [], []
    for number in sorted(set(truth[labelled].tolist())):
        mask = truth == number
        ious = []
        for other in set(segments[labelled].tolist()):
            found = (segments == other) & labelled
            ious.append((mask & found).sum() / (mask | found).sum())
        best.append(float(max(ious)))
        areas.append(int(mask.sum()))
    return best, areas


def test_best_ious_literal() -> None:
    truth = np.array([[0, 0, 0, 5, 5, -1], [0, 0, 0, 5, 5, -1]])
    segments = np.array([[7, 7, 2, 2, 2, 2], [7, 7, 2, 2, 2, 9]])
    iou, areas = best_ious(segments, truth)
    assert iou.tolist() == [
        4 / 6,
        4 / 6,
    ]  # of segment 2 the two pixels behind the truth do not count
    assert areas.tolist() == [6, 4]
    assert (iou.dtype, areas.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("most", [2, 9, 60, 10**6, 2**62])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_best_ious_equal_brute_force(most: int, dtype: type) -> None:
    draws = np.random.default_rng(0)
    most = min(most, int(np.iinfo(dtype).max))
    for height, width in ((1, 1), (1, 30), (13, 17)):
        names = draws.integers(0, most, 12)  # few numbers with gaps, and pieces of several pixels
        segments = np.kron(
            draws.choice(names, (height, width)), np.ones((2, 3), dtype=np.int64)
        ).astype(dtype)
        truth = (
            np.kron(draws.choice(names, (width, height)), np.ones((2, 3), dtype=np.int64))
            .reshape(segments.shape)
            .astype(dtype)
        )
        if np.issubdtype(dtype, np.signedinteger):
            truth[draws.random(truth.shape) < 0.3] = -draws.integers(1, 4)
        iou, areas = best_ious(segments, truth)
        wanted, pixels = by_brute_force(segments, truth)
        assert iou.tolist() == pytest.approx(wanted, abs=1e-15)
        assert areas.tolist() == pixels


def test_every_pixel_a_segment_of_its_own() -> None:
    pixels = np.arange(200 * 300).reshape(200, 300)  # too many pairs for a table
    iou, areas = best_ious(pixels, pixels[::-1])
    assert iou.tolist() == areas.tolist() == [1.0] * 60000


def test_nothing_labelled() -> None:
    for shape in ((3, 4), (0, 0)):
        iou, areas = best_ious(np.zeros(shape, dtype=np.int32), np.full(shape, -1, dtype=np.int32))
        assert (iou.shape, areas.shape) == ((0,), (0,))


def test_what_cannot_be_compared() -> None:
    zeros = np.zeros((3, 4), dtype=np.int64)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        best_ious(zeros, zeros.T)
    with pytest.raises(ValueError, match="segments must be numbered from 0 on, not from -1"):
        best_ious(zeros - 1, zeros)
    with pytest.raises(ValueError, match="truth must be integers, not float64"):
        best_ious(zeros, zeros * 0.5)


def test_means_literal() -> None:
    # One image with two annotators, one with a single segment, one that nobody has labelled.
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
    found = metric.compute()
    first, second = (1 + 1) / 2, (1 / 2 + 4 / 6) / 2
    assert found == pytest.approx(
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
    found = metric.compute()
    assert found["images"] == (0.5 + 1.0) / 2
    assert found["covering"] == (2 * 0.5 + 6 * 1.0) / 8
    assert found["num_segments"] == 3.0


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


def test_processes_joined_in_any_order_give_the_same_bits() -> None:
    draws = np.random.default_rng(0)
    images = [
        (draws.integers(0, 40, (20, 30)), [draws.integers(-1, 9, (20, 30)) for _ in range(3)])
        for _ in range(30)
    ]
    alone = SegmentationIoU()
    for image in images:
        alone.add(*image)
    for seed in range(5):
        random.Random(seed).shuffle(images)
        parts = [SegmentationIoU() for _ in range(4)]
        for i, image in enumerate(images):
            parts[i % 3].add(*image)  # the last one has none
        joined = SegmentationIoU()
        for part in parts:
            joined.merge(part.state())
        assert joined.compute() == alone.compute()


def test_the_suite_runs_beside_brute_force() -> None:
    numbers = segmentation_iou(
        SimpleNamespace(rounds=1), counts=(12, 30), true=5, height=40, width=60
    )
    assert [list(one["seconds"]) for one in numbers["cases"]] == [["pair by pair", "maskseg"]] * 2
    assert all(one["agreement"]["largest difference"] < 1e-15 for one in numbers["cases"])
    assert "30 segments, 5 true ones, 60 x 40" in table(numbers)
