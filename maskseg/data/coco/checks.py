"""The check of a whole COCO file before anything is trained on it: every problem, grouped by kind, in one report."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskseg.data.coco.annotation_checks import Kept, check_annotations, duplicates
from maskseg.data.coco.categories import file_categories, match
from maskseg.data.coco.parse import RawCoco, integer
from maskseg.data.coco.report import SHOWN, Finding, Report
from maskseg.data.image_files import check_name, image_size, safe_join
from maskseg.errors import UserError
from maskseg.structures import Categories

__all__ = ["Checked", "Finding", "ImageRecord", "Report", "check", "check_files"]

THREADS = 8  # headers are read: the disk is what takes the time


@dataclass(frozen=True)
class ImageRecord:
    """An image of the file; height and width in pixels, as the annotations see it."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class Checked:
    """A file's content without what was left out."""

    images: list[ImageRecord]
    categories: Categories
    annotations: Kept


def check(raw: RawCoco, report: Report, max_pixels: int, categories: Categories | None) -> Checked:
    """Checks all but the image files. What comes back may be used only if the report has no errors."""
    images = _images(raw.images, report, max_pixels)
    found = file_categories(raw.categories, report)
    if not len(found) and raw.columns.good.any():
        report.error("no categories", "the list 'categories' is empty, but there are annotations")
    used, labels = match(found, categories, report)
    annotations = check_annotations(
        raw.columns,
        image_ids=np.array([i.id for i in images], dtype=np.int64),
        sizes=np.array([(i.height, i.width) for i in images], dtype=np.int64).reshape(-1, 2),
        category_ids=np.array(found.ids, dtype=np.int64),
        labels=labels,
        num_points=np.array([len(points) for points in found.keypoints], dtype=np.int64),
        report=report,
    )
    if not images:
        report.warn("no images", "the list 'images' is empty")
    if not len(annotations.rows):
        report.warn("no annotations at all", "there is nothing to learn from this file")
    elif annotations.crowd.all():
        report.warn("only crowds", "there is no single object to learn from")
    return Checked(images, used, annotations)


def check_files(images: list[ImageRecord], root: Path, report: Report, max_pixels: int) -> None:
    """Looks at the header of every image file: is it there, is it an image, and of the stated size."""

    def problem(image: ImageRecord) -> tuple[str, str] | None:
        try:
            path = safe_join(root, image.file_name)
        except UserError as error:
            return "file name that is not safe", str(error)
        if not os.path.isfile(path):  # noqa: PTH113 - False also for names that are too long
            return "image file that does not exist", str(path)
        try:
            size = image_size(path, max_pixels)
        except UserError as error:
            return "image file that cannot be used", str(error)
        if size == (image.height, image.width):
            return None
        try:  # it fits if it is not turned upright
            image_size(path, max_pixels, (image.height, image.width))
        except UserError as error:
            return "image file of another size than stated", str(error)
        return None

    usable = [i for i in images if i.height > 0 and i.file_name]
    with ThreadPoolExecutor(THREADS) as pool:
        for image, found in zip(usable, pool.map(problem, usable), strict=True):
            if found:
                report.error(found[0], f"image {image.id}: {found[1]}")


def _images(entries: list[Any], report: Report, max_pixels: int) -> list[ImageRecord]:
    """The images; an empty name or a size of zero stands for one that was reported."""
    records = []
    for entry in entries:
        number = integer(entry.get("id")) if isinstance(entry, dict) else None
        if number is None:
            report.error("image without an integer id", f"{entry!r}"[:80])
            continue
        name, height, width = (
            entry.get("file_name"),
            integer(entry.get("height")),
            integer(entry.get("width")),
        )
        try:
            name = check_name(name)
        except UserError as error:
            report.error("file name that is not safe", f"image {number}: {error}")
            name = ""
        if height is None or width is None or height <= 0 or width <= 0:
            stated = f"image {number}: height {entry.get('height')!r}, width {entry.get('width')!r}"
            report.error("image size that is not two positive integers", stated[:200])
            height = width = 0
        elif height * width > max_pixels:
            report.error(
                "image of more pixels than data.max_pixels",
                f"image {number}: {height} x {width}, the cap is {max_pixels}",
            )
            height = width = 0
        records.append(ImageRecord(number, name, height, width))
    twice = duplicates(np.array([r.id for r in records], dtype=np.int64))
    if twice:
        report.error(
            "image id that is used more than once",
            *(f"id {i}, {n} times" for i, n in twice[:SHOWN]),
            count=len(twice),
        )
    names = [
        f"{name}, {n} times"
        for name, n in Counter(r.file_name for r in records).items()
        if n > 1 and name
    ]
    if names:
        report.warn("file name of more than one image", *names)
    return records
