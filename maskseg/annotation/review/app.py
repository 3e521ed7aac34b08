"""The review page: its routes, as a FastAPI application (extra `demo`).

Proposed masks are shown one at a time, accepted, rejected, or cut out again from a box and painted strokes. Everything is asked for by id, never
by path. What pixels and masks are read from, and how a mask is cut, is handed in.
"""

from __future__ import annotations

import io
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Literal, Protocol

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as AnyHTTPException

from maskseg.annotation.grabcut import Cut
from maskseg.annotation.review.guards import Bools, OwnPageOnly, Uploads, read_strokes
from maskseg.annotation.review.state import Annotation, ReviewFile, review_of
from maskseg.errors import UserError
from maskseg.masks.base import Rle, encoded, rle_to_bitmaps

Box = Sequence[float]  # xyxy, pixels
Recut = Callable[
    [NDArray[np.uint8], Box | None, Bools, Bools], Cut
]  # RGB [H, W, 3], box, surely foreground, surely background -> mask
Found = dict[str, Any]
PAGE = {
    "": "index.html",
    "app.js": "app.js",
    "view.js": "view.js",
    "list.js": "list.js",
    "style.css": "style.css",
}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
LONGEST_SIDE = 16384  # pixels, of a browser's canvas
QUALITY = 92  # of the JPEG that is shown


class Pictures(Protocol):
    """Images by the ids of the file, and masks. Raise KeyError for an id that is not there."""

    def name(self, image_id: int) -> str: ...
    def size(self, image_id: int) -> tuple[int, int]:
        """(height, width)"""

    def pixels(self, image_id: int) -> NDArray[np.uint8]:
        """RGB [H, W, 3]. Raises UserError for a file that cannot be read or lies outside the folder."""

    def mask(self, annotation: Annotation) -> Rle | None:
        """The mask of an annotation of the file, as it is now, in the image's frame; None where it has none. Raises UserError."""

    def categories(self) -> dict[int, str]:
        """Names by id."""


