"""A COCO JSON file, checked and cleaned: images, categories, and the annotations of one image at a time.

Any ids and names; polygons, compressed and uncompressed RLE; boxes without masks and masks without boxes. Labels are 0..K-1 in order of
ascending category id, or those of the categories that are handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.checks import Checked, ImageRecord, Report, check, check_files
from maskseg.data.coco.packed_segmentations import NONE
from maskseg.data.coco.parse import Columns, RawCoco, read_json
from maskseg.data.image_files import MAX_PIXELS
from maskseg.errors import UserError
from maskseg.masks.annotated import FileMasks, Polygons, Runs
from maskseg.structures import Categories

__all__ = ["Annotations", "CocoFile", "ImageRecord", "check_coco", "read_coco"]


_CENTRE = np.array([0.5, 0.5, 0.0], dtype=np.float32)  # of the pixel that a keypoint names


@dataclass(frozen=True)
class Annotations:
    """The annotations of one image.

    boxes: f32 [G, 4] xyxy inside the image, as the file's bbox has them, or around the mask where it has none; labels: i64 [G] in 0..K-1;
    crowd: bool [G]; ids: i64 [G], annotation ids, never 0; shapes: G masks in the file's frame, None where there is only a box;
    keypoints: f32 [G, P, 3], continuous pixels and visibility, zeros where there is no point; None where no class has any.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    ids: NDArray[np.int64]
    shapes: tuple[Polygons | Runs | None, ...]
    keypoints: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.boxes)


