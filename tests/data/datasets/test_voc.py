"""PASCAL VOC: COCO files that are generated once, and maps with background as a class."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from made.tools import assert_refused, done, said
from omegaconf import DictConfig
from PIL import Image

from maskseg import config as configs
from maskseg.data.datasets.voc import CLASSES, VocSource, read_list
from maskseg.errors import UserError
from maskseg.masks.base import rle_to_bitmaps

HEIGHT, WIDTH = 64, 96
NAMES = {
    "train": ["2007_000032", "2008_000002", "2011_003216"],
    "val": ["2007_000033", "2009_000005"],
}
PALETTE = [value for i in range(256) for value in (i, 255 - i, i // 2)]


def objects() -> np.ndarray:
    """The number of the object at each pixel; 0: none, 255: void around objects."""
    found = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for number, (top, left, bottom, right) in enumerate(
        [(8, 10, 30, 40), (8, 40, 30, 70), (36, 20, 56, 60)], 1
    ):
        found[top - 2 : bottom + 2, left - 2 : right + 2] = 255
        found[top:bottom, left:right] = number
    return found


OF_OBJECT = {1: 15, 2: 15, 3: 12}  # two people with void between them, and a dog


def classes() -> np.ndarray:
    return np.vectorize({0: 0, 255: 255, **OF_OBJECT}.__getitem__)(objects()).astype(np.uint8)


def save(path: Path, values: np.ndarray) -> None:
    """Write a PNG with a palette, as in VOC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putdata(values.ravel().tolist())
    image.putpalette(PALETTE)
    image.save(path)


