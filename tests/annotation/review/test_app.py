"""The routes of the review page: their responses, and what they write."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.reviews import HEIGHT, SQUARE, WIDTH, disc, proposals, write_proposals
from PIL import Image
from pycocotools import mask as coco_mask

pytest.importorskip("fastapi", reason="needs the extra demo")
from fastapi.testclient import TestClient

from maskseg.annotation.grabcut import GrabCutResult, refine_with_strokes
from maskseg.annotation.review.app import review_app
from maskseg.annotation.review.guards import Access, Uploads
from maskseg.annotation.review.serve import CocoImageStore
from maskseg.annotation.review.state import ReviewFile
from maskseg.data.coco.file import read_coco

PNG = {"content-type": "image/png"}


def strokes(
    foreground: np.ndarray | None = None,
    background: np.ndarray | None = None,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> bytes:
    """The PNG that the page sends: green is foreground, red is background, the rest black."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    for painted, channel in ((background, 0), (foreground, 1)):
        if painted is not None:
            pixels[painted] = 0
            pixels[painted, channel] = 255
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


class Page:
    """A client of the review page of a file; records the calls of the segmentation."""

    def __init__(self, path: Path, cut: Any = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.path, self.result, self.fallback = path, disc(6), ""
        self.file = ReviewFile(path, delay=1e6)
        self.images = CocoImageStore(read_coco(path, check_images=False), path.parent, 30_000)
        access = Access("127.0.0.1")
        app = review_app(self.file, self.images, cut or self.cut, access, Uploads(100_000, 2))
        self.client = TestClient(
            app,
            base_url="http://127.0.0.1:8000",
            headers={"authorization": f"Bearer {access.token}"},
        )

    def cut(self, *arguments: Any) -> GrabCutResult:
        self.calls.append(arguments)
        return GrabCutResult(self.result, self.fallback)

    def annotations_on_disk(self) -> dict[int, dict[str, Any]]:
        """The annotations in the file by id, after opening the page."""
        self.client.get("/api/items")
        return {a["id"]: a for a in json.loads(self.path.read_text())["annotations"]}


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page(write_proposals(tmp_path))
    yield page
    page.file.close()


def pixels_of(answer: Any) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))


def test_the_page_and_its_parts(page: Page) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/app.js", "text/javascript"),
        ("/view.js", "text/javascript"),
        ("/style.css", "text/css"),
    ):
        answer = page.client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
    assert 'src="app.js"' in page.client.get("/").text
    for path in ("/review.py", "/../review.py", "/docs", "/openapi.json", "/masks.json", "/7.png"):
        assert page.client.get(path).status_code == 404


def test_items_are_grouped_by_image(page: Page) -> None:
    page.client.post("/api/annotations/9/decision?decision=rejected")
    content = page.client.get("/api/items").json()
    assert content == {
        "file": "masks.json",
        "ids": [1, 5, 2, 9],
        "image_ids": [7, 7, 3, 3],
        "category_ids": [4, 9, 4, 9],
        "reviews": ["unreviewed", "unreviewed", "unreviewed", "rejected"],
        "images": {"7": "7.png", "3": "3.png"},
        "categories": {"4": "cat", "9": "dog"},
        "undoable": 1,
    }


def test_opening_the_page_writes_the_file(page: Page) -> None:
    page.client.post("/api/annotations/1/decision?decision=accepted")
    assert json.loads(page.path.read_text()) == proposals()
    assert page.annotations_on_disk()[1] == {**proposals()["annotations"][0], "review": "accepted"}


def test_one_annotation(page: Page) -> None:
    common = {
        "height": HEIGHT,
        "width": WIDTH,
        "review": "unreviewed",
        "removed": False,
        "removable": False,
        "undoable": 0,
        "trouble": "",
        "fallback": "",
    }
    assert page.client.get("/api/annotations/2").json() == {
        "id": 2,
        "image_id": 3,
        "category_id": 4,
        "box": [5, 10, 7, 30],
        "score": 0.25,
        **common,
    }
    assert page.client.get("/api/annotations/5").json() == {
        "id": 5,
        "image_id": 7,
        "category_id": 9,
        "box": [20.5, 10, 40.5, 30],
        "score": None,
        **common,
    }


def test_the_image(page: Page) -> None:
    shown = pixels_of(page.client.get("/api/images/7"))[..., :3].astype(float)
    stored = np.asarray(Image.open(page.path.parent / "7.png")).astype(float)
    assert shown.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(shown - stored).mean() < 8  # JPEG noise; a different image would be at 20


