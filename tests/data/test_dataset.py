"""From a COCO file and a folder to batches: reproducible whatever the workers, and clear about
files that cannot be read.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskseg import cli
from maskseg.data.coco.file import read_coco
from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.scenes import ScenesSource
from maskseg.data.options import ReadOptions
from maskseg.data.sample import Sample
from maskseg.data.transforms import ColorJitter, Flip, RandomCrop
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks
from maskseg.structures import Batch, Categories

SIZES = [(40, 60), (70, 50), (64, 64), (33, 90), (80, 40), (48, 48)]  # height, width
EMPTY = 2  # the image without objects
ONLY_CROWD = 4


def write_data(
    folder: Path,
    names: tuple[str, ...] = ("cat", "dog", "cup"),
    ids: tuple[int, ...] = (5, 9, 31),
    split: str = "train",
) -> Path:
    """Noise pictures of SIZES, two objects each, and their COCO file. -> the file."""
    rng = np.random.default_rng(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": height, "width": width})
        if i == EMPTY:
            continue
        for k in range(2):
            x, y, w, h = 3 + 10 * k, 4 + 6 * k, 15 + i, 12 + i
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            row = {
                "image_id": 100 + i,
                "category_id": ids[(i + k) % len(ids)],
                "bbox": [x, y, w, h],
                "segmentation": [polygon],
            }
            annotations.append(
                {"id": len(annotations) + 1, "iscrowd": int(i == ONLY_CROWD), "area": w * h, **row}
            )
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    path = folder / f"{split}.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def make_source(folder: Path, **keys: Any) -> CocoSource:
    write_data(folder)
    values: dict[str, Any] = {
        "train_json": str(folder / "train.json"),
        "images": str(folder / "images"),
        "num_workers": 0,
    }
    return CocoSource.from_keys(**(values | keys))


def make_dataset(folder: Path, **keys: Any) -> CocoDataset:
    names = {field.name for field in fields(ReadOptions)}
    options = ReadOptions(**{name: keys.pop(name) for name in names & keys.keys()})
    file = read_coco(write_data(folder))
    return CocoDataset(file, folder / "images", options=options, **keys)


def damage(folder: Path, *images: int) -> None:
    for i in images:
        path = folder / "images" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:200])


def assert_same(first: Batch, second: Batch) -> None:
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.sizes, second.sizes)
    assert torch.equal(first.original_sizes, second.original_sizes)
    assert (first.image_ids, first.file_names, first.read_errors) == (
        second.image_ids,
        second.file_names,
        second.read_errors,
    )
    assert first.targets is not None
    assert second.targets is not None
    for name in ("boxes", "labels", "image_index", "iscrowd"):
        assert torch.equal(getattr(first.targets, name), getattr(second.targets, name)), name
    assert first.targets.masks is not None
    assert second.targets.masks is not None
    assert first.targets.masks.to_rle() == second.targets.masks.to_rle()


RANDOM = [RandomCrop(32), Flip(0.5, 0.5), ColorJitter(0.4, 0.4, 0.4, 0.1)]


def test_a_sample_is_what_the_file_says(tmp_path: Path) -> None:
    sample = make_dataset(tmp_path)[(0, 1, 0)]
    stored = np.asarray(Image.open(tmp_path / "images" / "1.png"))
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), stored)
    assert (sample.image_id, sample.file_name, sample.original_size, sample.read_errors) == (
        101,
        "1.png",
        (70, 50),
        (),
    )
    assert sample.boxes.tolist() == [[3, 4, 19, 17], [13, 10, 29, 23]]
    assert sample.labels.tolist() == [1, 2]
    assert sample.iscrowd.tolist() == [False, False]
    assert sample.masks is not None
    assert sample.masks.area().tolist() == [16 * 13, 16 * 13]


def test_a_sample_depends_on_seed_epoch_index_and_repetition_alone(tmp_path: Path) -> None:
    def pixels(seed: int, item: tuple[int, int, int]) -> bytes:
        return (
            CocoDataset(file, tmp_path / "images", RANDOM, seed=seed)[item].image.numpy().tobytes()
        )

    file = read_coco(write_data(tmp_path))
    item = (3, 1, 0)
    first = pixels(7, item)
    other_order = CocoDataset(file, tmp_path / "images", RANDOM, seed=7)
    _ = [other_order[(0, i, 0)] for i in range(6)]
    np.random.default_rng(1).random()
    torch.manual_seed(5)
    assert other_order[item].image.numpy().tobytes() == first
    assert (
        len(
            {
                first,
                pixels(8, item),
                pixels(7, (4, 1, 0)),
                pixels(7, (3, 1, 1)),
                pixels(7, (3, 0, 0)),
            }
        )
        == 5
    )


@pytest.mark.parametrize("start", [0, 3])
def test_the_number_of_workers_changes_no_batch(tmp_path: Path, start: int) -> None:
    streams = []
    for workers in (0, 2):
        source = make_source(
            tmp_path, train_transforms=RANDOM, num_workers=workers, repeat_threshold=0.9
        )
        streams.append(list(source.train_loader(2, 8, seed=1, start_step=start)))
    assert len(streams[0]) == len(streams[1]) == 8 - start
    for alone, worked in zip(*streams, strict=True):
        assert_same(alone, worked)


def test_a_loader_that_starts_later_gives_the_same_batches(tmp_path: Path) -> None:
    source = make_source(tmp_path, train_transforms=RANDOM)
    whole = list(source.train_loader(2, 8, seed=1))
    for late, wanted in zip(
        source.train_loader(2, 8, seed=1, start_step=5), whole[5:], strict=True
    ):
        assert_same(late, wanted)


def test_images_without_objects_stay_or_go(tmp_path: Path) -> None:
    assert len(make_dataset(tmp_path)) == 6
    without = make_dataset(tmp_path, keep_empty=False)
    assert [without[(0, i, 0)].image_id for i in range(len(without))] == [
        100,
        101,
        103,
        105,
    ]  # a crowd is no object
    assert without.sizes() == [SIZES[i] for i in (0, 1, 3, 5)]
    assert without.labels() == [[0, 1], [1, 2], [0, 1], [2, 0]]
    empty = make_dataset(tmp_path)[(0, EMPTY, 0)]
    assert empty.boxes.shape == (0, 4)
    assert empty.masks is not None
    assert len(empty.masks) == 0


def test_validation_keeps_the_empty_images_that_training_leaves_out(tmp_path: Path) -> None:
    source = make_source(tmp_path, val_json=str(tmp_path / "train.json"), keep_empty=False)
    assert len(source.dataset("train")) == 4
    assert len(source.dataset("val")) == 6


def test_a_data_set_of_which_nothing_is_left(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match=r"train\.json: no image is left to use .*keep_empty=true"):
        CocoDataset(read_coco(path), tmp_path / "images", options=ReadOptions(keep_empty=False))


def test_max_images(tmp_path: Path) -> None:
    few = make_dataset(tmp_path, max_images=2, keep_empty=False)
    assert [few[(0, i, 0)].image_id for i in range(len(few))] == [100, 101]


def test_an_image_that_cannot_be_read_is_replaced_and_told(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, skip_bad=5)
    damage(tmp_path, 1, 3)
    samples = [dataset[(0, i, 0)] for i in range(6)]
    for i, sample in enumerate(samples):
        told = " ".join(sample.read_errors)
        assert (f"{i}.png" in told) == (i in (1, 3))
        assert sample.image_id not in (101, 103)
    assert sum(len(s.read_errors) for s in samples) >= 2
    again = [dataset[(0, i, 0)] for i in range(6)]
    assert [s.image_id for s in again] == [s.image_id for s in samples]
    batch = collate(samples)
    assert batch.read_errors == [message for s in samples for message in s.read_errors]


def test_a_missing_file_is_passed_over_too(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, skip_bad=1)
    (tmp_path / "images" / "0.png").unlink()
    assert "no such image file" in dataset[(0, 0, 0)].read_errors[0]


def test_one_sample_gives_up_beyond_the_limit(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, skip_bad=3)
    damage(tmp_path, *range(6))
    with pytest.raises(UserError, match=r"\.png"):
        dataset[(0, 0, 0)]


def test_a_damaged_image_is_an_error_that_names_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    damage(tmp_path, 1)
    with pytest.raises(UserError, match=r"images/1\.png: the image is damaged or truncated"):
        dataset[(0, 1, 0)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_reaches_the_user_as_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    # Guards against: torch re-raises the worker's UserError with its whole traceback as the message
    source = make_source(tmp_path, num_workers=workers)
    _ = source.train
    damage(tmp_path, *range(6))

    def main(words: list[str]) -> None:
        assert words == []
        list(source.train_loader(2, 4, seed=0))

    assert cli.run(main, "", []) == 2
    told = capsys.readouterr().err
    assert "the image is damaged or truncated" in told
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert len(told.strip().splitlines()) == 1


def test_padding_and_flat_targets(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    samples = [dataset[(0, i, 0)] for i in (0, EMPTY, 1)]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 96, 64)  # 70 and 64 -> multiples of 32
    assert batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[40, 60], [64, 64], [70, 50]]
    assert batch.original_sizes.tolist() == batch.sizes.tolist()
    assert batch.image_ids == [100, 102, 101]
    assert batch.file_names == ["0.png", "2.png", "1.png"]
    for image, sample in zip(batch.images, samples, strict=True):
        height, width = sample.size
        assert torch.equal(image[:, :height, :width], sample.image)
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()
    targets = batch.targets
    assert targets is not None
    assert targets.image_index.tolist() == [0, 0, 2, 2]
    assert targets.boxes.tolist() == [*samples[0].boxes.tolist(), *samples[2].boxes.tolist()]
    assert targets.labels.tolist() == [0, 1, 1, 2]
    assert targets.masks is not None
    assert len(targets.masks) == 4


@pytest.mark.parametrize(("divisor", "wanted"), [(1, (70, 64)), (8, (72, 64)), (64, (128, 64))])
def test_the_divisor_of_the_padding(tmp_path: Path, divisor: int, wanted: tuple[int, int]) -> None:
    dataset = make_dataset(tmp_path)
    assert collate([dataset[(0, i, 0)] for i in (1, EMPTY)], divisor).images.shape[2:] == wanted


def test_a_batch_without_any_object(tmp_path: Path) -> None:
    batch = collate([make_dataset(tmp_path)[(0, EMPTY, 0)]] * 2)
    assert batch.targets is not None
    assert batch.targets.boxes.shape == (0, 4)
    assert batch.targets.image_index.shape == (0,)
    assert batch.targets.image_index.dtype == torch.int64


def test_one_sample_without_masks_takes_them_from_the_batch() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    without = Sample(
        torch.zeros((3, 8, 8), dtype=torch.uint8),
        torch.ones(1, 4),
        torch.tensor([0]),
        torch.tensor([False]),
        None,
        0,
        "",
        (8, 8),
    )
    empty = Sample(
        without.image,
        torch.zeros(0, 4),
        nothing,
        nothing.bool(),
        AnnotatedMasks.from_file([], 8, 8),
        1,
        "",
        (8, 8),
    )
    for samples, has in (([without, empty], False), ([empty, empty], True)):
        targets = collate(samples).targets
        assert targets is not None
        assert (targets.masks is not None) is has


def test_crowds_are_marked(tmp_path: Path) -> None:
    batch = collate([make_dataset(tmp_path)[(0, i, 0)] for i in (0, ONLY_CROWD)])
    assert batch.targets is not None
    assert batch.targets.iscrowd.tolist() == [False, False, True, True]


def test_reading_gives_no_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([make_dataset(tmp_path)[(0, i, 0)] for i in range(6)])


def test_the_number_of_classes_is_checked(tmp_path: Path) -> None:
    assert make_source(tmp_path, num_classes=3).categories.names == ("cat", "dog", "cup")
    with pytest.raises(
        UserError, match=r"data\.num_classes=80, but .*train\.json has 3 categories"
    ):
        _ = make_source(tmp_path, num_classes=80).categories


def test_files_that_are_not_there(tmp_path: Path) -> None:
    source = make_source(tmp_path, train_json=str(tmp_path / "absent.json"))
    with pytest.raises(UserError, match=r"absent\.json: cannot be read"):
        _ = source.train
    with pytest.raises(UserError, match=r"data\.val_json is not set"):
        _ = make_source(tmp_path).val
    with pytest.raises(UserError, match=r"data\.images is not set"):
        _ = make_source(tmp_path, images=None).train
    with pytest.raises(UserError, match=r"0\.png|images"):
        _ = make_source(tmp_path, images=str(tmp_path / "elsewhere")).train


def test_splits(tmp_path: Path) -> None:
    assert make_source(tmp_path).splits() == ["train"]
    assert make_source(tmp_path, val_json="x").splits() == ["train", "val"]
    assert make_source(tmp_path, train_json=None).splits() == []
    only_val = make_source(tmp_path, train_json=None, val_json=str(tmp_path / "train.json"))
    assert only_val.categories.names == ("cat", "dog", "cup")


def test_classes_are_shared_by_name(tmp_path: Path) -> None:
    """The validation file has other ids in another order: a label means the same class in both."""
    write_data(tmp_path, ("cup", "cat", "dog"), (1, 2, 3), "val")
    source = make_source(tmp_path, val_json=str(tmp_path / "val.json"))
    assert (
        source.val.categories
        == source.train.categories
        == source.categories
        == Categories(("cat", "dog", "cup"), (5, 9, 31))
    )
    assert source.train.labels(0) == [0, 1]  # cat, dog
    assert source.val.labels(0) == [2, 0]  # cup, cat
    rows = source.val.to_dict()["annotations"]
    assert [row["category_id"] for row in rows[:2]] == [
        31,
        5,
    ]  # as the results of a model trained on the other file will say


def test_a_checkpoints_classes_rule(tmp_path: Path) -> None:
    known = Categories(("dog", "cup", "cat"), (1, 2, 3))
    source = make_source(tmp_path, categories=known)
    assert source.categories is known
    assert source.train.labels(0) == [2, 0]


def test_test_loader_reads_every_image_once_in_order(tmp_path: Path) -> None:
    source = make_source(tmp_path, val_json=str(tmp_path / "train.json"), train_transforms=RANDOM)
    batches = list(source.test_loader("val", 4))
    assert [batch.image_ids for batch in batches] == [[100, 101, 102, 103], [104, 105]]
    assert batches[0].sizes.tolist() == [list(size) for size in SIZES[:4]]  # no training transform
    assert [b.image_ids for b in source.test_loader("val", 2, max_images=3)] == [[100, 101], [102]]
    # the training images, tested: as they are too, and the training goes on with its own transforms
    tested = source.test_loader("train", 2, max_images=1)
    assert [b.sizes.tolist() for b in tested] == [[list(SIZES[0])]]
    assert next(iter(source.train_loader(2, 1, seed=0))).images.shape[2:] == (32, 32)


def test_batches_of_the_training_keep_portraits_apart(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    kinds = [
        {height > width for height, width in batch.sizes.tolist()}
        for batch in source.train_loader(2, 20, seed=0)
    ]
    assert all(len(kind) == 1 for kind in kinds)
    mixed = make_source(tmp_path, group_by_aspect=False)
    assert any(
        len({h > w for h, w in batch.sizes.tolist()}) == 2
        for batch in mixed.train_loader(2, 20, seed=0)
    )


def test_scenes_in_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is not a finished scenes dataset"):
        ScenesSource.from_keys(root=str(tmp_path / "mine")).prepare()


def test_no_other_image_stands_in_for_one_of_the_validation(tmp_path: Path) -> None:
    # Guards against: `skip_bad` replaces validation images too; another image is then tested twice
    # and nobody is told
    source = make_source(tmp_path, val_json=str(tmp_path / "train.json"), skip_bad=5)
    _ = source.val
    damage(tmp_path, 1, 3)
    with pytest.raises(UserError, match=r"1\.png: the image is damaged"):
        list(source.test_loader("val", 6))
