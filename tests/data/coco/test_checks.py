"""One report lists all problems of a dataset before training; repairable ones are repaired."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import cleaned, dataset, errors, write
from PIL import Image

from maskseg.data.coco.annotation_checks import find_duplicates
from maskseg.data.coco.file import check_coco, read_coco
from maskseg.data.coco.report import Report
from maskseg.errors import UserError

# The file itself


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"images": [',
        json.dumps(dataset())[:-30],
        "hello",
        '{"images": [1,,]}',
        "NaN,",
    ],
)
def test_not_json(tmp_path: Path, text: str) -> None:
    assert errors(tmp_path, text) == {"not JSON: the file is truncated or damaged": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": [' + "9" * 5000 + "]}"])
def test_json_that_no_parser_takes(tmp_path: Path, text: str) -> None:
    """Neither is damaged, so the report does not say so."""
    assert errors(tmp_path, text) == {"JSON that cannot be parsed": 1}


def test_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"a\.json(.|\n)*not UTF-8"):
        read_coco(tmp_path / "a.json")
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_coco(path)


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(dataset()), encoding="utf-8-sig")
    assert len(read_coco(tmp_path / "a.json")) == 2


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_not_coco(tmp_path: Path, key: str) -> None:
    content = dataset()
    del content[key]
    assert errors(tmp_path, content) == {"not a COCO dataset": 1}
    assert f"'{key}'" in check_coco(write(tmp_path, content)).text()
    assert errors(tmp_path, dataset() | {key: {"a": 1}}) == {"not a COCO dataset": 1}
    assert errors(tmp_path, dataset()["annotations"]) == {"not a COCO dataset": 1}  # a results file
    assert errors(tmp_path, {}) == {"not a COCO dataset": 3}


# Ids


def test_duplicate_ids(tmp_path: Path) -> None:
    content = dataset({"id": 1}, {"id": 7}, {"id": 7}, {"id": 7})
    for annotation in content["annotations"]:
        annotation["bbox"] = [1, 1, 2, 2]
    assert errors(tmp_path, content) == {"annotation id that is used more than once": 2}
    assert "id 7, 3 times" in check_coco(write(tmp_path, content)).text()
    content = dataset()
    content["images"][1]["id"] = 1
    assert errors(tmp_path, content) == {"image id that is used more than once": 1}
    content = dataset()
    content["categories"].append({"id": 4, "name": "dog"})
    assert errors(tmp_path, content) == {"category id that is used more than once": 1}


def test_ids_of_missing_images_and_categories(tmp_path: Path) -> None:
    box = {"bbox": [1, 1, 2, 2]}
    content = dataset({"image_id": 99, **box}, {"image_id": 98, **box}, {"category_id": 5, **box})
    assert errors(tmp_path, content) == {
        "annotation of an image that is not in the file": 2,
        "annotation of a category that is not in the file": 1,
    }
    text = check_coco(write(tmp_path, content)).text()
    assert "annotation 10 (image 99)" in text
    assert "annotation 12 (image 2): category 5" in text
    content = dataset() | {"categories": []}
    assert errors(tmp_path, content) == {
        "no categories": 1,
        "annotation of a category that is not in the file": 1,
    }


def test_the_annotations_of_an_unusable_category_are_not_reported(tmp_path: Path) -> None:
    """They would be called annotations of a category that is not in the file."""
    for name in ("c\ud800t", None, " "):
        content = dataset() | {"categories": [{"id": 4, "name": name}, {"id": 5, "name": "dog"}]}
        assert sum(errors(tmp_path, content).values()) == 1


def test_an_empty_report_says_only_what_is_true(tmp_path: Path) -> None:
    """Lists of which nothing can be used are not empty."""
    content = dataset()
    for image in content["images"]:
        image["id"] = str(image["id"])
    content["annotations"] = [{**content["annotations"][0], "image_id": "1"}]
    text = check_coco(write(tmp_path, content)).text()
    assert "'images' is empty" not in text
    assert "none of the 1 annotations can be used" in text


def test_ids_of_other_types(tmp_path: Path) -> None:
    content = dataset(
        {"id": "x", "bbox": [1, 1, 2, 2]},
        {"image_id": "2"},
        {"category_id": None},
        {"image_id": 2**70},
        {"id": True},
    )
    for annotation in content["annotations"]:
        annotation.setdefault("bbox", [1, 1, 2, 2])
    assert errors(tmp_path, content) == {
        "annotation id that is not an integer of 64 bits": 2,
        "image_id that is not an integer of 64 bits": 2,
        "category_id that is not an integer of 64 bits": 1,
    }
    content = dataset()
    content["images"] += [{"file_name": "a"}, 3, None]
    content["categories"] += [{"id": 9}, {"name": "x"}, "y"]
    content["annotations"] += [{"id": 4, "category_id": 4}, 0, None, {"id": 8, "image_id": 1}]
    assert errors(tmp_path, content) == {
        "image without an integer id of 64 bits": 3,
        "category without an integer id or a name": 3,
        "entry of 'annotations' that is not an annotation": 4,
    }


def test_ids_are_filled_in(tmp_path: Path) -> None:
    content = dataset(
        {"id": None, "bbox": [1, 1, 2, 2]},
        {"id": 0, "bbox": [1, 1, 2, 2]},
        {"id": 3.0, "bbox": [1, 1, 2, 2]},
    )
    file, warnings = cleaned(tmp_path, content)
    assert file.annotations(1).ids.tolist() == [4, 5, 3]
    assert warnings.pop("object without a mask, beside objects with masks") == 3
    assert sorted(warnings.values()) == [1, 1]


def test_repeated_names_are_a_warning(tmp_path: Path) -> None:
    content = dataset()
    content["images"][1]["file_name"] = "1.png"
    content["categories"].append({"id": 5, "name": "cat"})
    assert set(cleaned(tmp_path, content)[1]) == {
        "file name of more than one image",
        "category name of more than one id, read as one class",
    }


# Images


@pytest.mark.parametrize("height", [0, -3, 1.5, "20", None, True])
def test_image_sizes(tmp_path: Path, height: Any) -> None:
    content = dataset()
    content["images"][0]["height"] = height
    assert errors(tmp_path, content) == {"image size that is not two positive integers": 1}


def test_image_of_too_many_pixels(tmp_path: Path) -> None:
    content = dataset()
    content["images"][0] |= {"height": 60000, "width": 60000}
    assert errors(tmp_path, content) == {"image of more pixels than data.max_pixels": 1}


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "a\0b", 5, "a\ud800.png"])
def test_unsafe_names(tmp_path: Path, name: Any) -> None:
    content = dataset()
    content["images"][0]["file_name"] = name
    assert errors(tmp_path, content) == {"file name that is not safe": 1}


@pytest.mark.parametrize("name", ["", None, []])
def test_missing_names(tmp_path: Path, name: Any) -> None:
    content = dataset()
    content["images"][0]["file_name"] = name
    assert errors(tmp_path, content) == {"image without a file_name": 1}


def test_image_files(tmp_path: Path) -> None:
    root, content = tmp_path / "images", dataset()
    root.mkdir()
    names = ["good", "missing", "text", "size", "link", "bomb", "stored"]
    content["images"] = [
        {"id": i + 1, "file_name": f"{n}.png", "height": 20, "width": 30}
        for i, n in enumerate(names)
    ]
    picture, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "good.png")
    picture.save(root / "stored.png", exif=exif)  # the stated size is that of the stored pixels
    picture.rotate(90, expand=True).save(root / "size.png")
    picture.save(tmp_path / "outside.png")
    Image.new("1", (200, 200)).save(root / "bomb.png")
    (root / "text.png").write_text("hello")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    assert errors(tmp_path, content, image_root=root) == {
        "image file that does not exist": 1,
        "image file that cannot be used": 2,
        "image file whose size differs from the stated one": 1,
        "file name that is not safe": 1,
    }
    text = check_coco(write(tmp_path, content), image_root=root, max_pixels=10_000).text()
    for expected in (
        "missing.png",
        "text.png",
        "30 x 20 (height x width), the annotations state 20 x 30",
        "200 x 200",
        "link.png",
    ):
        assert expected in text
    assert len(read_coco(tmp_path / "data.json", image_root=root, check_images=False)) == 7
    content["images"] = [content["images"][i] for i in (0, 6)]
    content["annotations"] = []
    assert len(read_coco(write(tmp_path, content), image_root=root)) == 2


# The report


def test_report_shows_ten_problems_and_every_kind(tmp_path: Path) -> None:
    unknown = [{"image_id": 50 + i, "bbox": [1, 1, 2, 2]} for i in range(1000)]
    content = dataset(*unknown, {"bbox": [1, 1]}, {"bbox": [1, float("nan"), 1, 1]})
    assert errors(tmp_path, content) == {
        "bbox that is not four numbers": 1,
        "annotation of an image that is not in the file": 1000,
        "bbox with NaN or infinity": 1,
    }
    lines = check_coco(tmp_path / "data.json").text().splitlines()
    assert lines[0] == f"{tmp_path / 'data.json'}: 1002 errors"
    assert "  1000 x annotation of an image that is not in the file" in lines
    assert "      ... and 992 more" in lines
    assert sum(line.startswith("      annotation") for line in lines) == 10


def test_report_text() -> None:
    report = Report("a.json")
    assert report.text() == "a.json: no problems found"
    report.warn("odd", "x", "y")
    report.warn("odd", "z")
    report.error("bad", "here", count=3)
    assert report.text().splitlines() == [
        "a.json: 3 errors",
        "  3 x bad",
        "      here",
        "      ... and 2 more",
        "a.json: 3 warnings",
        "  3 x odd",
        "      x",
        "      y",
        "      z",
    ]


def test_duplicates() -> None:
    assert find_duplicates(np.array([3, 1, 3, 2, 1, 3])) == [(1, 2), (3, 3)]
    assert find_duplicates(np.array([], dtype=np.int64)) == []


def test_many_annotations_are_checked_quickly(tmp_path: Path) -> None:
    row = (
        '{"id": %d, "image_id": %d, "category_id": 4, "bbox": [4, 3, 10, 6], '
        '"segmentation": [[4, 3, 14, 3, 14, 9, 4, 9]]}'
    )
    content = dataset() | {"annotations": []}
    text = json.dumps(content).replace(
        '"annotations": []',
        '"annotations": [' + ",".join(row % (i + 1, i % 2 + 1) for i in range(100_000)) + "]",
    )
    start = time.perf_counter()
    file = read_coco(write(tmp_path, text))
    assert time.perf_counter() - start < 15  # 1 s on an idle machine
    assert len(file.annotations(0)) == 50_000
