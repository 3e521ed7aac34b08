"""Weights are downloaded once, atomically, and their checksums are compared at each use."""

from __future__ import annotations

import hashlib
import io
import os
import socket
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from threading import Thread
from urllib.error import URLError
from urllib.request import Request

import pytest
from made.downloads import FileServer, file_server

from maskseg.errors import UserError
from maskseg.files.downloads import SecureRedirects, fetch, is_address, published_file

CONTENT = bytes(range(256)) * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def running() -> Iterator[FileServer]:
    with file_server() as server:
        yield server


@pytest.fixture
def server(running: FileServer) -> FileServer:
    running.files.clear()
    running.redirects.clear()
    running.requests.clear()
    running.cut = None
    return running


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once(hub: Path, server: FileServer) -> None:
    address = server.add(f"/models/net-{SHA256[:8]}.pth", CONTENT)
    path = fetch(address)
    assert path.name.endswith(f"net-{SHA256[:8]}.pth")
    assert path.read_bytes() == CONTENT
    server.files.clear()
    assert fetch(address) == path
    assert len(server.requests) == 1
    assert files_in(hub) == [path.name]


def test_files_of_one_name_are_kept_apart(hub: Path, server: FileServer) -> None:
    first = fetch(server.add("/a/model_final.pkl", b"first"))
    second = fetch(server.add("/b/model_final.pkl", b"second"))
    third = fetch(server.add("/b/model_final.pkl", b"third") + "?version=2")
    assert [path.read_bytes() for path in (first, second, third)] == [b"first", b"second", b"third"]
    assert all(path.is_relative_to(hub) for path in (first, second, third))


def damage(path: Path, content: bytes) -> None:
    """Change a file as a disk does: without a new time."""
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_damaged_copy_is_downloaded_again(
    hub: Path, server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (f"/net-{SHA256[:8]}.pth", "/model_final.pkl"):
        address = server.add(path, CONTENT)
        cached = fetch(address)
        damage(cached, CONTENT[:-1])
        assert fetch(address).read_bytes() == CONTENT
        assert cached.is_relative_to(hub)
        assert f"warning: {cached} is damaged: its SHA-256" in capsys.readouterr().out
        # Without the server, one line names the place.
        damage(cached, b"")
        server.files.clear()
        with pytest.raises(UserError) as raised:
            fetch(address)
        message = str(raised.value)
        assert f"{address} could not be downloaded (HTTP Error 404: Not Found)" in message
        assert message.endswith(f"put the file at {cached}")
        assert "\n" not in message


def test_a_file_that_was_put_there_is_used(hub: Path) -> None:
    hub.mkdir(parents=True)
    # Where torchvision keeps it, too.
    (hub / f"net-{SHA256[:8]}.pth").write_bytes(CONTENT)
    assert fetch(f"https://download.pytorch.org/models/net-{SHA256[:8]}.pth").parent == hub
    by_hand = published_file("https://example.invalid/x/model.pkl").path
    assert by_hand == hub / "example.invalid" / "x" / "model.pkl"
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(b"anything")
    assert fetch("https://example.invalid/x/model.pkl") == by_hand


def test_a_newer_file_beside_a_record_is_never_replaced(hub: Path, server: FileServer) -> None:
    address = server.add("/model.pkl", CONTENT)
    path = fetch(address)
    record = path.with_name(f"{path.name}.sha256")
    assert record.read_text().strip() == SHA256
    path.write_bytes(b"of the user")
    later = record.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
    with pytest.raises(UserError) as raised:
        fetch(address)
    assert f"another file than that of {record}, and newer: remove that record" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"of the user"
    assert len(server.requests) == 1
    record.unlink()
    assert fetch(address).read_bytes() == b"of the user"
    path.unlink()
    assert fetch(address).read_bytes() == CONTENT
    assert path.is_relative_to(hub)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"\n", b"abc", SHA256[:63].encode()])
def test_a_damaged_record_is_named(hub: Path, content: bytes) -> None:
    address = "https://example.invalid/model.pkl"
    path = published_file(address).path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of the user")
    record = path.with_name("model.pkl.sha256")
    record.write_bytes(content)
    with pytest.raises(UserError, match="not the SHA-256 of a file: remove it to use") as raised:
        fetch(address)
    assert str(raised.value).startswith(str(record))
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == b"of the user"
    assert path.is_relative_to(hub)


def test_addresses_never_share_a_place() -> None:
    places = [
        *("a/b.pth", "a%2fb.pth", "a//b.pth", "./a/b.pth", "a/b.pth?c=1", "a/b.pth?c=2"),
        *("x y.pth", "x_y.pth", "x%20y.pth", "x+y.pth", "x%2By.pth", ".x.pth", "x.pth"),
    ]
    addresses = [f"https://example.invalid/{place}" for place in places]
    addresses += ["http://example.invalid/a/b.pth", "https://example.invalid:8443/a/b.pth"]
    addresses += ["https://example.invalid_8443/a/b.pth", "https://u@example.invalid/a/b.pth"]
    paths = [published_file(address).path for address in addresses]
    assert len(set(paths)) == len(paths)
    # The same file, with its hash or without it.
    stated = published_file(f"https://example.invalid/a/b.pth#sha256={SHA256}")
    assert stated.path == paths[0]
    assert published_file("https://example.invalid/a/b.pth?").path == paths[0]


