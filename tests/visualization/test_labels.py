"""The overview of a dataset, read back from what the plots show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from maskseg.data.coco.file import ObjectArrays
from maskseg.visualization.colours import as_hex, class_colour
from maskseg.visualization.labels import draw_labels


def make_objects(labels: list[int], num_images: int = 4) -> ObjectArrays:
    count = len(labels)
    sides = np.resize([16.0, 50.0, 50.0, 120.0], count)  # small, medium, medium, large
    boxes = np.stack([np.full(count, 10.0), np.full(count, 20.0), sides, sides], axis=1)
    images = np.arange(count) % max(num_images - 1, 1)  # none in the last image
    sizes = np.full((num_images, 2), 200)
    return ObjectArrays(np.array(labels, dtype=np.int64), boxes, images, sizes)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The bars, tick labels, titles and texts of the plots."""
    calls: dict[str, list[Any]] = {"barh": [], "set_yticks": [], "set_title": [], "text": []}
    for name, recorded in calls.items():
        original = getattr(Axes, name)

        def spy(
            self: Axes,
            *arguments: Any,
            original: Any = original,
            recorded: Any = recorded,
            **o: Any,
        ) -> Any:
            recorded.append((arguments, o))
            return original(self, *arguments, **o)

        monkeypatch.setattr(Axes, name, spy)
    return calls


def test_the_bars_are_the_classes_in_their_colours(shown: dict[str, list[Any]]) -> None:
    image = draw_labels(make_objects([0, 0, 2, 2, 2, 0, 0, 2]), ["cat", "never", "dog"])
    assert image.dtype == np.uint8
    assert image.shape == (825, 1650, 3)
    ((places, counts), options) = shown["barh"][0]
    assert (places.tolist(), counts.tolist()) == ([0, 1, 2], [4, 0, 4])
    assert options["color"] == [as_hex(class_colour(label)) for label in range(3)]
    assert shown["set_yticks"][0][0][1] == ["cat", "never", "dog"]
    texts = [arguments[2] for arguments, _ in shown["text"]]
    assert texts[:3] == ["4", "0", "4"]
    assert texts[3:] == ["small\n25 %", "medium\n50 %", "large\n25 %"]
    titles = [arguments[0] for arguments, _ in shown["set_title"]]
    assert "objects per image: mean 2.0, at most 3\n1 images without objects" in titles


@pytest.mark.parametrize("count", [1, 3, 30, 31, 80, 1203])
def test_many_classes_are_cut_and_counted(shown: dict[str, list[Any]], count: int) -> None:
    labels = [label for label in range(count) for _ in range(1 + label % 3)]
    image = draw_labels(make_objects(labels), [f"class {i}" for i in range(count)])
    ((_, counts), options) = shown["barh"][0]
    assert len(counts) == min(count, 30)
    title = shown["set_title"][0][0][0]
    if count > 30:
        assert counts.tolist() == sorted(counts.tolist(), reverse=True)
        rest = len(labels) - int(counts.sum())
        assert f"(and {count - 30:,} more classes with {rest:,} objects)" in title
        assert options["color"][0] == as_hex(class_colour(2))  # a class keeps its color
    for border in (image[0], image[-1], image[:, 0], image[:, -1]):  # nothing is cut off
        assert (border == 255).all()


def test_a_dataset_without_objects_or_images() -> None:
    for num_images in (0, 3):
        assert draw_labels(make_objects([], num_images), ["cat"]).ndim == 3


def test_names_with_dollars_are_no_mathematics() -> None:
    assert draw_labels(make_objects([0, 1]), ["$\\frac$", "_hidden"]).ndim == 3
