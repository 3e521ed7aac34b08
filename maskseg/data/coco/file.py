"""Checked COCO JSON files: images, categories, and the annotations of one image at a time.

Accepts any ids and names; polygons, compressed and uncompressed RLE; boxes without masks and masks
without boxes. Labels are 0..K-1 in order of ascending category id, or those of the given
categories. Several files are read as one dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.annotation_checks import ValidAnnotations
from maskseg.data.coco.checks import (
    CheckedDataset,
    ImageRecord,
    Report,
    check_dataset,
    check_image_files,
    ids_without_name,
    resolve_names,
)
from maskseg.data.coco.concatenate import concatenate, union_of_categories
from maskseg.data.coco.documents import (
    CocoAnnotation,
    CocoCategory,
    CocoDocument,
    CocoImage,
)
from maskseg.data.coco.packed_segmentations import NONE
from maskseg.data.coco.parse import AnnotationColumns, Crowds, ParsedCoco, read_json
from maskseg.data.image_files import MAX_PIXELS
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks, Polygons, RunLengths
from maskseg.structures import Categories

__all__ = ["Annotations", "CocoFile", "ImageRecord", "ObjectArrays", "check_coco", "read_coco"]

# COCO's keypoints are pixel indices: the center of pixel i is at i + 0.5.
_PIXEL_CENTRE = np.array([0.5, 0.5, 0.0], dtype=np.float32)

_MAX_NAME = 24  # characters of a class name in the table
_MIN_BLOCK = 10  # rows of a block of the table
_MAX_SINGLE_BLOCK = 20  # rows of a table that is not split into blocks


@dataclass(frozen=True)
class Annotations:
    """The annotations of one image.

    boxes: f32 [G, 4], xyxy inside the image: the file's bbox, or the box around the mask if the
    file has no bbox with an extent in the image; labels: i64 [G], 0..K-1; crowd: bool [G];
    ids: i64 [G], annotation ids, never 0;
    shapes: G masks in the file's frame, None for an annotation with only a box;
    keypoints: f32 [G, P, 3], continuous pixels and visibility, zeros for missing points;
    None if no class has keypoints.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    ids: NDArray[np.int64]
    shapes: tuple[Polygons | RunLengths | None, ...]
    keypoints: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class ObjectArrays:
    """The objects of a dataset without their masks.

    labels: i64 [G]; boxes: f64 [G, 4], x, y, width, height; image_index: i64 [G], index of the
    image; image_sizes: i64 [N, 2], (height, width) of the images.
    """

    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    image_index: NDArray[np.int64]
    image_sizes: NDArray[np.int64]


