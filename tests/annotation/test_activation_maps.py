"""Class activation maps of a data set's classes: against the classifier itself, and classes that it does not know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.annotation.activation_maps import ClassMaps, Published, built, seen_size
from maskseg.structures import FeatureSpec

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
SEEN: list[tuple[int, ...]] = []


class Colours:
    """A classifier whose maps are the image's channels, as coarse as cells of 32 pixels."""

    level = FeatureSpec(32, 16.0, 3)

    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        SEEN.append(tuple(images.shape))
        maps = torch.nn.functional.avg_pool2d(images, 32)
        return maps.mean(dim=(2, 3)), maps

    def normalised(self, pixels: Tensor) -> Tensor:
        return pixels / 255

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True)
class Build:
    number: int = 0

    def __call__(self) -> Colours:
        return Colours()


def test_scores_and_maps_of_unions_and_of_unknown_classes() -> None:
    maps = ClassMaps(Build(), ((0,), (), (1, 2)), side=96)
    found = maps(IMAGE, [2, 1, 0])
    assert found[1] is None
    assert found[0] is not None
    assert found[2] is not None
    means = (IMAGE / 255).mean(axis=(0, 1))
    assert found[2][0] == pytest.approx(means[0], abs=1e-5)
    assert found[0][0] == pytest.approx(means[1] + means[2], abs=1e-5)
    assert found[2][1].shape == (64, 96)
    assert found[2][1][16, 16] == pytest.approx((IMAGE[:32, :32, 0] / 255).mean(), abs=0.01)


def test_without_known_classes_nothing_is_computed() -> None:
    maps = ClassMaps(Build(), ((), (0,)), side=96)
    SEEN.clear()
    assert maps(IMAGE, [0]) == [None]
    assert maps(IMAGE, []) == []
    assert SEEN == []
    before = torch.get_num_threads()
    maps(IMAGE, [1])
    assert SEEN == [(1, 3, 64, 96)]
    assert torch.get_num_threads() == before


def test_equal_ones_are_built_once() -> None:
    assert built(Build(1), "cpu") is built(Build(1), "cpu")
    assert built(Build(1), "cpu") is not built(Build(2), "cpu")
    assert Published("a", "b", "1") != Published("a", "b", "2")  # the file has changed


@pytest.mark.parametrize(
    ("size", "seen"), [((100, 50), (448, 224)), ((10, 1000), (32, 448)), ((448, 448), (448, 448))]
)
def test_the_size_that_is_seen(size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert seen_size(*size, 448) == seen


@pytest.mark.parametrize(
    ("side", "seen"),
    [
        (None, (320, 512)),
        ((64, 1000), (64, 96)),
        ((64, 96), (64, 96)),
        ((640, 512), (320, 512)),
        ((640, 800), (512, 800)),
    ],
)
def test_the_size_that_tests_saw(side: tuple[int, int] | None, seen: tuple[int, int]) -> None:
    assert seen_size(320, 500, side) == seen
