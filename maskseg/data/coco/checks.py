"""Checks of a whole COCO file before training: every problem, grouped by kind, in one report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskseg.data.coco.annotation_checks import (
    ValidAnnotations,
    check_annotations,
    find_duplicates,
)
from maskseg.data.coco.categories import match_categories, parse_categories
from maskseg.data.coco.parse import ParsedCoco, as_int64
from maskseg.data.coco.report import MAX_EXAMPLES, Finding, Report
from maskseg.data.image_files import check_name, image_size, safe_join
from maskseg.errors import UserError
from maskseg.structures import Categories

__all__ = [
    "CheckedDataset",
    "Finding",
    "ImageRecord",
    "Report",
    "check_dataset",
    "check_image_files",
]

THREADS = 8  # more than CPUs: reading headers waits for the disk


@dataclass(frozen=True)
class ImageRecord:
    """An image of the file. Height and width in pixels, in the orientation of the annotations."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CheckedDataset:
    """The content of a file, without the annotations that were dropped."""

    images: list[ImageRecord]
    categories: Categories
    annotations: ValidAnnotations


def check_dataset(
    parsed: ParsedCoco, report: Report, max_pixels: int, categories: Categories | None
) -> CheckedDataset:
    """Check everything but the image files.

    categories: the expected ones, None to take the file's. The result may be used only if the
    report has no errors.
    """
    images = _check_images(parsed.images, report, max_pixels)
    file_categories = parse_categories(parsed.categories, report)
    if not len(file_categories) and parsed.columns.good.any():
        report.error("no categories", "the list 'categories' is empty, but there are annotations")
    used_categories, labels = match_categories(file_categories, categories, report)
    sizes = [(image.height, image.width) for image in images]
    num_points = [len(names) for names in file_categories.keypoints]
    annotations = check_annotations(
        parsed.columns,
        image_ids=np.array([image.id for image in images], dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        category_ids=np.array(file_categories.ids, dtype=np.int64),
        labels=labels,
        num_points=np.array(num_points, dtype=np.int64),
        report=report,
    )
    if not images:
        report.warn("no images", "the list 'images' is empty")
    if not len(annotations.rows):
        report.warn("no annotations at all", "there is nothing to learn from this file")
    elif annotations.crowd.all():
        report.warn("only crowds", "there is no single object to learn from")
    return CheckedDataset(images, used_categories, annotations)


def check_image_files(
    images: list[ImageRecord], root: Path, report: Report, max_pixels: int
) -> None:
    """Check the header of every image file: it exists, is an image, and has the stated size."""

    def check_file(image: ImageRecord) -> tuple[str, str] | None:
        return _find_file_problem(image, root, max_pixels)

    usable = [image for image in images if image.height > 0 and image.file_name]
    with ThreadPoolExecutor(THREADS) as pool:
        for image, problem in zip(usable, pool.map(check_file, usable), strict=True):
            if problem:
                kind, detail = problem
                report.error(kind, f"image {image.id}: {detail}")


def _find_file_problem(image: ImageRecord, root: Path, max_pixels: int) -> tuple[str, str] | None:
    """Return kind and detail of an image file's problem, None if it has none."""
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
    try:  # the stated size may be that of the pixels before the EXIF orientation is applied
        image_size(path, max_pixels, (image.height, image.width))
    except UserError as error:
        return "image file whose size differs from the stated one", str(error)
    return None


def _check_images(entries: list[object], report: Report, max_pixels: int) -> list[ImageRecord]:
    """Return the images; those with an empty name or size 0 have been reported."""
    records = []
    for entry in entries:
        fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
        image_id = as_int64(fields.get("id"))
        if image_id is None:
            report.error("image without an integer id", f"{entry!r}"[:80])
            continue
        file_name = _check_file_name(image_id, fields, report)
        height, width = _check_size(image_id, fields, report, max_pixels)
        records.append(ImageRecord(image_id, file_name, height, width))
    duplicates = find_duplicates(np.array([record.id for record in records], dtype=np.int64))
    if duplicates:
        report.error(
            "image id that is used more than once",
            *(f"id {number}, {n} times" for number, n in duplicates[:MAX_EXAMPLES]),
            count=len(duplicates),
        )
    name_counts = Counter(record.file_name for record in records)
    repeated = [f"{name}, {n} times" for name, n in name_counts.items() if n > 1 and name]
    if repeated:
        report.warn("file name of more than one image", *repeated)
    return records


def _check_file_name(image_id: int, entry: Mapping[str, object], report: Report) -> str:
    """Return the file name, "" after reporting one that is not safe."""
    try:
        return check_name(entry.get("file_name"))
    except UserError as error:
        report.error("file name that is not safe", f"image {image_id}: {error}")
        return ""


def _check_size(
    image_id: int, entry: Mapping[str, object], report: Report, max_pixels: int
) -> tuple[int, int]:
    """Return height and width, zeros after reporting an invalid size."""
    height = as_int64(entry.get("height"))
    width = as_int64(entry.get("width"))
    if height is None or width is None or height <= 0 or width <= 0:
        stated = f"height {entry.get('height')!r}, width {entry.get('width')!r}"
        report.error(
            "image size that is not two positive integers", f"image {image_id}: {stated}"[:200]
        )
        return 0, 0
    if height * width > max_pixels:
        report.error(
            "image of more pixels than data.max_pixels",
            f"image {image_id}: {height} x {width}, the limit is {max_pixels}",
        )
        return 0, 0
    return height, width
