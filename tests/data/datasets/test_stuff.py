"""Stuff classes after the thing classes, and semantic maps of their labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskseg.data.datasets.semantic_maps import SemanticMaps
from maskseg.data.datasets.stuff import with_stuff
from maskseg.errors import UserError
from maskseg.structures import Categories

THINGS = Categories(("dog", "cat"), (3, 18), (("nose",), ()), (((0, 0),), ()))


def file(folder: Path, content: object) -> Path:
    path = folder / "stuff.json"
    path.write_text(json.dumps(content))
    return path


def test_stuff_follows_the_things_in_order_of_ids(tmp_path: Path) -> None:
    found = with_stuff(
        THINGS,
        file(
            tmp_path,
            {
                "categories": [],
                "stuff_categories": [{"id": 95, "name": "grass"}, {"id": 92, "name": "sky"}],
            },
        ),
    )
    assert found.names == ("dog", "cat", "sky", "grass")
    assert found.ids == (3, 18, 92, 95)
    assert (found.num_things, found.num_stuff) == (2, 2)
    assert found.thing_categories() == THINGS
    assert found.keypoints == (("nose",), (), (), ())
    assert Categories.from_dict(found.to_dict()) == found


def test_classes_that_are_not_things_are_stuff(tmp_path: Path) -> None:
    rows = [{"id": 3, "name": "dog"}, {"id": 18, "name": "cat"}, {"id": 106, "name": "mud"}]
    assert with_stuff(THINGS, file(tmp_path, {"categories": rows})).names == ("dog", "cat", "mud")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"categories": [{"id": 3, "name": "dog"}]}, "no class that the things do not have"),
        ({"images": []}, "not JSON with a list of categories"),
        ([1], "not JSON with a list of categories"),
        ({"categories": [{"id": "x", "name": "dog"}]}, "category without an integer id"),
    ],
)
def test_files_without_stuff(tmp_path: Path, content: object, part: str) -> None:
    with pytest.raises(UserError, match=part):
        with_stuff(THINGS, file(tmp_path, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        with_stuff(THINGS, tmp_path / "absent.json")


def test_maps_have_labels_where_ids_are_given(tmp_path: Path) -> None:
    Image.fromarray(np.array([[3, 92, 7], [255, 18, 95]], dtype=np.uint8)).save(tmp_path / "a.png")
    maps = SemanticMaps(tmp_path, "data.train_semantic", ids=(3, 18, 92, 95))
    assert torch.equal(
        maps.load("a.jpg", 2, 3), torch.tensor([[0, 2, -1], [-1, 1, 3]], dtype=torch.int16)
    )
