"""Superpixel methods on images of all shapes; numbers, neighbors and components by brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maskseg.errors import UserError
from maskseg.superpixels.methods import (
    SLIC,
    Felzenszwalb,
    Labels,
    Superpixels,
    label_components,
    neighbours,
    relabel,
)
from maskseg.superpixels.opencv import opencv, scipy

KINDS: list[Superpixels] = [
    SLIC(),
    SLIC(7, 40.0, 2),
    Felzenszwalb(),
    Felzenszwalb(0.0, 1000.0, 1),
]
SIZES = [
    (1, 1),
    (1, 2),
    (1, 5),
    (5, 1),
    (2, 2),
    (3, 200),
    (200, 3),
    (1, 700),
    (14, 14),
    (15, 15),
    (20, 20),
    (61, 90),
]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 1000 + width).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )


def blocks(height: int, width: int, side: int = 30) -> NDArray[np.uint8]:
    """Squares of one color each, different from their neighbors."""
    y, x = np.mgrid[:height, :width] // side
    return np.stack([y % 2 * 200, x % 2 * 200, (x + y) % 3 * 100], axis=2).astype(np.uint8)


def flood(labels: NDArray[np.integer]) -> Labels:
    """Components of equal labels, by flood fill from their first pixels."""
    result = np.full(labels.shape, -1, dtype=np.int32)
    count = 0
    for seed in np.ndindex(labels.shape):
        if result[seed] >= 0:
            continue
        stack = [seed]
        result[seed] = count
        while stack:
            y, x = stack.pop()
            for n in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if (
                    0 <= n[0] < labels.shape[0]
                    and 0 <= n[1] < labels.shape[1]
                    and result[n] < 0
                    and labels[n] == labels[seed]
                ):
                    result[n] = count
                    stack.append(n)
        count += 1
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("content", ["noise", "constant", "blocks"])
def test_labels_are_connected_and_contiguous(
    kind: int, size: tuple[int, int], content: str
) -> None:
    image = {
        "noise": noise(*size),
        "constant": np.full((*size, 3), 128, dtype=np.uint8),
        "blocks": blocks(*size),
    }[content]
    before = image.copy()
    labels = KINDS[kind](image)
    assert np.array_equal(image, before)
    assert labels.dtype == np.int32
    assert labels.shape == size
    assert np.array_equal(
        labels, flood(labels)
    )  # connected, contiguous, in order of first appearance
    assert np.array_equal(labels, KINDS[kind](image))


@pytest.mark.parametrize("make", KINDS)
def test_superpixels_do_not_depend_on_the_memory_layout(make: Superpixels) -> None:
    image = noise(40, 50)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    wide = np.zeros((40, 100, 4), dtype=np.uint8)
    wide[:, ::2, :3] = image
    flipped = np.ascontiguousarray(image[::-1])
    expected = make(image)
    for view in (planes.transpose(1, 2, 0), wide[:, ::2, :3], flipped[::-1]):
        assert not view.flags.c_contiguous
        view.flags.writeable = False
        assert np.array_equal(make(view), expected)


@pytest.mark.parametrize("make", KINDS)
def test_superpixels_do_not_depend_on_the_number_of_threads(make: Superpixels) -> None:
    image = np.asarray(Image.fromarray(noise(30, 40)).resize((320, 240)))
    expected = make(image)
    try:
        opencv().setNumThreads(4)
        assert np.array_equal(make(image), expected)
    finally:
        opencv().setNumThreads(1)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_invalid_images(bad: NDArray[np.uint8]) -> None:
    for make in KINDS:
        with pytest.raises(ValueError, match=r"uint8 RGB \[H, W, 3\], not"):
            make(bad)


@pytest.mark.parametrize(
    "arguments",
    [{"count": 0}, {"compactness": 0.0}, {"compactness": float("nan")}, {"iterations": 0}],
)
def test_slic_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"SLIC\.(count|compactness|iterations)=.*: expected a"):
        SLIC(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"sigma": -1.0}, {"scale": 0.0}, {"min_size": 0}])
def test_felzenszwalb_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"Felzenszwalb\.(sigma|scale|min_size)=.*: expected a"):
        Felzenszwalb(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "size", [(120, 160), (480, 640), (30, 30), (100, 700), (10, 1500), (900, 7), (1, 1500)]
)
def test_the_number_of_superpixels_is_near_count(size: tuple[int, int]) -> None:
    y, x = np.indices(size)
    image = np.stack([y * 255 // size[0], x * 255 // size[1], 0 * x], axis=2).astype(np.uint8)
    for count in (1, 10, 50, 200):
        if count * 16 * min(size) < max(size):
            continue  # too narrow, see below
        assert abs(SLIC(count)(image).max() + 1 - count) <= 0.25 * count


def test_a_line_is_not_padded_to_a_square() -> None:
    assert SLIC(1)(np.zeros((1, 3200, 3), np.uint8)).max() + 1 == 200


def test_at_most_one_superpixel_per_pixel() -> None:
    assert SLIC(15)(np.zeros((3, 5, 3), np.uint8)).tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
    ]
    assert SLIC(14)(np.zeros((3, 5, 3), np.uint8)).max() < 14
    assert (
        SLIC(390)(np.zeros((20, 20, 3), np.uint8)).max() > 50
    )  # superpixels of one pixel would all be merged


def purity(labels: Labels, truth: NDArray[np.integer]) -> float:
    """Share of pixels in the true segment that has the majority of their superpixel."""
    shared = np.zeros((labels.max() + 1, truth.max() + 1))
    np.add.at(shared, (labels.ravel(), truth.ravel()), 1)
    return float(shared.max(axis=1).sum() / labels.size)


def test_superpixels_follow_edges() -> None:
    image = blocks(90, 120)
    truth = relabel(np.mgrid[:90, :120][0] // 30 * 4 + np.mgrid[:90, :120][1] // 30)
    assert np.array_equal(Felzenszwalb(0.0)(image), truth)
    assert purity(SLIC(60)(image), truth) > 0.98
    assert purity(SLIC(60, 1e4)(image), truth) < 0.95  # position alone
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 25, image.shape), 0, 255).astype(
        np.uint8
    )
    assert purity(SLIC(60)(noisy), truth) > 0.95


def border(labels: Labels) -> float:
    """Length of all borders in pixels, less for more compact superpixels."""
    return float((labels[:, 1:] != labels[:, :-1]).sum() + (labels[1:] != labels[:-1]).sum())


def test_effects_of_the_parameters() -> None:
    image = np.asarray(Image.fromarray(noise(12, 16)).resize((160, 120), Image.Resampling.BICUBIC))
    assert border(SLIC(50, 100.0)(image)) < 0.9 * border(SLIC(50, 1.0)(image))
    assert not np.array_equal(SLIC(50, iterations=1)(image), SLIC(50)(image))
    few = Felzenszwalb(scale=1000.0)(image)
    many = Felzenszwalb(scale=50.0)(image)
    assert few.max() < many.max()
    rough = noise(60, 80)
    assert np.bincount(Felzenszwalb(min_size=50)(rough).ravel()).min() >= 50
    assert np.bincount(Felzenszwalb(min_size=5)(rough).ravel()).min() < 50
    assert Felzenszwalb(sigma=3.0)(rough).max() < Felzenszwalb(sigma=0.0)(rough).max()


def test_felzenszwalb_does_not_depend_on_the_order_of_channels() -> None:
    image = noise(60, 80)
    assert np.array_equal(Felzenszwalb()(image), Felzenszwalb()(image[..., ::-1]))


def test_relabel_literals() -> None:
    assert relabel(np.array([[7, 7, 2], [0, 2, 7]])).tolist() == [[0, 0, 1], [2, 1, 0]]
    assert relabel(np.array([[-5, 2**40], [3, -5]])).tolist() == [[0, 1], [2, 0]]
    assert relabel(np.array([-1, 1, -1, 0])).tolist() == [0, 1, 0, 2]
    assert relabel(np.array([4, 3, 3, 9])).tolist() == [0, 1, 1, 2]
    assert relabel(np.zeros(0, np.int64)).tolist() == []
    assert relabel(np.array([[3, 1]], dtype=np.uint8)).dtype == np.int32


def test_relabel_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for top in (1, 5, 300, 10000):
        labels = rng.integers(0, top, (17, 23))
        order = list(dict.fromkeys(labels.ravel().tolist()))
        assert relabel(labels).tolist() == [
            [order.index(v) for v in row] for row in labels.tolist()
        ]


def test_neighbours_literals() -> None:
    # 0 and 3 touch only at a corner.
    assert neighbours(np.array([[0, 1], [2, 3]], np.int32)).tolist() == [
        [0, 1],
        [0, 2],
        [1, 3],
        [2, 3],
    ]
    assert neighbours(np.array([[2, 0, 2, 1]], np.int32)).tolist() == [[0, 2], [1, 2]]
    for single in (np.zeros((1, 1), np.int32), np.zeros((4, 3), np.int32)):
        assert neighbours(single).shape == (0, 2)
        assert neighbours(single).dtype == np.int64


@pytest.mark.parametrize("size", SIZES)
def test_neighbours_by_brute_force(size: tuple[int, int]) -> None:
    labels = SLIC(30)(noise(*size))
    expected = set()
    for y, x in np.ndindex(size):
        for n in ((y + 1, x), (y, x + 1)):
            if n[0] < size[0] and n[1] < size[1] and labels[n] != labels[y, x]:
                expected.add((min(labels[n], labels[y, x]), max(labels[n], labels[y, x])))
    assert [tuple(pair) for pair in neighbours(labels)] == sorted(expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kinds", [1, 2, 4, 50])
def test_label_components_by_brute_force(size: tuple[int, int], kinds: int) -> None:
    labels = np.random.default_rng(kinds).integers(0, kinds, size) - 1
    assert np.array_equal(label_components(labels), flood(labels))


def test_real_images(shared_data: Path) -> None:
    """Superpixels follow the human annotations of the same photographs."""
    paths = sorted((shared_data / "bsds500" / "images" / "val").glob("*.jpg"))[:4]
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        annotators = scipy("io").loadmat(
            path.parents[2] / "groundTruth" / "val" / f"{path.stem}.mat"
        )["groundTruth"][0]
        truths = [annotator[0, 0]["Segmentation"].astype(np.int64) for annotator in annotators]
        slic, graph, grid = (
            make(image) for make in (SLIC(), Felzenszwalb(), SLIC(compactness=1e4))
        )
        purities = [
            np.mean([purity(labels, truth) for truth in truths]) for labels in (slic, graph, grid)
        ]
        assert purities[0] > max(0.92, purities[2] + 0.02)
        assert purities[1] > 0.85
        assert 150 <= slic.max() + 1 <= 220
        assert np.array_equal(slic, label_components(slic))
        assert np.array_equal(graph, label_components(graph))
    assert paths