def test_a_download_that_breaks_off_leaves_nothing(hub: Path, server: FileServer) -> None:
    address = server.add("/model.pkl", CONTENT)
    server.cut = len(CONTENT) // 2
    with pytest.raises(UserError, match=rf"broke off after {server.cut} of {len(CONTENT)} bytes"):
        fetch(address)
    assert files_in(hub) == []
    server.cut = None
    assert fetch(address).read_bytes() == CONTENT
    # A copy that was complete before stays.
    server.cut = 10
    cached = fetch(address)
    cached.with_name(f"{cached.name}.sha256").write_text("0" * 64)
    damage(cached, CONTENT)
    with pytest.raises(UserError, match="broke off"):
        fetch(address)
    assert cached.read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["name", "fragment"])
def test_another_content_than_stated_is_refused(hub: Path, server: FileServer, place: str) -> None:
    wrong = "0badf00d"
    name = f"net-{wrong}.pth" if place == "name" else f"net.pth#sha256={wrong}"
    server.add(f"/{name.partition('#')[0]}", CONTENT)
    with pytest.raises(UserError, match=f"begins with {SHA256[:16]}, not with {wrong}"):
        fetch(f"{server.address}/{name}")
    assert files_in(hub) == []
    right = f"{server.add('/other.pth', CONTENT)}#sha256={SHA256.upper()}"
    assert fetch(right).read_bytes() == CONTENT


def test_no_answer_is_one_line(hub: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/net.pth"
        with pytest.raises(
            UserError, match=r"could not be downloaded \(.*[Rr]efused.*\)"
        ) as raised:
            fetch(address)
    assert "\n" not in str(raised.value)
    assert files_in(hub) == []


@pytest.mark.usefixtures("hub")
def test_processes_that_need_one_file_download_it_once(server: FileServer) -> None:
    address = server.add("/net.pth", CONTENT)
    threads = [Thread(target=fetch, args=(address,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == ["/net.pth"]


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").write_text("a file")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(UserError, match="TORCH_HOME names another one"):
        fetch("https://example.invalid/net.pth")


@pytest.mark.parametrize(
    "address",
    [
        *("https://example.invalid", "https://example.invalid/", "https://example.invalid/folder/"),
        *("https:///net.pth", "https://[::1/net.pth", "https://example.invalid/a.pth#md5=12345678"),
    ],
)
def test_what_is_not_the_address_of_a_file(address: str) -> None:
    assert is_address(address)
    with pytest.raises(UserError) as raised:
        fetch(address)
    assert str(raised.value).startswith(address)


def test_addresses_of_detectron2() -> None:
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl"
    file = published_file(f"detectron2://{name}")
    assert file.address == f"https://dl.fbaipublicfiles.com/detectron2/{name}"
    assert file.path.parts[-6:] == ("dl.fbaipublicfiles.com", "detectron2", *name.split("/"))
    outside = published_file("https://example.invalid/../../%2e%2e/etc%2fpasswd").path
    assert ".." not in outside.parts
    assert not is_address("runs/http")


@pytest.mark.parametrize(
    "host",
    [
        *("example.invalid", "evilpytorch.org", "pytorch.org", "download.pytorch.org.invalid"),
        *("user@download.pytorch.org", "download.pytorch.org:8443"),
    ],
)
def test_other_servers_have_folders_of_their_own(hub: Path, host: str) -> None:
    """Their files never take the place of those that torch loads without a check."""
    for name in ("resnet18-f37072fd.pth", "net-20260131.pth", "net.pth"):
        file = published_file(f"https://{host}/models/{name}")
        assert file.path.parent != hub
        assert file.path.is_relative_to(hub)
    assert published_file(f"https://{host}/net-20260131.pth").sha256 == ""


@pytest.mark.parametrize(
    ("old", "new", "is_followed"),
    [
        ("https://a.invalid/x", "https://b.invalid/y", True),
        ("http://a.invalid/x", "https://b.invalid/y", True),
        ("http://a.invalid/x", "http://b.invalid/y", True),
        ("https://a.invalid/x", "http://a.invalid/x", False),
        ("https://a.invalid/x", "ftp://a.invalid/x", False),
        ("http://a.invalid/x", "ftp://a.invalid/x", False),
    ],
)
def test_a_redirect_never_leaves_https(old: str, new: str, is_followed: bool) -> None:
    def redirect() -> Request | None:
        body, headers = io.BytesIO(), HTTPMessage()
        return SecureRedirects().redirect_request(Request(old), body, 302, "", headers, new)

    if is_followed:
        request = redirect()
        assert request is not None
        assert request.full_url == new
        return
    with pytest.raises(URLError, match=f"it redirects to {new}, which is not https"):
        redirect()


def test_a_refused_redirect_is_one_line(hub: Path, server: FileServer) -> None:
    server.redirects["/net.pth"] = "ftp://example.invalid/net.pth"
    with pytest.raises(
        UserError, match=r"\(it redirects to ftp://.*, which is not https\)"
    ) as error:
        fetch(f"{server.address}/net.pth")
    assert "\n" not in str(error.value)
    assert files_in(hub) == []
    server.redirects["/net.pth"] = server.add("/moved.pth", CONTENT)
    assert fetch(f"{server.address}/net.pth").read_bytes() == CONTENT


def test_a_date_in_a_name_is_no_checksum() -> None:
    assert published_file("https://example.invalid/net-20260131.pth").sha256 == ""
    assert published_file("https://download.pytorch.org/net-20260131.pth").sha256 == "20260131"
    assert published_file("https://example.invalid/net-2026013f.pth").sha256 == "2026013f"
