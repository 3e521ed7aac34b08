"""COCO-Stuff's maps in both published encodings, with COCO's instances."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.tools import assert_refused, done, said
from omegaconf import DictConfig
from PIL import Image

from maskseg import config as configs
from maskseg.data.datasets import coco as sources
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.semantic_maps import ENCODINGS, SemanticMaps
from maskseg.data.datasets.stuff import read_labels, with_stuff
from maskseg.data.process_pool import ImageJob
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.structures import Categories
from maskseg.variants.cfm.store import write_store

HEIGHT, WIDTH = 64, 80
THINGS = {1: "person", 18: "dog"}
IDS = (1, 18, 92, 124, 182)


def ground_truth() -> np.ndarray:
    """Category ids: a dog on grass and wood, a banner, and unlabelled pixels (-1)."""
    ids = np.full((HEIGHT, WIDTH), 124)
    ids[40:], ids[:, 70:], ids[:5] = 182, 92, -1
    ids[20:40, 10:30] = 18
    return ids


def stuffthing(ids: np.ndarray) -> np.ndarray:
    return np.where(ids < 0, 255, ids - 1)


def pixelmaps(ids: np.ndarray) -> np.ndarray:
    return np.where(ids < 0, 0, np.where(ids < 92, 183, ids))


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """COCO's layout with one image per split, and the maps in both encodings."""
    categories = [{"id": number, "name": name} for number, name in THINGS.items()]
    stuff = [{"id": n, "name": f"stuff {n}", "supercategory": "stuff"} for n in IDS[2:]] + [
        {"id": 183, "name": "other", "supercategory": "other"}
    ]
    dog = {
        "id": 1,
        "image_id": 7,
        "category_id": 18,
        "bbox": [10, 20, 20, 20],
        "segmentation": [[10, 20, 30, 20, 30, 40, 10, 40]],
    }
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        content = {
            "images": [
                {"id": 7, "file_name": "000000000007.jpg", "height": HEIGHT, "width": WIDTH}
            ],
            "annotations": [dog],
        }
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(
            json.dumps({**content, "categories": categories})
        )
        (tmp_path / "annotations" / f"stuff_{split}.json").write_text(
            json.dumps({"images": [], "annotations": [], "categories": stuff})
        )
        save(tmp_path / split / "000000000007.jpg", np.full((HEIGHT, WIDTH, 3), 90))
        save(tmp_path / "stuffthingmaps" / split / "000000000007.png", stuffthing(ground_truth()))
        save(
            tmp_path / "annotations" / f"stuff_{split}_pixelmaps" / "000000000007.png",
            pixelmaps(ground_truth()),
        )
    return tmp_path


@lru_cache
def composed(*words: str) -> DictConfig:
    return configs.compose("train", ["data=coco_stuff", "data.num_workers=0", *words])


def source(root: Path, *words: str) -> CocoSource:
    config = composed(*words).copy()
    config.data.root = str(root)
    found = configs.build_source(config.data)
    assert isinstance(found, CocoSource)
    return found


def labels(ids: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda number: IDS.index(number) if number in IDS else -1)(ids)


PIXELMAPS = [
    "data.semantic_encoding=pixelmaps",
    *(
        f"data.{s}_semantic=${{data.root}}/annotations/stuff_{s}2017_pixelmaps"
        for s in ("train", "val")
    ),
]


def test_maps_of_things_and_stuff(root: Path) -> None:
    data = source(root, "data.test_transforms=[]")
    assert data.categories.ids == IDS
    assert (data.categories.num_things, data.categories.names[2:]) == (
        2,
        ("stuff 92", "stuff 124", "stuff 182"),
    )
    (batch,) = data.test_loader("val", 1)
    assert batch.semantic is not None
    assert np.array_equal(batch.semantic[0, :HEIGHT, :WIDTH].numpy(), labels(ground_truth()))
    (dog,) = batch.targets.masks.to_rle()  # type: ignore[union-attr]
    assert dog["size"] == [HEIGHT, WIDTH]


