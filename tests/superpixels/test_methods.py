"""Superpixels: what every kind must give, on images of every shape; numbers, neighbours and components against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maskseg.errors import UserError
from maskseg.superpixels.methods import (
    SLIC,
    GraphSegments,
    Labels,
    Superpixels,
    connected,
    neighbours,
    renumbered,
)
from maskseg.superpixels.opencv import opencv, scipy

KINDS: list[Superpixels] = [
    SLIC(),
    SLIC(7, 40.0, 2),
    GraphSegments(),
    GraphSegments(0.0, 1000.0, 1),
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
    """Squares of one colour each, none like its neighbours."""
    y, x = np.mgrid[:height, :width] // side
    return np.stack([y % 2 * 200, x % 2 * 200, (x + y) % 3 * 100], axis=2).astype(np.uint8)


def flood(labels: NDArray[np.integer]) -> Labels:
    """Components of equal labels, each filled from its first pixel."""
    found = np.full(labels.shape, -1, dtype=np.int32)
    count = 0
    for seed in np.ndindex(labels.shape):
        if found[seed] >= 0:
            continue
        stack, found[seed] = [seed], count
        while stack:
            y, x = stack.pop()
            for n in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if (
                    0 <= n[0] < labels.shape[0]
                    and 0 <= n[1] < labels.shape[1]
                    and found[n] < 0
                    and labels[n] == labels[seed]
                ):
                    found[n] = count
                    stack.append(n)
        count += 1
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", range(len(KINDS)))
@pytest.mark.parametrize("of", ["noise", "constant", "blocks"])
def test_labels_are_whole(kind: int, size: tuple[int, int], of: str) -> None:
    image = {
        "noise": noise(*size),
        "constant": np.full((*size, 3), 128, dtype=np.uint8),
        "blocks": blocks(*size),
    }[of]
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
def test_memory_layout_does_not_matter(make: Superpixels) -> None:
    image = noise(40, 50)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    wide = np.zeros((40, 100, 4), dtype=np.uint8)
    wide[:, ::2, :3] = image
    flipped = np.ascontiguousarray(image[::-1])
    wanted = make(image)
    for view in (planes.transpose(1, 2, 0), wide[:, ::2, :3], flipped[::-1]):
        assert not view.flags.c_contiguous
        view.flags.writeable = False
        assert np.array_equal(make(view), wanted)


@pytest.mark.parametrize("make", KINDS)
def test_the_number_of_threads_does_not_matter(make: Superpixels) -> None:
    image = np.asarray(Image.fromarray(noise(30, 40)).resize((320, 240)))
    wanted = make(image)
    try:
        opencv().setNumThreads(4)
        assert np.array_equal(make(image), wanted)
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
def test_what_is_no_image(bad: NDArray[np.uint8]) -> None:
    for make in KINDS:
        with pytest.raises(ValueError, match=r"uint8 RGB \[H, W, 3\], not of"):
            make(bad)


@pytest.mark.parametrize(
    "arguments", [{"count": 0}, {"ruler": 0.0}, {"ruler": float("nan")}, {"iterations": 0}]
)
def test_slic_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match="SLIC: count and iterations must be at least 1"):
        SLIC(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"sigma": -1.0}, {"k": 0.0}, {"min_size": 0}])
def test_graph_arguments(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError, match="graph segments: sigma must not be negative"):
        GraphSegments(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "size", [(120, 160), (480, 640), (30, 30), (100, 700), (10, 1500), (900, 7), (1, 1500)]
)
def test_about_as_many_as_asked_for(size: tuple[int, int]) -> None:
    y, x = np.indices(size)
    image = np.stack([y * 255 // size[0], x * 255 // size[1], 0 * x], axis=2).astype(np.uint8)
    for count in (1, 10, 50, 200):
        if count * 16 * min(size) < max(size):
            continue  # too thin, see below
        assert abs(SLIC(count)(image).max() + 1 - count) <= 0.25 * count


def test_a_line_is_not_padded_to_a_square() -> None:
    assert SLIC(1)(np.zeros((1, 3200, 3), np.uint8)).max() + 1 == 200


def test_as_many_as_pixels_at_most() -> None:
    assert SLIC(15)(np.zeros((3, 5, 3), np.uint8)).tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
    ]
    assert SLIC(14)(np.zeros((3, 5, 3), np.uint8)).max() < 14
    assert (
        SLIC(390)(np.zeros((20, 20, 3), np.uint8)).max() > 50
    )  # superpixels of one pixel would all be joined


def purity(labels: Labels, truth: NDArray[np.integer]) -> float:
    """The share of pixels that lie in the true segment that most of their superpixel lies in."""
    shared = np.zeros((labels.max() + 1, truth.max() + 1))
    np.add.at(shared, (labels.ravel(), truth.ravel()), 1)
    return float(shared.max(axis=1).sum() / labels.size)


def test_superpixels_keep_to_edges() -> None:
    image = blocks(90, 120)
    truth = renumbered(np.mgrid[:90, :120][0] // 30 * 4 + np.mgrid[:90, :120][1] // 30)
    assert np.array_equal(GraphSegments(0.0)(image), truth)
    assert purity(SLIC(60)(image), truth) > 0.98
    assert purity(SLIC(60, 1e4)(image), truth) < 0.95  # place alone
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 25, image.shape), 0, 255).astype(
        np.uint8
    )
    assert purity(SLIC(60)(noisy), truth) > 0.95


def border(labels: Labels) -> float:
    """The length of all borders in pixels, less for more compact superpixels."""
    return float((labels[:, 1:] != labels[:, :-1]).sum() + (labels[1:] != labels[:-1]).sum())


def test_options_do_what_they_say() -> None:
    image = np.asarray(Image.fromarray(noise(12, 16)).resize((160, 120), Image.Resampling.BICUBIC))
    assert border(SLIC(50, 100.0)(image)) < 0.9 * border(SLIC(50, 1.0)(image))
    assert not np.array_equal(SLIC(50, iterations=1)(image), SLIC(50)(image))
    few, many = GraphSegments(k=1000.0)(image), GraphSegments(k=50.0)(image)
    assert few.max() < many.max()
    rough = noise(60, 80)
    assert np.bincount(GraphSegments(min_size=50)(rough).ravel()).min() >= 50
    assert np.bincount(GraphSegments(min_size=5)(rough).ravel()).min() < 50
    assert GraphSegments(sigma=3.0)(rough).max() < GraphSegments(sigma=0.0)(rough).max()


def test_the_order_of_the_channels_does_not_matter_to_graph_segments() -> None:
    image = noise(60, 80)
    assert np.array_equal(GraphSegments()(image), GraphSegments()(image[..., ::-1]))


def test_renumbered_literals() -> None:
    assert renumbered(np.array([[7, 7, 2], [0, 2, 7]])).tolist() == [[0, 0, 1], [2, 1, 0]]
    assert renumbered(np.array([[-5, 2**40], [3, -5]])).tolist() == [[0, 1], [2, 0]]
    assert renumbered(np.array([-1, 1, -1, 0])).tolist() == [0, 1, 0, 2]
    assert renumbered(np.array([4, 3, 3, 9])).tolist() == [0, 1, 1, 2]
    assert renumbered(np.zeros(0, np.int64)).tolist() == []
    assert renumbered(np.array([[3, 1]], dtype=np.uint8)).dtype == np.int32


def test_renumbered_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for top in (1, 5, 300, 10000):
        labels = rng.integers(0, top, (17, 23))
        order = list(dict.fromkeys(labels.ravel().tolist()))
        assert renumbered(labels).tolist() == [
            [order.index(v) for v in row] for row in labels.tolist()
        ]


def test_neighbours_literals() -> None:
    # 0 and 3 touch at a corner only.
    assert neighbours(np.array([[0, 1], [2, 3]], np.int32)).tolist() == [
        [0, 1],
        [0, 2],
        [1, 3],
        [2, 3],
    ]
    assert neighbours(np.array([[2, 0, 2, 1]], np.int32)).tolist() == [[0, 2], [1, 2]]
    for alone in (np.zeros((1, 1), np.int32), np.zeros((4, 3), np.int32)):
        assert neighbours(alone).shape == (0, 2)
        assert neighbours(alone).dtype == np.int64


@pytest.mark.parametrize("size", SIZES)
def test_neighbours_by_brute_force(size: tuple[int, int]) -> None:
    labels = SLIC(30)(noise(*size))
    wanted = set()
    for y, x in np.ndindex(size):
        for n in ((y + 1, x), (y, x + 1)):
            if n[0] < size[0] and n[1] < size[1] and labels[n] != labels[y, x]:
                wanted.add((min(labels[n], labels[y, x]), max(labels[n], labels[y, x])))
    assert [tuple(pair) for pair in neighbours(labels)] == sorted(wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kinds", [1, 2, 4, 50])
def test_connected_by_brute_force(size: tuple[int, int], kinds: int) -> None:
    labels = np.random.default_rng(kinds).integers(0, kinds, size) - 1
    assert np.array_equal(connected(labels), flood(labels))


def test_real_images(shared_data: Path) -> None:
    """Superpixels follow the outlines that people drew in the same photographs."""
    paths = sorted((shared_data / "bsds500" / "images" / "val").glob("*.jpg"))[:4]
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        people = scipy("io").loadmat(path.parents[2] / "groundTruth" / "val" / f"{path.stem}.mat")[
            "groundTruth"
        ][0]
        truths = [person[0, 0]["Segmentation"].astype(np.int64) for person in people]
        slic, graph, grid = (make(image) for make in (SLIC(), GraphSegments(), SLIC(ruler=1e4)))
        pure = [
            np.mean([purity(labels, truth) for truth in truths]) for labels in (slic, graph, grid)
        ]
        assert pure[0] > max(0.92, pure[2] + 0.02)
        assert pure[1] > 0.85
        assert 150 <= slic.max() + 1 <= 220
        assert np.array_equal(slic, connected(slic))
        assert np.array_equal(graph, connected(graph))
    assert paths
