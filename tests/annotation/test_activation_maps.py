"""Class activation maps of a data set's classes, with known and unknown classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.annotation.activation_maps import (
    ClassActivationMaps,
    TorchvisionClassifier,
    build_classifier,
    network_input_size,
)
from maskseg.structures import FeatureSpec

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
INPUT_SHAPES: list[tuple[int, ...]] = []


class Colours:
    """A classifier whose maps are the color channels, averaged over 32 x 32 pixels."""

    level = FeatureSpec(32, 16.0, 3)

    def activation(self, images: Tensor) -> tuple[Tensor, Tensor]:
        INPUT_SHAPES.append(tuple(images.shape))
        maps = torch.nn.functional.avg_pool2d(images, 32)
        return maps.mean(dim=(2, 3)), maps

    def normalise(self, pixels: Tensor) -> Tensor:
        return pixels / 255

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True)
class Build:
    number: int = 0

    def __call__(self) -> Colours:
        return Colours()


def test_scores_and_maps_of_unions_and_of_unknown_classes() -> None:
    maps = ClassActivationMaps(Build(), ((0,), (), (1, 2)), side=96)
    results = maps(IMAGE, [2, 1, 0])
    assert results[1] is None
    assert results[0] is not None
    assert results[2] is not None
    means = (IMAGE / 255).mean(axis=(0, 1))
    assert results[2][0] == pytest.approx(means[0], abs=1e-5)
    assert results[0][0] == pytest.approx(means[1] + means[2], abs=1e-5)
    assert results[2][1].shape == (64, 96)
    assert results[2][1][16, 16] == pytest.approx((IMAGE[:32, :32, 0] / 255).mean(), abs=0.01)


def test_without_known_classes_nothing_is_computed() -> None:
    maps = ClassActivationMaps(Build(), ((), (0,)), side=96)
    INPUT_SHAPES.clear()
    assert maps(IMAGE, [0]) == [None]
    assert maps(IMAGE, []) == []
    assert INPUT_SHAPES == []
    before = torch.get_num_threads()
    maps(IMAGE, [1])
    assert INPUT_SHAPES == [(1, 3, 64, 96)]
    assert torch.get_num_threads() == before


def test_equal_builders_build_once() -> None:
    assert build_classifier(Build(1), "cpu") is build_classifier(Build(1), "cpu")
    assert build_classifier(Build(1), "cpu") is not build_classifier(Build(2), "cpu")
    assert TorchvisionClassifier("a", "b", "1") != TorchvisionClassifier(
        "a", "b", "2"
    )  # the checksum of the file


@pytest.mark.parametrize(
    ("size", "expected"),
    [((100, 50), (448, 224)), ((10, 1000), (32, 448)), ((448, 448), (448, 448))],
)
def test_input_size_by_longer_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert network_input_size(*size, 448) == expected


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (None, (320, 512)),
        ((64, 1000), (64, 96)),
        ((64, 96), (64, 96)),
        ((640, 512), (320, 512)),
        ((640, 800), (512, 800)),
    ],
)
def test_input_size_by_shorter_side(
    side: tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    assert network_input_size(320, 500, side) == expected