class CocoFile:
    """A data set's annotations. Memory is a few flat arrays, shared by the workers of a loader; masks are decoded when they are asked for.

    path: the JSON; categories: what labels stand for; images: in the file's order, those without objects too; report: what was mended.
    """

    def __init__(self, path: Path, checked: Checked, columns: Columns, report: Report) -> None:
        self.path, self.report = path, report
        self.categories, self.images = checked.categories, checked.images
        self._kept, self._columns, self._segmentations = (
            checked.annotations,
            columns,
            columns.segmentations,
        )
        self._starts = np.searchsorted(self._kept.image_index, np.arange(len(self.images) + 1))

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def index_of(self) -> dict[int, int]:
        """Image id -> its place in `images`."""
        return {image.id: i for i, image in enumerate(self.images)}

    @property
    def num_annotations(self) -> int:
        """Annotations of all images, crowds too."""
        return len(self._kept.rows)

    def annotations(self, index: int) -> Annotations:
        """The annotations of images[index], in the file's order."""
        here = slice(self._starts[index], self._starts[index + 1])
        kept = self._kept
        boxes = kept.boxes[here].copy()
        boxes[:, 2:] += boxes[:, :2]
        return Annotations(
            boxes=boxes.astype(np.float32),
            labels=kept.labels[here].copy(),
            crowd=kept.crowd[here].copy(),
            ids=kept.ids[here].copy(),
            shapes=tuple(self._segmentations.shape(row) for row in kept.rows[here].tolist()),
            keypoints=self._keypoints(here) if self.categories.num_points else None,
        )

    def _keypoints(self, here: slice) -> NDArray[np.float32]:
        """COCO's keypoints are pixel indices: the centre of pixel i is at i + 0.5."""
        found = np.zeros((here.stop - here.start, self.categories.num_points, 3), dtype=np.float32)
        for points, position in zip(found, range(here.start, here.stop), strict=True):
            own = self._points(position)
            first, last = self.categories.point_ranges[self._kept.labels[position]]
            if len(own):
                points[first:last] = (own + _CENTRE) * (own[:, 2:] > 0)
        return found

    def _points(self, position: int) -> NDArray[np.float32]:
        """f32 [n, 3] as the file has them, n is 0 or the number of the class' points."""
        own = self._columns.points_of(int(self._kept.rows[position]))
        expected = len(self.categories.keypoints[self._kept.labels[position]])
        return own if self._kept.has_points[position] and len(own) == expected else own[:0]

    def _to_coco(self, position: int) -> dict[str, Any]:
        """keypoints and num_keypoints of an annotation, as the file has them (none visible where it has none)."""
        own = self._points(position)
        own = (
            own
            if len(own)
            else np.zeros(
                (len(self.categories.keypoints[self._kept.labels[position]]), 3), dtype=np.float32
            )
        )
        return {"keypoints": own.ravel().tolist(), "num_keypoints": int((own[:, 2] > 0).sum())}

    def has_keypoints(self) -> bool:
        """Whether some object has a visible point of its class."""
        return bool(self.categories.num_points) and any(
            self._points(position)[:, 2:].any()
            for position in np.flatnonzero(~self._kept.crowd).tolist()
        )

    def labels(self, index: int) -> list[int]:
        """The labels of the single objects of images[index]; crowds are left out."""
        here = slice(self._starts[index], self._starts[index + 1])
        return [int(label) for label in self._kept.labels[here][~self._kept.crowd[here]]]

    def has_objects(self) -> NDArray[np.bool_]:
        """Which images show a single object (a crowd is none), bool [N]."""
        found = np.zeros(len(self.images), dtype=bool)
        found[self._kept.image_index[~self._kept.crowd]] = True
        return found

    def has_masks(self) -> bool:
        """Whether every object has a mask."""
        return bool((self._segmentations.kinds[self._kept.rows] != NONE).all())

    def to_dict(self) -> dict[str, Any]:
        """The data set as a COCO JSON object that pycocotools can index: every annotation has an id, bbox, area, iscrowd and segmentation
        (polygons or compressed RLE; [] for a box alone), and keypoints and num_keypoints where a class has points. Category ids are those of
        `categories`."""
        ids, kept = np.array(self.categories.ids, dtype=np.int64), self._kept
        images = [
            {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
            for i in self.images
        ]
        annotations = [
            {
                "id": number,
                "image_id": self.images[image].id,
                "category_id": category,
                "bbox": box,
                "area": self._area(position),
                "iscrowd": int(crowd),
                "segmentation": self._segmentations.to_coco(row),
            }
            for position, (number, image, category, box, crowd, row) in enumerate(
                zip(
                    kept.ids.tolist(),
                    kept.image_index.tolist(),
                    ids[kept.labels].tolist(),
                    kept.boxes.tolist(),
                    kept.crowd.tolist(),
                    kept.rows.tolist(),
                    strict=True,
                )
            )
        ]
        if self.categories.num_points:
            for position, annotation in enumerate(annotations):
                annotation |= self._to_coco(position)
        categories = [
            {"id": number, "name": name}
            for number, name in zip(self.categories.ids, self.categories.names, strict=True)
        ]
        for category, points, lines in zip(
            categories, self.categories.keypoints, self.categories.skeletons, strict=True
        ):
            category |= (
                {"keypoints": list(points), "skeleton": [[a + 1, b + 1] for a, b in lines]}
                if points
                else {}
            )
        return {
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }

    def _area(self, position: int) -> float:
        """Pixels: the file's number, or the mask's, or the box's."""
        kept = self._kept
        if np.isfinite(kept.areas[position]):
            return float(kept.areas[position])
        shape = self._segmentations.shape(int(kept.rows[position]))
        if shape is None:
            return float(kept.boxes[position, 2] * kept.boxes[position, 3])
        image = self.images[kept.image_index[position]]
        return float(FileMasks.from_file([shape], image.height, image.width).area()[0])

    def class_counts(self) -> list[tuple[int, int, int]]:
        """For each class: images that show it, single instances, crowds."""
        num_classes, kept = len(self.categories), self._kept
        seen = np.unique(np.stack([kept.labels, kept.image_index], axis=1), axis=0)[:, 0]
        counts = [
            np.bincount(labels, minlength=num_classes)
            for labels in (seen, kept.labels[~kept.crowd], kept.labels[kept.crowd])
        ]
        return [(int(a), int(b), int(c)) for a, b, c in zip(*counts, strict=True)]

    def class_table(self, width: int = 120) -> str:
        """The counts of each class and their totals as text of at most `width` columns; long lists of classes go side by side."""
        counts = self.class_counts()
        names = [name if len(name) <= 24 else f"{name[:23]}…" for name in self.categories.names]
        longest = max(len("class"), *(len(name) for name in names), 0)
        rows = [
            f"{n:<{longest}} {a:>7} {b:>9} {c:>6}"
            for n, (a, b, c) in zip(names, counts, strict=True)
        ]
        head = f"{'class':<{longest}} {'images':>7} {'instances':>9} {'crowds':>6}"
        blocks = (
            1
            if len(rows) <= 20
            else max(1, min((width + 3) // (len(head) + 3), -(-len(rows) // 10)))
        )
        deep = -(-len(rows) // blocks)
        columns = [rows[i : i + deep] for i in range(0, len(rows), deep)] if rows else []
        lines = (
            [" | ".join([head] * len(columns)), " | ".join(["-" * len(head)] * len(columns))]
            if rows
            else []
        )
        lines += [
            " | ".join(column[i] for column in columns if i < len(column)) for i in range(deep)
        ]
        crowds, empty = int(self._kept.crowd.sum()), int((np.diff(self._starts) == 0).sum())
        lines.append(
            f"{len(rows)} classes, {len(self)} images ({empty} without objects), {self.num_annotations - crowds} instances, {crowds} crowds"
        )
        return "\n".join(lines)


def read_coco(
    path: str | Path,
    *,
    categories: Categories | None = None,
    image_root: str | Path | None = None,
    check_images: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> CocoFile:
    """Reads and checks a COCO JSON file.

    categories: those to use (the training file's, a checkpoint's), matched by name, or by id where names repeat; image_root: the folder of
    the images, whose headers are looked at unless `check_images` is False. Raises UserError with the whole report if there are errors;
    warnings are in the result's `report`.
    """
    file, report = _read(Path(path), categories, image_root if check_images else None, max_pixels)
    if file is None:
        raise UserError(report.text())
    return file


def check_coco(
    path: str | Path,
    *,
    categories: Categories | None = None,
    image_root: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Report:
    """The report on a file, whatever is in it. Raises UserError only if it cannot be opened."""
    return _read(Path(path), categories, image_root, max_pixels)[1]


def _read(
    path: Path, categories: Categories | None, image_root: str | Path | None, max_pixels: int
) -> tuple[CocoFile | None, Report]:
    report = Report(str(path))
    raw: RawCoco | None = read_json(path, max_pixels, report)
    if raw is None:
        return None, report
    checked = check(raw, report, max_pixels, categories)
    if image_root is not None:
        check_files(checked.images, Path(image_root), report, max_pixels)
    return (None if report.errors else CocoFile(path, checked, raw.columns, report)), report
