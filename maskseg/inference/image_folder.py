"""Finds the images to predict on, and maps labels of pixels to category ids."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files.similar import suggest_path
from maskseg.structures import Categories

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".tif",
    ".tiff",
    ".webp",
    ".gif",
    ".jp2",
    ".ppm",
    ".pgm",
}
NO_CATEGORY = 65535  # in maps of category ids


def image_files(pattern: str) -> list[Path]:
    """List one image file, or the images of a folder or of a glob pattern, sorted.

    Subfolders of a folder are not searched.
    Raises UserError if there are none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        advice = f"; input='{path / '**' / '*'}' searches its subfolders, too"
        return _select_images(path.iterdir(), f"input={pattern}", advice)
    if not glob.has_magic(pattern):
        raise UserError(
            f"input={pattern}: no image found; there is no such file or folder{suggest_path(path)}"
        )
    # `Path.glob` does not accept absolute patterns.
    candidates = [Path(name) for name in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    return _select_images(candidates, f"input={pattern}")


def find_images(folder: Path) -> list[Path]:
    """List the images of a folder, sorted; subfolders are not searched.

    Raises UserError if there are none.
    """
    return _select_images(folder.iterdir(), str(folder))


def _select_images(candidates: Iterable[Path], name: str, advice: str = "") -> list[Path]:
    """Sort the images among files. name and advice: for the message where there are none."""
    files = sorted(f for f in candidates if f.is_file() and f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{name}: no image found ({', '.join(sorted(SUFFIXES))}){advice}")
    return files


def category_id_map(labels: Tensor, categories: Categories) -> NDArray[np.uint16]:
    """The category id of each pixel, 65535 for none. labels: i64 [H, W], -1 for none."""
    ids = np.array([*categories.ids, NO_CATEGORY], dtype=np.uint16)  # label -1 selects the last
    id_map: NDArray[np.uint16] = ids[labels.numpy()]
    return id_map