def test_maps_of_stuff_alone_leave_things_unlabelled(root: Path) -> None:
    data = source(root, *PIXELMAPS)
    assert data.categories.ids == IDS  # without 183, "other"
    found = data.semantic_maps("train").load("000000000007.jpg", HEIGHT, WIDTH)  # type: ignore[union-attr]
    assert found.dtype == torch.int16
    assert np.array_equal(found.numpy(), labels(np.where(ground_truth() == 18, -1, ground_truth())))


def test_the_list_of_labels_names_the_stuff_too(root: Path) -> None:
    lines = [
        "0: unlabeled",
        "1: person",
        "12: street sign",
        "18: dog",
        "92: banner",
        "124: grass",
        "",
        "182: wood",
    ]
    (root / "labels.txt").write_text("\n".join(lines))
    found = source(root, "data.stuff_json=${data.root}/labels.txt").categories
    assert (found.ids, found.names[2:]) == (
        IDS,
        ("banner", "grass", "wood"),
    )  # id 12 has no instances, and is not in the range of COCO's stuff


@pytest.mark.parametrize(
    ("name", "last"), [("stuffthing", 181), ("pixelmaps", 182), ("voc", 20), ("ids", 254)]
)
def test_every_value_of_an_encoding(tmp_path: Path, name: str, last: int) -> None:
    encoding = ENCODINGS[name]
    values = np.array([[*encoding.ignore_values, *range(encoding.values.start, last + 1)]])
    save(tmp_path / "a.png", values)
    found = (
        SemanticMaps(tmp_path, "key", encoding=encoding).load("a.jpg", *values.shape)[0].tolist()
    )
    wanted = {
        "stuffthing": [-1, *range(1, 183)],
        "pixelmaps": [-1, -1, *range(92, 183)],
        "voc": [-1, *range(21)],
        "ids": list(range(255)),
    }
    assert found == wanted[name]
    known = (
        SemanticMaps(tmp_path, "key", ids=[last, 5], encoding=encoding)
        .load("a.jpg", *values.shape)[0]
        .tolist()
    )
    assert known == [{last: 0, 5: 1}.get(number, -1) for number in found]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stuffthing", 182),
        ("stuffthing", 254),
        ("pixelmaps", 1),
        ("pixelmaps", 91),
        ("pixelmaps", 255),
        ("voc", 21),
    ],
)
def test_values_that_an_encoding_does_not_have(tmp_path: Path, name: str, value: int) -> None:
    # Guards against: maps of the other encoding are read, and every class is wrong
    save(tmp_path / "a.png", np.array([[ENCODINGS[name].ignore_values[0], value]]))
    with pytest.raises(
        UserError,
        match=rf"a\.png: {value} is not a value of such a semantic map "
        rf"\({ENCODINGS[name].values.start} to",
    ):
        SemanticMaps(tmp_path, "key", encoding=ENCODINGS[name]).load("a.jpg", 1, 2)


def test_what_is_refused(root: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.semantic_encoding=pixels: there are ids, stuffthing, pixelmaps, voc",
    ):
        source(root, "data.semantic_encoding=pixels")
    maps = source(root, "data.semantic_encoding=pixelmaps").semantic_maps("val")
    with pytest.raises(UserError, match="255 is not a value of such a semantic map"):
        maps.load("000000000007.jpg", HEIGHT, WIDTH)  # type: ignore[union-attr]
    (root / "stuffthingmaps" / "val2017").rename(root / "elsewhere")
    with pytest.raises(
        UserError, match=r"data\.val_semantic=.*stuffthingmaps/val2017: no such folder"
    ):
        source(root).dataset("val")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("1 person", "line 1, '1 person', is not a new number, a colon and a name"),
        ("1: person\nx: dog", "line 2, 'x: dog'"),
        ("1: person\n1: dog", "line 2, '1: dog'"),
        ("1:", "line 1, '1:'"),
        ("\n", "no class in it"),
    ],
)
def test_invalid_lists_of_labels(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UserError, match=part):
        read_labels(tmp_path / "labels.txt", "data.labels")


