"""Published files of weights, which are downloaded once and kept in torch's folder for them."""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from tqdm import tqdm

from maskseg.errors import UserError, describe_error
from maskseg.files.atomic import replacing
from maskseg.files.locks import lock

_TIMEOUT = 30.0  # seconds without an answer after which a download has failed
_BLOCK = 1 << 20  # bytes
_SCHEMES = ("http", "https")
# detectron2's own form of an address, and where its files are.
_DETECTRON2 = "detectron2://"
_DETECTRON2_FILES = "https://dl.fbaipublicfiles.com/detectron2/"
# torch appends the beginning of a file's SHA-256 to its name: `resnet18-f37072fd.pth`.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
# The host of the files that torch itself keeps in its folder; its hashes of digits are no dates.
_TORCH_HOST = "download.pytorch.org"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{8,64})")
_UNSAFE = re.compile(r"[^\w.+-]")


def weights_folder() -> Path:
    """The folder where torch keeps downloaded weights."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def is_address(text: str) -> bool:
    """Whether a text is the address of a file: `http://`, `https://` or `detectron2://`."""
    return text.startswith((*(f"{scheme}://" for scheme in _SCHEMES), _DETECTRON2))


@dataclass(frozen=True)
class PublishedFile:
    """A file to download, and its place on this machine.

    sha256: the SHA-256 in hexadecimal digits, or its beginning; "" where it is not known before
    the download.
    """

    address: str
    path: Path
    sha256: str

    @property
    def record(self) -> Path:
        """The file that keeps the SHA-256 of a download whose address does not state it."""
        return self.path.with_name(f"{self.path.name}.sha256")

    def expected_hash(self) -> str:
        """The SHA-256, its beginning, or "" for a file that was put there by hand.

        Raises UserError for a damaged record.
        """
        if self.sha256 or not self.record.is_file():
            return self.sha256
        text = self.record.read_bytes().decode("ascii", "replace").strip()
        if _SHA256.fullmatch(text) is None:
            raise UserError(
                f"{self.record}: not the SHA-256 of a file: remove it to use {self.path} as it is, "
                "or both to download the file again"
            )
        return text

    def fault(self) -> str:
        """Why the file of this machine cannot be used: "" for one that is complete.

        Raises UserError for a file that was put there by hand after another one was downloaded.
        """
        if not self.path.is_file():
            return "no such file"
        expected = self.expected_hash()
        if not expected or _hash_file(self.path).startswith(expected):
            return ""
        if not self.sha256 and self.path.stat().st_mtime_ns > self.record.stat().st_mtime_ns:
            raise UserError(
                f"{self.path}: another file than that of {self.record}, and newer: "
                "remove that record to use the file as it is, or both to download it again"
            )
        return f"its SHA-256 does not begin with {expected[:16]}"


def published_file(address: str) -> PublishedFile:
    """Parse an address, which may end in `#sha256=` and the hash of the file.

    A file of torch whose name has its hash is kept as torch and torchvision keep it, each other one
    in a folder of the name of the server. No two addresses have one place.
    Raises UserError for an address without a file.
    """
    if address.startswith(_DETECTRON2):
        address = _DETECTRON2_FILES + address.removeprefix(_DETECTRON2)
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UserError(f"{address}: not an address ({error})") from error
    names = [name for name in map(_safe_name, parts.path.split("/")) if name]
    if parts.scheme not in _SCHEMES or not parts.netloc or not names or parts.path.endswith("/"):
        raise UserError(f"{address}: not the address of a file (http:// or https://)")
    stated = _FRAGMENT.fullmatch(parts.fragment)
    if parts.fragment and stated is None:
        raise UserError(f"{address}: expected #sha256=HASH at its end, not #{parts.fragment}")
    sha256 = _hash_in_name(names[-1], parts.netloc)
    is_plain = _is_plain(parts, names)
    folder = weights_folder()
    if not (sha256 and is_plain and parts.netloc == _TORCH_HOST):
        folder = folder.joinpath(_safe_name(parts.netloc) or "_", *names[:-1])
    if not is_plain:
        place = address.partition("#")[0].encode("utf-8", "surrogatepass")
        names[-1] = f"{hashlib.sha256(place).hexdigest()[:8]}_{names[-1]}"
    if stated is not None:
        sha256 = stated[1].lower()
    return PublishedFile(address.partition("#")[0], folder / names[-1], sha256)


def _hash_in_name(name: str, host: str) -> str:
    """The beginning of the SHA-256 in a file's name, "" where there is none."""
    match = _HASH_IN_NAME.search(name)
    if match is None or (match[1].isdigit() and host != _TORCH_HOST):
        return ""  # eight digits are a date
    return match[1]


