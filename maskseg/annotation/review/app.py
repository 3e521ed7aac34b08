"""The review page as a FastAPI application (extra `demo`).

Proposed masks are shown one at a time, accepted, rejected, given another class or contour, or
segmented again from a box and painted strokes; further objects can be added. Requests name
annotations and images by id, never by path. The sources of pixels and masks, and the segmentation,
are injected.
"""

from __future__ import annotations

import io
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from maskseg.annotation.grabcut import GrabCutResult
from maskseg.annotation.review.guards import (
    Access,
    AccessControl,
    Bools,
    Uploads,
    hide_folders,
    read_strokes,
)
from maskseg.annotation.review.journal import Annotation
from maskseg.annotation.review.state import NewMask, ReviewFile, review_of
from maskseg.errors import UserError
from maskseg.masks.base import Rle, encode_rle, rle_to_bitmaps
from maskseg.masks.polygons import mask_to_rings

Box = Sequence[float]  # xyxy, pixels
# RGB image [H, W, 3], box, sure foreground, sure background -> mask
RefineMask = Callable[[NDArray[np.uint8], Box | None, Bools, Bools], GrabCutResult]
PAGE = {
    "": "index.html",
    "app.js": "app.js",
    "view.js": "view.js",
    "list.js": "list.js",
    "contour.js": "contour.js",
    "style.css": "style.css",
}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
MAX_SIDE = 16384  # px, the limit of a canvas in browsers
QUALITY = 92  # of the JPEG images
EXACT = 0.0  # px, tolerance of the contours of neighbors
EDITED = 1.0  # px, tolerance of a contour that is going to be edited
MAX_COORDINATES = 200_000  # of an edited contour


class ImageStore(Protocol):
    """Images and masks by id. Methods raise KeyError for an unknown id."""

    root: Path  # the folder of the images

    def name(self, image_id: int) -> str: ...
    def size(self, image_id: int) -> tuple[int, int]:
        """(height, width)"""

    def pixels(self, image_id: int) -> NDArray[np.uint8]:
        """RGB [H, W, 3]. Raises UserError for a file that is unreadable or outside the folder."""

    def mask(self, annotation: Annotation) -> Rle | None:
        """The current mask of an annotation in the image's frame, or None. Raises UserError."""

    def bitmap(self, image_id: int, rings: Sequence[Sequence[float]]) -> Bools:
        """The pixels that an odd number of rings (x, y, x, y, ...) contain, bool [H, W]."""

    def categories(self) -> dict[int, str]:
        """Category names by id."""