def write_voc(root: Path) -> Path:
    """Write a small VOC2012: five images of two splits."""
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    draws = np.random.default_rng(0)
    for split, names in NAMES.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(
            "".join(f"{name}\n" for name in names)
        )
        for name in names:
            pixels = 60 * (objects()[..., None] % 4) + draws.integers(0, 40, (HEIGHT, WIDTH, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(
                root / "JPEGImages" / f"{name}.jpg", quality=95
            )
            save(root / "SegmentationObject" / f"{name}.png", objects())
            save(root / "SegmentationClass" / f"{name}.png", classes())
    (root / "ImageSets" / "Segmentation" / "trainval.txt").write_text(
        "\n".join(name for names in NAMES.values() for name in names)
    )
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_voc(tmp_path / "VOC2012")


@lru_cache
def composed(*words: str) -> DictConfig:
    return configs.compose(
        "train", ["data=voc", "data.num_workers=0", "data.test_transforms=[]", *words]
    )


def source(root: Path, *words: str) -> VocSource:
    config = composed(*words).copy()
    config.data.root = str(root)
    found = configs.build_source(config.data)
    assert isinstance(found, VocSource)
    found.prepare()
    return found


def test_instances_and_classes_are_those_of_the_files(root: Path) -> None:
    data = source(root)
    assert data.categories.names == (*CLASSES, "background")
    assert (data.categories.ids[0], data.categories.ids[-2:], data.categories.num_things) == (
        1,
        (20, 0),
        20,
    )
    (batch,) = data.test_loader("val", 2)
    assert batch.file_names == [f"{name}.jpg" for name in NAMES["val"]]
    assert batch.image_ids == [2007000033, 2009000005]
    assert batch.semantic is not None
    wanted = np.where(classes() == 255, -1, np.where(classes() == 0, 20, classes().astype(int) - 1))
    assert np.array_equal(batch.semantic[0, :HEIGHT, :WIDTH].numpy(), wanted)
    content = json.loads((root / "maskseg" / "val.json").read_text())
    assert [row["category_id"] for row in content["annotations"]] == [15, 15, 12] * 2
    assert [row["bbox"] for row in content["annotations"][:3]] == [
        [10, 8, 28, 22],
        [40, 8, 30, 22],
        [20, 36, 40, 20],
    ]
    masks = data.dataset("val")[(0, 0, 0)].masks
    assert masks is not None
    for number, mask in enumerate(rle_to_bitmaps(masks.to_rle()), 1):
        assert np.array_equal(mask, objects() == number)


def test_files_are_generated_once_and_again_after_changes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generated(*words: str) -> list[str]:
        source(root, *words)
        return [
            line.split(":")[0].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()
        ]

    assert generated() == ["train.json", "val.json"]
    inode = (root / "maskseg" / "train.json").stat().st_ino
    assert generated() == []
    assert (root / "maskseg" / "train.json").stat().st_ino == inode
    assert generated("data.train_list=${data.root}/ImageSets/Segmentation/trainval.txt") == [
        "train.json"
    ]
    save(root / "SegmentationObject" / "2009_000005.png", np.minimum(objects(), 1))
    assert generated("data.train_list=${data.root}/ImageSets/Segmentation/trainval.txt") == [
        "train.json",
        "val.json",
    ]
    assert (root / "maskseg" / "val.json").read_text().count(
        "bbox"
    ) == 4  # one object instead of three
    assert sorted(path.name for path in (root / "maskseg").iterdir()) == ["train.json", "val.json"]


def test_a_truncated_file_is_generated_again(root: Path) -> None:
    source(root)
    (root / "maskseg" / "train.json").write_text("{")
    assert len(source(root).train) == 3


def test_a_split_alone_and_one_file_for_both(root: Path) -> None:
    assert source(root, "data.train_json=null").splits() == ["val"]
    both = source(root, "data.val_json=${data.train_json}", "data.cache=${data.root}/other")
    assert [len(both.file(split)) for split in ("train", "val")] == [3, 3]


def test_a_cache_that_cannot_be_written_to(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(
        UserError, match=r"data\.cache=.*file/x must be a folder that can be written to"
    ):
        source(root, "data.cache=${data.root}/file/x")
    (root / "maskseg" / "train.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data\.train_json=.*maskseg/train\.json is a folder"):
        source(root)


@pytest.mark.parametrize(
    ("file", "values", "part"),
    [
        (
            "SegmentationObject",
            objects()[1:],
            "the map of objects is 63 x 96 (height x width), the image 64 x 96",
        ),
        (
            "SegmentationClass",
            classes()[:, 1:],
            "the semantic map is 64 x 95 (height x width), the image 64 x 96",
        ),
        (
            "SegmentationClass",
            np.where(classes() == 12, 21, classes()),
            "21 is not a value of such a semantic map (0 to 20, 255 for unlabelled)",
        ),
        (
            "SegmentationClass",
            np.where(classes() == 12, 0, classes()),
            "object 3 has no pixel of a class in",
        ),
        (
            "SegmentationClass",
            np.where(classes() == 12, 255, classes()),
            "object 3 has no pixel of a class in",
        ),
    ],
)
def test_inconsistent_files(root: Path, file: str, values: np.ndarray, part: str) -> None:
    save(root / file / "2008_000002.png", values)
    with pytest.raises(UserError) as raised:
        source(root)
    assert str(raised.value).startswith(
        f"{root}/ImageSets/Segmentation/train.txt: 1 error\n"
        "  1 x image whose files cannot be used\n"
    )
    assert part in str(raised.value)
    assert f"{file}/2008_000002.png" in str(raised.value)
    assert not (root / "maskseg").exists()


def test_files_that_are_missing_or_damaged(root: Path) -> None:
    (root / "SegmentationObject" / "2007_000032.png").unlink()
    (root / "JPEGImages" / "2008_000002.jpg").unlink()
    (root / "SegmentationClass" / "2011_003216.png").write_bytes(b"")
    with pytest.raises(UserError, match="3 x image whose files cannot be used") as raised:
        source(root)
    for part in (
        "2007_000032.png: the map of objects cannot be read",
        "2008_000002.jpg: no such image file",
        "2011_003216.png: the semantic map",
    ):
        assert part in str(raised.value)


def test_an_object_has_the_most_frequent_class_of_its_pixels(root: Path) -> None:
    mixed = classes()
    mixed[36:40] = np.where(mixed[36:40] == 12, 8, mixed[36:40])
    save(root / "SegmentationClass" / "2008_000002.png", mixed)
    assert [CLASSES[k] for k in source(root).train.labels(1)] == ["person", "person", "dog"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "2007_000032\n../2007_000033\n",
            r"line 2, '\.\./2007_000033', is not a name of an image of VOC",
        ),
        ("/etc/passwd", "line 1, '/etc/passwd', is not a name"),
        ("2007_000032 -1\n", "line 1, '2007_000032 -1', is not a name"),
        ("2007_000032\n\n2007_000032\n", "line 3 names 2007_000032 again"),
        (" \n", "no name of an image in it"),
    ],
)
def test_invalid_lists(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=rf"list\.txt: {part}"):
        read_list(tmp_path / "list.txt")


def test_missing_folders_and_keys(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.root=.*there is no folder JPEGImages in it; .*VOCdevkit/VOC2012"
    ):
        source(tmp_path)
    with pytest.raises(
        UserError, match=r"absent\.txt: the list of images cannot be read \(No such file"
    ):
        source(root, "data.train_list=absent.txt")
    with pytest.raises(UserError, match=r"data\.val_list is not set"):
        source(root, "data.val_list=null")


def test_things_alone(root: Path) -> None:
    data = source(
        root, "data.stuff_json=null", "data.train_semantic=null", "data.val_semantic=null"
    )
    assert (data.categories.names, data.semantic_maps("train")) == (CLASSES, None)


def test_checked_and_proposed_for_by_the_tools(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    words = ["data=voc", f"data.root={root}"]
    text = done("check_data", *words)
    assert "20 classes, 3 images (0 without objects), 9 instances" in text
    assert "recall of 6 things" in done(
        "propose",
        *words,
        "split=val",
        f"output={tmp_path / 'segments'}",
        "workers=1",
        "data.stuff_json=null",
    )
    assert_refused(said("check_data", "data=voc", f"data.root={tmp_path}"), "data.root=")


@pytest.mark.slow
def test_a_joint_model_trains_on_it(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    small = [
        "model.backbone.channels=16",
        "model.classifier.mlp.width=16",
        "trainer.device=cpu",
        "debug=smoke",
        "trainer.max_steps=2",
    ]
    small += ["data.train_transforms=[]", "data.test_transforms=[]"]
    maps = [f"data.{split}_semantic=${{data.root}}/SegmentationClass" for split in ("train", "val")]
    stores = [f"data.{split}_segments={tmp_path}/segments_{split}" for split in ("train", "val")]
    own, run = ["data=voc", f"data.root={root}"], tmp_path / "run"
    for split in ("train", "val"):
        done("propose", *own, f"split={split}", f"output={tmp_path}/segments_{split}", "workers=1")
    done(
        "train",
        "experiment=scenes_cfm",
        *own,
        *maps,
        *stores,
        *small,
        f"run_dir={run}",
        "trainer.evaluate_every=2",
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any({"semantic/mIoU", "semantic/mIoU_stuff", "segm/AP"} <= set(row) for row in rows)
    done("evaluate", f"checkpoint={run}", f"output={tmp_path / 'evaluation'}", "trainer.device=cpu")
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["semantic/mIoU"] <= 1