def _is_plain(parts: SplitResult, names: Sequence[str]) -> bool:
    """Whether no other address has these names: no character of the address is lost in them."""
    is_whole = parts.path == "/" + "/".join(names) and not parts.query
    return is_whole and parts.scheme == "https" and parts.netloc == _safe_name(parts.netloc)


def _safe_name(text: str) -> str:
    """A part of an address as the name of a file or folder, "" where nothing is left."""
    return _UNSAFE.sub("_", unquote(text)).lstrip(".")


def fetch(address: str) -> Path:
    """Return the local copy of a published file, which is downloaded if there is none.

    The checksum of the copy is compared each time, and a damaged one is downloaded again. One
    process at a time downloads a file; others wait. A download that fails leaves nothing.
    Raises UserError, which names the address and the place where the file can be put by hand.
    """
    file = published_file(address)
    if not file.fault():
        return file.path
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(file.path.with_name(f".{file.path.name}.lock"), "", _report_wait):
            fault = file.fault()  # another process may have downloaded it meanwhile
            if fault:
                if file.path.is_file():
                    print(f"warning: {file.path} is damaged: {fault}", flush=True)
                _download(file)
    except OSError as error:
        raise UserError(
            f"{file.path}: the folder cannot be written ({describe_error(error)}); TORCH_HOME "
            "names another one"
        ) from error
    return file.path


def _report_wait() -> None:
    print("waiting for another process, which downloads the weights", flush=True)


class _TransferError(Exception):
    """The download failed; the message is the reason."""


def _download(file: PublishedFile) -> None:
    """Download a file and write it atomically. Raises UserError."""
    print(f"downloading {file.address} to {file.path}", flush=True)
    digest = hashlib.sha256()
    try:
        with (
            _open(file.address) as response,
            replacing(file.path, "the download") as target,
        ):
            for block in _read_blocks(response):
                digest.update(block)
                target.write(block)
            if not digest.hexdigest().startswith(file.sha256):
                raise _TransferError(
                    f"its SHA-256 begins with {digest.hexdigest()[:16]}, not with "
                    f"{file.sha256[:16]}"
                )
        if not file.sha256:
            with replacing(file.record, "the checksum of the download") as record:
                record.write(f"{digest.hexdigest()}\n".encode())
    except _TransferError as error:
        raise UserError(
            f"{file.address} could not be downloaded ({error}); without a network, put the file at "
            f"{file.path}"
        ) from error


class SecureRedirects(HTTPRedirectHandler):
    """Refuses a redirect from https:// to another scheme, and one to neither http nor https."""

    def redirect_request(
        self,
        req: Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> Request | None:
        """The request of the new address. Raises URLError for one that is refused."""
        scheme = urlsplit(newurl).scheme
        if scheme not in _SCHEMES or (req.type == "https" and scheme != "https"):
            raise URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _open(address: str) -> Iterator[http.client.HTTPResponse]:
    """The answer of a server. Raises _TransferError where there is none."""
    request = Request(address, headers={"User-Agent": "maskseg"})
    try:
        response = build_opener(SecureRedirects()).open(request, timeout=_TIMEOUT)
    except HTTPError as error:
        raise _TransferError(str(error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = describe_error(reason) if isinstance(reason, BaseException) else reason
        raise _TransferError(text) from error
    with response:
        yield response


def _read_blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The content of an answer. Raises _TransferError where it breaks off."""
    stated = response.headers.get("Content-Length", "")
    total = int(stated) if stated.isdigit() else None
    received = 0
    with tqdm(
        total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
    ) as progress:
        while True:
            try:
                block = response.read(_BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise _TransferError(describe_error(error)) from error
            if not block:
                break
            received += len(block)
            progress.update(len(block))
            yield block
    if total is not None and received != total:
        raise _TransferError(f"it broke off after {received} of {total} bytes")


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
