"""COCO's panoptic files.

A JSON file has the class of each segment; PNG files encode the segment of each pixel as a color.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.coco.categories import parse_categories
from maskseg.data.coco.checks import THREADS, ImageRecord
from maskseg.data.coco.file import CocoFile
from maskseg.data.coco.parse import as_int64
from maskseg.data.coco.report import Report
from maskseg.data.datasets.coco import CocoSource, SourceArguments
from maskseg.data.datasets.semantic_maps import MAX_ID, SemanticMaps, check_header, read_png
from maskseg.data.image_files import check_name, safe_join
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.structures import Categories

_LISTS = ("annotations", "categories")
_ID_LIMIT = 2**24  # segment ids are smaller: they are stored in the three bytes of a color
_KIND = "panoptic map"


@dataclass(frozen=True)
class PanopticSegments:
    """The segments of all images of a split; M maps with S segments in total.

    png: for each image's file name, the index and the name of its map;
    ids: i64 [S], segment ids, map by map, ascending within a map;
    category_ids: i64 [S], -1 for a crowd; starts: i64 [M + 1], start of each map in `ids`.
    """

    png: dict[str, tuple[int, str]]
    ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class _ImageSegments:
    """The panoptic annotation of one image: the map's file name, ids and category ids."""

    file_name: str
    segments: list[tuple[int, int]]


class PanopticSource(CocoSource):
    """COCO files of things with panoptic files, which the semantic maps are derived from.

    train_panoptic, val_panoptic: the JSON of each split. train_semantic, val_semantic: the folders
    of its PNGs (segment id = R + 256 G + 65536 B, 0 for none). If the validation uses the
    training's images and maps, it uses `train_panoptic` too. Other keys: `CocoSource`.

    Crowds are unlabelled, as in panoptic quality and in the built-in synthetic dataset: their
    outlines are coarse. Each JSON is checked completely when its split is read, the headers of the
    PNGs together with those of the images; a color without a segment is found when its map is
    read.
    """

    def __init__(
        self,
        train_panoptic: str | None = None,
        val_panoptic: str | None = None,
        **keys: Unpack[SourceArguments],
    ) -> None:
        super().__init__(**keys)
        train = self.split("train")
        val = self.split("val")
        same_images = (val.json, val.semantic) == (train.json, train.semantic)
        self.panoptic = {
            "train": train_panoptic,
            "val": train_panoptic if same_images else val_panoptic,
        }
        self._segments: dict[str, PanopticSegments] = {}

    def read_file(self, split: str, categories: Categories | None) -> CocoFile:
        """Read and check the COCO file and the panoptic file of a split. Raises UserError."""
        file = super().read_file(split, categories)
        folder = self.split(split).semantic
        if folder is None:
            return file
        path = self.panoptic[split]
        if path is None:
            raise UserError(
                f"data.{split}_panoptic is not set: the JSON that belongs to the maps in "
                f"data.{split}_semantic={folder}"
            )
        if not Path(folder).is_dir():
            raise UserError(f"data.{split}_semantic={folder}: no such folder of panoptic maps")
        self._segments[split] = read_panoptic(
            Path(path),
            file.images,
            Path(folder),
            self.reading.check_images,
            self.reading.max_pixels,
        )
        return file

    def _open_maps(self, split: str, folder: str, ids: Sequence[int] | None) -> SemanticMaps:
        self.file(split)  # reads the segments
        return PanopticMaps(
            folder,
            f"data.{split}_semantic",
            self._segments[self.split(split).part_of or split],
            self.reading.max_pixels,
            ids,
        )


