"""Keypoints of any skeleton, from the file to the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskseg.data.coco.file import check_coco, read_coco
from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.transforms import Flip, RandomCrop, ResizeShortestEdge, Transform
from maskseg.errors import UserError

HAND = ["wrist", "thumb", "tip"]
FACE = ["nose", "left_eye", "right_eye", "mouthLeft", "mouthRight"]
HEIGHT, WIDTH = 40, 60


def dataset(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An image with a hand, a face and a stone without keypoints; 20 x 10 pixels each."""
    base: list[dict[str, Any]] = [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 3,
            "bbox": [0, 0, 20, 10],
            "keypoints": [1, 2, 2, 10, 5, 1, 0, 0, 0],
            "num_keypoints": 2,
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 7,
            "bbox": [20, 10, 20, 10],
            "keypoints": [30, 15, 2, 35, 12, 2, 25, 12, 2, 33, 18, 2, 27, 18, 2],
        },
        {"id": 3, "image_id": 1, "category_id": 9, "bbox": [30, 20, 20, 10]},
        {"id": 4, "image_id": 1, "category_id": 3, "bbox": [5, 5, 20, 10]},
    ]
    categories: list[dict[str, Any]] = [
        {"id": 3, "name": "hand", "keypoints": HAND, "skeleton": [[1, 2], [2, 3]]},
        {"id": 7, "name": "face", "keypoints": FACE, "skeleton": [[1, 2], [1, 3]]},
        {"id": 9, "name": "stone"},
    ]
    categories[0] |= changes
    images = [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}]
    rows = [{**row, "segmentation": [[0, 0, 10, 0, 10, 10]]} for row in (*base, *annotations)]
    return {"images": images, "annotations": rows, "categories": categories}


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / "1.png")
    (folder / "data.json").write_text(json.dumps(content))
    return folder / "data.json"


def sample(folder: Path, *transforms: Transform) -> Any:
    file = read_coco(write(folder, dataset()), check_images=False)
    return CocoDataset(file, folder, transforms)[0, 0, 0]


def test_classes_have_different_keypoints(tmp_path: Path) -> None:
    file = read_coco(write(tmp_path, dataset()), check_images=False)
    assert file.categories.keypoints == (tuple(HAND), tuple(FACE), ())
    assert file.categories.point_ranges == ((0, 3), (3, 8), (0, 0))
    assert file.categories.skeleton_edges == (((0, 1), (1, 2)), ((3, 4), (3, 5)), ())
    assert file.categories.flip_indices() == [0, 1, 2, 3, 5, 4, 7, 6]
    points = file.annotations(0).keypoints
    assert points is not None
    # Pixel indices become pixel centers. Unlabelled points and those of other classes are zeros.
    assert points[0].tolist() == [[1.5, 2.5, 2], [10.5, 5.5, 1], *[[0, 0, 0]] * 6]
    assert points[1].tolist() == [
        *[[0, 0, 0]] * 3,
        [30.5, 15.5, 2],
        [35.5, 12.5, 2],
        [25.5, 12.5, 2],
        [33.5, 18.5, 2],
        [27.5, 18.5, 2],
    ]
    assert not points[2:].any()
    assert file.has_keypoints()


def test_classes_with_equal_lists_share_keypoints(tmp_path: Path) -> None:
    content = dataset()
    content["categories"][2] |= {"keypoints": HAND}
    file = read_coco(write(tmp_path, content), check_images=False)
    assert file.categories.point_ranges == ((0, 3), (3, 8), (0, 3))
    assert file.categories.num_points == 8


def test_the_file_is_written_for_the_evaluation(tmp_path: Path) -> None:
    found = read_coco(write(tmp_path, dataset()), check_images=False).to_dict()
    given = dataset()
    assert [a["keypoints"] for a in found["annotations"][:2]] == [
        a["keypoints"] for a in given["annotations"][:2]
    ]
    assert [a["num_keypoints"] for a in found["annotations"]] == [2, 5, 0, 0]
    assert found["categories"] == given["categories"]