def review_app(
    file: ReviewFile, images: ImageStore, refine_mask: RefineMask, access: Access, uploads: Uploads
) -> FastAPI:
    """Build the application; `file` is closed when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(file.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(AccessControl, access=access)
    app.include_router(Routes(file, images, refine_mask, uploads).router())
    app.add_exception_handler(UserError, _user_error(file, images))
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(KeyError, _unknown_id)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    return app


class Routes:
    """The request handlers.

    Handlers that read, write or compute are not coroutines: the server runs them in threads.
    """

    def __init__(
        self, file: ReviewFile, images: ImageStore, refine_mask: RefineMask, uploads: Uploads
    ) -> None:
        self.file = file
        self.images = images
        self.refine_mask = refine_mask
        self.uploads = uploads

    def router(self) -> APIRouter:
        """The routes of the page and its API."""
        router = APIRouter()
        for path, name in PAGE.items():
            router.add_api_route(f"/{path}", _page_file(name), methods=["GET"])
        router.add_api_route("/api/items", self.items, methods=["GET"])
        image = "/api/images/{number}"
        annotation = "/api/annotations/{number}"
        router.add_api_route(image, self.image, methods=["GET"])
        router.add_api_route(f"{image}/neighbors", self.neighbors, methods=["GET"])
        router.add_api_route(f"{image}/annotations", self.add, methods=["POST"])
        router.add_api_route(annotation, self.annotation, methods=["GET"])
        router.add_api_route(f"{annotation}/mask", self.mask, methods=["GET"])
        router.add_api_route(f"{annotation}/contour", self.contour, methods=["GET"])
        router.add_api_route(f"{annotation}/contour", self.replace_contour, methods=["POST"])
        router.add_api_route(f"{annotation}/category", self.set_category, methods=["POST"])
        router.add_api_route(f"{annotation}/decision", self.decide, methods=["POST"])
        router.add_api_route(f"{annotation}/cut", self.cut, methods=["POST"])
        router.add_api_route("/api/undo", self.undo, methods=["POST"])
        return router

    def items(self) -> Response:
        """All annotations as columns, grouped by image. Brings the file up to date first."""
        self.file.merge_journal()
        rows = self.file.rows()
        position: dict[int, int] = {}
        for row in rows:
            position.setdefault(row.image_id, len(position))
        rows.sort(key=lambda row: position[row.image_id])
        content = {
            "file": self.file.path.name,
            "ids": [row.id for row in rows],
            "image_ids": [row.image_id for row in rows],
            "category_ids": [row.category_id for row in rows],
            "reviews": [row.review for row in rows],
            "images": {image_id: self.images.name(image_id) for image_id in position},
            "categories": self.images.categories(),
            "undoable": self.file.undoable(),
        }
        return JSONResponse(content)

    def image(self, number: int) -> Response:
        """The image in the frame of the annotations, as JPEG."""
        if max(self.images.size(number)) > MAX_SIDE:
            raise HTTPException(
                422,
                f"{self.images.name(number)}: browsers cannot show images of more than "
                f"{MAX_SIDE} pixels a side",
            )
        data = io.BytesIO()
        image = Image.fromarray(self.images.pixels(number))
        image.save(data, "JPEG", quality=QUALITY, subsampling=0)
        return Response(data.getvalue(), media_type="image/jpeg")

    def neighbors(self, number: int, without: int = -1) -> Response:
        """The outlines of an image's other masks, as `contour` gives them but exact.

        without: id of an annotation that is left out, as are rejected ones.
        """
        self.images.size(number)  # raises KeyError for an unknown image
        masks = []
        for row in self.file.rows():
            if row.image_id == number and row.id != without and row.review != "rejected":
                rings = self._rings(row.id)
                if rings:
                    masks.append(rings)
        return JSONResponse({"masks": masks})

    def annotation(self, number: int) -> Response:
        """The state of an annotation."""
        return self._state(number)

    def mask(self, number: int) -> Response:
        """The mask as a 1-bit PNG, transparent outside."""
        annotation = self.file.annotation(number)
        rle = self.images.mask(annotation)
        height, width = self.images.size(annotation["image_id"])
        bitmap = np.zeros((height, width), dtype=bool) if rle is None else rle_to_bitmaps([rle])[0]
        image = Image.fromarray(bitmap.astype(np.uint8)).convert("P")
        image.putpalette([0, 0, 0, 255, 255, 255])
        data = io.BytesIO()
        image.save(data, "PNG", bits=1, transparency=0)
        return Response(data.getvalue(), media_type="image/png")

    def contour(self, number: int) -> Response:
        """The outlines of the mask and its holes, simplified to a pixel, to be edited."""
        rle = self.images.mask(self.file.annotation(number))
        return JSONResponse({"rings": _rings(rle, EDITED)})

    async def replace_contour(self, number: int, request: Request) -> Response:
        """Replace the mask by the pixels inside of `rings`, in the form of `contour`."""
        with self.uploads.slot():
            content = await self.uploads.read_json(request)
            return await run_in_threadpool(self._replace_contour, number, content)

    def set_category(self, number: int, category_id: int) -> Response:
        """Change the class of an annotation."""
        self.file.set_category(number, category_id)
        return self._state(number)

    def decide(self, number: int, decision: Literal["accepted", "rejected"]) -> Response:
        """Accept or reject an annotation; the request's body is not read."""
        self.file.decide(number, decision)
        return self._state(number)

    async def cut(self, number: int, request: Request, box: str = "") -> Response:
        """Segment the object again.

        box: "x1,y1,x2,y2", by default the annotation's own box; the body is a PNG of strokes for
        `read_strokes`.
        """
        with self.uploads.slot():
            data = await self.uploads.read_png(request)
            return await run_in_threadpool(self._cut, number, data, box)

    async def add(self, number: int, request: Request, category_id: int, box: str = "") -> Response:
        """Segment another object of an image, and add it.

        box: "x1,y1,x2,y2", by default the whole image; the body as for `cut`.
        """
        with self.uploads.slot():
            data = await self.uploads.read_png(request)
            return await run_in_threadpool(self._add, number, category_id, data, box)

    def undo(self) -> Response:
        """Undo the last decision. Answers 409 if there is none."""
        number = self.file.undo()
        if number is None:
            raise HTTPException(409, "there is nothing to undo")
        return self._state(number)

    def _replace_contour(self, number: int, content: object) -> Response:
        annotation = self.file.annotation(number)
        bitmap = self.images.bitmap(annotation["image_id"], _parse_rings(content))
        self.file.replace_mask(number, _new_mask(bitmap))
        return self._state(number)

    def _cut(self, number: int, data: bytes, box_text: str) -> Response:
        annotation = self.file.annotation(number)
        box = _box_of(annotation)
        self.file.replace_mask(number, self._segment(annotation["image_id"], data, box_text, box))
        return self._state(number)

    def _add(self, image_id: int, category_id: int, data: bytes, box_text: str) -> Response:
        mask = self._segment(image_id, data, box_text, None)
        return self._state(self.file.add(image_id, category_id, mask))

    def _segment(self, image_id: int, data: bytes, box_text: str, box: Box | None) -> NewMask:
        """Segment an object. data: strokes; box_text: the box, by default `box`."""
        height, width = self.images.size(image_id)
        foreground, background = read_strokes(data, height, width)
        if box_text:
            box = _parse_box(box_text, height, width)
        result = self.refine_mask(self.images.pixels(image_id), box, foreground, background)
        return _new_mask(result.mask, result.fallback_reason)

    def _rings(self, number: int) -> list[list[float]]:
        """The exact outlines of a mask; none where it cannot be read or is gone."""
        try:
            rle = self.images.mask(self.file.annotation(number))
        except (UserError, KeyError):
            return []
        return _rings(rle, EXACT)

    def _state(self, number: int) -> Response:
        if self.file.is_removed(number):
            removed = {"id": number, "removed": True, "undoable": self.file.undoable()}
            return JSONResponse(removed)
        annotation = self.file.annotation(number)
        height, width = self.images.size(annotation["image_id"])
        mask_by = annotation.get("mask_by")
        if not isinstance(mask_by, dict):
            mask_by = {}
        score = mask_by.get("score", annotation.get("score"))
        fallback = mask_by.get("fallback")
        content = {
            "id": number,
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "removed": False,
            "removable": self.file.is_removable(number),
            "height": height,
            "width": width,
            "box": _box_of(annotation),
            "score": score if _is_number(score) else None,
            "review": review_of(annotation),
            "undoable": self.file.undoable(),
            "trouble": hide_folders(
                self.file.write_error, (self.images.root, self.file.path.parent)
            ),
            "fallback": fallback if isinstance(fallback, str) else "",
        }
        return JSONResponse(content)