class CocoFile:
    """The annotations of a dataset.

    Memory is a few flat arrays, shared by the workers of a loader; masks are decoded on request.

    path: the JSON file, or the first of several; name: all of them, for messages; categories: the
    meaning of the labels; images: in the file's order, including those without objects; report:
    warnings about repaired and dropped annotations.
    """

    def __init__(
        self, path: Path, checked: CheckedDataset, columns: AnnotationColumns, report: Report
    ) -> None:
        self.path = path
        self.name = report.path
        self.report = report
        self.categories = checked.categories
        self.images = checked.images
        self._valid = checked.annotations
        self._columns = columns
        self._segmentations = columns.segmentations
        self._starts = np.searchsorted(self._valid.image_index, np.arange(len(self.images) + 1))

    def __len__(self) -> int:
        return len(self.images)

    def select(self, images: NDArray[np.bool_], report: Report) -> CocoFile:
        """Return the file with some of its images, bool [N], and their annotations.

        report: of the result; its path is the name of this part in messages.
        """
        records = [self.images[i] for i in np.flatnonzero(images)]
        new_index = np.cumsum(images) - 1
        positions = np.flatnonzero(images[self._valid.image_index])
        values = {
            field.name: getattr(self._valid, field.name)[positions]
            for field in fields(ValidAnnotations)
        }
        values["image_index"] = new_index[values["image_index"]]
        checked = CheckedDataset(records, self.categories, ValidAnnotations(**values))
        return CocoFile(self.path, checked, self._columns, report)

    @cached_property
    def index_of(self) -> dict[int, int]:
        """Image id -> index in `images`."""
        return {image.id: i for i, image in enumerate(self.images)}

    @property
    def num_annotations(self) -> int:
        """Number of annotations of all images, including crowds."""
        return len(self._valid.rows)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Index of each annotation in the file's own list, i64 [A], in the order of `to_dict`.

        -1 for crowds that were added for the `category_ids` of images.
        """
        return self._columns.list_index[self._valid.rows]

    def annotations(self, index: int) -> Annotations:
        """Return the annotations of images[index], in the file's order."""
        of_image = self._slice_of(index)
        valid = self._valid
        boxes = valid.boxes[of_image].copy()
        boxes[:, 2:] += boxes[:, :2]
        rows = valid.rows[of_image].tolist()
        return Annotations(
            boxes=boxes.astype(np.float32),
            labels=valid.labels[of_image].copy(),
            crowd=valid.crowd[of_image].copy(),
            ids=valid.ids[of_image].copy(),
            shapes=tuple(self._segmentations.shape(row) for row in rows),
            keypoints=self._keypoints(of_image) if self.categories.num_points else None,
        )

    def _slice_of(self, index: int) -> slice:
        return slice(int(self._starts[index]), int(self._starts[index + 1]))

    def _keypoints(self, positions: slice) -> NDArray[np.float32]:
        """Return the keypoints of a range of annotations, f32 [G, P, 3], continuous pixels."""
        count = positions.stop - positions.start
        keypoints = np.zeros((count, self.categories.num_points, 3), dtype=np.float32)
        for i in range(count):
            position = positions.start + i
            points = self._points(position)
            first, stop = self.categories.point_ranges[self._valid.labels[position]]
            if len(points):
                keypoints[i, first:stop] = (points + _PIXEL_CENTRE) * (points[:, 2:] > 0)
        return keypoints

    def _points(self, position: int) -> NDArray[np.float32]:
        """Return the keypoints as in the file, f32 [n, 3]; n is 0 or the class's number."""
        points = self._columns.points_of(int(self._valid.rows[position]))
        complete = len(points) == self._num_points_of_class(position)
        return points if self._valid.has_points[position] and complete else points[:0]

    def _num_points_of_class(self, position: int) -> int:
        return len(self.categories.keypoints[self._valid.labels[position]])

    def _complete_points(self, position: int) -> NDArray[np.float32]:
        """Return the keypoints of an annotation as in the file, f32 [P, 3], zeros if absent."""
        points = self._points(position)
        if not len(points):
            return np.zeros((self._num_points_of_class(position), 3), dtype=np.float32)
        return points

    def has_keypoints(self) -> bool:
        """Return whether any object has a labelled keypoint."""
        if not self.categories.num_points:
            return False
        objects = np.flatnonzero(~self._valid.crowd).tolist()
        return any(self._points(position)[:, 2:].any() for position in objects)

    def labels(self, index: int) -> list[int]:
        """Return the labels of the objects of images[index], without crowds."""
        of_image = self._slice_of(index)
        labels = self._valid.labels[of_image][~self._valid.crowd[of_image]]
        return [int(label) for label in labels]

    def has_objects(self) -> NDArray[np.bool_]:
        """Return which images show an object other than a crowd, bool [N]."""
        flags = np.zeros(len(self.images), dtype=bool)
        flags[self._valid.image_index[~self._valid.crowd]] = True
        return flags

    def object_sides(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the square root of the area of each object's box, f64 [A] px, and its image.

        The images are indices, i64 [A]. Crowds are left out.
        """
        objects = ~self._valid.crowd
        boxes = self._valid.boxes[objects]
        return np.sqrt(boxes[:, 2] * boxes[:, 3]), self._valid.image_index[objects]

    def has_masks(self) -> bool:
        """Return whether every object has a mask. Crowds need none, unless there is no object."""
        if self._valid.crowd.all():
            return bool((self._segmentations.kinds[self._valid.rows] != NONE).all())
        return not self.objects_without_masks()

    def objects_without_masks(self) -> list[int]:
        """Return the ids of the objects, other than crowds, that have no mask."""
        has_none = self._segmentations.kinds[self._valid.rows] == NONE
        return [int(i) for i in self._valid.ids[has_none & ~self._valid.crowd]]

    @cached_property
    def fills_crowds(self) -> bool:
        """Whether crowds without a mask get the rectangle of their box: all objects have masks."""
        return bool((~self._valid.crowd).any()) and self.has_masks()

    def to_dict(self) -> dict[str, Any]:
        """Return the dataset as a COCO JSON object that pycocotools can index.

        Every annotation has id, bbox, area, iscrowd and segmentation (polygons or compressed RLE,
        the box's rectangle for a crowd if `fills_crowds`, [] for any other box alone), and
        keypoints and num_keypoints if any class has keypoints. Category ids are those of
        `categories`.
        """
        images: list[CocoImage] = [
            {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
            for i in self.images
        ]
        document: CocoDocument = {
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": self._annotations_to_coco(),
            "categories": self._categories_to_coco(),
        }
        return dict(document)

    def _annotations_to_coco(self) -> list[CocoAnnotation]:
        valid = self._valid
        category_ids = np.array(self.categories.ids, dtype=np.int64)
        # Lists of Python numbers: JSON cannot hold numpy's, and indexing lists is faster.
        ids = valid.ids.tolist()
        image_index = valid.image_index.tolist()
        categories = category_ids[valid.labels].tolist()
        boxes = valid.boxes.tolist()
        rows = valid.rows.tolist()
        annotations: list[CocoAnnotation] = []
        for position in range(len(ids)):
            annotation: CocoAnnotation = {
                "id": ids[position],
                "image_id": self.images[image_index[position]].id,
                "category_id": categories[position],
                "bbox": boxes[position],
                "area": self._area(position),
                "iscrowd": int(valid.crowd[position]),
                "segmentation": self._segmentations.to_coco(rows[position]),
            }
            if not annotation["segmentation"] and self.fills_crowds:
                corners = valid.boxes[position].copy()
                corners[2:] += corners[:2]
                annotation["segmentation"] = [rectangle(corners).parts[0].ravel().tolist()]
            if self.categories.num_points:
                points = self._complete_points(position)
                annotation["keypoints"] = points.ravel().tolist()
                annotation["num_keypoints"] = int((points[:, 2] > 0).sum())
            annotations.append(annotation)
        return annotations

    def _categories_to_coco(self) -> list[CocoCategory]:
        categories = []
        for label, category_id in enumerate(self.categories.ids):
            category: CocoCategory = {"id": category_id, "name": self.categories.names[label]}
            if self.categories.keypoints[label]:
                category["keypoints"] = list(self.categories.keypoints[label])
                edges = self.categories.skeletons[label]
                category["skeleton"] = [[start + 1, end + 1] for start, end in edges]
            categories.append(category)
        return categories

    def _area(self, position: int) -> float:
        """Return the area in pixels: the file's value, else the mask's, else the box's."""
        valid = self._valid
        if np.isfinite(valid.areas[position]):
            return float(valid.areas[position])
        shape = self._segmentations.shape(int(valid.rows[position]))
        if shape is None:
            return float(valid.boxes[position, 2] * valid.boxes[position, 3])
        image = self.images[valid.image_index[position]]
        return float(AnnotatedMasks.from_file([shape], image.height, image.width).area()[0])

    def objects(self) -> ObjectArrays:
        """Return labels, boxes and images of all objects, without crowds."""
        valid = self._valid
        is_object = ~valid.crowd
        sizes = np.array([(image.height, image.width) for image in self.images], dtype=np.int64)
        return ObjectArrays(
            valid.labels[is_object],
            valid.boxes[is_object].astype(np.float64),
            valid.image_index[is_object],
            sizes.reshape(-1, 2),
        )

    def class_counts(self) -> list[tuple[int, int, int]]:
        """Return for each class the numbers of images that show it, of instances and of crowds."""
        valid = self._valid
        label_image_pairs = np.unique(np.stack([valid.labels, valid.image_index], axis=1), axis=0)
        counts = [
            np.bincount(labels, minlength=len(self.categories)).tolist()
            for labels in (
                label_image_pairs[:, 0],
                valid.labels[~valid.crowd],
                valid.labels[valid.crowd],
            )
        ]
        return list(zip(*counts, strict=True))

    def class_table(self, width: int = 120) -> str:
        """Format the counts of each class and their totals in at most `width` columns.

        Long lists of classes are split into blocks side by side.
        """
        names = [
            name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
            for name in self.categories.names
        ]
        name_width = max(len("class"), *(len(name) for name in names), 0)
        rows = [
            f"{name:<{name_width}} {images:>7} {instances:>9} {crowds:>6}"
            for name, (images, instances, crowds) in zip(names, self.class_counts(), strict=True)
        ]
        header = f"{'class':<{name_width}} {'images':>7} {'instances':>9} {'crowds':>6}"
        lines = _to_blocks(header, rows, width)
        num_crowds = int(self._valid.crowd.sum())
        num_empty = int((np.diff(self._starts) == 0).sum())
        lines.append(
            f"{len(rows)} classes, {len(self)} images ({num_empty} without objects), "
            f"{self.num_annotations - num_crowds} instances, {num_crowds} crowds"
        )
        return "\n".join(lines)


def rectangle(box: NDArray[np.floating]) -> Polygons:
    """Return a box xyxy [4] as a mask."""
    x0, y0, x1, y1 = box.tolist()
    return Polygons((np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]),))