class PanopticMaps(SemanticMaps):
    """The class of each pixel, from the PNGs of a folder."""

    def __init__(
        self,
        folder: Path | str,
        key: str,
        segments: PanopticSegments,
        max_pixels: int,
        ids: Sequence[int] | None,
    ) -> None:
        super().__init__(folder, key, max_pixels, ids)
        self.segments = segments
        classes = segments.category_ids
        if ids is not None:
            label_of_id = {category_id: label for label, category_id in enumerate(ids)}
            labels = [label_of_id.get(category_id, -1) for category_id in classes.tolist()]
            classes = np.array(labels, dtype=np.int64)
        elif classes.max(initial=0) > MAX_ID:
            raise UserError(
                f"{key}={folder}: category id {classes.max()} of the panoptic maps is above "
                f"{MAX_ID}"
            )
        self._classes = classes.astype(np.int16)

    def load(self, file_name: str, height: int, width: int) -> Tensor:
        """Read the map of an image: i16 [height, width], -1 for pixels without segment or label.

        Raises UserError.
        """
        index, map_name = self.segments.png[file_name]
        of_map = slice(int(self.segments.starts[index]), int(self.segments.starts[index + 1]))
        path = safe_join(self.folder, map_name)
        colours = _read_colours(path, height, width, self.max_pixels)
        red, green, blue = np.moveaxis(colours, 2, 0).astype(np.int32)
        pixel_ids = red + 256 * green + 65536 * blue
        # Entry 0 is for pixels without a segment. The ids ascend, so that a search finds them.
        ids = np.concatenate([[0], self.segments.ids[of_map]])
        classes = np.concatenate([[-1], self._classes[of_map]]).astype(np.int16)
        position = (np.searchsorted(ids, pixel_ids, side="right") - 1).astype(np.int64)
        unknown = ids[position] != pixel_ids
        if unknown.any():
            raise UserError(
                f"{path}: the id {pixel_ids[unknown][0]} of a pixel is not one of the image's "
                "segments in the JSON"
            )
        return torch.from_numpy(classes[position])


def _read_colours(path: Path, height: int, width: int, max_pixels: int) -> NDArray[np.uint8]:
    """Return the colors of a map, uint8 [height, width, 3]. Raises UserError."""
    expected = "encodes ids in three bytes of color"
    return read_png(path, height, width, max_pixels, _KIND, ("RGB",), expected)


def read_panoptic(
    path: Path, images: Sequence[ImageRecord], folder: Path, check_headers: bool, max_pixels: int
) -> PanopticSegments:
    """Read and check the JSON for the images, and the headers of its PNGs.

    Raises UserError with the whole report.
    """
    report = Report(str(path))
    annotations, category_ids = _parse_file(path, report)
    image_ids = {image.id for image in images}
    by_image = _parse_annotations(annotations, image_ids, category_ids, report)
    if not report.errors:
        _check_complete(images, by_image, report)
        if check_headers:
            _check_maps(images, by_image, folder, report, max_pixels)
    if report.errors:
        raise UserError(report.text())
    png = {}
    counts = [0]
    rows: list[tuple[int, int]] = []
    for index, image in enumerate(images):
        annotation = by_image[image.id]
        png[image.file_name] = (index, annotation.file_name)
        counts.append(len(annotation.segments))
        rows += sorted(annotation.segments)
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return PanopticSegments(png, table[:, 0], table[:, 1], np.cumsum(counts).astype(np.int64))


def _check_complete(
    images: Sequence[ImageRecord], by_image: dict[int, _ImageSegments], report: Report
) -> None:
    missing = [image for image in images if image.id not in by_image]
    if missing:
        report.error(
            "image without a panoptic annotation",
            *(f"image {image.id}: {image.file_name}" for image in missing),
        )


def _parse_file(path: Path, report: Report) -> tuple[list[object], set[int]]:
    """Return the annotations and the ids of the categories.

    Problems go into the report. Raises UserError if the file cannot be opened.
    """
    try:
        tree = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        report.error("not JSON: the file is truncated or damaged", str(error))
        return [], set()
    lists = tree if isinstance(tree, dict) else {}
    missing = [key for key in _LISTS if not isinstance(lists.get(key), list)]
    if missing:
        report.error("not a panoptic dataset", *(f"it has no list '{key}'" for key in missing))
        return [], set()
    return lists["annotations"], set(parse_categories(lists["categories"], report).ids)


