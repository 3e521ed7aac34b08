"""Access control of the review page.

Requests of other web pages are refused, and so are uploads that are too large, too many at once, or
not PNG files.

A page of another site can send requests to this machine. The request then has the other site's
address in `Origin`, or a host name under the other site's control in `Host` (DNS rebinding), so
both headers must match the page itself.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Bools = NDArray[np.bool_]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIMEOUT = 30.0  # seconds for an upload
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


class SameOriginOnly:
    """Middleware that answers 403 to requests of other pages.

    host: the address that the server is bound to. On an address other than loopback every `Host` is
    allowed, as the names of the machine are unknown.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self.hosts = LOOPBACK if host in LOOPBACK else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Headers(scope=scope))
            if refusal:
                await JSONResponse({"error": refusal}, 403)(scope, receive, send)
                return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, headers: Headers) -> str:
        """Why a request is refused, "" if it is not."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
                return f"Host {host!r} is not this machine"
            if origin is not None and urlsplit(origin).netloc != host:
                return f"Origin {origin!r} is another page"
        except ValueError:
            return "Host or Origin is not a valid address"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return "the request comes from another page"
        return ""


class Uploads:
    """Limits for uploads of PNG files; they are enforced while the data arrives.

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

    async def read_body(self, request: Request) -> bytes:
        """Read an upload. Answers 413 or 415, or 408 after the timeout."""
        if request.headers.get("content-type") != "image/png":
            raise HTTPException(415, "strokes must be sent as image/png")
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
                    if data[: len(SIGNATURE)] != SIGNATURE[: len(data)]:
                        raise HTTPException(415, "not a PNG file")
        except TimeoutError as error:
            raise HTTPException(408, f"the upload took more than {self.timeout:g} s") from error
        return bytes(data)

    def _too_large(self) -> str:
        return f"strokes are limited to {self.max_bytes} bytes"


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
