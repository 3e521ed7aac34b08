"""Checks of a whole COCO file before training: every problem, grouped by kind, in one report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maskseg.data.coco.annotation_checks import (
    ValidAnnotations,
    check_annotations,
    find_duplicates,
)
from maskseg.data.coco.categories import (
    match_categories,
    merge_repeated_names,
    parse_categories,
)
from maskseg.data.coco.image_names import find_name, hint_for_missing, name_from_url
from maskseg.data.coco.parse import ParsedCoco, as_int64
from maskseg.data.coco.report import MAX_EXAMPLES, Finding, Report
from maskseg.data.image_files import check_name, max_value, read_header, safe_join
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

MAX_DECODED = 8  # 16-bit images that are decoded to see which part of the range they use
LOW_RANGE = 2**14  # an image with 16 bits and smaller values uses less than a quarter of its range
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
    stated_categories = parse_categories(parsed.categories, report)
    if not parsed.categories:
        report.error("no categories", "the list 'categories' is empty")
    # The annotations of a category that is reported above are not reported, too.
    unusable = ids_of(parsed.categories) - set(stated_categories.ids)
    parsed.columns.good[np.isin(parsed.columns.category_ids, list(unusable))] = False
    file_categories, merged = merge_repeated_names(stated_categories, report)
    used_categories, labels = match_categories(file_categories, categories, report)
    sizes = [(image.height, image.width) for image in images]
    num_points = np.array([len(names) for names in file_categories.keypoints], dtype=np.int64)
    annotations = check_annotations(
        parsed.columns,
        image_ids=np.array([image.id for image in images], dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        category_ids=np.array(stated_categories.ids, dtype=np.int64),
        labels=labels[merged],
        num_points=num_points[merged],
        report=report,
    )
    _check_contents(parsed, annotations, used_categories, report)
    return CheckedDataset(images, used_categories, annotations)


def _check_contents(
    parsed: ParsedCoco, annotations: ValidAnnotations, categories: Categories, report: Report
) -> None:
    """Warn about a file that has nothing to learn from, or classes without a single object."""
    if not parsed.images:
        report.warn("no images", "the list 'images' is empty")
    if not len(annotations.rows):
        detail = "the list 'annotations' is empty"
        if parsed.num_entries:
            detail = f"none of the {parsed.num_entries} annotations can be used"
        report.warn("no annotations at all", f"there is nothing to learn from this file: {detail}")
        return
    crowds = annotations.crowd
    if crowds.all():
        detail = "there is no single object to learn from"
    else:
        detail = "no object of the class is left"
    labels = np.setdiff1d(annotations.labels[crowds], annotations.labels[~crowds])
    if parsed.columns.crowd[~parsed.columns.ignored & (parsed.columns.list_index >= 0)].any():
        detail += "; data.crowds=objects reads iscrowd=1 as objects, which CVAT's masks need"
    if crowds.all():
        report.warn("only crowds", detail)
    elif len(labels):
        names = [f"{categories.names[label]!r}: {detail}" for label in labels[:MAX_EXAMPLES]]
        report.warn("class with crowds only", *names, count=len(labels))


def check_image_files(
    images: list[ImageRecord], root: Path, report: Report, max_pixels: int
) -> None:
    """Check the header of every image file: it exists, is an image, and has the stated size.

    Of the images with 16 bits, some are decoded to see which part of the range they use.
    """

    def check_file(image: ImageRecord) -> _FileProblem | bool:
        return _check_file(image, root, max_pixels)

    usable = [image for image in images if image.height > 0 and image.file_name]
    deep_images = []
    with ThreadPoolExecutor(THREADS) as pool:
        for image, result in zip(usable, pool.map(check_file, usable), strict=True):
            if isinstance(result, _FileProblem):
                _report_file(image, root, result, report)
            elif result:
                deep_images.append(image)
    _check_range(deep_images, root, report, max_pixels)


@dataclass(frozen=True)
class _FileProblem:
    kind: str
    detail: str


_MISSING_FILE = "image file that does not exist"


def _report_file(image: ImageRecord, root: Path, problem: _FileProblem, report: Report) -> None:
    detail = problem.detail
    finding = report.errors.get(problem.kind)
    if problem.kind == _MISSING_FILE and (finding is None or finding.count < MAX_EXAMPLES):
        detail += hint_for_missing(root, image.file_name)
    report.error(problem.kind, f"image {image.id}: {detail}")


def _check_file(image: ImageRecord, root: Path, max_pixels: int) -> _FileProblem | bool:
    """Return the problem of an image file, else whether it has more than 8 bits per channel."""
    try:
        path = safe_join(root, image.file_name)
    except UserError as error:
        return _FileProblem("file name that is not safe", str(error))
    if not os.path.isfile(path):  # noqa: PTH113 - False also for names that are too long
        return _FileProblem(_MISSING_FILE, str(path))
    try:
        header = read_header(path, max_pixels)
    except UserError as error:
        return _FileProblem("image file that cannot be used", str(error))
    if (header.height, header.width) == (image.height, image.width):
        return header.is_deep
    try:  # the stated size may be that of the pixels before the EXIF orientation is applied
        return read_header(path, max_pixels, (image.height, image.width)).is_deep
    except UserError as error:
        return _FileProblem("image file whose size differs from the stated one", str(error))


def _check_range(
    deep_images: list[ImageRecord], root: Path, report: Report, max_pixels: int
) -> None:
    """Warn where 16-bit images use a small part of their range, such as 12 bits."""
    step = max(1, len(deep_images) // MAX_DECODED)
    sampled = deep_images[::step][:MAX_DECODED]
    examples = []
    for image in sampled:
        try:
            largest = max_value(safe_join(root, image.file_name), max_pixels)
        except UserError:
            continue  # a damaged image is reported when it is read
        if largest >= LOW_RANGE:
            return
        examples.append(
            f"image {image.id} ({image.file_name}): values up to {largest} of 65535 become "
            f"0..{(largest + 128) // 257}"
        )
    if examples:
        report.warn(
            "16-bit image that uses less than a quarter of its range; scale the values to 0..65535 "
            f"or convert the images to 8 bits ({len(examples)} of {len(deep_images)} were decoded)",
            *examples,
        )


def ids_of(entries: Iterable[object]) -> set[int]:
    """Return the ids of entries that have one, whatever else they lack."""
    objects = [entry for entry in entries if isinstance(entry, dict)]
    ids = {as_int64(entry.get("id")) for entry in objects}
    return {number for number in ids if number is not None}


def ids_without_name(entries: list[object]) -> set[int]:
    """Return the ids of the images without a `file_name`, whose names are of `name_from_url`."""
    objects = [entry for entry in entries if isinstance(entry, dict)]
    return ids_of(entry for entry in objects if not entry.get("file_name"))


def resolve_names(
    images: list[ImageRecord], url_ids: Set[int], root: Path, report: Report
) -> list[ImageRecord]:
    """Replace file names that name no file by another spelling that does, with a warning.

    url_ids: the images whose names are of `name_from_url`.
    """
    resolved = []
    for image in images:
        match = find_name(root, image.file_name, image.id in url_ids) if image.file_name else None
        if match is None:
            resolved.append(image)
            continue
        name, kind = match
        report.warn(kind, f"image {image.id}: {image.file_name!r}, the file is {name!r}")
        resolved.append(replace(image, file_name=name))
    return resolved


def _check_images(entries: list[object], report: Report, max_pixels: int) -> list[ImageRecord]:
    """Return the images; those with an empty name or size 0 have been reported."""
    records = []
    for entry in entries:
        fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
        image_id = as_int64(fields.get("id"))
        if image_id is None:
            report.error("image without an integer id of 64 bits", f"{entry!r}"[:80])
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
    """Return the file name, "" after reporting one that is missing or not safe."""
    name = entry.get("file_name") or name_from_url(entry.get("coco_url"))
    if not name:
        report.error("image without a file_name", f"image {image_id}")
        return ""
    try:
        return check_name(name)
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
