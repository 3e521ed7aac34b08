"""Projection of masks to cells: fractions, torch's pooling and interpolation, bitmaps."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.benchmarks.projection import projection, simulate_proposals
from maskseg.benchmarks.report import table
from maskseg.variants.cfm import projection as module
from maskseg.variants.cfm.projection import (
    STATISTICS,
    SuperpixelCells,
    nearest_cells,
    project,
    project_superpixels,
)

PLACES = [
    (stride, centre)
    for stride in (4, 8, 16, 32)
    for centre in dict.fromkeys((0.5, stride / 2, 15.5))
]
SHAPES = {
    4: (10, 14),
    8: (6, 7),
    16: (3, 4),
    32: (3, 2),
}  # for 37 x 53 pixels: with cells beyond the image, one cell fewer, or the exact number


def by_loop(
    mask: Tensor,
    shape: tuple[int, int],
    stride: float,
    centre: float,
    statistic: str,
    threshold: float | None,
) -> Tensor:
    """Project a mask [H, W] by the definition, pixel by pixel, in exact fractions."""
    values: dict[tuple[int, ...], list[Fraction]] = {}
    nearest = [
        [min(range(n), key=lambda i: abs(p + 0.5 - centre - i * stride)) for p in range(side)]
        for n, side in zip(shape, mask.shape, strict=True)
    ]
    for y, row in enumerate(mask.tolist()):
        for x, value in enumerate(row):
            values.setdefault((nearest[0][y], nearest[1][x]), []).append(Fraction(value))
    out = torch.zeros(shape)
    for cell, projected in values.items():
        result = (
            sum(projected) / Fraction(len(projected)) if statistic == "mean" else max(projected)
        )
        out[cell] = float(result if threshold is None else result > Fraction(str(threshold)))
    return out


def rough(masks: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Soft masks f32 [R, H, W] of patches and noise, with some values 0 and 1."""
    patches = torch.rand((1, masks, 4, 5), generator=generator)
    smooth = F.interpolate(patches, size=(height, width), mode="bilinear")[0] * 2 - 0.5
    return (smooth + 0.3 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("threshold", [0.5, 0.3, None])
@pytest.mark.parametrize("statistic", ["mean", "max"])
@pytest.mark.parametrize(("stride", "centre"), PLACES)
def test_equal_to_a_loop_over_pixels(
    stride: int, centre: float, statistic: str, threshold: float | None, generator: torch.Generator
) -> None:
    soft = rough(2, 37, 53, generator)
    soft[0, :, :33] = 0
    labels, members = simulate_proposals(3, 30, 37, 53, generator)
    bitmaps = torch.cat([members[:, labels], soft[:1] > 0.5])
    options = (SHAPES[stride], stride, centre, statistic, threshold)
    for masks in (bitmaps, soft):
        expected = torch.stack([by_loop(mask, *options) for mask in masks])
        assert torch.equal(project(masks, *options), expected)
        assert threshold is None or 0 < expected.mean() < 1
    assert torch.equal(
        project_superpixels(labels.int(), members, *options),
        torch.stack([by_loop(mask, *options) for mask in bitmaps[:3]]),
    )


@pytest.mark.parametrize("threshold", [0.5, 0.3, None])
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(
    ("stride", "centre"),
    [(1, 0.5), (3, 1.5), (3, 2.0), (5, -4.0), (7, 0.5), (16, 8.0), (16, 15.5), (32, 16.0)],
)
def test_superpixels_equal_to_their_bitmaps(
    stride: int,
    centre: float,
    statistic: str,
    threshold: float | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels, members = simulate_proposals(40, 25, 61, 83, generator)
    labels[labels == 7] = -1
    bitmaps = F.pad(members, (0, 1))[:, labels]
    for shape in ((-(-61 // stride), -(-83 // stride)), (4, 30), (1, 1)):
        options = (shape, stride, centre, statistic, threshold)
        result = project_superpixels(labels.int(), members, *options)
        assert result.dtype == torch.float32
        assert torch.equal(result, project(bitmaps, *options))
        for block in (
            1,
            7 * 61 * 83,
        ):  # one mask at a time, and a number for which the last block is not full
            monkeypatch.setattr(module, "BLOCK", block)
            assert torch.equal(result, project_superpixels(labels.int(), members, *options))
            assert torch.equal(result, project(bitmaps, *options))


@pytest.mark.parametrize("stride", [2, 3, 8, 16])
def test_equal_to_torch_where_cells_are_squares(stride: int, generator: torch.Generator) -> None:
    shape = (5, 7)
    masks = rough(4, 5 * stride, 7 * stride, generator)
    expected = {
        "mean": F.avg_pool2d(masks, stride),
        "max": F.max_pool2d(masks, stride),
        "nearest": F.interpolate(masks[None], size=shape, mode="nearest-exact")[0],
        "area": F.interpolate(masks[None], size=shape, mode="bilinear", antialias=True)[0],
    }
    for statistic in STATISTICS:
        torch.testing.assert_close(
            project(masks, shape, stride, stride / 2, statistic, None),
            expected[statistic],
            atol=1e-6,
            rtol=0,
        )


def test_nearest_cells_literal() -> None:
    assert nearest_cells(8, 2, 4, 2.0).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert nearest_cells(9, 3, 4, 0.5).tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        1,
        2,
        2,
    ]  # pixel 2 lies halfway between two centers, and so does 6
    assert nearest_cells(9, 2, 4, 0.5).tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        1,
        1,
        1,
    ]  # beyond the last center
    assert nearest_cells(9, 2, 4, 7.5).tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert nearest_cells(6, 4, 3, -1.5).tolist() == [
        1,
        1,
        1,
        2,
        2,
        2,
    ]  # the first center lies outside the image
    assert nearest_cells(1, 5, 16, 8.0).tolist() == [0]
    assert nearest_cells(0, 5, 16, 8.0).tolist() == []


@pytest.mark.parametrize("statistic", STATISTICS)
def test_cells_beyond_the_image_are_empty(statistic: str) -> None:
    # 20 pixels of ones on 4 cells with centers 0.5, 16.5, 32.5, 48.5; the antialiasing of the third
    # would reach the last pixels.
    result = project(torch.ones(1, 20, 20), (4, 4), 16, 0.5, statistic, None)
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert torch.equal(result[0], expected[:, None] * expected)
    # The center of the second cell, 24, is beyond the image, but the cell has pixels: "nearest"
    # uses the last one, all other statistics use their values.
    result = project(torch.ones(1, 20, 20, dtype=torch.bool), (2, 2), 16, 8.0, statistic)
    assert result.tolist() == [[[1.0, 1.0], [1.0, 1.0]]]


def test_a_cell_that_is_cut_by_the_border_counts_its_own_pixels_only() -> None:
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, :, 4] = True
    assert project(mask, (1, 2), 4, 2.0, threshold=None).tolist() == [[[0.0, 0.5]]]
    assert project(mask, (1, 2), 4, 2.0).tolist() == [[[0.0, 0.0]]]  # a half does not exceed a half
    mask[0, 0, 5] = True
    assert project(mask, (1, 2), 4, 2.0).tolist() == [[[0.0, 1.0]]]


def test_thresholds_are_compared_exactly() -> None:
    # 0.57 * 100 is below 57, so counts must not be compared with products.
    masks = (torch.arange(100) < torch.arange(101)[:, None]).view(101, 10, 10)
    labels = torch.arange(100).view(10, 10)
    for percent in range(101):
        expected = (torch.arange(101) > percent).float()
        assert torch.equal(
            project(masks, (1, 1), 10, 5.0, threshold=percent / 100).flatten(), expected
        )
        assert torch.equal(
            project_superpixels(
                labels, masks.flatten(1), (1, 1), 10, 5.0, threshold=percent / 100
            ).flatten(),
            expected,
        )
    third = torch.tensor([[[True, False, False]]])
    for threshold, expected in ((0.333333333, 1.0), (0.333333334, 0.0)):  # equal in float32
        result = (
            project(third, (1, 1), 3, 1.5, threshold=threshold),
            project_superpixels(labels[:1, :3], third[0], (1, 1), 3, 1.5, threshold=threshold),
        )
        assert [f.item() for f in result] == [expected, expected]


def test_pixels_without_a_superpixel_count_as_pixels_of_their_cell() -> None:
    labels = torch.tensor([[0, 0, 1, -1], [0, -1, -1, -1]])
    members = torch.tensor([[True, False], [True, True], [False, False]])
    result = project_superpixels(labels, members, (1, 2), 2, 1.0, threshold=None)
    assert result.tolist() == [[[0.75, 0.0]], [[0.75, 0.25]], [[0.0, 0.0]]]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_nothing_to_project(statistic: str) -> None:
    labels = torch.full((9, 9), -1, dtype=torch.int32)
    assert project(torch.zeros(0, 9, 9, dtype=torch.bool), (3, 3), 4, 2.0, statistic).shape == (
        0,
        3,
        3,
    )
    assert project_superpixels(
        labels, torch.zeros(0, 5, dtype=torch.bool), (3, 3), 4, 2.0, statistic
    ).shape == (0, 3, 3)
    assert torch.equal(
        project_superpixels(labels, torch.zeros(2, 0, dtype=torch.bool), (3, 3), 4, 2.0, statistic),
        torch.zeros(2, 3, 3),
    )
    assert torch.equal(
        project_superpixels(labels, torch.ones(2, 5, dtype=torch.bool), (3, 3), 4, 2.0, statistic),
        torch.zeros(2, 3, 3),
    )


@pytest.mark.parametrize("statistic", STATISTICS)
def test_one_pixel(statistic: str) -> None:
    expected = torch.zeros(1, 2, 2)
    expected[0, 0, 0] = 1
    assert torch.equal(project(torch.ones(1, 1, 1), (2, 2), 32, 16.0, statistic), expected)
    assert torch.equal(
        project_superpixels(
            torch.zeros(1, 1).int(), torch.ones(1, 1).bool(), (2, 2), 32, 16.0, statistic
        ),
        expected,
    )


def test_not_rounded_by_autocast(generator: torch.Generator) -> None:
    labels, members = simulate_proposals(20, 25, 61, 83, generator)
    options = ((2, 2), 32, 16.0, "mean", None)
    expected = project_superpixels(labels, members, *options)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(project_superpixels(labels, members, *options), expected)
        assert torch.equal(project(members[:, labels], *options), expected)


def test_an_unknown_statistic_is_refused() -> None:
    for call in (
        lambda: project(torch.ones(1, 4, 4), (1, 1), 4, 2.0, "median"),
        lambda: project(torch.ones(0, 4, 4), (1, 1), 4, 2.0, ""),
    ):
        with pytest.raises(ValueError, match="statistic must be one of mean, max, nearest, area"):
            call()


def test_the_suite_runs_beside_bitmaps() -> None:
    numbers = projection(
        SimpleNamespace(rounds=1), proposals=12, superpixels=20, height=64, width=96
    )
    assert [list(one["seconds"]) for one in numbers["cases"]] == [
        ["bitmaps, projected", "bitmaps, avg_pool2d", "maskseg"]
    ] * 2
    assert all(one["agreement"] == {"cells that differ": 0} for one in numbers["cases"])
    assert "12 proposals, 20 superpixels, 96 x 64, stride 8" in table(numbers)


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.8, 1.0, -0.1, None])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_project_at_equals_project(
    statistic: str, threshold: float | None, generator: torch.Generator
) -> None:
    labels, members = simulate_proposals(40, 25, 61, 83, generator)
    labels[labels == 7] = -1
    cells = SuperpixelCells.from_labels(labels.int(), (9, 11), 8, 0.5, statistic, threshold)
    mask = torch.randint(0, 40, (4000,), generator=generator)
    cell = torch.randint(0, 99, (4000,), generator=generator)
    assert torch.equal(
        cells.project_at(members, mask, cell), cells.project(members).flatten(1)[mask, cell]
    )
    assert cells.project_at(members, mask[:0], cell[:0]).shape == (0,)
