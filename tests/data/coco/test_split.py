"""One file is divided by image, the same way wherever and in whatever order it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maskseg.data.coco.checks import ImageRecord
from maskseg.data.coco.split import find_equal_files, find_shared_images, split_images
from maskseg.errors import UserError


def write(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        (folder / f"{name}.png").write_text(content)


def records(names: list[str]) -> list[ImageRecord]:
    return [ImageRecord(i, name, 10, 10) for i, name in enumerate(names)]


def val_names(
    names: list[str], folder: Path, fraction: float = 0.2, empty: tuple[str, ...] = ()
) -> set[str]:
    has_objects = np.array([name not in empty for name in names])
    is_val = split_images(records(names), folder, has_objects, fraction)
    return {name for name, selected in zip(names, is_val, strict=True) if selected}


def test_the_split_depends_on_the_names_alone(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(20)]
    chosen = val_names(names, tmp_path)
    assert len(chosen) == 4
    # A recorded split: another one would mix the images of runs of different versions.
    assert chosen == {"0.png", "18.png", "6.png", "8.png"}
    shuffled = list(np.random.default_rng(0).permutation(names))
    assert val_names(shuffled, tmp_path) == chosen
    assert val_names(names, tmp_path / "elsewhere") == chosen
    assert val_names([f"./{name}" for name in names], tmp_path) == {f"./{name}" for name in chosen}
    # One more image moves at most one of the others.
    assert len(val_names([*names, "new.png"], tmp_path) ^ chosen) <= 2


def test_copies_are_on_one_side(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(12)]
    for i, name in enumerate(names):
        (tmp_path / name).write_text(f"pixels {i % 6}")  # each content twice
    repeated = [*names, "0.png", "7.png"]
    for fraction in (0.2, 0.5, 0.8):
        has_objects = np.ones(len(repeated), dtype=bool)
        is_val = split_images(records(repeated), tmp_path, has_objects, fraction)
        sides = {
            name: {bool(v) for n, v in zip(repeated, is_val, strict=True) if n == name}
            for name in names
        }
        for i in range(6):
            assert sides[f"{i}.png"] == sides[f"{i + 6}.png"], fraction
            assert len(sides[f"{i}.png"]) == 1
        assert abs(is_val.mean() - fraction) < 0.15


def test_copies_of_an_export_are_on_one_side(tmp_path: Path) -> None:
    """Roboflow's augmented copies of one photograph differ in content and in name."""
    names = [f"photo{i}_jpg.rf.{copy * 32}.jpg" for i in range(8) for copy in ("a", "7", "f")]
    chosen = val_names(names, tmp_path, 0.25)
    assert len(chosen) == 6
    assert len({name.partition(".")[0] for name in chosen}) == 2


def test_images_without_objects_are_split_by_themselves(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(20)]
    empty = tuple(names[:10])
    chosen = val_names(names, tmp_path, 0.2, empty)
    assert len(chosen & set(empty)) == len(chosen - set(empty)) == 2
    # Both sides have an image with objects, however small a share is.
    assert len(val_names(names[:3], tmp_path, 0.01)) == 1
    assert len(val_names(names[:3], tmp_path, 0.99)) == 2


@pytest.mark.parametrize(("names", "count"), [(["0.png", "0.png"], 1), (["1.png", "2.png"], 1)])
def test_a_single_image_is_not_divided(tmp_path: Path, names: list[str], count: int) -> None:
    write(tmp_path, **{"1": "same", "2": "same"})
    with pytest.raises(
        UserError, match=rf"two different images with objects, but there is {count}"
    ):
        val_names(names, tmp_path)


def test_equal_files_are_found_by_content(tmp_path: Path) -> None:
    head = "x" * 100_000
    write(tmp_path, a=f"{head}1", b=f"{head}2", c=f"{head}1", d="1", e="1", f="2", g="", h="")
    paths = [tmp_path / f"{name}.png" for name in "abcdefgh"]
    assert find_equal_files([*paths, tmp_path / "absent.png"]) == [[0, 2], [3, 4]]


def test_images_of_two_files_are_found_by_place_and_by_content(tmp_path: Path) -> None:
    write(tmp_path, a="1", b="2", c="1", d="3")
    first = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "absent.png"]
    second = [tmp_path / name for name in ("c.png", "d.png", "./b.png", "absent.png")]
    assert find_shared_images(first, second) == [(0, 0), (1, 2), (2, 3)]
    assert find_shared_images(first, second, by_content=False) == [(1, 2), (2, 3)]