def review_app(
    file: ReviewFile, pictures: Pictures, recut: Recut, host: str, uploads: Uploads
) -> FastAPI:
    """host: what the server is bound to. `file` is closed when the application ends."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(file.close)

    app = FastAPI(lifespan=life, openapi_url=None)
    app.add_middleware(OwnPageOnly, host=host)
    app.include_router(Routes(file, pictures, recut, uploads).router())
    app.add_exception_handler(UserError, lambda _, error: JSONResponse({"error": str(error)}, 422))
    app.add_exception_handler(
        KeyError, lambda _, error: JSONResponse({"error": f"there is no id {error}"}, 404)
    )
    app.add_exception_handler(AnyHTTPException, _told)
    app.add_exception_handler(
        RequestValidationError, lambda _, error: JSONResponse({"error": str(error)}, 422)
    )
    return app


class Routes:
    """One method a request. Functions that read, write or compute are no coroutines: the server runs them in threads."""

    def __init__(
        self, file: ReviewFile, pictures: Pictures, recut: Recut, uploads: Uploads
    ) -> None:
        self.file, self.pictures, self.recut, self.uploads = file, pictures, recut, uploads

    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        for path, name in PAGE.items():
            router.add_api_route(f"/{path}", _page_file(name), methods=["GET"])
        router.add_api_route("/api/items", self.items, methods=["GET"])
        router.add_api_route("/api/images/{number}", self.image, methods=["GET"])
        router.add_api_route("/api/annotations/{number}", self.annotation, methods=["GET"])
        router.add_api_route("/api/annotations/{number}/mask", self.mask, methods=["GET"])
        router.add_api_route("/api/annotations/{number}/decision", self.decide, methods=["POST"])
        router.add_api_route("/api/annotations/{number}/cut", self.cut, methods=["POST"])
        router.add_api_route("/api/undo", self.undo, methods=["POST"])
        return router

    def items(self) -> Response:
        """All annotations as columns, those of one image side by side. The file is made true first."""
        self.file.fold()
        rows = self.file.rows()
        place: dict[int, int] = {}
        for row in rows:
            place.setdefault(row.image_id, len(place))
        rows.sort(key=lambda row: place[row.image_id])
        found = {
            "file": self.file.path.name,
            "ids": [row.id for row in rows],
            "image_ids": [row.image_id for row in rows],
            "category_ids": [row.category_id for row in rows],
            "reviews": [row.review for row in rows],
            "images": {number: self.pictures.name(number) for number in place},
            "categories": self.pictures.categories(),
            "undoable": self.file.undoable(),
        }
        return JSONResponse(found)

    def image(self, number: int) -> Response:
        """The picture as the annotations see it, a JPEG file."""
        if max(self.pictures.size(number)) > LONGEST_SIDE:
            raise HTTPException(
                422,
                f"{self.pictures.name(number)}: browsers show no image of more than {LONGEST_SIDE} pixels a side",
            )
        data = io.BytesIO()
        Image.fromarray(self.pictures.pixels(number)).save(
            data, "JPEG", quality=QUALITY, subsampling=0
        )
        return Response(data.getvalue(), media_type="image/jpeg")

    def annotation(self, number: int) -> Response:
        """What is known of one annotation."""
        return self._state(number)

    def mask(self, number: int) -> Response:
        """The mask, a PNG file of one bit a pixel, transparent where it is not."""
        annotation = self.file.annotation(number)
        rle = self.pictures.mask(annotation)
        height, width = self.pictures.size(annotation["image_id"])
        bitmap = np.zeros((height, width), dtype=bool) if rle is None else rle_to_bitmaps([rle])[0]
        picture = Image.fromarray(bitmap.astype(np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 255, 255, 255])
        data = io.BytesIO()
        picture.save(data, "PNG", bits=1, transparency=0)
        return Response(data.getvalue(), media_type="image/png")

    def decide(self, number: int, decision: Literal["accepted", "rejected"]) -> Response:
        """Accepts or rejects; no body is read."""
        self.file.decide(number, decision)
        return self._state(number)

    async def cut(self, number: int, request: Request, box: str = "") -> Response:
        """Cuts the object out again. box: "x1,y1,x2,y2", the annotation's own where it is not given; the body: strokes as `read_strokes` has them."""
        with self.uploads.place():
            data = await self.uploads.body(request)
            return await run_in_threadpool(self._cut, number, data, box)

    def undo(self) -> Response:
        """Takes the last decision back."""
        number = self.file.undo()
        if number is None:
            raise HTTPException(409, "there is nothing to take back")
        return self._state(number)

    def _cut(self, number: int, data: bytes, box: str) -> Response:
        annotation = self.file.annotation(number)
        height, width = self.pictures.size(annotation["image_id"])
        foreground, background = read_strokes(data, height, width)
        chosen = _posted_box(box, height, width) if box else _box(annotation)
        cut = self.recut(
            self.pictures.pixels(annotation["image_id"]), chosen, foreground, background
        )
        if not cut.mask.any():
            raise HTTPException(
                422, "nothing would be left of the mask; paint foreground, or reject it"
            )
        self.file.redraw(number, *encoded(cut.mask), int(cut.mask.sum()), cut.fallback)
        return self._state(number)

    def _state(self, number: int) -> Response:
        annotation = self.file.annotation(number)
        height, width = self.pictures.size(annotation["image_id"])
        made = annotation["mask_by"] if isinstance(annotation.get("mask_by"), dict) else {}
        score, fallback = made.get("score", annotation.get("score")), made.get("fallback")
        found = {
            "id": number,
            "image_id": annotation["image_id"],
            "height": height,
            "width": width,
            "box": _box(annotation),
            "score": score if _is_number(score) else None,
            "review": review_of(annotation),
            "undoable": self.file.undoable(),
            "trouble": self.file.trouble,
            "fallback": fallback if isinstance(fallback, str) else "",
        }
        return JSONResponse(found)


def _page_file(name: str) -> Callable[[], Response]:
    text = files("maskseg.annotation.review").joinpath("page", name).read_text()

    def answer() -> Response:
        return Response(text, media_type=TYPES[name.rpartition(".")[2]])

    return answer


async def _told(_: Request, error: Exception) -> Response:
    """Refusals are JSON of one form."""
    assert isinstance(error, AnyHTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _box(annotation: Annotation) -> list[float] | None:
    """xyxy; None where the annotation has no box that is one."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None
    x, y, width, height = box
    return [x, y, x + width, y + height] if width > 0 and height > 0 else None


def _posted_box(text: str, height: int, width: int) -> list[float]:
    """A drawn box, cut at the image's border. Answers 422 for what is none."""
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise HTTPException(422, f"box={text!r} is not x1,y1,x2,y2") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise HTTPException(422, f"box={text!r} has a number that is not finite")
    box = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise HTTPException(422, "the box has no part of the image in it")
    return box
