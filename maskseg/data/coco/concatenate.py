"""Several COCO files as one dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from maskseg.data.coco.annotation_checks import ValidAnnotations
from maskseg.data.coco.categories import merge_repeated_names, parse_categories
from maskseg.data.coco.checks import CheckedDataset, ImageRecord
from maskseg.data.coco.packed_segmentations import Floats, Segmentations
from maskseg.data.coco.parse import AnnotationColumns, ParsedCoco
from maskseg.data.coco.report import Report
from maskseg.ops.rle import Ints
from maskseg.structures import Categories

_Part = tuple[CheckedDataset, AnnotationColumns]


def union_of_categories(files: Sequence[ParsedCoco]) -> Categories:
    """Return the classes of all files, matched by name, in order of ascending id.

    A class has the id of the first file that has it, or a new one if another class has that id.
    Problems of the categories are reported where each file is checked.
    """
    ids: dict[str, int] = {}
    points: dict[str, tuple[tuple[str, ...], tuple[tuple[int, int], ...]]] = {}
    for file in files:
        scratch = Report("")
        categories = merge_repeated_names(parse_categories(file.categories, scratch), scratch)[0]
        for label, name in enumerate(categories.names):
            if name not in ids:
                category_id = categories.ids[label]
                is_free = category_id not in ids.values()
                ids[name] = category_id if is_free else max(ids.values()) + 1
            if categories.keypoints[label] and name not in points:
                points[name] = (categories.keypoints[label], categories.skeletons[label])
    names = sorted(ids, key=lambda name: ids[name])
    return Categories(
        names=tuple(names),
        ids=tuple(ids[name] for name in names),
        keypoints=tuple(points.get(name, ((), ()))[0] for name in names),
        skeletons=tuple(points.get(name, ((), ()))[1] for name in names),
    )


def concatenate(parts: Sequence[_Part], report: Report) -> tuple[CheckedDataset, AnnotationColumns]:
    """Join checked files of the same classes. Ids that an earlier file uses are replaced."""
    images: list[ImageRecord] = []
    annotations: list[ValidAnnotations] = []
    num_rows = 0
    image_ids = np.zeros(0, dtype=np.int64)
    ids = np.zeros(0, dtype=np.int64)
    renumbered = np.zeros(2, dtype=np.int64)
    for checked, columns in parts:
        stated_ids = np.array([image.id for image in checked.images], dtype=np.int64)
        new_image_ids = _free_ids(stated_ids, image_ids)
        new_ids = _free_ids(checked.annotations.ids, ids)
        renumbered += (
            (new_image_ids != stated_ids).sum(),
            (new_ids != checked.annotations.ids).sum(),
        )
        annotations.append(
            replace(
                checked.annotations,
                rows=checked.annotations.rows + num_rows,
                image_index=checked.annotations.image_index + len(images),
                ids=new_ids,
            )
        )
        images += [
            replace(image, id=image_id)
            for image, image_id in zip(checked.images, new_image_ids.tolist(), strict=True)
        ]
        num_rows += len(columns.ids)
        image_ids = np.concatenate([image_ids, new_image_ids])
        ids = np.concatenate([ids, new_ids])
    for what, count in zip(("image", "annotation"), renumbered.tolist(), strict=True):
        if count:
            report.warn(f"{what} id that an earlier file uses, renumbered", count=count)
    _warn_repeated_files(images, report)
    joined = CheckedDataset(images, parts[0][0].categories, _join_annotations(annotations))
    return joined, _join_columns([columns for _, columns in parts])


def _free_ids(ids: Ints, used: Ints) -> Ints:
    """Return the ids with new numbers, above all others, for those that are used."""
    is_used = np.isin(ids, used)
    first = max(int(ids.max(initial=0)), int(used.max(initial=0))) + 1
    free = ids.copy()
    free[is_used] = first + np.arange(int(is_used.sum()))
    return free


def _warn_repeated_files(images: Sequence[ImageRecord], report: Report) -> None:
    seen: set[str] = set()
    for image in images:
        if image.file_name in seen:
            report.warn(
                "file name of images of several files: each has its own file's annotations only",
                image.file_name,
            )
        seen.add(image.file_name)


def _join_annotations(parts: Sequence[ValidAnnotations]) -> ValidAnnotations:
    names = [field.name for field in fields(ValidAnnotations)]
    return ValidAnnotations(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


def _join_columns(parts: Sequence[AnnotationColumns]) -> AnnotationColumns:
    names = {field.name for field in fields(AnnotationColumns)}
    flat = names - {"segmentations", "point_starts"}
    return AnnotationColumns(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in flat},
        segmentations=_join_segmentations([part.segmentations for part in parts]),
        point_starts=_join_starts([part.point_starts for part in parts]),
    )


def _join_segmentations(parts: Sequence[Segmentations]) -> Segmentations:
    clipped: dict[int, tuple[Floats, ...]] = {}
    first_row = 0
    for part in parts:
        clipped |= {first_row + row: polygons for row, polygons in part.clipped.items()}
        first_row += len(part.kinds)
    columns: dict[str, Any] = {}
    for name in (field.name for field in fields(Segmentations)):
        if name != "clipped":
            values = [getattr(part, name) for part in parts]
            is_starts = name.endswith("_starts")
            columns[name] = _join_starts(values) if is_starts else np.concatenate(values)
    return Segmentations(**columns, clipped=clipped)


def _join_starts(parts: Sequence[Ints]) -> Ints:
    """Join the starts of rows, i64 [rows + 1] each."""
    lengths = np.concatenate([np.diff(part) for part in parts])
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
