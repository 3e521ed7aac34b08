"""PASCAL-Context: class maps from .mat files, instances from VOC2010 or connected regions."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from made.tools import assert_refused, done, said
from omegaconf import DictConfig
from PIL import Image

from maskseg import config as configs
from maskseg.data.datasets.pascal_context import MIN_REGION, PascalContextSource, regions
from maskseg.errors import UserError
from maskseg.masks.base import rle_to_bitmaps

scipy_io = pytest.importorskip("scipy.io")
pytest.importorskip("cv2")

HEIGHT, WIDTH = 64, 96
NAMES = {"train": ["2008_000002", "2008_000008"], "val": ["2009_000015"]}
# Order and spelling differ from the short list, as in the published files.
LABELS = {
    1: "accordion",
    2: "aeroplane",
    9: "bag",
    85: "cloth",
    104: "dining room",
    258: "person",
    259: "grass",
    397: "table",
    430: "tv monitor",
}
CLASSES = ["aeroplane", "clothes", "diningtable", "grass", "person", "tvmonitor"]
IDS = (2, 258, 397, 430, 85, 259)  # things in ascending order, then stuff
PERSON, TABLE, GRASS, CLOTH, ACCORDION = 258, 397, 259, 85, 1
VOC_OBJECT = {1: 15, 2: 15, 3: 11}  # two people and a dining table


def label_map() -> np.ndarray:
    """A map of ids of LABELS.

    Grass, cloth, two people who touch, a table in two parts, an accordion, a speck of a person,
    and unlabelled pixels.
    """
    ids = np.full((HEIGHT, WIDTH), GRASS, dtype=np.uint16)
    ids[:6], ids[60:] = CLOTH, 0
    ids[10:30, 10:40] = PERSON
    ids[40:55, 10:20], ids[40:55, 30:45] = TABLE, TABLE
    ids[10:20, 60:80] = ACCORDION
    ids[30:33, 85:88] = PERSON
    return ids


def object_map() -> np.ndarray:
    """VOC's instances of the same image, with two separate people."""
    found = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    found[10:30, 10:25], found[10:30, 25:40], found[40:55, 10:45] = 1, 2, 3
    return found