def test_masks_of_polygons_and_run_lengths(page: Page) -> None:
    expected = {
        1: coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(SQUARE, HEIGHT, WIDTH))),
        2: coco_mask.decode(
            coco_mask.frPyObjects(proposals()["annotations"][1]["segmentation"], HEIGHT, WIDTH)
        ),
        5: np.zeros((HEIGHT, WIDTH)),
    }
    for number, mask in expected.items():
        np.testing.assert_array_equal(
            pixels_of(page.client.get(f"/api/annotations/{number}/mask"))[..., 3], mask * 255
        )


def test_decisions_and_undo(page: Page) -> None:
    assert (
        page.client.post("/api/annotations/1/decision?decision=accepted").json()["review"]
        == "accepted"
    )
    assert page.client.post("/api/annotations/2/decision?decision=rejected").json()["undoable"] == 2
    undone = page.client.post("/api/undo").json()
    assert (undone["id"], undone["review"], undone["undoable"]) == (2, "unreviewed", 1)
    assert {k: v.get("review") for k, v in page.annotations_on_disk().items()} == {
        1: "accepted",
        2: None,
        5: None,
        9: None,
    }
    page.client.post("/api/undo")
    refused = page.client.post("/api/undo")
    assert (refused.status_code, refused.json()) == (
        409,
        {"error": "there is nothing to undo"},
    )


@pytest.mark.parametrize(
    "query", ["?decision=edited", "?decision=1", "?decision=", "", "?accepted"]
)
def test_other_decisions_are_refused(page: Page, query: str) -> None:
    answer = page.client.post(f"/api/annotations/1/decision{query}", json={"decision": "accepted"})
    assert answer.status_code == 422
    assert "decision" in answer.json()["error"]
    assert page.file.undoable() == 0


def test_a_cut_is_computed_and_saved(page: Page) -> None:
    foreground, background = disc(3), ~disc(15)
    answer = page.client.post(
        "/api/annotations/1/cut?box=10.5,4,50,39",
        content=strokes(foreground, background),
        headers=PNG,
    )
    assert answer.status_code == 200, answer.text
    image, box, seen_foreground, seen_background = page.calls[0]
    np.testing.assert_array_equal(image, np.asarray(Image.open(page.path.parent / "7.png")))
    assert box == [10.5, 4, 50, 39]
    np.testing.assert_array_equal(seen_foreground, foreground)
    np.testing.assert_array_equal(seen_background, background)
    stored = page.annotations_on_disk()[1]
    rle = stored.pop("segmentation")
    np.testing.assert_array_equal(coco_mask.decode(rle), page.result)
    before = proposals()["annotations"][0]
    del before["segmentation"]
    assert stored == {
        **before,
        "bbox": [24, 14, 12, 12],
        "area": page.result.sum(),
        "mask_by": {"technique": "review"},
        "review": "edited",
    }
    assert list(coco_mask.toBbox(rle)) == stored["bbox"]
    np.testing.assert_array_equal(
        pixels_of(page.client.get("/api/annotations/1/mask"))[..., 3], page.result * 255
    )
    assert answer.json()["box"] == [24, 14, 36, 26]


def test_an_edited_mask_that_is_rejected_stays_edited_and_undo_brings_polygons_back(
    page: Page,
) -> None:
    page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG)
    page.client.post("/api/annotations/1/decision?decision=rejected")
    np.testing.assert_array_equal(
        pixels_of(page.client.get("/api/annotations/1/mask"))[..., 3], page.result * 255
    )
    for _ in range(2):
        page.client.post("/api/undo")
    assert pixels_of(page.client.get("/api/annotations/1/mask"))[..., 3].sum() == 60 * 255
    assert page.annotations_on_disk()[1] == proposals()["annotations"][0]


def test_the_box_of_a_cut(page: Page) -> None:
    for query, box in (("", [4, 3, 14, 9]), ("?box=-5,-5,700,20", [0, 0, WIDTH, 20])):
        assert (
            page.client.post(
                f"/api/annotations/1/cut{query}", content=strokes(), headers=PNG
            ).status_code
            == 200
        )
        assert page.calls[-1][1] == box
        page.client.post("/api/undo")
    for bad in (
        "1,2,3",
        "1,2,3,x",
        "1,2,nan,5",
        "1,2,inf,5",
        "10,10,10,20",
        "20,10,10,20",
        "100,100,120,120",
    ):
        refused = page.client.post(
            f"/api/annotations/1/cut?box={bad}", content=strokes(), headers=PNG
        )
        assert refused.status_code == 422, bad
        assert "box" in refused.json()["error"]
    assert page.file.undoable() == 0


