"""Server of the review page. Implements `tools/review.py`."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskseg import config as configs
from maskseg.annotation.grabcut import refine_with_strokes
from maskseg.annotation.review.journal import Annotation
from maskseg.annotation.review.state import ReviewFile
from maskseg.config import Config
from maskseg.data.coco.file import CocoFile, read_coco
from maskseg.data.coco.packed_segmentations import (
    SegmentationError,
    SegmentationPacker,
    clip_polygon,
)
from maskseg.data.image_files import load_image, safe_join
from maskseg.errors import UserError
from maskseg.files.outputs import check_outputs, is_same_file, record_outputs
from maskseg.files.similar import suggest_path
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.masks.base import Rle
from maskseg.superpixels.opencv import opencv

INSTALL = "pip install -e '.[demo]'"
SHUTDOWN_TIMEOUT = 5  # seconds to wait for running requests


class CocoImageStore:
    """The images of a COCO file below a folder, and its masks; see `review.app.ImageStore`."""

    def __init__(self, coco: CocoFile, root: Path, max_pixels: int) -> None:
        self.coco = coco
        self.root = root
        self.max_pixels = max_pixels

    def name(self, image_id: int) -> str:
        return self.coco.images[self.coco.index_of[image_id]].file_name

    def size(self, image_id: int) -> tuple[int, int]:
        record = self.coco.images[self.coco.index_of[image_id]]
        return record.height, record.width

    def pixels(self, image_id: int) -> NDArray[np.uint8]:
        path = safe_join(self.root, self.name(image_id))
        pixels = load_image(path, self.max_pixels, self.size(image_id))
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())

    def mask(self, annotation: Annotation) -> Rle | None:
        """The mask of an annotation; polygons are clipped to the image.

        Takes the current annotation, as it may differ from the file that was read.
        """
        size = self.size(annotation["image_id"])
        packer = SegmentationPacker(self.max_pixels)
        try:
            packer.add(annotation.get("segmentation"))
            shape = packer.to_segmentations().shape(0)
        except SegmentationError as error:
            raise UserError(
                f"annotation {annotation['id']}: {error.kind}: {error.detail}"
            ) from error
        if isinstance(shape, Polygons):
            clipped = [clip_polygon(part, *size) for part in shape.parts]
            parts = tuple(part for part in clipped if len(part))
            shape = Polygons(parts) if parts else None
        return None if shape is None else AnnotatedMasks.from_file([shape], *size).to_rle()[0]

    def bitmap(self, image_id: int, rings: Sequence[Sequence[float]]) -> NDArray[np.bool_]:
        """The pixels that an odd number of rings contain, bool [H, W]; see `ImageStore`."""
        height, width = self.size(image_id)
        bitmap = np.zeros((height, width), dtype=bool)
        for ring in rings:
            points = clip_polygon(np.array(ring, dtype=float).reshape(-1, 2), height, width)
            if len(points):
                masks = AnnotatedMasks.from_file([Polygons((points,))], height, width)
                bitmap ^= masks.to_bitmaps()[0]
        return bitmap

    def categories(self) -> dict[int, str]:
        return dict(zip(self.coco.categories.ids, self.coco.categories.names, strict=True))


def review(overrides: list[str]) -> None:
    """Run `tools/review.py`: serve the page until it is stopped, or write `export` and return.

    Raises UserError before anything is served if the file, the image folder or a key is invalid.
    """
    config = configs.compose("review", overrides)
    configs.require_keys(config, "file")
    source = Path(config.file)
    output = Path(config.output or config.file)
    if config.export:
        _export(source, output, Path(config.export), config.overwrite)
        return
    configs.require_keys(config, "images")
    root = Path(config.images)
    if not root.is_dir():
        raise UserError(f"images={root}: no such folder{suggest_path(root)}")
    if not source.is_file():
        raise UserError(f"file={source}: cannot be read (no such file){suggest_path(source)}")
    opencv()  # report a missing library now, not at the first request
    serve = _load_server()
    file = ReviewFile(source, output)
    try:
        coco = read_coco(file.current, check_images=False, max_pixels=config.max_pixels)
        _print_status(file, config.host)
        serve(file, CocoImageStore(coco, root, config.max_pixels), config)
    finally:
        file.close()


def _load_server() -> Callable[[ReviewFile, CocoImageStore, Config], None]:
    """Import the server libraries; returns the function that serves the page.

    Raises UserError if the libraries are not installed.
    """
    try:
        import uvicorn

        from maskseg.annotation.review.app import review_app
        from maskseg.annotation.review.guards import Access, Uploads
    except ImportError as error:
        raise UserError(
            f"the review page needs FastAPI and uvicorn ({error}): {INSTALL}"
        ) from error

    def serve(file: ReviewFile, images: CocoImageStore, config: Config) -> None:
        listener = _listen(config.host, config.port)
        uploads = Uploads(round(config.max_upload_mb * 1e6), config.uploads_at_once)
        access = Access(config.host, config.host_names)
        app = review_app(file, images, refine_with_strokes, access, uploads)
        port = listener.getsockname()[1]
        address = f"http://{_browser_host(config.host)}:{port}/?token={access.token}"
        print(f"open {address} in a browser; Ctrl-C ends", flush=True)
        settings = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_TIMEOUT
        )
        uvicorn.Server(settings).run(sockets=[listener])

    return serve


def _browser_host(host: str) -> str:
    """Return the host of the page's address; that of all interfaces is no address to open."""
    if host in ("0.0.0.0", "::", ""):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket of the page; port 0 picks any free one."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # requests that arrive before the server is up wait for it
        return listener
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"host={host} port={port} cannot be served ({reason}); another port: port=8001"
        ) from error


def _print_status(file: ReviewFile, host: str) -> None:
    if file.recovered:
        print(f"recovered {file.recovered} decisions of an interrupted review to {file.path}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"host={host}: everyone with the address below can see the images and decide, and the "
            "network can read it: the connection is not encrypted"
        )
    print(f"{len(file.rows())} annotations; decisions are written to {file.path}")


def _export(source: Path, output: Path, target: Path, overwrite: bool) -> None:
    """Write the reviewed file without its rejected annotations."""
    check_outputs([target], (source, output), "export", "review", overwrite)
    if is_same_file(target, output):
        raise UserError(f"export={target} is the file of the decisions: choose another name")
    file = ReviewFile(source, output)
    try:
        with record_outputs([target], "review"):
            counts = file.export(target)
    finally:
        file.close()
    kept = ", ".join(
        f"{counts[kind]} {kind}" for kind in ("accepted", "edited", "added", "unreviewed")
    )
    print(f"written to {target}: {kept}; dropped: {counts['rejected']} rejected")
