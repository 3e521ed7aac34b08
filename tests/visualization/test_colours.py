"""Colors of classes and of their objects: stable, distinct, and of one hue within a class."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from maskseg.visualization.colours import (
    NUM_SHADES,
    as_hex,
    assign_shades,
    class_colour,
    class_colours,
    instance_colour,
    line_colour,
    to_oklab,
)
from maskseg.visualization.layout import PALETTE


def oklab(*colours: tuple[int, int, int]) -> np.ndarray:
    return to_oklab(np.array(colours))


def hue_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The angle between two hues in degrees."""
    angle = np.degrees(np.arctan2(a[2], a[1]) - np.arctan2(b[2], b[1]))
    return float(abs((angle + 180) % 360 - 180))


def test_a_class_has_its_colour_whatever_other_classes_there_are() -> None:
    assert [class_colour(label) for label in range(9)] == list(PALETTE)
    for count in (1, 3, 80, 1203):
        colours = class_colours(count)
        assert len(colours) == count
        assert tuple(colours[-1].tolist()) == class_colour(count - 1)
    assert len({class_colour(label) for label in range(250)}) == 250
    assert class_colour(-1) in {class_colour(label) for label in range(400)}  # an unknown class


@pytest.mark.parametrize("label", [*range(12), 79, 1202])
def test_shades_of_a_class_differ_in_lightness_and_not_in_hue(label: int) -> None:
    shades = [instance_colour(label, shade) for shade in range(NUM_SHADES)]
    assert shades[0] == class_colour(label)
    assert shades == [instance_colour(label, shade + NUM_SHADES) for shade in range(NUM_SHADES)]
    values = oklab(*shades)
    for a, b in itertools.combinations(values, 2):
        assert abs(a[0] - b[0]) > 0.03
        assert hue_difference(a, b) < 8
    assert values[:, 0].min() > 0.35
    assert values[:, 0].max() < 0.97


def test_nearby_objects_of_a_class_have_other_shades() -> None:
    row = np.array([[10 + 30 * i, 10, 42 + 30 * i, 60] for i in range(12)], dtype=np.float64)
    shades = assign_shades(row, [3] * 12)
    assert all(a != b for a, b in itertools.pairwise(shades))
    apart = np.array([[100 * i, 10, 100 * i + 20, 60] for i in range(5)], dtype=np.float64)
    assert sorted(assign_shades(apart, [3] * 5)) == list(range(NUM_SHADES))
    assert assign_shades(apart, [0, 1, 2, 3, 4]) == [0] * 5
    assert assign_shades(np.zeros((0, 4)), []) == []


def test_lines_on_white_keep_the_hue_and_are_visible() -> None:
    for label in range(20):
        line, colour = oklab(line_colour(label), class_colour(label))
        assert line[0] < 0.78
        assert hue_difference(line, colour) < 8
    assert as_hex((230, 159, 0)) == "#e69f00"