@pytest.mark.parametrize("box", [None, [], [1, 2, 0, 4]])
def test_an_annotation_without_a_box_is_cut_anywhere(tmp_path: Path, box: Any) -> None:
    path, tree = write_proposals(tmp_path), proposals()
    tree["annotations"][0]["bbox"] = box
    path.write_text(json.dumps(tree))
    page = Page(path)
    assert page.client.get("/api/annotations/1").json()["box"] is None
    assert (
        page.client.post(
            "/api/annotations/1/cut", content=strokes(disc(3)), headers=PNG
        ).status_code
        == 200
    )
    assert page.calls[0][1] is None
    page.file.close()


@pytest.mark.parametrize("corner", [(0, 0), (HEIGHT - 1, WIDTH - 1), (3, 5)])
def test_a_mask_of_one_pixel(page: Page, corner: tuple[int, int]) -> None:
    page.result = np.zeros((HEIGHT, WIDTH), dtype=bool)
    page.result[corner] = True
    assert (
        page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG).status_code
        == 200
    )
    stored = page.annotations_on_disk()[1]
    np.testing.assert_array_equal(coco_mask.decode(stored["segmentation"]), page.result)
    assert (stored["bbox"], stored["area"]) == ([corner[1], corner[0], 1, 1], 1)


def test_masks_that_are_full_or_noise(page: Page) -> None:
    for mask in (
        np.ones((HEIGHT, WIDTH), dtype=bool),
        np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.5,
    ):
        page.result = mask
        page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG)
        np.testing.assert_array_equal(
            coco_mask.decode(page.annotations_on_disk()[1]["segmentation"]), mask
        )


def test_a_fallback_is_reported(page: Page) -> None:
    assert (
        page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG).json()[
            "fallback"
        ]
        == ""
    )
    page.fallback = "no background seeds"
    assert (
        page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG).json()[
            "fallback"
        ]
        == "no background seeds"
    )
    assert page.client.get("/api/annotations/1").json()["fallback"] == "no background seeds"
    assert page.annotations_on_disk()[1]["mask_by"] == {
        "technique": "review",
        "fallback": "no background seeds",
    }


@pytest.mark.parametrize(
    ("mask_by", "score", "fallback"),
    [
        (
            {"technique": "cam", "score": 0.75, "fallback": "the map is constant"},
            0.75,
            "the map is constant",
        ),
        ({"technique": "box"}, 0.25, ""),
        ({"score": "high", "fallback": 3}, None, ""),
        ({"score": True, "fallback": ["x"]}, None, ""),
        (["score"], 0.25, ""),
    ],
)
def test_mask_by_is_reported(
    tmp_path: Path, mask_by: Any, score: float | None, fallback: str
) -> None:
    path, tree = write_proposals(tmp_path), proposals()
    tree["annotations"][1]["mask_by"] = mask_by
    path.write_text(json.dumps(tree))
    page = Page(path)
    content = page.client.get("/api/annotations/2").json()
    assert (content["score"], content["fallback"]) == (score, fallback)
    page.client.post("/api/annotations/2/cut", content=strokes(), headers=PNG)
    assert page.annotations_on_disk()[2]["mask_by"] == {"technique": "review"}
    page.client.post("/api/undo")
    assert page.annotations_on_disk()[2]["mask_by"] == mask_by
    page.file.close()


def test_an_empty_cut_changes_nothing(page: Page) -> None:
    page.result = np.zeros((HEIGHT, WIDTH), dtype=bool)
    answer = page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG)
    assert answer.status_code == 422
    assert "the mask would be empty" in answer.json()["error"]
    assert page.file.undoable() == 0


def test_grabcut_finds_the_disc(tmp_path: Path) -> None:
    page = Page(write_proposals(tmp_path), refine_with_strokes)
    answer = page.client.post(
        "/api/annotations/1/cut?box=20,10,40,30", content=strokes(disc(2)), headers=PNG
    )
    assert answer.status_code == 200, answer.text
    content = coco_mask.decode(page.annotations_on_disk()[1]["segmentation"]).astype(bool)
    assert (content & disc(8)).sum() / (content | disc(8)).sum() > 0.9
    page.file.close()


