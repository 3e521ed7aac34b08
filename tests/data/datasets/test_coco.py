"""A source of one COCO file that is divided, or of two that share images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskseg import config as configs
from maskseg.commands.check_data import check_data, fix_data
from maskseg.data.datasets.coco import CocoSource
from maskseg.errors import UserError


def document(numbers: range | list[int], reverse: bool = False) -> dict[str, Any]:
    """One object an image, a dog in image 2, else a cat. The last image has none."""
    images = []
    annotations = []
    for number in reversed(numbers) if reverse else numbers:
        images.append({"id": number, "file_name": f"{number}.png", "height": 20, "width": 30})
        if number != numbers[-1]:
            box = [4, 3, 10, 6]
            label = 2 if number == 2 else 1
            annotations.append(
                {"id": number + 1, "image_id": number, "category_id": label, "bbox": box}
            )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 9, "name": "unused"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (30, 20), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "all.json").write_text(json.dumps(document(range(11))))
    (tmp_path / "reversed.json").write_text(json.dumps(document(range(11), reverse=True)))
    return tmp_path


def keys_of(folder: Path, train: str, *overrides: str) -> Any:
    words = ["data=custom", f"data.images={folder}/images", f"data.train_json={folder}/{train}"]
    return configs.compose("check_data", [*words, *overrides])


def open_source(folder: Path, train: str, *overrides: str) -> CocoSource:
    source = configs.build_source(keys_of(folder, train, *overrides).data)
    assert isinstance(source, CocoSource)
    return source


def names(source: CocoSource, split: str) -> set[str]:
    return {image.file_name for image in source.file(split).images}


def test_one_file_is_divided_by_image(folder: Path) -> None:
    source = open_source(folder, "all.json", "data.val_fraction=0.3")
    assert source.splits() == ["train", "val"]
    train, val = names(source, "train"), names(source, "val")
    assert train | val == {f"{i}.png" for i in range(11)}
    assert not train & val
    assert len(val) == 3
    # The annotations follow their images, in files of any order and in any tool.
    for split in ("train", "val"):
        file = source.file(split)
        for index, image in enumerate(file.images):
            assert file.annotations(index).ids.tolist() == [image.id + 1] * (image.id != 10)
        assert len(source.test_dataset(split)) == len(file)
        sample = source.test_dataset(split)[(0, 0, 0)]
        assert sample.image[0, 0, 0] == int(sample.file_name.partition(".")[0])
    assert source.categories.names == ("cat", "dog", "unused")
    assert source.val.categories == source.train.categories
    other = open_source(folder, "reversed.json", "data.val_fraction=0.3", "data.check_images=false")
    assert names(other, "val") == val
    assert other.split_hash() == source.split_hash() != {}
    less = open_source(folder, "all.json", "data.val_fraction=0.1")
    assert less.split_hash() != source.split_hash()
    assert source.data_files()["data.train_json"] == [f"{folder}/all.json"]
    assert source.json_files() == [f"{folder}/all.json"]
    assert not source.shared_images()


def test_a_validation_file_is_used_instead_of_a_part(folder: Path) -> None:
    (folder / "val.json").write_text(json.dumps(document([1, 2, 3, 4])))
    keys = ["data.val_fraction=0.3", f"data.val_json={folder}/val.json"]
    source = open_source(folder, "all.json", *keys)
    assert names(source, "val") == {"1.png", "2.png", "3.png", "4.png"}
    assert len(source.train) == 11
    assert source.split_hash() == {}


def test_a_divided_file_is_checked_once(folder: Path) -> None:
    content = document(range(11))
    content["annotations"][4]["bbox"] = [100, 100, 5, 5]
    (folder / "edge.json").write_text(json.dumps(content))
    text = check_data(keys_of(folder, "edge.json", "data.val_fraction=0.3"))
    assert text.count("annotation outside its image") == 1, text
    for part in ("train: ", "val: "):
        assert f"{part}{folder}/edge.json (" in text
    assert "(7 of 11 images, data.val_fraction=0.3)" in text
    content["annotations"][4]["category_id"] = 77
    (folder / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        check_data(keys_of(folder, "wrong.json", "data.val_fraction=0.3"))
    assert str(raised.value).count("wrong.json") == 1
    # A repair is one of the whole file.
    output = folder / "mended.json"
    fix_data(keys_of(folder, "wrong.json", "data.val_fraction=0.3", f"fix={output}"))
    assert len(json.loads(output.read_text())["images"]) == 11


def test_classes_without_a_training_object_are_named(folder: Path) -> None:
    source = open_source(folder, "all.json", "data.val_fraction=0.9")
    kinds = source.train.report.warnings
    assert "2.png" in names(source, "val")
    finding = kinds["class without an object among the training images"]
    assert finding.examples == ["'dog': 1 objects are validated"]


def test_images_of_both_files_are_reported(folder: Path) -> None:
    Image.open(folder / "images" / "3.png").save(folder / "images" / "copy.png")
    content = document([5, 6, 11])
    content["images"].append({"id": 99, "file_name": "copy.png", "height": 20, "width": 30})
    (folder / "val.json").write_text(json.dumps(content))
    val = f"data.val_json={folder}/val.json"
    text = check_data(keys_of(folder, "all.json", val))
    assert text.splitlines()[-1] == (
        "warning: 3 of 4 validation images are training images, too, so that the metrics are too "
        "high: 5.png, 6.png, copy.png (training: 3.png)"
    )
    assert (
        "2 of 4" in open_source(folder, "all.json", val, "data.check_images=false").shared_images()
    )
    same = check_data(keys_of(folder, "all.json", f"data.val_json={folder}/all.json"))
    assert "data.val_json is the training file" in same


@pytest.mark.parametrize("value", ["0", "1", "-0.2", "20"])
def test_a_fraction_is_a_share(folder: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"data\.val_fraction=.*: expected a number above 0"):
        keys_of(folder, "all.json", f"data.val_fraction={value}")


def test_an_epoch_is_counted_before_other_files_are_made(folder: Path) -> None:
    """Segments and proposals are made when the model is known."""
    keys = ["data.repeat_threshold=0.5", "data.max_images=4"]
    source = open_source(folder, "all.json", *keys, "data.train_proposals=absent.npz")
    # In half of four images each class should occur; the dog is in one of them.
    assert source.images_per_epoch() == pytest.approx(3 + 2**0.5)
    with pytest.raises(UserError, match=r"absent\.npz"):
        source.dataset("train")
