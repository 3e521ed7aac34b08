"""COCO's panoptic files: a JSON that says the class of each segment, and PNGs whose colours say which segment a pixel is of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.coco.categories import file_categories
from maskseg.data.coco.checks import THREADS, ImageRecord
from maskseg.data.coco.file import CocoFile
from maskseg.data.coco.parse import integer
from maskseg.data.coco.report import Report
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.semantic_maps import HIGHEST, SemanticMaps, check_header, read_png
from maskseg.data.image_files import check_name, safe_join
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.structures import Categories

_LISTS = ("annotations", "categories")
_MOST = 2**24  # segment ids are below: three bytes of colour
_WHAT = "panoptic map"


@dataclass(frozen=True)
class PanopticSegments:
    """The segments of a split's images. png: of each image's file name, the number and the name of its map; ids: i64 [S], of one map after the other,
    ascending in each; category_ids: i64 [S], -1 for a crowd; starts: i64 [M + 1], where those of each map begin."""

    png: dict[str, tuple[int, str]]
    ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    starts: NDArray[np.int64]


class PanopticSource(CocoSource):
    """COCO files of things with panoptic files, from which the semantic maps come.

    train_panoptic, val_panoptic: the JSON of each split; train_semantic, val_semantic: the folders of its PNGs (id = R + 256 G + 65536 B, 0 for
    none); for a validation with the training's own images and maps, `train_panoptic` counts. Crowds are unlabelled, as panoptic quality leaves
    them out and the embedded data does: their outlines are coarse. Each JSON is checked whole when its split is read, the PNGs' headers with the
    images'; a colour without a segment is found when its map is read.
    Other keys: `CocoSource`.
    """

    def __init__(
        self, train_panoptic: str | None = None, val_panoptic: str | None = None, **keys: Any
    ) -> None:
        super().__init__(**keys)
        same = all(of["val"] == of["train"] for of in (self.json, self.semantic))
        self.panoptic = {"train": train_panoptic, "val": train_panoptic if same else val_panoptic}
        self._found: dict[str, PanopticSegments] = {}

    def _read(self, split: str, categories: Categories | None) -> CocoFile:
        file, folder, path = (
            super()._read(split, categories),
            self.semantic[split],
            self.panoptic[split],
        )
        if folder is None:
            return file
        if path is None:
            raise UserError(
                f"data.{split}_panoptic is not set: the JSON that belongs to the maps in data.{split}_semantic={folder}"
            )
        if not Path(folder).is_dir():
            raise UserError(f"data.{split}_semantic={folder}: no such folder of panoptic maps")
        self._found[split] = read_panoptic(
            Path(path), file.images, Path(folder), self.check_images, self.max_pixels
        )
        return file

    def _maps(self, split: str, folder: str, ids: Sequence[int] | None) -> SemanticMaps:
        self.file(split)
        return PanopticMaps(
            folder, f"data.{split}_semantic", self._found[split], self.max_pixels, ids
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
        number = segments.category_ids
        if ids is not None:
            labels = {number: label for label, number in enumerate(ids)}
            number = np.array([labels.get(i, -1) for i in number.tolist()], dtype=np.int64)
        elif number.max(initial=0) > HIGHEST:
            raise UserError(
                f"{key}={folder}: category id {number.max()} of the panoptic maps is above {HIGHEST}"
            )
        self._classes = number.astype(np.int16)

    def of(self, file_name: str, height: int, width: int) -> Tensor:
        """The map of an image: i16 [height, width], -1 where a pixel has no segment, or one without a label. Raises UserError."""
        number, name = self.segments.png[file_name]
        here = slice(self.segments.starts[number], self.segments.starts[number + 1])
        path = safe_join(self.folder, name)
        red, green, blue = np.moveaxis(_colours(path, height, width, self.max_pixels), 2, 0).astype(
            np.int32
        )
        pixels = red + 256 * green + 65536 * blue
        ids = np.concatenate([[0], self.segments.ids[here]])
        place = (np.searchsorted(ids, pixels, side="right") - 1).astype(np.int64)
        strange = ids[place] != pixels
        if strange.any():
            raise UserError(
                f"{path}: the id {pixels[strange][0]} of a pixel is none of the image's segments in the JSON"
            )
        return torch.from_numpy(np.concatenate([[-1], self._classes[here]]).astype(np.int16)[place])


def _colours(path: Path, height: int, width: int, max_pixels: int) -> NDArray[np.uint8]:
    """[height, width, 3]. Raises UserError."""
    return read_png(
        path, height, width, max_pixels, _WHAT, ("RGB",), "says ids with three bytes of colour"
    )


def read_panoptic(
    path: Path, images: Sequence[ImageRecord], folder: Path, check_headers: bool, max_pixels: int
) -> PanopticSegments:
    """Reads and checks the JSON for the images, and the headers of its PNGs. Raises UserError with the whole report."""
    report = Report(str(path))
    annotations, known = _content(path, report)
    found = dict(_annotations(annotations, {image.id for image in images}, known, report))
    if not report.errors:
        lacking = [
            f"image {image.id}: {image.file_name}" for image in images if image.id not in found
        ]
        if lacking:
            report.error("image without a panoptic annotation", *lacking)
        if check_headers:
            _check_maps(
                [(image, found[image.id][0]) for image in images if image.id in found],
                folder,
                report,
                max_pixels,
            )
    if report.errors:
        raise UserError(report.text())
    rows = [found[image.id][1] for image in images]
    table = np.array([row for own in rows for row in sorted(own)], dtype=np.int64).reshape(-1, 2)
    starts = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return PanopticSegments(
        {image.file_name: (i, found[image.id][0]) for i, image in enumerate(images)},
        table[:, 0],
        table[:, 1],
        starts,
    )


def _content(path: Path, report: Report) -> tuple[list[Any], set[int]]:
    """The annotations and the ids of the categories. Raises UserError where the file cannot be opened."""
    try:
        tree = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        report.error("not JSON: the file is cut short or damaged", str(error))
        return [], set()
    lacking = (
        [key for key in _LISTS if not isinstance(tree.get(key), list)]
        if isinstance(tree, dict)
        else list(_LISTS)
    )
    if lacking:
        report.error("not a panoptic data set", *(f"it has no list '{key}'" for key in lacking))
        return [], set()
    return tree["annotations"], set(file_categories(tree["categories"], report).ids)


def _annotations(
    entries: list[Any], image_ids: set[int], known: set[int], report: Report
) -> Iterator[tuple[int, tuple[str, list[tuple[int, int]]]]]:
    """Of each good annotation the image's id, the name of the PNG, and its segments' ids and category ids (-1 for a crowd)."""
    seen: set[int] = set()
    for entry in entries:
        number = integer(entry.get("image_id")) if isinstance(entry, dict) else None
        if number is None:
            report.error("annotation without an integer image_id", f"{entry!r}"[:80])
        elif number not in image_ids:
            report.error("image_id that is no image's", f"image {number}")
        elif number in seen:
            report.error("image with more than one annotation", f"image {number}")
        else:
            seen.add(number)
            try:
                yield (
                    number,
                    (
                        check_name(entry.get("file_name")),
                        _segments(number, entry.get("segments_info"), known, report),
                    ),
                )
            except UserError as error:
                report.error("file name that is not safe", f"image {number}: {error}")


def _segments(image: int, entries: Any, known: set[int], report: Report) -> list[tuple[int, int]]:
    if not isinstance(entries, list):
        report.error("annotation without a list segments_info", f"image {image}")
        return []
    rows = []
    for entry in entries:
        values = entry if isinstance(entry, dict) else {}
        number, category, crowd = (
            integer(values.get("id")),
            integer(values.get("category_id")),
            values.get("iscrowd") or 0,
        )
        if number is None or not 0 < number < _MOST:
            report.error(
                f"segment id that is not within 1 .. {_MOST - 1}",
                f"image {image}: {values.get('id')!r}"[:80],
            )
        elif category not in known:
            report.error(
                "segment whose category_id is no category's",
                f"image {image}, segment {number}: {values.get('category_id')!r}"[:80],
            )
        elif crowd not in (0, 1):
            report.error(
                "iscrowd that is neither 0 nor 1",
                f"image {image}, segment {number}: {crowd!r}"[:80],
            )
        else:
            rows.append((number, -1 if crowd else category))
    twice = [
        f"image {image}: id {number}, {n} times"
        for number, n in Counter(number for number, _ in rows).items()
        if n > 1
    ]
    if twice:
        report.error("segment id that is used more than once in an image", *twice)
    return rows


def _check_maps(
    pairs: list[tuple[ImageRecord, str]], folder: Path, report: Report, max_pixels: int
) -> None:
    """Looks at the header of every PNG: is it there, of three bytes a pixel, and of its image's size."""

    def problem(pair: tuple[ImageRecord, str]) -> tuple[str, str] | None:
        image, name = pair
        try:
            path = safe_join(folder, name)
        except UserError as error:
            return "file name that is not safe", str(error)
        if not path.is_file():
            return f"{_WHAT} that does not exist", str(path)
        try:
            with Image.open(path, formats=("PNG",)) as header:
                check_header(header, path, image.height, image.width, max_pixels, _WHAT)
                return (
                    None
                    if header.mode == "RGB"
                    else (f"{_WHAT} that is not RGB", f"{path}: mode {header.mode}")
                )
        except UserError as error:
            return f"{_WHAT} of another size than its image", str(error)
        except Exception as error:  # as where it is decoded
            return f"{_WHAT} that cannot be read", f"{path}: {error}"

    with ThreadPoolExecutor(THREADS) as pool:
        for pair, found in zip(pairs, pool.map(problem, pairs), strict=True):
            if found:
                report.error(found[0], f"image {pair[0].id}: {found[1]}")