def test_lists_of_labels_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.labels=.*absent\.txt: cannot be read"):
        read_labels(tmp_path / "absent.txt", "data.labels")
    (tmp_path / "labels.txt").write_bytes(b"1: \xff")
    with pytest.raises(UserError, match=r"labels\.txt: not UTF-8 text"):
        read_labels(tmp_path / "labels.txt", "data.labels")


def test_things_of_a_panoptic_file_are_not_stuff(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 2, "name": "car", "isthing": 1},
        {"id": 92, "name": "banner", "isthing": 0},
        {"id": 95, "name": "bridge"},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"categories": rows}))
    things = Categories(("person",), (1,))
    assert with_stuff(things, tmp_path / "a.json").names == ("person", "banner", "bridge")
    assert with_stuff(things, tmp_path / "a.json", range(92, 95)).names == ("person", "banner")
    with pytest.raises(UserError, match="no class that the things do not have"):
        with_stuff(things, tmp_path / "a.json", range(200, 300))


def test_through_the_tool(root: Path) -> None:
    assert "2 classes, 1 images" in done("check_data", "data=coco_stuff", f"data.root={root}")
    (root / "annotations" / "stuff_val2017.json").unlink()
    assert_refused(
        said("check_data", "data=coco_stuff", f"data.root={root}"),
        "data.stuff_json=",
        "cannot be read",
    )


def test_segments_of_things_alone(root: Path) -> None:
    """Without stuff classes, maps have labels too; pixels outside of things are unlabelled."""
    job = ImageJob(7, HEIGHT, WIDTH, str(root / "train2017"), "000000000007.jpg")
    found = SegmentProposals((ground_truth() == 18).astype(np.int32), np.eye(2, dtype=bool))
    write_store(root / "segments", [job], lambda _: found, {}, 1)
    words = [
        "experiment=coco_cfm_r50_fpn",
        "data.stuff_json=null",
        f"data.train_segments={root / 'segments'}",
    ]
    data = source(root, *words, "data.train_transforms=[]", "data.val_segments=null")
    assert data.categories.ids == IDS[:2]
    sample = data.dataset("train")[0, 0, 0]
    assert sample.semantic is not None
    assert np.array_equal(sample.semantic.numpy(), np.where(ground_truth() == 18, 1, -1))
    assert sample.segment_labels is not None
    assert sorted(sample.segment_labels.tolist()) == [
        1,
        1,
    ]  # the dog as a proposal and as the ground truth; its surroundings overlap it too much
    whole = source(
        root,
        *words[:1],
        "data.val_segments=null",
        "data.stuff_json=null",
        "data.segment_sampler=null",
    ).semantic_maps("val")
    assert whole is not None
    assert np.array_equal(
        whole.load("000000000007.jpg", HEIGHT, WIDTH).numpy(), ground_truth()
    )  # for models without classes the maps keep the ids


def test_the_file_of_stuff_is_read_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counting(things: Categories, path: Path, within: range | None) -> Categories:
        read.append(path)
        return with_stuff(things, path, within)

    monkeypatch.setattr(sources, "with_stuff", counting)
    data = source(root)
    data.dataset("train")
    data.dataset("val")
    assert len(read) == 1


def test_known_classes_and_classes_of_the_validation_file(root: Path) -> None:
    config = composed().copy()
    config.data.root = str(root)
    known = configs.build_source(config.data, Categories(("dog",), (18,)))
    assert known.categories.ids == (18,)
    # Without a training file, the classes are those of the validation file.
    assert source(root, "data.train_json=null").categories.ids == IDS