def test_unknown_ids(page: Page) -> None:
    for path in ("/api/annotations/77", "/api/annotations/77/mask", "/api/images/77"):
        answer = page.client.get(path)
        assert (answer.status_code, answer.json()) == (404, {"error": "there is no id 77"})
    assert page.client.post("/api/annotations/77/decision?decision=accepted").status_code == 404
    assert (
        page.client.post("/api/annotations/77/cut", content=strokes(), headers=PNG).status_code
        == 404
    )
    for path in ("/api/images/7.png", "/api/images/..%2f7.png", "/api/annotations/x"):
        assert page.client.get(path).status_code in (404, 422)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", "'..'"),
        ("/etc/passwd", "absolute"),
        ("a\0b.png", "NUL"),
        ("link.png", "a link that leads out"),
        ("missing.png", "no such image file"),
        ("masks.json", "not an image"),
    ],
)
def test_files_outside_the_folder_and_bad_ones_are_refused(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    page = Page(write_proposals(tmp_path / "images"))
    images = page.images.coco.images
    images[0] = replace(images[0], file_name=name)
    answers = [
        page.client.get("/api/images/7"),
        page.client.post("/api/annotations/1/cut", content=strokes(), headers=PNG),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert message in answer.json()["error"]
    assert page.calls == []
    assert page.client.get("/api/images/3").status_code == 200
    assert page.client.post("/api/annotations/1/decision?decision=rejected").status_code == 200
    page.file.close()


def test_an_image_over_the_cap_or_too_long_for_a_browser_is_refused(tmp_path: Path) -> None:
    path = write_proposals(tmp_path)
    tree = proposals()
    tree["images"][0] |= {"height": 1, "width": 20_000}
    path.write_text(json.dumps(tree))
    Image.new("RGB", (20_000, 1)).save(tmp_path / "7.png")
    Image.new("RGB", (1000, 1000)).save(tmp_path / "3.png")
    page = Page(path)
    assert "16384 pixels a side" in page.client.get("/api/images/7").json()["error"]
    assert (
        "3.png: the image has 1000 x 1000 pixels"
        in page.client.get("/api/images/3").json()["error"]
    )
    page.file.close()


def test_the_file_is_closed_with_the_application(tmp_path: Path) -> None:
    path = write_proposals(tmp_path)
    page = Page(path)
    with page.client as client:
        client.post("/api/annotations/1/decision?decision=accepted")
    assert json.loads(path.read_text())["annotations"][0]["review"] == "accepted"
    assert not path.with_name("masks.json.journal").exists()


def test_write_errors_are_reported(page: Page) -> None:
    page.file.write_error = "disk full"
    assert (
        page.client.post("/api/annotations/1/decision?decision=accepted").json()["trouble"]
        == "disk full"
    )


# Classes, contours, new objects, neighbors


def test_another_class(page: Page) -> None:
    state = page.client.post("/api/annotations/1/category?category_id=9").json()
    assert (state["category_id"], state["review"], state["undoable"]) == (9, "edited", 1)
    before = proposals()["annotations"][0]
    assert page.annotations_on_disk()[1] == {**before, "category_id": 9, "review": "edited"}
    page.client.post("/api/annotations/1/category?category_id=9")  # changes nothing
    assert page.client.post("/api/undo").json()["category_id"] == 4
    assert page.annotations_on_disk()[1] == before
    for query, status in (("category_id=5", 404), ("category_id=x", 422), ("", 422)):
        answer = page.client.post(f"/api/annotations/1/category?{query}")
        assert answer.status_code == status, answer.text
    assert page.file.undoable() == 0


def test_a_contour_is_edited(page: Page) -> None:
    rings = page.client.get("/api/annotations/1/contour").json()["rings"]
    assert len(rings) == 1
    assert sorted(zip(rings[0][::2], rings[0][1::2], strict=True)) == [
        (4, 3),
        (4, 9),
        (14, 3),
        (14, 9),
    ]
    hole = [6, 4, 12, 4, 12, 8, 6, 8]
    answer = page.client.post("/api/annotations/1/contour", json={"rings": [*rings, hole]})
    assert answer.json()["review"] == "edited"
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[3:9, 4:14] = True
    expected[4:8, 6:12] = False
    stored = page.annotations_on_disk()[1]
    np.testing.assert_array_equal(coco_mask.decode(stored["segmentation"]), expected)
    assert (stored["bbox"], stored["area"]) == ([4, 3, 10, 6], 60 - 24)
    again = page.client.get("/api/annotations/1/contour").json()
    assert len(again["rings"]) == 2
    page.client.post("/api/annotations/1/contour", json=again)
    np.testing.assert_array_equal(
        coco_mask.decode(page.annotations_on_disk()[1]["segmentation"]), expected
    )
    assert page.client.get("/api/annotations/5/contour").json() == {"rings": []}  # has no mask


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"rings": 1},
        {"rings": [1]},
        {"rings": [[1, 2, 3, 4]]},
        {"rings": [[1, 2, 3, 4, 5, 6, 7]]},
        {"rings": [[1, 2, 3, 4, 5, "6"]]},
        {"rings": [[1, 2, 3, 4, 5, None]]},
        {"rings": []},
        {"rings": [[100, 100, 110, 100, 110, 110]]},
        {"rings": [[0, 0] * 100_001]},
    ],
)
def test_bad_contours_are_refused(page: Page, content: object) -> None:
    answer = page.client.post("/api/annotations/1/contour", json=content)
    assert answer.status_code in (413, 422), answer.text
    assert answer.json()["error"]
    assert page.file.undoable() == 0
    assert page.annotations_on_disk()[1] == proposals()["annotations"][0]


