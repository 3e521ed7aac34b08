"""What keeps the review page to its user: requests of other web pages are refused, and so are uploads that are too large, no PNG, or too many.

A page of another site can send requests to this machine. Its address stands in `Origin`, and the name that it made the browser look up in `Host`;
both must be the page's own.
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
SECONDS = 30.0  # for an upload
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; form-action 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class OwnPageOnly:
    """Middleware that answers 403 to other pages. host: what the server is bound to; beyond the loopback addresses any Host may be asked for, as
    one cannot know under what names a machine is reached."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app, self.hosts = app, LOOPBACK if host in LOOPBACK else ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Headers(scope=scope))
            if refusal:
                await JSONResponse({"error": refusal}, 403)(scope, receive, send)
                return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, guarded)

    def _refusal(self, headers: Headers) -> str:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
                return f"Host {host!r} is not this machine's own"
            if origin is not None and urlsplit(origin).netloc != host:
                return f"Origin {origin!r} is another page"
        except ValueError:
            return "Host or Origin is no address"
        return (
            "another page asks"
            if headers.get("sec-fetch-site") in ("cross-site", "same-site")
            else ""
        )


class Uploads:
    """PNG files of up to `most_bytes`, `at_once` of them at a time; what goes beyond is refused while it arrives."""

    def __init__(self, most_bytes: int, at_once: int, seconds: float = SECONDS) -> None:
        self.most_bytes, self.at_once, self.seconds = most_bytes, at_once, seconds
        self._busy = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places, until its work is done. Answers 429 where there is none."""
        if self._busy >= self.at_once:
            raise HTTPException(429, f"more than {self.at_once} masks at once; try again")
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def body(self, request: Request) -> bytes:
        """The upload. Answers 413, 415, or 408 where it takes too long."""
        if request.headers.get("content-type") != "image/png":
            raise HTTPException(415, "strokes are sent as image/png")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.most_bytes:
            raise HTTPException(413, self._too_large())
        data = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.most_bytes:
                        raise HTTPException(413, self._too_large())
                    if data[: len(SIGNATURE)] != SIGNATURE[: len(data)]:
                        raise HTTPException(415, "not a PNG file")
        except TimeoutError as error:
            raise HTTPException(408, f"the upload took more than {self.seconds:g} s") from error
        return bytes(data)

    def _too_large(self) -> str:
        return f"strokes are at most {self.most_bytes} bytes"


def read_strokes(data: bytes, height: int, width: int) -> tuple[Bools, Bools]:
    """A PNG of the image's size, green where it is painted as foreground, red as background -> the two masks, bool [height, width].

    Answers 413 where it has more pixels than the image, before any is decoded; 415 or 422 for what cannot be read or has another size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > height * width:
                raise HTTPException(
                    413,
                    f"strokes of {image.height} x {image.width} pixels, the image has {height} x {width}",
                )
            if image.size != (width, height):
                raise HTTPException(
                    422,
                    f"strokes of {image.height} x {image.width} pixels, the image has {height} x {width}",
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
    except Exception as error:  # decoders raise almost anything on damaged data
        raise HTTPException(422, f"the PNG file is damaged ({error})") from error
    foreground = (pixels[..., 1] > 127) & (pixels[..., 1] > pixels[..., 0])
    return foreground, (pixels[..., 0] > 127) & ~foreground