def test_flips_transform_keypoints_like_pixels_and_swap_sides(tmp_path: Path) -> None:
    # Guards against: torchvision's transforms v2 flips keypoints to W - 1 - x but boxes to W - x,
    # swaps no pairs, and moves unlabelled points.
    plain, flipped = sample(tmp_path / "a"), sample(tmp_path / "b", Flip(1.0, 0.0))
    x = WIDTH - plain.keypoints[..., 0]
    assert flipped.keypoints[0, :3].tolist() == [[58.5, 2.5, 2], [49.5, 5.5, 1], [0, 0, 0]]
    assert flipped.keypoints[1, 4].tolist() == [
        float(x[1, 5]),
        12.5,
        2,
    ]  # the right eye becomes the left one
    assert flipped.keypoints[1, 3].tolist() == [float(x[1, 3]), 15.5, 2]
    inside = flipped.keypoints[..., 2] > 0
    low, high = flipped.boxes[:, None, :2], flipped.boxes[:, None, 2:]
    assert (
        ((flipped.keypoints[..., :2] >= low) & (flipped.keypoints[..., :2] <= high))
        .all(dim=-1)[inside]
        .all()
    )
    twice = sample(tmp_path / "c", Flip(1.0, 0.0), Flip(1.0, 0.0))
    assert torch.equal(twice.keypoints, plain.keypoints)
    # An up-down flip swaps sides too; both flips are a rotation by 180 degrees.
    assert sample(tmp_path / "d", Flip(0.0, 1.0)).keypoints[1, 4].tolist() == [
        25.5,
        HEIGHT - 12.5,
        2,
    ]
    assert sample(tmp_path / "e", Flip(1.0, 1.0)).keypoints[1, 4].tolist() == [
        float(x[1, 4]),
        HEIGHT - 12.5,
        2,
    ]


def test_resizes_and_crops(tmp_path: Path) -> None:
    large = sample(tmp_path / "a", ResizeShortestEdge([80], 200))
    assert large.keypoints[0, 0].tolist() == [3.0, 5.0, 2]
    rng_free = RandomCrop(10_000)
    assert torch.equal(sample(tmp_path / "b", rng_free).keypoints, sample(tmp_path / "c").keypoints)
    cut = sample(tmp_path / "d", RandomCrop(25))
    assert len(cut.keypoints) == len(cut.boxes)
    seen = cut.keypoints[cut.keypoints[..., 2] > 0]
    assert ((seen[:, :2] >= 0) & (seen[:, :2] <= 25)).all()
    assert not cut.keypoints[cut.keypoints[..., 2] == 0].any()


def test_batches(tmp_path: Path) -> None:
    one = sample(tmp_path / "a")
    batch = collate([one, one])
    assert batch.targets is not None
    assert batch.targets.keypoints is not None
    assert batch.targets.keypoints.shape == (8, 8, 3)
    assert torch.equal(batch.targets[torch.tensor([5])].keypoints, one.keypoints[1:2])


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        ({"keypoints": [1, 2, 2, 3]}, "keypoints that are not x, y, visibility of each point"),
        ({"keypoints": "abc"}, "keypoints that are not x, y, visibility of each point"),
        ({"keypoints": [1, 2, 2] * 2}, "number of keypoints that differs from the category's"),
        (
            {"keypoints": [1, float("nan"), 2] * 3},
            "keypoints with NaN, infinity, or a visibility that is not 0, 1 or 2",
        ),
        (
            {"keypoints": [1, 2, 3] * 3},
            "keypoints with NaN, infinity, or a visibility that is not 0, 1 or 2",
        ),
    ],
)
def test_invalid_keypoints(tmp_path: Path, annotation: dict[str, Any], kind: str) -> None:
    row = {"id": 9, "image_id": 1, "category_id": 3, "bbox": [0, 0, 5, 5], **annotation}
    report = check_coco(write(tmp_path, dataset(row)))
    assert list(report.errors) == [kind]
    assert "annotation 9 (image 1)" in report.text()