def test_contours_are_json(page: Page) -> None:
    path = "/api/annotations/1/contour"
    kind = {"content-type": "application/json"}
    assert page.client.post(path, content=b"{", headers=kind).status_code == 422
    assert page.client.post(path, content=b"{}", headers=PNG).status_code == 415
    deep = b"[" * 50_000
    assert page.client.post(path, content=deep, headers=kind).status_code == 422
    text = b'{"rings": [[0, 0, 9, 0, 9, NaN]]}'
    assert page.client.post(path, content=text, headers=kind).status_code == 422


def test_a_new_object(page: Page) -> None:
    answer = page.client.post(
        "/api/images/7/annotations?category_id=9&box=10,4,50,39",
        content=strokes(disc(3)),
        headers=PNG,
    )
    state = answer.json()
    assert (state["id"], state["review"], state["image_id"]) == (10, "added", 7)
    assert state["removable"]
    assert page.calls[0][1] == [10, 4, 50, 39]
    stored = page.annotations_on_disk()[10]
    np.testing.assert_array_equal(coco_mask.decode(stored.pop("segmentation")), page.result)
    assert stored == {
        "id": 10,
        "image_id": 7,
        "category_id": 9,
        "iscrowd": 0,
        "bbox": [24, 14, 12, 12],
        "area": page.result.sum(),
        "mask_by": {"technique": "review"},
        "review": "added",
    }
    assert page.client.get("/api/items").json()["ids"] == [1, 5, 10, 2, 9]
    removed = page.client.post("/api/annotations/10/decision?decision=rejected").json()
    assert removed == {"id": 10, "removed": True, "undoable": 2}
    assert 10 not in page.annotations_on_disk()
    assert page.client.post("/api/annotations/10/category?category_id=4").status_code == 404
    assert page.client.post("/api/undo").json()["review"] == "added"
    assert 10 in page.annotations_on_disk()
    assert page.client.post("/api/undo").json()["removed"]
    assert json.loads(page.path.read_text()) != proposals()
    page.client.get("/api/items")
    assert json.loads(page.path.read_text()) == proposals()
    for path in ("images/8/annotations?category_id=9", "images/7/annotations?category_id=8"):
        answer = page.client.post(f"/api/{path}", content=strokes(), headers=PNG)
        assert answer.status_code == 404, answer.text


def test_neighbors_are_outlines(page: Page) -> None:
    stripe = page.client.get("/api/images/3/neighbors?without=9").json()["masks"]
    assert len(stripe) == 1
    assert sorted(zip(stripe[0][0][::2], stripe[0][0][1::2], strict=True)) == [
        (5, 10),
        (5, 30),
        (7, 10),
        (7, 30),
    ]
    assert len(page.client.get("/api/images/3/neighbors").json()["masks"]) == 2
    page.client.post("/api/annotations/9/decision?decision=rejected")
    assert page.client.get("/api/images/3/neighbors?without=2").json() == {"masks": []}
    assert page.client.get("/api/images/8/neighbors").status_code == 404
