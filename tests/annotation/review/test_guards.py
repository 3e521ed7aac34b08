"""Access control of the review page, and limits of uploads."""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.reviews import HEIGHT, WIDTH, disc, write_proposals
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra demo")
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient

from maskseg.annotation.grabcut import GrabCutResult
from maskseg.annotation.review.app import review_app
from maskseg.annotation.review.guards import Access, Uploads, hide_folders, read_strokes
from maskseg.annotation.review.serve import CocoImageStore
from maskseg.annotation.review.state import ReviewFile
from maskseg.data.coco.file import read_coco

CUT = "/api/annotations/1/cut"
MAX_BYTES = 1_000_000
TOKEN = "the-token-of-the-test"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def make(
    folder: Path,
    access: Access | None = None,
    cut: Any = lambda *_: GrabCutResult(disc(5)),
    uploads: Uploads | None = None,
) -> FastAPI:
    path = write_proposals(folder)
    images = CocoImageStore(read_coco(path, check_images=False), folder, 10_000)
    access = access or Access("127.0.0.1", token=TOKEN)
    return review_app(
        ReviewFile(path, delay=1e6), images, cut, access, uploads or Uploads(MAX_BYTES, 4)
    )


def png(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


def black() -> bytes:
    return png(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))


def bomb(side: int) -> bytes:
    """A PNG file of a few bytes with a header for side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(make(tmp_path), base_url="http://127.0.0.1:8000", headers=BEARER)


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "localhost", "LOCALHOST:1"]
)
def test_own_names(client: TestClient, host: str) -> None:
    assert client.get("/api/items", headers={"host": host}).status_code == 200
    assert client.post(
        "/api/annotations/1/decision?decision=accepted",
        headers={"host": host, "origin": f"http://{host}"},
    ).is_success


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
        "[::1",
        "192.168.1.5:8000",
    ],
)
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/api/items", "/api/images/7"):
        assert client.get(path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:8001",
        "http://localhost:8000",
        "null",
        "http://[",
        "http://127.0.0.1:8000.evil",
    ],
)
def test_other_pages_are_refused(client: TestClient, origin: str) -> None:
    assert (
        client.post(
            "/api/annotations/1/decision?decision=accepted", headers={"origin": origin}
        ).status_code
        == 403
    )
    assert client.post("/api/undo", headers={"origin": origin}).status_code == 403
    assert client.get("/api/items").json()["undoable"] == 0


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_cross_site_requests_are_refused(client: TestClient, site: str) -> None:
    assert client.get("/api/images/7", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/api/images/7", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.168.1.5:8000", 200),
        ("[fe80::1]:8000", 200),
        (f"{socket.gethostname()}:8000", 200),
        ("localhost:8000", 200),
        ("desk.example:8000", 200),
        ("DESK.example", 200),
        ("evil.example:8000", 403),
        ("192.168.1.5.evil.example", 403),
        ("", 403),
    ],
)
def test_on_the_network_only_names_of_this_machine_are_allowed(
    tmp_path: Path, host: str, status: int
) -> None:
    access = Access("0.0.0.0", ["desk.example"], TOKEN)
    client = TestClient(make(tmp_path, access), headers=BEARER)
    assert client.get("/api/items", headers={"host": host}).status_code == status


def test_on_the_network_other_origins_are_refused(tmp_path: Path) -> None:
    access = Access("0.0.0.0", ["desk.example"], TOKEN)
    client = TestClient(make(tmp_path, access), "http://desk.example:8000", headers=BEARER)
    assert client.post("/api/undo", headers={"origin": "http://evil.example"}).status_code == 403
    assert (
        client.post("/api/undo", headers={"origin": "http://desk.example:8000"}).status_code == 409
    )


PATHS = ("/", "/app.js", "/api/items", "/api/images/7", "/api/annotations/1", "/api/nothing")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"cookie": "maskseg_review_8000=other"},
        {"cookie": f"maskseg_review_8001={TOKEN}"},
        {"cookie": "maskseg_review_8000=\u00fc".encode()},
        {"cookie": ";=;\x01"},
    ],
)
def test_requests_without_the_token_are_refused(tmp_path: Path, headers: dict[str, Any]) -> None:
    client = TestClient(make(tmp_path), base_url="http://127.0.0.1:8000", headers=headers)
    for path in (*PATHS, "/?token=", "/?token=other", f"/api/items?token={TOKEN}"):
        answer = client.get(path)
        assert answer.status_code == 403
        assert "no valid token" in answer.json()["error"]
        assert "set-cookie" not in answer.headers
    decision = client.post(f"/api/annotations/1/decision?decision=accepted&token={TOKEN}")
    assert decision.status_code == 403
    assert client.get("/api/items", headers=BEARER).json()["undoable"] == 0


def test_the_address_with_the_token_sets_a_cookie(tmp_path: Path) -> None:
    client = TestClient(make(tmp_path), base_url="http://127.0.0.1:8000")
    # A link in a terminal inside another page, such as that of Jupyter, is followed as well.
    answer = client.get(f"/?token={TOKEN}", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert answer.headers["set-cookie"] == (
        f"maskseg_review_8000={TOKEN}; HttpOnly; SameSite=Strict; Path=/"
    )
    assert client.get("/").status_code == 200
    assert client.get("/api/items").status_code == 200
    assert client.post("/api/annotations/1/decision?decision=accepted").is_success
    # Cookies of other servers on this machine, at other ports, do not replace or hide it.
    client.cookies.clear()
    others = 'a={"b": [1]}; c; maskseg_review_8001=other'
    cookies = f"{others}; maskseg_review_8000={TOKEN}"
    assert client.get("/api/items", headers={"cookie": cookies}).status_code == 200
    assert client.get("/api/items", headers={"cookie": others}).status_code == 403


def test_every_server_has_its_own_token() -> None:
    tokens = {Access("127.0.0.1").token for _ in range(20)}
    assert len(tokens) == 20
    assert min(map(len, tokens)) >= 32


def test_messages_do_not_show_folders(tmp_path: Path) -> None:
    folder = tmp_path / "with a space"
    messages = {
        f"{folder}/a.png: not an image": "a.png: not an image",
        "rel/ative/a.png: not an image": "a.png: not an image",
        "cannot read /home/somebody/x/y.json (no such file)": "cannot read y.json (no such file)",
        "C:\\Users\\me\\x.json: damaged": "x.json: damaged",
        "'/root/x/y'": "'y'",
        "3/4 of and/or 1 / 2": "3/4 of and/or 1 / 2",
        "": "",
    }
    for message, shown in messages.items():
        assert hide_folders(message, (folder, Path("rel/ative"), Path())) == shown


def test_no_answer_has_a_path_of_the_server(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "7.png").write_text("no picture")
    paths = [
        "/api/images/7",
        "/api/images/x",
        "/api/images/99",
        "/api/annotations/none/mask",
        "/nothing",
        "/../etc/passwd",
    ]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code in (404, 422)
        assert str(tmp_path) not in answer.text
        assert "maskseg/" not in answer.text
        assert answer.json()["error"]
    assert "7.png: not an image that can be read" in client.get(paths[0]).json()["error"]
    wrong = client.post("/api/annotations/1/decision?decision=maybe")
    assert wrong.status_code == 422
    assert wrong.json()["error"].startswith("query.decision: ")
    assert "maskseg" not in wrong.text


def test_no_other_page_may_frame_or_read_it(client: TestClient) -> None:
    for path in ("/", "/api/images/7", "/api/nothing"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("kind", ["image/jpeg", "text/plain", "multipart/form-data", "", None])
def test_other_types_are_refused(client: TestClient, kind: str | None) -> None:
    assert (
        client.post(
            CUT, content=black(), headers={} if kind is None else {"content-type": kind}
        ).status_code
        == 415
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", png(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "JPEG"), b"\x89PNG\r\n\x1a\n"],
)
def test_other_formats_are_refused(client: TestClient, data: bytes) -> None:
    answer = client.post(CUT, content=data, headers={"content-type": "image/png"})
    assert answer.status_code == 415
    assert answer.json() == {"error": "not a PNG file"}


def test_a_damaged_png_is_refused(client: TestClient) -> None:
    noise = png(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for data in (noise[:20], noise[:3000], noise[:2000] + bytes(500) + noise[2500:]):
        answer = client.post(CUT, content=data, headers={"content-type": "image/png"})
        assert answer.status_code == 422
        assert "damaged" in answer.json()["error"]


@pytest.mark.parametrize("side", [61, 20_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(client: TestClient, side: int) -> None:
    answer = client.post(CUT, content=bomb(side), headers={"content-type": "image/png"})
    assert answer.status_code == 413
    assert "pixels" in answer.json()["error"]


def test_another_size_is_refused(client: TestClient) -> None:
    answer = client.post(
        CUT,
        content=png(np.zeros((WIDTH, HEIGHT, 3), np.uint8)),
        headers={"content-type": "image/png"},
    )
    assert answer.status_code == 422
    assert "strokes of 60 x 40 pixels, the image has 40 x 60" in answer.json()["error"]


def test_a_stated_length_over_the_limit_is_refused_unread(client: TestClient) -> None:
    assert (
        client.post(
            CUT, content=black() + bytes(MAX_BYTES), headers={"content-type": "image/png"}
        ).status_code
        == 413
    )


def ask(
    app: FastAPI, chunks: list[bytes], headers: dict[str, str], path: str = CUT, query: bytes = b""
) -> tuple[int, int]:
    """Send a body in chunks, as a server would.

    Returns the status and the number of chunks read before the response.
    """
    status, read = 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": chunks[read - 1], "more_body": read < len(chunks)}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    raw = [
        (k.encode(), v.encode())
        for k, v in {
            "host": "127.0.0.1",
            "content-type": "image/png",
            **BEARER,
            **headers,
        }.items()
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": raw,
        "http_version": "1.1",
    }
    asyncio.run(
        app(
            {**scope, "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)},
            receive,
            send,
        )
    )
    return status, read


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [("/api/annotations/1/decision", b"decision=accepted", 200), ("/api/undo", b"", 409)],
)
def test_decisions_read_no_body(tmp_path: Path, path: str, query: bytes, status: int) -> None:
    assert ask(
        make(tmp_path), [bytes(100_000)] * 600, {"content-type": "application/json"}, path, query
    ) == (status, 0)


def test_sixty_megabytes_are_refused_while_they_arrive(tmp_path: Path) -> None:
    chunks = [black(), *[bytes(100_000)] * 600]
    app = make(tmp_path)
    assert ask(app, chunks, {}) == (413, 1 + MAX_BYTES // 100_000)
    assert ask(app, chunks, {"content-length": "60000000"}) == (413, 0)


def test_other_formats_are_refused_at_their_first_bytes(tmp_path: Path) -> None:
    assert ask(make(tmp_path), [b"\x89PN", b"X", *[bytes(10)] * 50], {}) == (415, 2)


def test_a_stalled_upload_times_out(tmp_path: Path) -> None:
    app = make(tmp_path, uploads=Uploads(MAX_BYTES, 1, timeout=0.05))
    status = 0

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [
        (b"host", b"127.0.0.1"),
        (b"content-type", b"image/png"),
        (b"authorization", BEARER["authorization"].encode()),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": CUT,
        "raw_path": b"",
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
    }
    asyncio.run(
        app(
            {**scope, "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)},
            receive,
            send,
        )
    )
    assert status == 408


def test_twenty_at_once(tmp_path: Path) -> None:
    """Four are processed, the others are refused immediately; later there is room again."""
    started, go = threading.Semaphore(0), threading.Event()

    def cut(*_: Any) -> GrabCutResult:
        started.release()
        assert go.wait(60)
        return GrabCutResult(disc(5))

    client = TestClient(make(tmp_path, cut=cut), base_url="http://127.0.0.1:8000", headers=BEARER)
    statuses: list[int] = []

    def post() -> None:
        statuses.append(
            client.post(CUT, content=black(), headers={"content-type": "image/png"}).status_code
        )

    with client:
        first = [threading.Thread(target=post) for _ in range(4)]
        for thread in first:
            thread.start()
        for _ in first:
            assert started.acquire(timeout=60)
        others = [threading.Thread(target=post) for _ in range(16)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(60)
        assert statuses == [429] * 16
        go.set()
        for thread in first:
            thread.join(60)
        assert sorted(statuses) == [200] * 4 + [429] * 16
        post()
        assert statuses[-1] == 200


def test_antialiased_strokes_are_foreground_or_background() -> None:
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0] = [[0, 255, 0], [100, 140, 0], [140, 100, 0]]
    pixels[1] = [[255, 0, 0], [127, 127, 0], [128, 128, 0]]
    foreground, background = read_strokes(png(pixels), 2, 3)
    assert foreground.tolist() == [[True, True, False], [False, False, False]]
    assert background.tolist() == [[False, False, True], [True, False, True]]


def test_a_slot_is_released_after_an_error() -> None:
    uploads = Uploads(10, 1)
    with pytest.raises(ValueError, match="x"), uploads.slot():
        raise ValueError("x")
    with uploads.slot(), pytest.raises(HTTPException), uploads.slot():
        pass
    with uploads.slot():
        pass
