"""Sheets of training batches: file names above the images, classes in a legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made.training import make_source, write_scenes
from PIL import Image

from maskseg.visualization import batches, layout, legends
from maskseg.visualization.batches import save_batch
from maskseg.visualization.colours import class_colour
from maskseg.visualization.legends import add_class_legend

GREY = np.full((400, 600, 3), 90, dtype=np.uint8)


def has(image: np.ndarray, label: int) -> np.ndarray:
    return (image == class_colour(label)).all(axis=2)


def test_a_batch_has_the_names_of_its_files_and_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    add_title = layout.add_title

    def spy(image: layout.RGBImage, title: str, size: int) -> layout.RGBImage:
        titles.append(title)
        return add_title(image, title, size)

    monkeypatch.setattr(batches, "add_title", spy)
    write_scenes(tmp_path, 3)
    source = make_source(tmp_path)
    batch = next(iter(source.test_loader("val", 3)))
    path = tmp_path / "batch.png"
    save_batch(batch, source.categories, path)
    assert titles == batch.file_names
    assert len(set(titles)) == 3
    sheet = np.asarray(Image.open(path))
    assert has(sheet[:60], 0).sum() > 100  # the legend
    assert has(sheet[:60], 1).sum() > 100


@pytest.mark.parametrize("count", [1, 3, 24, 25, 80, 1203])
def test_a_legend_is_limited_and_counts_the_others(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries: list[layout.HeadingText] = []
    add_heading = layout.add_heading

    def spy(texts: list[layout.HeadingText], image: layout.RGBImage, size: int) -> layout.RGBImage:
        entries.extend(texts)
        return add_heading(texts, image, size)

    monkeypatch.setattr(legends, "add_heading", spy)
    names = [f"a class with a rather long name {i}" for i in range(count)]
    labels = [label for label in range(count) for _ in range(1 + label % 2)]
    image = add_class_legend(GREY, labels, names)
    shown = [entry for entry in entries if entry.colour is not None]
    assert len(shown) == min(count, 24)
    assert [entry.text for entry in entries if entry.colour is None] == (
        [f"and {count - 24:,} more classes"] if count > 24 else []
    )
    if count > 48:
        assert shown[0].colour == class_colour(1)  # those with most objects
    assert max(len(entry.text) for entry in shown) <= 28
    top = image[: -GREY.shape[0]]
    assert (image[-400:, :600] == 90).all()
    assert (top[:, -2:] == 255).all()  # nothing is cut off
    assert top.shape[0] < 500


def test_no_objects_and_unknown_classes() -> None:
    assert add_class_legend(GREY, [], ["cat"]) is GREY
    assert add_class_legend(GREY, [7, -1], ["cat"]).shape[0] > GREY.shape[0]
