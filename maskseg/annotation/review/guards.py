"""Access control of the review page.

Requests without the token of the server are refused, and so are requests of other web pages, and
uploads that are too large, too many at once, or of another kind.

Other users of this machine can send requests to the server, also on a loopback address. The token
is printed as part of the page's address, and is kept in a cookie from then on.

A page of another site can send requests to this machine. The request then has the other site's
address in `Origin`, or a host name under the other site's control in `Host` (DNS rebinding), so
both headers must match the page itself.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskseg.files import parse_json

Bools = NDArray[np.bool_]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIMEOUT = 30.0  # seconds for an upload
TOKEN_BYTES = 24
_ABSOLUTE_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+")
_CONTENT_POLICY = (
    "default-src 'self'",
    "img-src 'self' blob: data:",
    "frame-ancestors 'none'",
    "form-action 'none'",
    "base-uri 'none'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_CONTENT_POLICY),
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Access:
    """Decides which requests are answered.

    token: the secret of this server, by default a random one.
    host: the address that the server is bound to; names: further host names of this machine, as
    they are written in the address of the page.
    """

    def __init__(self, host: str, names: Iterable[str] = (), token: str = "") -> None:
        self.token = token or secrets.token_urlsafe(TOKEN_BYTES)
        self.is_local = host in LOOPBACK
        own_names = () if self.is_local else (host, socket.gethostname(), socket.getfqdn())
        self.names = frozenset(name.lower() for name in (*LOOPBACK, *own_names, *names))

    def refusal(self, headers: Headers, query: str, is_page: bool) -> str:
        """Return why a request is refused, "" if it is not.

        is_page: whether it opens the page itself, which is allowed from a link with the token.
        """
        if not self._is_own_name(headers.get("host", "")):
            return (
                f"Host {headers.get('host', '')!r} is not a known name of this machine; "
                "host_names=[NAME] adds one"
            )
        origin = headers.get("origin")
        if origin is not None and not _is_same_origin(origin, headers.get("host", "")):
            return f"Origin {origin!r} is another page"
        if is_page and self.has_token_in_query(query):
            return ""
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return "the request comes from another page"
        if not self._has_token(headers):
            return "no valid token: open the address that the review tool has printed"
        return ""

    def has_token_in_query(self, query: str) -> bool:
        """Whether a query string has the token."""
        return any(self._is_token(value) for value in parse_qs(query).get("token", ()))

    def cookie(self, headers: Headers) -> str:
        """Return the cookie that keeps the token."""
        name = _cookie_name(headers.get("host", ""))
        return f"{name}={self.token}; HttpOnly; SameSite=Strict; Path=/"

    def _is_own_name(self, host: str) -> bool:
        name = _host_name(host)
        if not name:
            return False
        # Rebinding needs a name of the other site: an address is always that of this machine.
        return name in self.names or (not self.is_local and _is_ip_address(name))

    def _has_token(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(value.strip()):
            return True
        # Not http.cookies, which drops all cookies behind one that it cannot parse.
        cookies = cookie_parser(headers.get("cookie", ""))
        return self._is_token(cookies.get(_cookie_name(headers.get("host", "")), ""))

    def _is_token(self, value: str) -> bool:
        return secrets.compare_digest(value.encode(), self.token.encode())


def _host_name(host: str) -> str:
    """Return the host name of a `Host` header in lower case, "" if it is invalid."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same_origin(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _cookie_name(host: str) -> str:
    """Return the name of the cookie: cookies belong to a host, whatever the port."""
    return f"maskseg_review_{host.rpartition(':')[2] if host[-1:].isdigit() else 80}"


