"""File names that do not name a file as they are: found in another spelling, or explained."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import cleaned, dataset, errors, write
from PIL import Image

from maskseg.data.coco.file import check_coco, read_coco
from maskseg.data.coco.image_names import name_from_url, shorter_names

ACCENT = unicodedata.normalize("NFC", "é")


def stated(name: Any, **fields: Any) -> dict[str, Any]:
    content = dataset()
    content["images"] = [{"id": 1, "file_name": name, "height": 20, "width": 30, **fields}]
    return content


def save(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(root / name)


@pytest.mark.parametrize("check_images", [True, False])
@pytest.mark.parametrize(
    ("name", "actual", "kind"),
    [
        ("sub\\a.png", "sub/a.png", "file name with backslashes, read as folders"),
        ("a%20b.png", "a b.png", "with or without %-escapes"),
        ("a b.png", "a%20b.png", "with or without %-escapes"),
        ("sub%5Ca.png", "sub\\a.png", "with or without %-escapes"),
        (f"{ACCENT}.png", unicodedata.normalize("NFD", f"{ACCENT}.png"), "Unicode form"),
        (unicodedata.normalize("NFD", f"{ACCENT}.png"), f"{ACCENT}.png", "Unicode form"),
        (f"s\\{ACCENT}.png", unicodedata.normalize("NFD", f"s/{ACCENT}.png"), "backslashes"),
    ],
)
def test_names_in_another_spelling(
    tmp_path: Path, name: str, actual: str, kind: str, check_images: bool
) -> None:
    save(tmp_path / "images", actual)
    path = write(tmp_path, stated(name))
    file = read_coco(path, image_root=tmp_path / "images", check_images=check_images)
    assert file.images[0].file_name == actual
    assert kind in file.report.text()


@pytest.mark.parametrize("name", ["a%20b.png", "sub\\a.png", f"{ACCENT}.png", "a b.png"])
def test_a_name_that_is_right_is_kept(tmp_path: Path, name: str) -> None:
    save(tmp_path / "images", name)
    save(tmp_path / "images", "a b.png")
    save(tmp_path / "images", "sub/a.png")
    file = read_coco(write(tmp_path, stated(name)), image_root=tmp_path / "images")
    assert file.images[0].file_name == name
    assert not file.report.warnings


def test_no_spelling_leads_out_of_the_folder(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    (tmp_path / "images").mkdir()
    for name in ("%2e%2e/a.png", "..\\a.png", "%2Fa.png"):
        assert sum(errors(tmp_path, stated(name), image_root=tmp_path / "images").values()) == 1


@pytest.mark.parametrize("actual", ["train2017/1.png", "1.png"])
def test_images_of_lvis_have_a_url_instead_of_a_name(tmp_path: Path, actual: str) -> None:
    save(tmp_path / "images", actual)
    content = stated(None, coco_url="http://images.cocodataset.org/train2017/1.png")
    file = read_coco(write(tmp_path, content), image_root=tmp_path / "images")
    assert file.images[0].file_name == actual
    assert "coco_url" in file.report.text()
    assert cleaned(tmp_path, content)[0].images[0].file_name == "train2017/1.png"


def test_names_of_urls() -> None:
    assert name_from_url("https://x.org/a/b/c.jpg?size=2") == "b/c.jpg"
    assert name_from_url("c.jpg") == "c.jpg"
    for url in (None, "", 3, "http://[bad", "https://x.org/"):
        assert name_from_url(url) is None
    assert list(shorter_names("C:\\data\\x\\1.png")) == ["data/x/1.png", "x/1.png", "1.png"]


def test_what_the_folder_has_instead_is_named(tmp_path: Path) -> None:
    root = tmp_path / "images"
    save(root, "a.PNG")
    save(root, "b.png")

    def report(name: str, folder: Path = root) -> str:
        return check_coco(write(tmp_path, stated(name)), image_root=folder).text()

    assert "the folder has a.PNG" in report("a.png")
    assert "the folder has b.png" in report("b.jpg")
    assert "has b.png: file_name repeats a part of data.images" in report("images/b.png")
    assert "there is no such folder: see data.images" in report("b.png", tmp_path / "x")
    assert report("c.png").endswith("c.png")


# Images of 16 bits


def save_gray(path: Path, largest: int) -> None:
    values = np.full((20, 30), 5, dtype=np.uint16)
    values[0, 0] = largest
    Image.fromarray(values).save(path)


@pytest.mark.parametrize(("largest", "warns"), [(4095, True), (16383, True), (16384, False)])
@pytest.mark.parametrize("name", ["1.png", "1.tif"])
def test_a_small_part_of_16_bits(tmp_path: Path, name: str, largest: int, warns: bool) -> None:
    save_gray(tmp_path / name, largest)
    report = check_coco(write(tmp_path, stated(name)), image_root=tmp_path)
    assert bool(report.warnings) == warns
    if warns:
        assert f"image 1 ({name}): values up to {largest} of 65535 become 0.." in report.text()
        assert "(1 of 1 were decoded)" in report.text()


def test_one_image_of_the_whole_range_shows_that_it_is_used(tmp_path: Path) -> None:
    content = stated("1.png")
    content["images"].append({**content["images"][0], "id": 2, "file_name": "2.png"})
    save_gray(tmp_path / "1.png", 700)
    save_gray(tmp_path / "2.png", 60000)
    assert not check_coco(write(tmp_path, content), image_root=tmp_path).warnings
