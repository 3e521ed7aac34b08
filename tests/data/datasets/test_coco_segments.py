"""COCO data as class-agnostic segments: instances and connected regions of stuff."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made.training import make_source, write_scenes
from PIL import Image

from maskseg.data.datasets.coco_segments import CocoSegments
from maskseg.data.datasets.segmentation_source import SegmentedSource
from maskseg.data.transforms import Flip
from maskseg.errors import UserError
from maskseg.masks.base import rle_to_bitmaps

SIZE = 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images with an ellipse above and a triangle below, and semantic maps.

    Stuff 7 is in three vertical stripes with 9 between them and a speck of 9 in the corner.
    """
    write_scenes(tmp_path, 3)
    ids = np.full((SIZE, SIZE), 7)
    ids[:, 20:24] = ids[:, 40:44] = 9
    ids[:3, :3] = 9
    (tmp_path / "stuff").mkdir()
    for i in (1, 2, 3):
        Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "stuff" / f"{i}.png")
    return tmp_path


def segments_of(folder: Path, **keys: object) -> CocoSegments:
    return CocoSegments(
        make_source(
            folder, val_semantic=str(folder / "stuff"), test_transforms=[Flip(1.0, 0.0)], **keys
        )
    )


def test_images_are_the_files_whatever_the_transforms(folder: Path) -> None:
    source: SegmentedSource = segments_of(folder)
    source.prepare()
    assert source.splits() == ["train", "val"]
    assert source.names("val") == ["1.png", "2.png", "3.png"]
    for index in range(3):
        image = source.image("val", index)
        wanted = np.asarray(Image.open(folder / "images" / f"{index + 1}.png"))
        assert (image.dtype, image.is_contiguous()) == (torch.uint8, True)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), wanted)


def test_truth_is_instances_and_pieces_of_stuff(folder: Path) -> None:
    source = segments_of(folder)
    for index in range(3):
        (truth,) = source.ground_truths("val", index)
        assert truth.shape == (SIZE, SIZE)
        sample = make_source(folder).dataset("val")[(0, index, 0)]
        assert sample.masks is not None
        instances = rle_to_bitmaps(sample.masks.to_rle())
        ids = np.asarray(Image.open(folder / "stuff" / f"{index + 1}.png"))
        later = np.zeros((SIZE, SIZE), dtype=bool)
        for number, mask in reversed(list(enumerate(instances))):
            assert (truth[mask & ~later] == number).all()
            later |= mask
        assert (truth[~later & (ids == 7)] != -1).mean() > 0.9
        # Nine pixels are too few for a segment.
        assert (truth[:3, :3][~later[:3, :3]] == -1).all()
        # Each segment of stuff is one stripe of one class.
        stripe = np.array([0] * 20 + [1] * 4 + [2] * 16 + [3] * 4 + [4] * 20)
        for number in set(truth[~later].tolist()) - {-1}:
            inside = truth == number
            assert len(set(ids[inside].tolist())) == 1
            assert len({stripe[x] for x in np.nonzero(inside)[1].tolist()}) == 1
            assert inside.sum() >= 25


def test_without_semantic_maps_there_are_instances_alone(folder: Path) -> None:
    (truth,) = segments_of(folder).ground_truths("train", 0)
    assert set(truth.ravel().tolist()) == {-1, 0, 1}


def test_max_images(folder: Path) -> None:
    assert segments_of(folder, max_images=2).names("val") == ["1.png", "2.png"]


def test_an_image_that_cannot_be_read_is_not_passed_over(folder: Path) -> None:
    source = segments_of(folder, skip_bad=5)
    source.names("train")
    (folder / "images" / "2.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"2\.png: not an image"):
        source.image("train", 1)


def test_a_split_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match="split=test"):
        segments_of(folder).names("test")
    with pytest.raises(UserError, match=r"data\.val_json"):
        segments_of(folder, val_json=None).names("val")
