"""Images with class labels and without locations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made.coco_files import SQUARE, cleaned, dataset, errors

WHOLE = [0, 0, 30, 20]


def labelled(ids: Any, *annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A dataset whose second image has labels; classes: cat (id 4) and dog (id 9)."""
    content = dataset(*annotations)
    content["images"][1] |= {"category_ids": ids, **changes}
    content["categories"].append({"id": 9, "name": "dog"})
    return content


def test_a_label_is_a_crowd_over_the_whole_image(tmp_path: Path) -> None:
    file, warnings = cleaned(tmp_path, labelled([9, 4, 9]))
    truth = file.annotations(1)
    assert truth.labels.tolist() == [0, 1]
    assert truth.crowd.tolist() == [True, True]
    assert truth.boxes.tolist() == [WHOLE, WHOLE]
    assert truth.ids.tolist() == [2, 3]
    assert truth.shapes == (None, None)
    assert warnings == {
        "image without annotations whose category_ids are read as crowds over the whole image": 1,
        "class with crowds only": 1,
    }
    assert file.labels(1) == []
    assert file.has_objects().tolist() == [True, False]
    assert len(file.annotations(0)) == 1


def test_category_ids_beside_annotations_are_no_labels(tmp_path: Path) -> None:
    """Annotation tools keep a field of this name; then that of other images is theirs, too."""
    content = labelled([9, 4], {"bbox": [1, 1, 5, 5], "segmentation": SQUARE, "category_ids": [9]})
    content["images"].append({**content["images"][1], "id": 3, "file_name": "3.png"})
    file, warnings = cleaned(tmp_path, content)
    truth = file.annotations(1)
    assert truth.labels.tolist() == [0]
    assert truth.crowd.tolist() == [False]
    assert truth.ids.tolist() == [10]
    assert len(file.annotations(2)) == 0
    assert warnings["image with category_ids beside annotations, which are not read"] == 1


def test_labels_alone(tmp_path: Path) -> None:
    content = labelled([9])
    content["annotations"] = []
    file, warnings = cleaned(tmp_path, content)
    assert [file.annotations(i).labels.tolist() for i in (0, 1)] == [[], [1]]
    assert warnings == {"only crowds": 1}


@pytest.mark.parametrize("ids", [[], None])
def test_no_labels(tmp_path: Path, ids: Any) -> None:
    assert len(cleaned(tmp_path, labelled(ids))[0].annotations(1)) == 0


@pytest.mark.parametrize("ids", [[99], ["x"], "abc", 7, [None], [4, 1.5], {"a": 1}])
def test_invalid_labels_are_reported(tmp_path: Path, ids: Any) -> None:
    assert errors(tmp_path, labelled(ids)) == {
        "category_ids of an image that are not ids of categories": 1
    }


def test_an_image_without_a_size_or_an_id_is_reported_once(tmp_path: Path) -> None:
    assert errors(tmp_path, labelled([4], height=0)) == {
        "image size that is not two positive integers": 1
    }
    assert errors(tmp_path, labelled([4], id=None)) == {"image without an integer id of 64 bits": 1}
