"""Proposed masks reviewed in a browser: what tools/review.py does."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg import config as configs
from maskseg.annotation.grabcut import recut
from maskseg.annotation.review.state import ReviewFile
from maskseg.annotation.write import check_output
from maskseg.data.coco.file import CocoFile, read_coco
from maskseg.data.coco.packed_segmentations import Packer, SegmentationError, clip_polygon
from maskseg.data.image_files import load_image, safe_join
from maskseg.errors import UserError
from maskseg.masks.annotated import FileMasks, Polygons
from maskseg.masks.base import Rle
from maskseg.superpixels.opencv import opencv

INSTALL = "pip install maskseg[demo]"
LEAVE = 5  # seconds that requests under way are waited for at the end


class CocoPictures:
    """What the page shows: the images of a COCO file below a folder, and its masks. See `inference.review.Pictures`."""

    def __init__(self, coco: CocoFile, root: Path, max_pixels: int) -> None:
        self.coco, self.root, self.max_pixels = coco, root, max_pixels

    def name(self, image_id: int) -> str:
        return self.coco.images[self.coco.index_of[image_id]].file_name

    def size(self, image_id: int) -> tuple[int, int]:
        record = self.coco.images[self.coco.index_of[image_id]]
        return record.height, record.width

    def pixels(self, image_id: int) -> NDArray[np.uint8]:
        path = safe_join(self.root, self.name(image_id))
        return np.ascontiguousarray(
            load_image(path, self.max_pixels, self.size(image_id)).permute(1, 2, 0).numpy()
        )

    def mask(self, annotation: dict[str, Any]) -> Rle | None:
        """That of the annotation as it is now, which may have changed since the file was read; polygons are cut at the image's border."""
        size, packer = self.size(annotation["image_id"]), Packer(self.max_pixels)
        try:
            packer.add(annotation.get("segmentation"))
            shape = packer.packed().shape(0)
        except SegmentationError as error:
            raise UserError(
                f"annotation {annotation['id']}: {error.kind}: {error.detail}"
            ) from error
        if isinstance(shape, Polygons):
            parts = tuple(
                part for part in (clip_polygon(part, *size) for part in shape.parts) if len(part)
            )
            shape = Polygons(parts) if parts else None
        return None if shape is None else FileMasks.from_file([shape], *size).to_rle()[0]

    def categories(self) -> dict[int, str]:
        return dict(zip(self.coco.categories.ids, self.coco.categories.names, strict=True))


def review(words: list[str]) -> None:
    """Serves the page until it is stopped, or writes `export` and ends. Raises UserError before anything is served where the file, the images'
    folder or a key is wrong."""
    config = configs.compose("review", words)
    configs.require(config, "file")
    source, output = Path(config.file), Path(config.output or config.file)
    if config.export:
        _export(source, output, Path(config.export))
        return
    configs.require(config, "images")
    root = Path(config.images)
    if not root.is_dir():
        raise UserError(f"images={root}: no such folder")
    for key in ("max_pixels", "max_upload_mb", "uploads_at_once"):
        if not config[key] > 0:
            raise UserError(f"{key}={config[key]}: expected more than 0")
    opencv()  # says so now where it is not installed
    app = _application()
    file = ReviewFile(source, output)
    try:
        coco = read_coco(file.current, check_images=False, max_pixels=config.max_pixels)
        _say(file, config.host)
        app(file, CocoPictures(coco, root, config.max_pixels), config)
    finally:
        file.close()


def _application() -> Any:
    """What serves the page. Raises UserError where the libraries are not installed."""
    try:
        import uvicorn

        from maskseg.annotation.review.app import review_app
        from maskseg.annotation.review.guards import Uploads
    except ImportError as error:
        raise UserError(
            f"the review page needs FastAPI and uvicorn ({error}): {INSTALL}"
        ) from error

    def serve(file: ReviewFile, pictures: CocoPictures, config: Any) -> None:
        listening = _listen(config.host, config.port)
        app = review_app(
            file,
            pictures,
            recut,
            config.host,
            Uploads(round(config.max_upload_mb * 1e6), config.uploads_at_once),
        )
        address = f"[{config.host}]" if ":" in config.host else config.host
        print(
            f"open http://{address}:{listening.getsockname()[1]} in a browser; Ctrl-C ends",
            flush=True,
        )
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LEAVE)
        uvicorn.Server(settings).run(sockets=[listening])

    return serve


def _listen(host: str, port: int) -> socket.socket:
    """The socket of the page; port 0: any free one."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # who opens the page before the server is up waits for it
        return listening
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(
            f"host={host} port={port} cannot be served ({getattr(error, 'strerror', None) or error}); another port: port=8001"
        ) from error


def _say(file: ReviewFile, host: str) -> None:
    if file.recovered:
        print(f"{file.recovered} decisions of a review that was cut short are in {file.path}")
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"host={host}: whoever reaches this machine can see the images and decide; there is no password"
        )
    print(f"{len(file.rows())} annotations; decisions go into {file.path}")


def _export(source: Path, output: Path, target: Path) -> None:
    check_output(target, (source, output), "export=")
    file = ReviewFile(source, output)
    try:
        counts = file.export(target)
    finally:
        file.close()
    kept = ", ".join(f"{counts[kind]} {kind}" for kind in ("accepted", "edited", "open"))
    print(f"written to {target}: {kept}; left out: {counts['rejected']} rejected")