def _to_blocks(header: str, rows: list[str], width: int) -> list[str]:
    """Arrange the rows of a table in blocks side by side, each below its header."""
    num_blocks = 1
    if len(rows) > _MAX_SINGLE_BLOCK:
        fitting = (width + 3) // (len(header) + 3)  # a separator takes 3 columns
        filled = -(-len(rows) // _MIN_BLOCK)
        num_blocks = max(1, min(fitting, filled))
    height = -(-len(rows) // num_blocks)
    blocks = [rows[start : start + height] for start in range(0, len(rows), height)]
    header_lines = [
        " | ".join([header] * len(blocks)),
        " | ".join(["-" * len(header)] * len(blocks)),
    ]
    # The last block may be shorter than the others.
    row_lines = [" | ".join(block[i] for block in blocks if i < len(block)) for i in range(height)]
    return header_lines + row_lines


def read_coco(
    path: str | Path | Sequence[str | Path],
    *,
    categories: Categories | None = None,
    image_root: str | Path | None = None,
    check_images: bool = True,
    max_pixels: int = MAX_PIXELS,
    crowds: Crowds = "ignore",
) -> CocoFile:
    """Read and check a COCO JSON file, or several as one dataset.

    In several files, classes are matched by name, and ids that an earlier file uses are replaced.

    categories: the expected ones (of the training file or a checkpoint), matched by name, or by id
    if names repeat; None: the file's;
    image_root: the image folder; file names that only exist in another spelling are replaced, and
    the headers of the files are checked if `check_images` is True;
    crowds: `objects` reads annotations with iscrowd=1 as objects.

    Raises UserError with the whole report if there are errors; warnings are in the result's
    `report`.
    """
    options = _Options(categories, image_root, check_images, max_pixels, crowds)
    file, report = _read(_to_paths(path), options)
    if file is None:
        raise UserError(report.text())
    return file


def check_coco(
    path: str | Path | Sequence[str | Path],
    *,
    categories: Categories | None = None,
    image_root: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    crowds: Crowds = "ignore",
) -> Report:
    """Return the report on files with any content. Raises UserError if one cannot be opened."""
    options = _Options(categories, image_root, image_root is not None, max_pixels, crowds)
    return _read(_to_paths(path), options)[1]


@dataclass(frozen=True)
class _Options:
    """The arguments of `read_coco` but for the paths."""

    categories: Categories | None
    image_root: str | Path | None
    check_images: bool
    max_pixels: int
    crowds: Crowds


def _to_paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    return [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]


def _read(paths: list[Path], options: _Options) -> tuple[CocoFile | None, Report]:
    reports = [Report(str(path)) for path in paths]
    parsed = [
        read_json(path, options.max_pixels, report, options.crowds)
        for path, report in zip(paths, reports, strict=True)
    ]
    if len(paths) == 1:
        report = reports[0]
        checked = None if parsed[0] is None else _check(parsed[0], options, report)
        if checked is None or parsed[0] is None or report.errors:
            return None, report
        return CocoFile(paths[0], checked, parsed[0].columns, report), report
    report = Report(", ".join(map(str, paths)))
    readable = [file for file in parsed if file is not None]
    options = replace(options, categories=options.categories or union_of_categories(readable))
    parts = []
    for file, file_report in zip(parsed, reports, strict=True):
        if file is not None:
            parts.append((_check(file, options, file_report), file.columns))
        report.extend(file_report)
    if report.errors:
        return None, report
    checked, columns = concatenate(parts, report)
    return CocoFile(paths[0], checked, columns, report), report


def _check(parsed: ParsedCoco, options: _Options, report: Report) -> CheckedDataset:
    """Check a parsed file and its images; the result may be used if the report has no errors."""
    checked = check_dataset(parsed, report, options.max_pixels, options.categories)
    if options.image_root is None:
        return checked
    root = Path(options.image_root)
    images = resolve_names(checked.images, ids_without_name(parsed.images), root, report)
    if options.check_images:
        check_image_files(images, root, report, options.max_pixels)
    return replace(checked, images=images)
