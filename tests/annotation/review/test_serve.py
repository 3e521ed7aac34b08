"""tools/review.py from the command line."""

from __future__ import annotations

import io
import json
import signal
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from made.reviews import proposals, write_proposals
from made.servers import served
from made.tools import assert_refused, done, said
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra demo")
import uvicorn
from fastapi.testclient import TestClient

from maskseg.annotation.review.serve import CocoImageStore
from maskseg.annotation.review.state import ReviewFile
from maskseg.data.coco.file import read_coco
from maskseg.errors import UserError
from maskseg.masks.base import rle_to_bitmaps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_proposals(tmp_path)


def accept(address: str, number: int) -> None:
    """Accept an annotation. address: of the page, with its token."""
    server, token = address.split("/?token=")
    request = urllib.request.Request(
        f"{server}/api/annotations/{number}/decision?decision=accepted",
        b"",
        {"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


def reviews(path: Path) -> list[Any]:
    return [a.get("review") for a in json.loads(path.read_text())["annotations"]]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_or_killed_server_keeps_the_decisions(path: Path, number: int, code: int) -> None:
    with served("review", f"file={path}", f"images={path.parent}", cwd=path.parent) as server:
        assert server.address.startswith("http://127.0.0.1:")
        accept(server.address, 1)
        accept(server.address, 9)
        assert server.stop(number) == code
        assert "Traceback" not in server.said.read_text()
    if number == signal.SIGKILL:
        file = ReviewFile(path)
        assert file.recovered == 2
        file.close()
    assert reviews(path) == ["accepted", None, None, "accepted"]
    assert not path.with_name("masks.json.journal").exists()


def test_export(path: Path) -> None:
    file = ReviewFile(path)
    file.decide(1, "accepted")
    file.decide(2, "rejected")
    file.close()
    clean = path.with_name("clean.json")
    out = done("review", f"file={path}", f"export={clean}")
    assert (
        f"written to {clean}: 1 accepted, 0 edited, 0 added, 2 unreviewed; dropped: 1 rejected"
        in out
    )
    assert [a["id"] for a in json.loads(clean.read_text())["annotations"]] == [1, 5, 9]
    path.with_name("same.json").symlink_to(path)
    before = path.read_bytes(), clean.read_bytes()
    for own in (path, path.with_name("same.json")):
        assert_refused(
            said("review", f"file={path}", f"export={own}"),
            f"export={own} is an input file: choose another name",
        )
    out = path.with_name("out.json")
    assert_refused(
        said("review", f"file={path}", f"output={out}", f"export={out}"),
        "is the file of the decisions",
    )
    assert_refused(said("review", f"file={path}", f"export={clean}"), f"{clean} already exists")
    assert (path.read_bytes(), clean.read_bytes()) == before


def test_export_of_an_output(path: Path) -> None:
    output, clean = path.with_name("out.json"), path.with_name("clean.json")
    file = ReviewFile(path, output)
    file.decide(1, "rejected")
    file.close()
    done("review", f"file={path}", f"output={output}", f"export={clean}")
    assert [a["id"] for a in json.loads(clean.read_text())["annotations"]] == [2, 5, 9]


def test_errors_name_the_key(path: Path) -> None:
    folder = f"images={path.parent}"
    assert_refused(said("review"), "file=... is missing")
    assert_refused(said("review", f"file={path}"), "images=... is missing")
    assert_refused(said("review", f"file={path}", "images=none"), "images=none: no such folder")
    assert_refused(said("review", "file=none.json", folder), "none.json: cannot be read")
    assert_refused(said("review", f"file={path}", folder, "prot=1"), "prot")
    assert_refused(
        said("review", f"file={path}", folder, "port=70000"),
        "port=70000: expected a whole number from 0 to 65535",
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(
            said("review", f"file={path}", folder, f"port={port}"),
            f"port={port} cannot be served",
            "another port",
        )
    assert reviews(path) == [None] * 4
    assert not path.with_name("masks.json.journal").exists()


def test_the_keys_reach_the_page(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[Any] = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        assert isinstance(sys.stdout, io.StringIO)  # `done` collects the output
        token = sys.stdout.getvalue().partition("/?token=")[2].split()[0]
        client = TestClient(
            server.config.app,
            base_url="http://desk.example",
            headers={"authorization": f"Bearer {token}"},
        )
        cut = client.post(
            "/api/annotations/1/cut",
            content=b"\x89PNG\r\n\x1a\n" + bytes(2000),
            headers={"content-type": "image/png"},
        )
        observed.extend(
            [
                sockets[0].getsockname()[0],
                cut.status_code,
                client.get("/api/images/7").json()["error"],
            ]
        )

    monkeypatch.setattr(uvicorn.Server, "run", run)
    Image.new("RGB", (600, 400)).save(path.with_name("7.png"))
    overrides = (
        f"file={path}",
        f"images={path.parent}",
        "host=0.0.0.0",
        "host_names=[desk.example]",
        "port=0",
        "max_upload_mb=0.001",
        "max_pixels=3000",
        "uploads_at_once=1",
    )
    out = done("review", *overrides)
    assert "the connection is not encrypted" in out
    assert f"open http://{socket.gethostname()}:" in out
    assert "4 annotations" in out
    assert observed[:2] == ["0.0.0.0", 413]
    assert "7.png: the image has 400 x 600 pixels" in observed[2]
    for key in ("max_upload_mb", "max_pixels", "uploads_at_once"):
        assert_refused(said("review", *overrides, f"{key}=0"), f"{key}=0: expected ")


def test_a_damaged_file_is_reported(path: Path) -> None:
    tree = proposals()
    tree["annotations"][1]["segmentation"]["counts"][0] += 1
    path.write_text(json.dumps(tree))
    result = said("review", f"file={path}", f"images={path.parent}")
    assert result.code == 2
    assert "counts do not sum" in result.err
    assert not path.with_name("masks.json.journal").exists()


def test_without_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_refused(
        said("review", f"file={path}", f"images={path.parent}"),
        "needs FastAPI and uvicorn",
        "pip install -e '.[demo]'",
    )


def test_run_lengths_that_changed_since_the_file_was_read_are_checked(path: Path) -> None:
    pictures = CocoImageStore(read_coco(path, check_images=False), path.parent, 10_000)
    annotation = proposals()["annotations"][0]
    assert (
        pictures.mask(annotation | {"segmentation": {"size": [40, 60], "counts": [2400]}})
        is not None
    )
    for bad in (
        {"size": [40, 60], "counts": [5]},
        {"size": [400, 600], "counts": [240_000]},
        {"size": [40, 60], "counts": "\x7f"},
        {},
    ):
        with pytest.raises(UserError, match="annotation 1: RLE"):
            pictures.mask(annotation | {"segmentation": bad})


def test_polygons_are_the_annotations_own_cut_at_the_border(path: Path) -> None:
    """Also for an annotation with id 0, which gets a new id when the file is read."""
    tree = proposals()
    tree["annotations"][0] |= {
        "id": 0,
        "segmentation": [[-5.0, 3.0, 4.0, 3.0, 4.0, 9.0, -5.0, 9.0], [1.0, 1.0]],
    }
    path.write_text(json.dumps(tree))
    pictures = CocoImageStore(read_coco(path, check_images=False), path.parent, 10_000)
    result = pictures.mask(tree["annotations"][0])
    assert result is not None
    assert rle_to_bitmaps([result])[0].sum() == 4 * 6
    assert rle_to_bitmaps([result])[0][3:9, :4].all()
    for nothing in ([[-5.0, 3.0, -2.0, 3.0, -2.0, 9.0]], [[1.0, 1.0, 2.0, 2.0]], [], None):
        assert pictures.mask(tree["annotations"][0] | {"segmentation": nothing}) is None
