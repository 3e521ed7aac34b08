"""The review page in a real browser: clicks, keys and strokes, and the resulting file."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from made.reviews import disc, proposals, write_proposals
from made.servers import served
from pycocotools import mask as coco_mask

from maskseg.annotation.grabcut import refine_with_strokes
from maskseg.annotation.review.serve import CocoImageStore
from maskseg.annotation.review.state import ReviewFile
from maskseg.data.coco.file import read_coco

pytestmark = pytest.mark.browser
CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: make test-browser installs it"
    )
    if CHROMIUM is None:
        pytest.skip("needs Chromium: make test-browser installs it")
    with driver.sync_playwright() as play:
        opened = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else []
        )
        yield opened
        opened.close()


@contextmanager
def served_here(path: Path) -> Iterator[str]:
    """Serve the page from a thread of this process; its address."""
    import uvicorn

    from maskseg.annotation.review.app import review_app
    from maskseg.annotation.review.guards import Access, Uploads

    images = CocoImageStore(read_coco(path, check_images=False), path.parent, 10_000)
    access = Access("127.0.0.1")
    app = review_app(ReviewFile(path), images, refine_with_strokes, access, Uploads(1_000_000, 4))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token={access.token}"
        finally:
            server.should_exit = True
            thread.join(60)


class Desk:
    """A page in the browser, and the file under review."""

    def __init__(self, browser: Any, address: str, path: Path) -> None:
        self.path, self.problems, self.addresses = path, [], set()
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.page.set_default_timeout(20_000)
        self.page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type == "error" else None,
        )
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.addresses.add(request.url))
        self.page.goto(address)

    def keys(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def about(self, text: str) -> None:
        """Wait for a text in the line about the current annotation."""
        self.page.locator("#about").filter(has_text=text).wait_for()

    def draw(self, *points: tuple[float, float], size: tuple[float, float] = (40, 60)) -> None:
        """Drag the mouse over points (x, y) of an image of size (height, width)."""
        view = self.page.locator("#view").bounding_box()
        scale = min(view["width"] / size[1], view["height"] / size[0])
        middle = view["x"] + view["width"] / 2, view["y"] + view["height"] / 2
        for i, (x, y) in enumerate(points):
            self.page.mouse.move(
                middle[0] + scale * (x - size[1] / 2),
                middle[1] + scale * (y - size[0] / 2),
                steps=4,
            )
            if i == 0:
                self.page.mouse.down()
        self.page.mouse.up()

    def pixels(self) -> str:
        """The picture on the canvas, as text that can be compared."""
        return str(self.page.locator("#view").evaluate("(view) => view.toDataURL()"))

    def marks(self) -> list[str]:
        """The decision shown for each visible row of the list."""
        return [
            mark.get_attribute("aria-label") for mark in self.page.locator(".row .review").all()
        ]

    def stored(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text()))


@pytest.fixture
def desk(browser: Any, tmp_path: Path) -> Iterator[Desk]:
    path = write_proposals(tmp_path)
    with served_here(path) as address:
        made = Desk(browser, address, path)
        made.about("annotation 1")
        yield made
        made.page.close()


def test_accept_repaint_reject_undo_reload(browser: Any, tmp_path: Path) -> None:
    """The tool itself, in a separate process."""
    path = write_proposals(tmp_path)
    with served("review", f"file={path}", f"images={tmp_path}", cwd=tmp_path) as server:
        desk = Desk(browser, server.address, path)
        desk.about("annotation 1")
        _review(desk)
        desk.page.close()


def _review(desk: Desk) -> None:
    desk.keys("a")
    desk.about("annotation 5")
    desk.keys("b")
    desk.draw((20, 10), (40, 30))
    desk.keys("f")
    desk.draw((28, 20), (32, 20))
    desk.keys("g")
    desk.draw((30, 37), (45, 37))
    desk.keys("Enter")
    desk.about("edited")
    desk.keys("ArrowRight")
    desk.about("annotation 2, score 0.25: unreviewed")
    desk.keys("r")
    desk.about("annotation 9")
    desk.keys("a")
    desk.page.get_by_text("4 of 4 reviewed").wait_for()
    desk.keys("z")
    desk.page.get_by_text("3 of 4 reviewed").wait_for()
    desk.about("annotation 9: unreviewed")
    desk.page.reload()
    desk.about("annotation 9: unreviewed")
    assert desk.marks() == ["accepted", "edited", "rejected", "unreviewed"]
    stored, expected = desk.stored(), proposals()
    edited, changed = stored["annotations"][2], expected["annotations"][2]
    mask = coco_mask.decode(edited["segmentation"]).astype(bool)
    assert (mask & disc(8)).sum() / (mask | disc(8)).sum() > 0.9
    changed |= {
        "segmentation": edited["segmentation"],
        "bbox": list(coco_mask.toBbox(edited["segmentation"])),
        "area": mask.sum(),
    }
    changed["mask_by"] = {"technique": "review"}
    for annotation, review in zip(
        expected["annotations"], ("accepted", "rejected", "edited"), strict=False
    ):
        annotation["review"] = review
    assert stored == expected
    assert desk.problems == []
    assert {urlsplit(address).hostname for address in desk.addresses} <= {
        "127.0.0.1",
        None,
    }  # None: data and blob URLs


def test_undo_takes_back_strokes_first_then_the_cut(desk: Desk) -> None:
    desk.page.get_by_role("button", name="Foreground").click()
    desk.draw((30, 20), (34, 20))
    desk.keys("Enter")
    desk.about("edited")
    desk.draw((10, 30), (15, 30))
    desk.keys("z")
    desk.about("edited")
    desk.keys("z")
    desk.about("annotation 1: unreviewed")
    desk.page.reload()
    desk.about("annotation 1: unreviewed")
    assert desk.stored() == proposals()
    assert desk.problems == []


def test_a_box_is_drawn_where_the_object_is(desk: Desk) -> None:
    desk.keys("b")
    desk.draw((2, 2), (2.01, 2.01))  # a click does not make a box
    desk.draw((40, 30), (20, 10))
    desk.keys("Enter")
    desk.about("edited")
    desk.page.reload()
    desk.about("annotation 5")
    mask = coco_mask.decode(desk.stored()["annotations"][0]["segmentation"]).astype(bool)
    assert (mask & disc(8)).sum() / (mask | disc(8)).sum() > 0.9


def test_painted_pixels_are_kept(desk: Desk) -> None:
    """The mask has the painted label at the painted pixels."""
    desk.page.locator("#size").evaluate(
        "(size) => { size.value = 4; size.dispatchEvent(new Event('input')); }"
    )
    desk.keys("f")
    desk.draw((4, 35), (12, 35))
    desk.keys("g")
    desk.draw((5, 5), (12, 5))
    desk.keys("Enter")
    desk.about("edited")
    desk.page.reload()
    desk.about("annotation 5")
    mask = coco_mask.decode(desk.stored()["annotations"][0]["segmentation"])
    assert mask[34:36, 3:13].all()
    assert not mask[4:6, 4:13].any()


def test_the_filter_and_the_keys_that_move(desk: Desk) -> None:
    desk.keys("r", "a")
    desk.about("annotation 2")
    desk.page.locator("#filter").select_option("rejected")
    desk.about("annotation 1: rejected")
    assert desk.marks() == ["rejected"]
    desk.keys("a")  # the row stays visible
    desk.page.locator(".row .review[aria-label=accepted]").wait_for()
    desk.page.locator("#filter").select_option("accepted")
    desk.page.get_by_text("2 shown").wait_for()
    desk.page.locator("#filter").select_option("unreviewed")
    desk.page.get_by_text("2 shown").wait_for()
    desk.page.locator("#filter").select_option("all")
    desk.page.locator("#row-5").click()
    desk.about("annotation 5")
    desk.keys("ArrowLeft")
    desk.about("annotation 1")
    desk.keys("ArrowLeft", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown")
    desk.about("annotation 9")
    assert desk.problems == []


def test_fast_keys_are_queued(desk: Desk) -> None:
    desk.keys("a", "r", "a", "z", "a", "r")
    desk.page.get_by_text("4 of 4 reviewed").wait_for()
    desk.page.reload()
    desk.page.get_by_text("4 of 4 reviewed").wait_for()
    assert [a["review"] for a in desk.stored()["annotations"]] == [
        "accepted",
        "accepted",
        "rejected",
        "rejected",
    ]


def test_a_key_that_is_held_decides_once(desk: Desk) -> None:
    for _ in range(3):  # from the second on as keyboard repeats
        desk.page.keyboard.down("r")
    desk.page.keyboard.up("r")
    desk.about("annotation 5: unreviewed")
    for _ in range(3):
        desk.page.keyboard.down("ArrowRight")
    desk.page.keyboard.up("ArrowRight")
    desk.about("annotation 9: unreviewed")
    assert desk.marks() == ["rejected", "unreviewed", "unreviewed", "unreviewed"]


def test_a_button_is_not_pressed_again_by_the_space_bar(desk: Desk) -> None:
    desk.page.get_by_role("button", name="Accept").click()
    desk.about("annotation 5: unreviewed")
    desk.keys(" ", " ")
    desk.keys("ArrowRight")
    desk.about("annotation 2")
    assert desk.marks() == ["accepted", "unreviewed", "unreviewed", "unreviewed"]


def test_a_fallback_is_shown_when_it_is_opened(browser: Any, tmp_path: Path) -> None:
    path, tree = write_proposals(tmp_path), proposals()
    tree["annotations"][0]["mask_by"] = {
        "technique": "cam",
        "score": 0.5,
        "fallback": "no class map",
    }
    path.write_text(json.dumps(tree))
    with served_here(path) as address:
        desk = Desk(browser, address, path)
        desk.about("annotation 1, score 0.50: unreviewed")
        desk.page.get_by_role("alert").filter(
            has_text="No object was found here (no class map)"
        ).wait_for()
        desk.keys("ArrowRight")
        desk.about("annotation 5")
        assert desk.page.get_by_role("alert").inner_text() == ""
        desk.page.close()


def test_an_annotation_that_cannot_be_opened_gets_no_decision(desk: Desk) -> None:
    desk.page.route(
        "**/api/annotations/5",
        lambda route: route.fulfill(status=500, json={"error": "no such luck"}),
    )
    desk.keys("ArrowRight")
    desk.page.get_by_role("alert").filter(has_text="no such luck").wait_for()
    desk.keys("r", "ArrowRight")
    desk.about("annotation 2")
    assert desk.marks() == ["unreviewed"] * 4


def test_an_unreadable_image_is_reported_and_can_be_rejected(browser: Any, tmp_path: Path) -> None:
    path = write_proposals(tmp_path)
    (tmp_path / "7.png").write_text("no picture")
    with served_here(path) as address:
        desk = Desk(browser, address, path)
        desk.page.get_by_role("alert").filter(
            has_text="7.png: not an image that can be read"
        ).wait_for()
        desk.keys("r")
        desk.page.get_by_text("1 of 4 reviewed").wait_for()
        desk.page.close()


# Classes, new objects, contours, and what is shown


def test_another_class_from_the_list(desk: Desk) -> None:
    desk.page.locator("#category").select_option("dog")
    desk.about("dog in 7.png, annotation 1: edited")
    desk.keys("a")  # goes to the page, not to the list of classes
    desk.about("annotation 5")
    desk.page.reload()
    desk.about("annotation 5")
    first = desk.stored()["annotations"][0]
    assert (first["category_id"], first["review"]) == (9, "edited")
    assert desk.problems == []


def test_a_new_object_is_added_and_deleted(desk: Desk) -> None:
    desk.keys("n")
    desk.page.get_by_text("Draw a box around the object").wait_for()
    assert desk.page.locator("#accept").is_disabled()
    desk.keys("Enter")
    desk.page.get_by_role("alert").filter(has_text="Draw a box around").wait_for()
    desk.draw((20, 10), (40, 30))
    desk.page.locator("#category").select_option("dog")
    desk.keys("ArrowRight")  # what was drawn is not lost
    desk.page.get_by_role("alert").filter(has_text="Enter to save").wait_for()
    desk.page.get_by_role("button", name="Add object").click()
    desk.about("dog in 7.png, annotation 10: added")
    desk.page.get_by_text("1 of 5 reviewed, 5 shown").wait_for()
    assert desk.marks() == ["unreviewed", "unreviewed", "added", "unreviewed", "unreviewed"]
    desk.page.reload()
    desk.page.get_by_text("1 of 5 reviewed").wait_for()
    added = desk.stored()["annotations"][-1]
    mask = coco_mask.decode(added["segmentation"]).astype(bool)
    assert (mask & disc(8)).sum() / (mask | disc(8)).sum() > 0.9
    desk.page.locator("#row-10").click()
    desk.about("annotation 10")
    desk.page.get_by_role("button", name="Delete").click()
    desk.page.get_by_text("0 of 4 reviewed").wait_for()
    desk.keys("z")
    desk.page.get_by_text("1 of 5 reviewed").wait_for()
    desk.about("annotation 10: added")
    desk.keys("Delete")
    desk.page.get_by_text("0 of 4 reviewed").wait_for()
    desk.page.reload()
    desk.about("annotation 1: unreviewed")
    assert desk.stored() == proposals()
    assert desk.problems == []


def test_a_new_object_is_cancelled(desk: Desk) -> None:
    desk.keys("n")
    desk.draw((20, 10), (40, 30))
    desk.keys("Escape")
    desk.about("annotation 1: unreviewed")
    desk.keys("ArrowRight")
    desk.about("annotation 5")
    assert desk.marks() == ["unreviewed"] * 4


def test_the_contour_is_dragged(desk: Desk) -> None:
    """The square from (4, 3) to (14, 9) gets a corner at (30, 20), and one point more."""
    desk.keys("c")
    desk.page.get_by_text("Drag points").wait_for()
    desk.draw((14, 9), (30, 20))
    desk.keys("ArrowRight")
    desk.page.get_by_role("alert").filter(has_text="Enter to save").wait_for()
    desk.keys("z", "z", "z")  # the contour first, then nothing is left to undo
    desk.draw((14, 9), (14, 20))
    desk.draw((9, 3), (9, 1))
    desk.keys("Enter")
    desk.about("edited")
    desk.page.reload()
    desk.about("annotation 5")
    mask = coco_mask.decode(desk.stored()["annotations"][0]["segmentation"]).astype(bool)
    rings = [[4.0, 3, 9, 1, 14, 3, 14, 20, 4, 9]]
    wanted = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(rings, 40, 60))).astype(bool)
    assert (mask ^ wanted).sum() <= 4
    assert desk.problems == []


def test_a_point_of_the_contour_is_removed(desk: Desk) -> None:
    desk.keys("c")
    desk.page.get_by_text("Drag points").wait_for()
    desk.page.keyboard.down("Alt")
    desk.draw((14, 9))
    desk.page.keyboard.up("Alt")
    desk.keys("Enter")
    desk.about("edited")
    desk.page.reload()
    desk.about("annotation 5")
    area = desk.stored()["annotations"][0]["area"]
    assert area == pytest.approx(30, abs=6)  # half of the rectangle


def test_outline_opacity_and_neighbors(desk: Desk) -> None:
    """Each changes the picture, and the same keys change it back."""
    desk.keys("ArrowRight")  # an annotation without a mask; its neighbor is shown
    desk.about("annotation 5")
    desk.page.wait_for_load_state("networkidle")
    with_neighbors = desk.pixels()
    desk.keys("s")
    assert desk.pixels() != with_neighbors
    desk.keys("s")
    assert desk.pixels() == with_neighbors
    desk.keys("ArrowLeft")
    desk.about("annotation 1")
    desk.page.wait_for_load_state("networkidle")
    pictures = [desk.pixels()]
    for key in ("m", "o"):
        desk.keys(key)
        pictures.append(desk.pixels())
    desk.keys("m")
    desk.page.locator("#opacity").evaluate(
        "(slider) => { slider.value = 90; slider.dispatchEvent(new Event('input')); }"
    )
    pictures.append(desk.pixels())
    assert len(set(pictures)) == 4


def test_nothing_wraps_or_is_cut_off_at_1400_pixels(desk: Desk) -> None:
    for width, height in ((1400, 800), (1280, 720)):
        desk.page.set_viewport_size({"width": width, "height": height})
        wrapped = desk.page.evaluate(
            """() => [...document.querySelectorAll("button, label, h2, .row")].filter(
                (part) => part.scrollWidth > part.clientWidth + 1 || part.offsetHeight > 34
            ).map((part) => part.textContent.trim())"""
        )
        assert wrapped == []
        assert desk.page.evaluate("document.documentElement.scrollWidth") <= width
        assert desk.page.evaluate("document.querySelector('#tools').scrollHeight") <= height


def test_colors_have_the_contrast_of_wcag_aa(desk: Desk) -> None:
    colors = desk.page.evaluate(
        """() => {
            const style = getComputedStyle(document.documentElement);
            const names = ["ink", "dim", "mark", "alert", "line", "ground", "panel", "chosen"];
            return Object.fromEntries(names.map((n) => [n, style.getPropertyValue(`--${n}`)]));
        }"""
    )
    for text in ("ink", "dim", "mark", "alert"):
        for ground in ("ground", "panel"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
    for text in ("ink", "mark"):
        assert contrast(colors[text], colors["chosen"]) >= 4.5, text
    assert contrast(colors["line"], colors["panel"]) >= 3  # borders of the controls


def contrast(first: str, second: str) -> float:
    """The contrast of two colors, #rrggbb (WCAG 2.2, contrast ratio)."""
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    """The relative luminance of a color (WCAG 2.2)."""
    channels = [int(color.strip()[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_only_visible_rows_are_in_the_page(browser: Any, tmp_path: Path) -> None:
    path, tree = write_proposals(tmp_path), proposals()
    tree["images"] = [
        {"id": i, "file_name": "7.png", "height": 40, "width": 60} for i in range(5000)
    ]
    tree["annotations"] = [
        {**tree["annotations"][0], "id": i + 1, "image_id": i} for i in range(5000)
    ]
    path.write_text(json.dumps(tree))
    with served_here(path) as address:
        desk = Desk(browser, address, path)
        desk.about("annotation 1:")
        assert 10 < desk.page.locator(".row").count() < 60
        desk.page.locator("#list").evaluate("(list) => list.scrollTo(0, list.scrollHeight)")
        desk.page.locator("#row-5000").click()
        desk.about("annotation 5000:")
        assert desk.page.locator(".row").count() < 60
        desk.keys("a")  # wraps around to the first open one
        desk.about("annotation 1:")
        assert desk.problems == []
        desk.page.close()


def test_the_token_leaves_the_address_and_is_needed(browser: Any, tmp_path: Path) -> None:
    path = write_proposals(tmp_path)
    with served_here(path) as address:
        desk = Desk(browser, address, path)
        desk.about("annotation 1")
        plain = address.partition("?")[0]
        assert desk.page.url == plain
        desk.page.reload()
        desk.about("annotation 1")
        # The cookie is out of reach for scripts.
        assert desk.page.evaluate("document.cookie") == ""
        assert desk.problems == []
        other = browser.new_context().new_page()  # of another user, without the cookie
        answer = other.goto(plain)
        assert answer.status == 403
        assert "no valid token" in other.content()
        other.close()
        desk.page.close()
