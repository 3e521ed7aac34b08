"""Conversion of names and classes, in both directions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskseg.errors import UserError
from maskseg.interop.classes import (
    coco_categories,
    person_categories,
    resolve_classes,
    select_class_rows,
    to_background_first,
)
from maskseg.interop.state_dict_names import describe_names, match_state_dict, translate
from maskseg.structures import Categories

PAIRS = (("a.p{i+2}.", "b.{i}."), ("c.{i}.{j}.", "d{j}.x.{2i}."), ("rest.", "others."))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("a.p2.weight", "b.0.weight"),
        ("a.p12.1.bias", "b.10.1.bias"),
        ("c.3.4.w", "d4.x.6.w"),
        ("rest.a.3.b", "others.a.3.b"),
    ],
)
def test_both_ways(ours: str, theirs: str) -> None:
    assert translate(ours, PAIRS) == theirs
    assert translate(theirs, PAIRS, back=True) == ours


@pytest.mark.parametrize(
    ("name", "back"),
    [
        ("a.p1.weight", False),
        ("a.px.weight", False),
        ("xa.p2.w", False),
        ("d1.x.3.w", True),
        ("", False),
    ],
)
def test_names_without_a_place(name: str, back: bool) -> None:
    assert translate(name, PAIRS, back) is None


def test_fit() -> None:
    state = {"b.0.w": torch.zeros(1), "others.q": torch.zeros(2), "left": torch.zeros(3)}
    found, missing, left = match_state_dict(state, ["a.p2.w", "rest.q", "rest.r", "own"], PAIRS)
    assert set(found) == {"a.p2.w", "rest.q"}
    assert (missing, left) == (["others.r", "own"], ["left"])
    assert (
        describe_names(missing=missing, left_over=left, misshapen=[])
        == "2 missing (others.r, own); 1 left over (left)"
    )
    assert describe_names(left_over=list("abcdefg")) == "7 left over (a, b, c, d, e ...)"


def test_the_classes_are_cocos(shared_data: Path) -> None:
    folder = shared_data / "coco_tiny" / "annotations"
    entries = json.loads((folder / "instances_val2017.json").read_text())["categories"]
    coco = coco_categories()
    assert dict(zip(coco.ids, coco.names, strict=True)) == {e["id"]: e["name"] for e in entries}
    assert list(coco.ids) == sorted(coco.ids)
    (entry,) = json.loads((folder / "person_keypoints_val2017.json").read_text())["categories"]
    people = person_categories()
    assert (people.names, people.ids) == ((entry["name"],), (entry["id"],))
    assert list(people.keypoints[0]) == entry["keypoints"]
    assert {tuple(sorted(line)) for line in people.skeletons[0]} == {
        tuple(sorted(e - 1 for e in line)) for line in entry["skeleton"]
    }


def test_rows_of_classes() -> None:
    own = Categories(("a", "b"), (3, 5))
    assert resolve_classes(80, False, None) == (coco_categories(), list(range(80)))
    categories, rows = resolve_classes(90, False, None)
    assert (categories, rows[:12], rows[-1]) == (coco_categories(), [*range(11), 12], 89)
    assert resolve_classes(1, True, None)[0] == person_categories()
    assert resolve_classes(2, False, own) == (own, [0, 1])
    assert resolve_classes(5, False, own) == (own, [2, 4])
    for number, given in ((1, None), (3, None), (3, own), (81, None)):
        with pytest.raises(UserError, match=f"the model has {number} classes"):
            resolve_classes(number, False, given)


def test_rows_there_and_back() -> None:
    # Theirs: background, then labels 1 to 4, of which 2 and 4 exist.
    theirs = {
        "classifier.cls_score.weight": torch.arange(10.0).view(5, 2),
        "classifier.cls_score.bias": torch.arange(5.0),
        "classifier.bbox_pred.bias": torch.arange(20.0),
        "heads.mask.predictor.bias": torch.arange(5.0),
        "other": torch.arange(5.0),
    }
    ours = select_class_rows(theirs, [2, 4], background=0)
    assert ours["classifier.cls_score.weight"].tolist() == [[4, 5], [8, 9], [0, 1]]
    assert ours["classifier.cls_score.bias"].tolist() == [2, 4, 0]
    assert ours["classifier.bbox_pred.bias"].tolist() == [8, 9, 10, 11, 16, 17, 18, 19]
    assert ours["heads.mask.predictor.bias"].tolist() == [2, 4]
    assert ours["other"].tolist() == [0, 1, 2, 3, 4]
    back = to_background_first(ours, [2, 4], 5)
    assert back["classifier.cls_score.weight"].tolist() == [[0, 1], [0, 0], [4, 5], [0, 0], [8, 9]]
    assert back["classifier.cls_score.bias"].tolist() == [0, -100, 2, -100, 4]
    assert back["classifier.bbox_pred.bias"].tolist() == [0] * 8 + [8, 9, 10, 11] + [0] * 4 + [
        16,
        17,
        18,
        19,
    ]
    assert back["heads.mask.predictor.bias"].tolist() == [0, 0, 2, 0, 4]
