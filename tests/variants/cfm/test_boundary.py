"""Effect of masked pixels on features: networks of known receptive field, distances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskseg.models.rcnn import PixelModel
from maskseg.structures import Batch, Features, FeatureSpec
from maskseg.variants.cfm.boundary import (
    BoundaryStudy,
    border_distances,
    cells_to_pixels,
    draw_boundary_study,
    draw_colour_bar,
    mask_outside,
    plot_boundary,
    relative_differences,
    render_heatmap,
)

PIXELS = FeatureSpec(1, 0.5, 4)
MEAN = (120.0, 110.0, 100.0)
STD = (50.0, 50.0, 50.0)


class OneConv(nn.Module):
    """A backbone with the features `f` of one convolution."""

    def __init__(self, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel, stride, kernel // 2)
        nn.init.uniform_(self.conv.weight, 0.1, 1.0)
        nn.init.constant_(self.conv.bias, 5.0)

    def forward(self, images: Tensor) -> Features:
        return {"f": self.conv(images)}


def batch(height: int = 24, width: int = 32) -> Batch:
    images = torch.randint(
        0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    size = torch.tensor([[height, width]])
    return Batch(
        images,
        size,
        size,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros((1, 3), dtype=torch.int64),
    )


def disc(height: int = 24, width: int = 32, radius: float = 8.0) -> Tensor:
    y = torch.arange(height)[:, None] + 0.5
    x = torch.arange(width) + 0.5
    return (y - 12).square() + (x - 14).square() < radius**2


def by_loop(inside: Tensor, shape: tuple[int, int], at: FeatureSpec) -> Tensor:
    """Compute the distance of each cell's center to the squares of all pixels outside."""
    out = torch.full(shape, torch.nan)
    outside = torch.nonzero(~inside).tolist()
    for i in range(shape[0]):
        for j in range(shape[1]):
            y = at.centre + i * at.stride
            x = at.centre + j * at.stride
            if y < inside.shape[0] and x < inside.shape[1] and inside[int(y), int(x)]:
                gaps = [
                    math.hypot(max(abs(y - r - 0.5) - 0.5, 0), max(abs(x - c - 0.5) - 0.5, 0))
                    for r, c in outside
                ]
                out[i, j] = min(gaps, default=math.inf)
    return out


@pytest.mark.parametrize(
    "at", [PIXELS, FeatureSpec(4, 0.5, 4), FeatureSpec(4, 2.0, 4), FeatureSpec(8, 7.5, 4)]
)
def test_distances_to_the_nearest_pixel_outside(at: FeatureSpec) -> None:
    shape = (-(-24 // at.stride), -(-32 // at.stride))
    rough = torch.rand((24, 32), generator=torch.Generator().manual_seed(3)) > 0.1
    for inside in (disc(), ~disc(), rough, torch.ones(24, 32).bool()):
        torch.testing.assert_close(
            border_distances(inside, shape, at), by_loop(inside, shape, at), equal_nan=True
        )
    assert border_distances(torch.zeros(24, 32).bool(), shape, at).isnan().all()


def test_pixels_outside_become_the_mean() -> None:
    inside = disc(20, 30)
    result = mask_outside(
        batch(), inside, torch.tensor([119.6, 110.0, 100.0]).view(3, 1, 1)
    ).images[0]
    assert torch.equal(result[:, :20, :30][:, inside], batch().images[0, :, :20, :30][:, inside])
    assert result[:, 22, 5].tolist() == [120, 110, 100]
    assert result[:, 5, 31].tolist() == [120, 110, 100]


def test_a_network_of_single_pixels_has_no_boundary() -> None:
    model = PixelModel(OneConv(1), MEAN, STD)
    difference = relative_differences(model, batch(), disc())["f"]
    assert not difference[disc()].any()
    assert (difference[~disc()] > 0).float().mean() > 0.9


def test_a_3x3_window_sees_the_boundary_only_within_its_receptive_field() -> None:
    model = PixelModel(OneConv(3), MEAN, STD)
    difference = relative_differences(model, batch(), disc())["f"]
    apart = border_distances(disc(), (24, 32), PIXELS)
    assert difference[apart < 1].gt(0).all()
    assert not difference[apart > 1].any()
    study = BoundaryStudy((0.0, 1.0, 4.0, 100.0))
    study.add({"f": difference}, disc(), {"f": PIXELS})
    study.add({"f": difference}, disc(), {"f": PIXELS})
    numbers = study.means()["f"]
    assert list(numbers) == ["0-1", "1-4", "4-100", "100-"]
    assert numbers["0-1"] == pytest.approx(float(difference[apart < 1].mean()))
    assert (numbers["1-4"], numbers["4-100"], numbers["100-"]) == (0, 0, None)


def test_differences_are_relative_and_nan_where_the_feature_is_zero() -> None:
    class Half(nn.Module):
        def forward(self, images: Tensor) -> Features:
            return {"f": torch.cat([images[..., :16] * 0, images[..., 16:]], dim=3)}

    model = PixelModel(Half(), MEAN, STD)
    result = relative_differences(model, batch(), torch.zeros(24, 32).bool())["f"]
    assert result[:, :16].isnan().all()
    torch.testing.assert_close(
        result[:, 16:], torch.ones(24, 16)
    )  # everything becomes the mean, which is 0
    study = BoundaryStudy()
    study.add({"f": result}, torch.ones(24, 32).bool(), {"f": PIXELS})
    assert set(study.means()["f"].values()) == {None}  # without a border there is no distance


def test_cells_are_drawn_at_their_centers() -> None:
    cells = np.arange(6).reshape(2, 3)
    assert (
        cells_to_pixels(cells, FeatureSpec(4, 2.0, 1), (8, 12)).tolist()
        == np.kron(cells, np.ones((4, 4))).tolist()
    )
    assert cells_to_pixels(cells[:1], FeatureSpec(4, 0.5, 1), (1, 9)).tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 2, 2]
    ]


def test_heatmap_goes_from_dark_to_light_and_is_gray_for_nan() -> None:
    drawn = render_heatmap(np.array([[0.0, 1.0, 2.0, 9.0, np.nan]]), PIXELS, (1, 5), 2.0)[0].astype(
        int
    )
    assert (np.diff(drawn[:3].sum(axis=1)) > 100).all()
    assert (drawn[3] == drawn[2]).all()
    assert drawn[4].tolist() == [128, 128, 128]
    bar = draw_colour_bar(2.0, "share", 300)
    assert bar.shape[0] == 300
    assert render_heatmap(np.zeros((2, 2)), PIXELS, (2, 2), 0.0).shape == (2, 2, 3)


def test_pictures_are_drawn() -> None:
    model = PixelModel(OneConv(3), MEAN, STD)
    difference = relative_differences(model, batch(), disc())
    image = np.ascontiguousarray(batch().images[0].permute(1, 2, 0).numpy())
    picture = draw_boundary_study(image, disc().numpy(), MEAN, difference, {"f": PIXELS})
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 3 * 720  # three tiles, and the color bar beside the last one
    study = BoundaryStudy()
    study.add(difference, disc(), {"f": PIXELS})
    curve = plot_boundary(study.means())
    assert curve.ndim == 3
    assert curve.std() > 5