def _page_file(name: str) -> Callable[[], Response]:
    """Handler that returns a file of the page."""
    text = files("maskseg.annotation.review").joinpath("page", name).read_text("utf-8")

    def handler() -> Response:
        return Response(text, media_type=TYPES[name.rpartition(".")[2]])

    return handler


def _user_error(
    file: ReviewFile, images: ImageStore
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Handler that answers 422 with the message, without the folders of this machine."""

    async def handler(_: Request, error: Exception) -> Response:
        message = hide_folders(str(error), (images.root, file.path.parent))
        return JSONResponse({"error": message}, 422)

    return handler


async def _invalid_request(_: Request, error: Exception) -> Response:
    """Answer 422; the message of the error itself has the path of the source file."""
    assert isinstance(error, RequestValidationError)
    reasons = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return JSONResponse({"error": "; ".join(reasons)}, 422)


async def _unknown_id(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"there is no id {error}"}, 404)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)


def _rings(rle: Rle | None, tolerance: float) -> list[list[float]]:
    """The outlines of a mask and its holes, x, y, x, y, ..., simplified by `tolerance` pixels."""
    if rle is None:
        return []
    rings = mask_to_rings(rle_to_bitmaps([rle])[0], tolerance)
    return [ring.ravel().tolist() for ring in rings]


def _new_mask(bitmap: Bools, fallback_reason: str = "") -> NewMask:
    """Encode a mask. Answers 422 for an empty one."""
    if not bitmap.any():
        raise HTTPException(422, "the mask would be empty; paint foreground, or reject it")
    rle, box = encode_rle(bitmap)
    return NewMask(rle, box, int(bitmap.sum()), fallback_reason)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _box_of(annotation: Annotation) -> list[float] | None:
    """The box of an annotation as xyxy, None if it has no valid box."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None
    x, y, width, height = box
    return [x, y, x + width, y + height] if width > 0 and height > 0 else None


def _parse_box(text: str, height: int, width: int) -> list[float]:
    """Parse a drawn box and clip it to the image. Answers 422 for an invalid one."""
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise HTTPException(422, f"box={text!r} is not x1,y1,x2,y2") from error
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise HTTPException(422, f"box={text!r} has a number that is not finite")
    box = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
    if box[0] >= box[2] or box[1] >= box[3]:
        raise HTTPException(422, "the box does not overlap the image")
    return box


def _parse_rings(content: object) -> list[list[float]]:
    """Parse an edited contour. Answers 422 for an invalid one."""
    rings = content.get("rings") if isinstance(content, dict) else None
    if not isinstance(rings, list) or not all(isinstance(ring, list) for ring in rings):
        raise HTTPException(422, 'a contour is {"rings": [[x, y, x, y, ...], ...]}')
    if sum(map(len, rings)) > MAX_COORDINATES:
        raise HTTPException(422, f"a contour can have up to {MAX_COORDINATES} coordinates")
    for ring in rings:
        if len(ring) < 6 or len(ring) % 2 or not all(map(_is_number, ring)):
            raise HTTPException(422, "a ring of a contour needs at least 3 points x, y, all finite")
    return rings