def _parse_annotations(
    entries: list[object], image_ids: set[int], category_ids: set[int], report: Report
) -> dict[int, _ImageSegments]:
    """Return the valid annotations by image id; others are reported."""
    by_image: dict[int, _ImageSegments] = {}
    seen: set[int] = set()
    for entry in entries:
        fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
        image_id = as_int64(fields.get("image_id"))
        if image_id is None:
            report.error("annotation without an integer image_id", f"{entry!r}"[:80])
        elif image_id not in image_ids:
            report.error("image_id of no image", f"image {image_id}")
        elif image_id in seen:
            report.error("image with more than one annotation", f"image {image_id}")
        else:
            seen.add(image_id)
            try:
                file_name = check_name(fields.get("file_name"))
            except UserError as error:
                report.error("file name that is not safe", f"image {image_id}: {error}")
                continue
            segments = _parse_segments(image_id, fields.get("segments_info"), category_ids, report)
            by_image[image_id] = _ImageSegments(file_name, segments)
    return by_image


def _parse_segments(
    image_id: int, entries: object, category_ids: set[int], report: Report
) -> list[tuple[int, int]]:
    """Return id and category id (-1 for a crowd) of each valid segment; others are reported."""
    if not isinstance(entries, list):
        report.error("annotation without a list segments_info", f"image {image_id}")
        return []
    rows = []
    for entry in entries:
        row = _parse_segment(image_id, entry, category_ids, report)
        if row is not None:
            rows.append(row)
    id_counts = Counter(segment_id for segment_id, _ in rows)
    repeated = [
        f"image {image_id}: id {segment_id}, {n} times"
        for segment_id, n in id_counts.items()
        if n > 1
    ]
    if repeated:
        report.error("segment id that is used more than once in an image", *repeated)
    return rows


def _parse_segment(
    image_id: int, entry: object, category_ids: set[int], report: Report
) -> tuple[int, int] | None:
    """Return id and category id (-1 for a crowd) of a segment; None after reporting a problem."""
    fields: Mapping[str, object] = entry if isinstance(entry, dict) else {}
    segment_id = as_int64(fields.get("id"))
    category_id = as_int64(fields.get("category_id"))
    iscrowd = fields.get("iscrowd") or 0
    if segment_id is None or not 0 < segment_id < _ID_LIMIT:
        report.error(
            f"segment id that is not within 1 .. {_ID_LIMIT - 1}",
            f"image {image_id}: {fields.get('id')!r}"[:80],
        )
        return None
    segment = f"image {image_id}, segment {segment_id}"
    if category_id is None or category_id not in category_ids:
        report.error(
            "segment with the category_id of no category",
            f"{segment}: {fields.get('category_id')!r}"[:80],
        )
        return None
    if iscrowd not in (0, 1):
        report.error("iscrowd that is neither 0 nor 1", f"{segment}: {iscrowd!r}"[:80])
        return None
    return segment_id, -1 if iscrowd else category_id


def _check_maps(
    images: Sequence[ImageRecord],
    by_image: dict[int, _ImageSegments],
    folder: Path,
    report: Report,
    max_pixels: int,
) -> None:
    """Check the header of every PNG: it exists, is RGB, and has its image's size."""

    def check_map(image: ImageRecord) -> tuple[str, str] | None:
        return _find_map_problem(image, by_image[image.id].file_name, folder, max_pixels)

    annotated = [image for image in images if image.id in by_image]
    with ThreadPoolExecutor(THREADS) as pool:
        for image, problem in zip(annotated, pool.map(check_map, annotated), strict=True):
            if problem:
                kind, detail = problem
                report.error(kind, f"image {image.id}: {detail}")


def _find_map_problem(
    image: ImageRecord, name: str, folder: Path, max_pixels: int
) -> tuple[str, str] | None:
    """Return kind and detail of a map's problem, None if it has none."""
    try:
        path = safe_join(folder, name)
    except UserError as error:
        return "file name that is not safe", str(error)
    if not path.is_file():
        return f"{_KIND} that does not exist", str(path)
    try:
        with Image.open(path, formats=("PNG",)) as header:
            check_header(header, path, image.height, image.width, max_pixels, _KIND)
            if header.mode != "RGB":
                return f"{_KIND} that is not RGB", f"{path}: mode {header.mode}"
            return None
    except UserError as error:
        return f"{_KIND} whose size differs from its image's", str(error)
    except Exception as error:  # decoders raise many types of errors on damaged data
        return f"{_KIND} that cannot be read", f"{path}: {error}"