class AccessControl:
    """Middleware that answers 403 to requests that `access` refuses."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        query = scope["query_string"].decode("latin-1")
        is_page = scope["path"] == "/" and scope["method"] == "GET"
        refusal = self.access.refusal(headers, query, is_page)
        sets_cookie = not refusal and is_page and self.access.has_token_in_query(query)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                response_headers = MutableHeaders(scope=message)
                response_headers.update(_HEADERS)
                if sets_cookie:
                    response_headers.append("Set-Cookie", self.access.cookie(headers))
            await send(message)

        if refusal:
            await JSONResponse({"error": refusal}, 403)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


class Uploads:
    """Limits for uploads; they are enforced while the data arrives.

    max_bytes: of a file; max_concurrent: number of uploads processed at a time; timeout: seconds.
    """

    def __init__(self, max_bytes: int, max_concurrent: int, timeout: float = TIMEOUT) -> None:
        self.max_bytes = max_bytes
        self.max_concurrent = max_concurrent
        self.timeout = timeout
        self._active = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Occupy one of the `max_concurrent` slots. Answers 429 if none is free."""
        if self._active >= self.max_concurrent:
            raise HTTPException(429, f"more than {self.max_concurrent} masks at once; try again")
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    async def read_png(self, request: Request) -> bytes:
        """Read a PNG file. Answers 413 or 415, or 408 after the timeout."""
        return await self._read(request, "image/png", SIGNATURE)

    async def read_json(self, request: Request) -> object:
        """Read a value in JSON. Answers 413, 415 or 422, or 408 after the timeout."""
        data = await self._read(request, "application/json", b"")
        try:
            value: object = parse_json(data)
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, f"not JSON ({error})") from error
        return value

    async def _read(self, request: Request, kind: str, signature: bytes) -> bytes:
        """Read an upload of a content type that starts with `signature`."""
        if request.headers.get("content-type") != kind:
            raise HTTPException(415, f"this must be sent as {kind}")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_bytes:
            raise HTTPException(413, self._too_large())
        data = bytearray()
        try:
            async with asyncio.timeout(self.timeout):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.max_bytes:
                        raise HTTPException(413, self._too_large())
                    if data[: len(signature)] != signature[: len(data)]:
                        raise HTTPException(415, "not a PNG file")
        except TimeoutError as error:
            raise HTTPException(408, f"the upload took more than {self.timeout:g} s") from error
        return bytes(data)

    def _too_large(self) -> str:
        return f"uploads are limited to {self.max_bytes} bytes"


def hide_folders(message: str, folders: Iterable[Path]) -> str:
    """Return a message for the browser, in which paths are reduced to names of files.

    folders: those that messages are about; they can be relative or contain spaces. Of other
    absolute paths everything before the last name is removed.
    """
    prefixes: set[str] = set()
    for folder in folders:
        prefixes.update((f"{folder}{os.sep}", f"{folder.resolve()}{os.sep}"))
    for prefix in sorted(prefixes, key=len, reverse=True):
        if prefix not in (os.sep, f".{os.sep}"):
            message = message.replace(prefix, "")
    return _ABSOLUTE_PATH.sub("", message)


def read_strokes(data: bytes, height: int, width: int) -> tuple[Bools, Bools]:
    """Decode painted strokes to foreground and background masks, bool [height, width] each.

    data: a PNG of the image's size, green for foreground and red for background. Answers 413 if it
    has more pixels than the image, before decoding; 415 or 422 if it cannot be read or has another
    size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != (width, height):
                status = 413 if image.width * image.height > height * width else 422
                raise HTTPException(
                    status,
                    f"strokes of {image.height} x {image.width} pixels, "
                    f"the image has {height} x {width}",
                )
            pixels = np.asarray(image.convert("RGB"))
    except (HTTPException, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise HTTPException(
            413, f"strokes of too many pixels, the image has {height} x {width}"
        ) from error
    except UnidentifiedImageError as error:
        raise HTTPException(415, "not a PNG file") from error
    except Exception as error:  # decoders raise almost any exception on damaged data
        raise HTTPException(422, f"the PNG file is damaged ({error})") from error
    red = pixels[..., 0]
    green = pixels[..., 1]
    foreground = (green > 127) & (green > red)
    return foreground, (red > 127) & ~foreground
