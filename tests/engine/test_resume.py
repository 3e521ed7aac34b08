"""A resume checks that classes and data files are those of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskseg.engine.resume import (
    DIVISION,
    category_changes,
    changed_files,
    check_categories,
    hash_files,
    moved_labels,
)
from maskseg.errors import UserError
from maskseg.structures import Categories

PETS = Categories(("cat", "dog"), (1, 2))


@pytest.mark.parametrize(
    ("categories", "changes"),
    [
        (PETS, []),
        (
            Categories(("dog", "cat"), (1, 2)),
            ["'cat' had id 1 and has id 2", "'dog' had id 2 and has id 1"],
        ),
        (Categories(("cat", "dog"), (1, 5)), ["'dog' had id 2 and has id 5"]),
        (Categories(("cat", "cow"), (1, 2)), ["'dog' (id 2) is missing", "'cow' (id 2) is new"]),
        (Categories(("dog", "cat"), (2, 1)), ["their order"]),
        (
            Categories(("cat", "dog"), (1, 2), keypoints=(("nose",), ())),
            ["their keypoints, or which of them are stuff"],
        ),
    ],
)
def test_changes_of_classes_are_named(categories: Categories, changes: list[str]) -> None:
    assert category_changes(PETS, categories) == changes
    checkpoint = {"categories": PETS.to_dict()}
    if not changes:
        check_categories(checkpoint, categories, "trainer.resume=R")
        return
    with pytest.raises(UserError) as raised:
        check_categories(checkpoint, categories, "trainer.resume=R")
    assert str(raised.value).startswith("trainer.resume=R: the classes of the data are not those")
    assert "; ".join(changes) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_many_changes_are_counted() -> None:
    names = [f"c{i}" for i in range(9)]
    old = Categories(tuple(names), tuple(range(9)))
    new = Categories(tuple(names), tuple(range(10, 19)))
    with pytest.raises(UserError, match=r"'c4' had id 4 and has id 14 and 4 more; resume with"):
        check_categories({"categories": old.to_dict()}, new, "x")


def test_weights_without_classes_are_not_checked() -> None:
    check_categories({}, PETS, "x")
    check_categories({"categories": {"names": 3}}, PETS, "x")


def test_labels_that_moved() -> None:
    swapped = ["label 0 was 'cat' and is 'dog'", "label 1 was 'dog' and is 'cat'"]
    assert moved_labels(PETS, Categories(("dog", "cat"), (1, 2))) == swapped
    assert moved_labels(PETS, Categories(("cat", "dog"), (7, 8))) == []
    assert moved_labels(PETS, Categories(("car", "bus"), (1, 2))) == []
    assert moved_labels(PETS, Categories(("dog",), (1,))) == []


def test_files_are_compared_by_content(tmp_path: Path) -> None:
    train = tmp_path / "train.json"
    moved = tmp_path / "moved.json"
    train.write_text("{}")
    moved.write_text("{}")
    hashes = hash_files({"data.train_json": [str(train)], "data.val_json": [], "x": ["absent"]})
    assert list(hashes) == ["data.train_json"]
    checkpoint = {"data_files": hashes}
    assert changed_files(checkpoint, hash_files({"data.train_json": [str(moved)]})) == []
    moved.write_text("{ }")
    changed = hash_files({"data.train_json": [str(moved)], "data.val_json": [str(train)]})
    assert changed_files(checkpoint, changed) == ["data.train_json"]
    assert changed_files({}, changed) == []


@pytest.mark.parametrize(
    ("saved", "now", "is_changed"),
    [
        ({}, {}, False),
        ({DIVISION: "a"}, {DIVISION: "a"}, False),
        ({DIVISION: "a"}, {DIVISION: "b"}, True),
        ({DIVISION: "a"}, {}, True),
        ({DIVISION: "a"}, {"data.val_json": "c"}, True),
        ({}, {DIVISION: "a"}, True),
        ({"data.val_json": "c"}, {DIVISION: "a"}, True),
        ({}, {"data.val_json": "c"}, False),  # the training images are the same
    ],
)
def test_another_division_of_the_training_file(
    saved: dict[str, str], now: dict[str, str], is_changed: bool
) -> None:
    checkpoint = {"data_files": {"data.train_json": "t", **saved}}
    changed = changed_files(checkpoint, {"data.train_json": "t", **now})
    assert changed == ([DIVISION] if is_changed else [])