@pytest.mark.parametrize(
    ("category", "kind"),
    [
        ({"keypoints": ["a", "a"]}, "category whose keypoints are not a list of distinct names"),
        ({"keypoints": 17}, "category whose keypoints are not a list of distinct names"),
        (
            {"skeleton": [[-1, 1]]},
            "category whose skeleton is not pairs of its keypoints, counted from 1",
        ),
        (
            {"skeleton": [[0, 1], [1, 6]]},
            "category whose skeleton is not pairs of its keypoints, counted from 1",
        ),
        (
            {"skeleton": [[1, 4]]},
            "category whose skeleton is not pairs of its keypoints, counted from 1",
        ),
        (
            {"skeleton": [[1, 2, 3]]},
            "category whose skeleton is not pairs of its keypoints, counted from 1",
        ),
    ],
)
def test_invalid_skeletons(tmp_path: Path, category: dict[str, Any], kind: str) -> None:
    assert kind in check_coco(write(tmp_path, dataset(**category))).errors


def test_keypoints_without_names_are_dropped_with_a_warning(tmp_path: Path) -> None:
    row = {"id": 9, "image_id": 1, "category_id": 9, "bbox": [0, 0, 5, 5], "keypoints": [1, 2, 2]}
    file = read_coco(write(tmp_path, dataset(row)), check_images=False)
    assert "keypoints of a category without keypoints, dropped" in file.report.warnings
    points = file.annotations(0).keypoints
    assert points is not None
    assert not points[4].any()


def test_dropped_keypoints_are_dropped_from_a_validation_file_too(tmp_path: Path) -> None:
    # Guards against: the training's categories name them, so they are used without checks
    train = read_coco(write(tmp_path / "a", dataset()), check_images=False)
    row = {
        "id": 9,
        "image_id": 1,
        "category_id": 3,
        "bbox": [0, 0, 5, 5],
        "keypoints": [float("nan"), 2, 7] * 3,
    }
    content = dataset(row)
    for category in content["categories"]:
        category.pop("keypoints", None)
        category.pop("skeleton", None)
    file = read_coco(
        write(tmp_path / "b", content), categories=train.categories, check_images=False
    )
    points = file.annotations(0).keypoints
    assert points is not None
    assert not points.any()
    assert {a["num_keypoints"] for a in file.to_dict()["annotations"]} == {0}


def test_validation_with_different_keypoints_is_an_error(tmp_path: Path) -> None:
    train = read_coco(write(tmp_path / "a", dataset()), check_images=False)
    path = write(tmp_path / "b", dataset(keypoints=["palm", "thumb", "tip"]))
    with pytest.raises(
        UserError,
        match="category whose keypoints differ from the training data's or the checkpoint's",
    ):
        read_coco(path, categories=train.categories, check_images=False)


def test_flip_pairs_by_name(tmp_path: Path) -> None:
    path = str(write(tmp_path, dataset()))
    source = CocoSource.from_keys(
        train_json=path, images=str(tmp_path), flip_pairs=[["thumb", "tip"]]
    )
    assert source.flip_indices() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert CocoSource.from_keys(
        train_json=path, images=str(tmp_path), flip_pairs=[]
    ).flip_indices() == list(range(8))
    with pytest.raises(
        UserError,
        match=r"data\.flip_pairs: \['thumb', 'nose'\] is not a pair of keypoints of a class",
    ):
        CocoSource.from_keys(
            train_json=path, images=str(tmp_path), flip_pairs=[["thumb", "nose"]]
        ).flip_indices()


def test_point_ranges_that_differ_from_the_data(tmp_path: Path) -> None:
    source = CocoSource.from_keys(
        train_json=str(write(tmp_path, dataset())), images=str(tmp_path), point_ranges=[[0, 17]]
    )
    with pytest.raises(
        UserError,
        match=r"data\.point_ranges=\[\[0, 17\]\], but the keypoints of .*data\.json are "
        r"\[\[0, 3\], \[3, 8\], \[0, 0\]\]",
    ):
        _ = source.categories