def write_mat(
    path: Path, values: np.ndarray, compressed: bool = True, name: str = "LabelMap"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io.savemat(path, {name: values}, do_compression=compressed)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Small versions of both datasets; one of the three images has VOC's instances."""
    context, voc = tmp_path / "context", tmp_path / "VOC2010"
    for folder in ("JPEGImages", "ImageSets/Main", "SegmentationObject", "SegmentationClass"):
        (voc / folder).mkdir(parents=True)
    for split, names in NAMES.items():
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(
            "".join(f"{name}\n" for name in names)
        )
        for name in names:
            Image.fromarray((label_map() % 250).astype(np.uint8)).convert("RGB").save(
                voc / "JPEGImages" / f"{name}.jpg"
            )
            write_mat(
                context / "trainval" / f"{name}.mat", label_map(), compressed=name.endswith("2")
            )
    objects = object_map()
    Image.fromarray(objects).save(voc / "SegmentationObject" / "2008_000002.png")
    Image.fromarray(np.array([0, *VOC_OBJECT.values()], dtype=np.uint8)[objects]).save(
        voc / "SegmentationClass" / "2008_000002.png"
    )
    (context / "labels.txt").write_text(
        "".join(f"{number}: {name}\n" for number, name in LABELS.items())
    )
    (context / "59_labels.txt").write_text(
        "".join(f"{number}: {name}\n" for number, name in enumerate(CLASSES, 1))
    )
    return tmp_path


@lru_cache
def composed(*words: str) -> DictConfig:
    return configs.compose(
        "train",
        [
            "data=pascal_context",
            "data.num_workers=0",
            "data.test_transforms=[]",
            "data.train_transforms=[]",
            *words,
        ],
    )


def source(root: Path, *words: str) -> PascalContextSource:
    config = composed(*words).copy()
    config.data.root, config.data.voc = str(root / "context"), str(root / "VOC2010")
    found = configs.build_source(config.data)
    assert isinstance(found, PascalContextSource)
    found.prepare()
    return found


def labels(ids: tuple[int, ...], other: int = -1) -> np.ndarray:
    return np.vectorize(lambda number: ids.index(number) if number in ids else other)(label_map())


def test_classes_of_pixels(root: Path) -> None:
    data = source(root)
    assert (data.categories.ids, data.categories.num_things) == (IDS, 4)
    assert data.categories.names == (
        "aeroplane",
        "person",
        "diningtable",
        "tvmonitor",
        "clothes",
        "grass",
    )
    (batch,) = data.test_loader("train", 2)
    assert batch.image_ids == [2008000002, 2008000008]
    assert batch.semantic is not None
    for found in batch.semantic:  # of a compressed and an uncompressed file
        assert np.array_equal(found[:HEIGHT, :WIDTH].numpy(), labels(IDS))


def test_background_as_the_sixtieth_class(root: Path) -> None:
    data = source(root, "data.background=true")
    assert data.categories.ids == (2, 258, 397, 430, 0, 85, 259)
    assert (data.categories.names[4], data.categories.num_things) == ("background", 4)
    maps = data.semantic_maps("val")
    assert maps is not None
    ids = data.categories.ids
    assert np.array_equal(
        maps.load("2009_000015.jpg", HEIGHT, WIDTH).numpy(), labels(ids, ids.index(0))
    )


def masks_of(data: PascalContextSource, split: str, index: int) -> list[tuple[str, np.ndarray]]:
    sample = data.dataset(split)[(0, index, 0)]
    assert sample.masks is not None
    names = [data.categories.names[k] for k in sample.labels.tolist()]
    return list(zip(names, rle_to_bitmaps(sample.masks.to_rle()), strict=True))


def test_instances_of_voc_are_used_where_available(root: Path) -> None:
    found = masks_of(source(root), "train", 0)
    assert [name for name, _ in found] == ["person", "person", "diningtable"]
    for number, (_, mask) in enumerate(found, 1):
        assert np.array_equal(mask, object_map() == number)


def test_connected_regions_are_instances_elsewhere(root: Path) -> None:
    data = source(root)
    for split, index in (("train", 1), ("val", 0)):
        found = masks_of(data, split, index)
        assert [name for name, _ in found] == [
            "person",
            "diningtable",
            "diningtable",
        ]  # the two people are one object, the speck is dropped
        assert np.array_equal(found[0][1], (label_map() == PERSON) & (np.arange(WIDTH) < 60))
        assert np.array_equal(found[1][1] | found[2][1], label_map() == TABLE)


def test_regions_are_4_connected_and_have_a_minimum_size() -> None:
    ids = np.full((20, 20), -1, dtype=np.int16)
    ids[:5, :5], ids[5:10, 5:10], ids[15:, 10:14] = 7, 7, 7
    ids[0, 10:] = 3
    assert MIN_REGION == 25
    found = list(regions(ids, [7, 8]))
    assert [(number, int(mask.sum()), int(mask.argmax())) for number, mask in found] == [
        (7, 25, 0),
        (7, 25, 105),
    ]
    assert list(regions(np.full((4, 4), -1, dtype=np.int16), [7])) == []


def test_custom_lists_and_instances_that_are_added_later(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "own.txt").write_text("2008_000008\n")
    words = ["data.train_list=${data.root}/../own.txt"]
    assert [image.file_name for image in source(root, *words).train.images] == ["2008_000008.jpg"]
    assert "train.json" in capsys.readouterr().out
    source(root, *words)
    assert capsys.readouterr().out == ""
    for folder in ("SegmentationObject", "SegmentationClass"):
        (root / "VOC2010" / folder / "2008_000008.png").write_bytes(
            (root / "VOC2010" / folder / "2008_000002.png").read_bytes()
        )
    assert source(root, *words).train.labels(0) == [1, 1, 2]


@pytest.mark.parametrize(
    ("values", "name", "part"),
    [
        (label_map()[1:], "LabelMap", "LabelMap is 63 x 96 (height x width), the image 64 x 96"),
        (label_map(), "Labels", "it has no variable LabelMap (Labels)"),
        (label_map().astype(np.float64), "LabelMap", "LabelMap is of type float64, not uint16"),
        (label_map() + 300, "LabelMap", "697 is not a value of such a semantic map (0 to 430)"),
    ],
)
def test_invalid_maps(root: Path, values: np.ndarray, name: str, part: str) -> None:
    write_mat(root / "context" / "trainval" / "2008_000008.mat", values, name=name)
    with pytest.raises(UserError, match="1 x image whose files cannot be used") as raised:
        source(root)
    assert part in str(raised.value)
    assert "2008_000008.mat" in str(raised.value)


def test_missing_and_damaged_maps(root: Path) -> None:
    folder = root / "context" / "trainval"
    (folder / "2008_000008.mat").unlink()
    (folder / "2008_000002.mat").write_bytes((folder / "2008_000002.mat").read_bytes()[:300])
    with pytest.raises(UserError, match="2 x image whose files cannot be used") as raised:
        source(root)
    assert "2008_000008.mat: cannot be read (No such file" in str(raised.value)
    assert "2008_000002.mat: not a map of PASCAL-Context, or damaged" in str(raised.value)


def test_inconsistent_lists_of_classes(root: Path) -> None:
    path = root / "context" / "59_labels.txt"
    path.write_text("1: aeroplane\n2: zebra\n")
    with pytest.raises(
        UserError, match=r"data\.classes=.*59_labels\.txt: 'zebra' is not a class of data\.labels="
    ):
        source(root)
    path.write_text("1: grass\n")
    with pytest.raises(UserError, match=r"59_labels\.txt: none of VOC's classes"):
        source(root)
    path.unlink()
    with pytest.raises(UserError, match=r"data\.classes=.*59_labels\.txt: cannot be read"):
        source(root)


def test_missing_folders_and_keys(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_semantic is not set"):
        source(root, "data.train_semantic=null")
    (root / "context" / "trainval").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"data\.train_semantic=.*trainval: no such folder"):
        source(root)
    (root / "VOC2010" / "JPEGImages").rename(root / "pictures")
    with pytest.raises(UserError, match=r"data\.voc=.*there is no folder JPEGImages"):
        source(root)


def test_checked_and_proposed_for_by_the_tools(root: Path, tmp_path: Path) -> None:
    words = ["data=pascal_context", f"data.root={root}/context", f"data.voc={root}/VOC2010"]
    assert "4 classes, 2 images (0 without objects), 6 instances" in done("check_data", *words)
    assert "recall of 3 things" in done(
        "propose",
        *words,
        "split=val",
        f"output={tmp_path / 'segments'}",
        "workers=1",
        "data.stuff_json=null",
    )
    (root / "context" / "labels.txt").write_text("none")
    assert_refused(said("check_data", *words), "data.labels=")
