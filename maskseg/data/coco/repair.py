"""Repair a COCO file: what can be mended is mended, what cannot is dropped, all is listed.

Fields that are not part of the format are kept. The result is judged by the same checks as any
file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from maskseg.data.coco.annotation_checks import (
    BOX_AS_CORNERS,
    BOX_IN_FRACTIONS,
    POLYGON_IN_FRACTIONS,
    ValidAnnotations,
)
from maskseg.data.coco.categories import parse_categories
from maskseg.data.coco.checks import CheckedDataset, check_dataset
from maskseg.data.coco.image_names import find_name, is_image_name, name_from_url, shorter_names
from maskseg.data.coco.packed_segmentations import NONE, POLYGONS
from maskseg.data.coco.parse import (
    AnnotationColumns,
    Crowds,
    ParsedCoco,
    as_int64,
    parse_tree,
    read_tree,
)
from maskseg.data.coco.report import Report
from maskseg.data.image_files import MAX_PIXELS, read_header, safe_join
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks

_Object = dict[str, Any]
_Key = int | str  # an id of the file, of any size or type that JSON has

# Warnings of the checks that are no changes of the file.
_NO_CHANGES = (
    "only crowds",
    "class with crowds only",
    "no annotations at all",
    "no images",
    "object without a mask, beside objects with masks",
    "annotation with ignore=1, read as a crowd",
    "image with category_ids beside annotations, which are not read",
    "image without annotations whose category_ids are read as crowds over the whole image",
    "file name of more than one image",
    "category names that differ only in case, spaces or Unicode form",
)
_DISAGREES = "bbox that contradicts its mask, replaced by the mask's box"


@dataclass(frozen=True)
class RepairOptions:
    """How a file is read.

    image_root: the folder of the images; check_images: read their headers, and drop images whose
    file is missing or does not fit; crowds: `objects` writes iscrowd=1 as 0.
    """

    image_root: Path
    check_images: bool = True
    max_pixels: int = MAX_PIXELS
    crowds: Crowds = "ignore"


def repair_coco(path: Path, options: RepairOptions) -> tuple[_Object, Report]:
    """Return the repaired content of a file, and the changes as the warnings of a report.

    Raises UserError for a file that is no COCO dataset, or of which nothing is left.
    """
    problems = Report(str(path))
    tree = read_tree(path, problems)
    if tree is None:
        raise UserError(problems.text())
    changes = Report(f"{path}, changes")
    categories, category_ids = _repair_categories(tree["categories"], changes)
    if not categories:
        categories, category_ids = _invent_categories(tree["annotations"], changes)
    images, image_ids = _ImageRepair(options, changes).repair(tree["images"])
    _repair_labels(images, category_ids, changes)
    crowds = options.crowds
    if all(_is_crowd(entry) for entry in tree["annotations"] if isinstance(entry, dict)):
        crowds = "objects"  # an exporter that marks every mask as a crowd
    repair = _AnnotationRepair(image_ids, category_ids, crowds, changes)
    annotations = repair.repair(tree["annotations"])
    repaired = {**tree, "images": images, "categories": categories, "annotations": annotations}
    repaired["annotations"] = _check_and_rewrite(repaired, options, changes)
    _check_result(repaired, options, changes)
    if not images or (tree["annotations"] and not repaired["annotations"]):
        raise UserError(
            f"{changes.text('change')}\nnothing is left to train on, so no file is written"
        )
    return repaired, changes


def without_nan(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return value


def _check_result(repaired: _Object, options: RepairOptions, changes: Report) -> None:
    """Raise UserError unless the repaired content has no errors."""
    report = Report("the repaired file")
    check_dataset(
        parse_tree(repaired, options.max_pixels, report), report, options.max_pixels, None
    )
    if report.errors:
        raise UserError(f"{changes.text('change')}\n{report.text()}")


def _id_key(value: object) -> _Key | None:
    """Return an id as it is compared: a whole number or a text; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return value


def _look_up(table: Mapping[_Key, int], value: object) -> int | None:
    """Return the new id of an id of the file; 7 and "7" are the same where only one exists."""
    key = _id_key(value)
    if key is None:
        return None
    if key in table:
        return table[key]
    if isinstance(key, int):
        return table.get(str(key))
    is_number = key.lstrip("-").isdecimal() and key.isascii()
    return table.get(int(key)) if is_number and len(key) <= 20 else None


def _free_ids(keys: Iterable[_Key | None]) -> count[int]:
    used = [key for key in keys if as_int64(key) is not None and isinstance(key, int)]
    return count(max([0, *used]) + 1)


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Categories


def _repair_categories(
    entries: list[object], changes: Report
) -> tuple[list[_Object], dict[_Key, int]]:
    """Return the repaired categories, and the new id of each id of the file."""
    objects = [dict(entry) for entry in entries if isinstance(entry, dict)]
    if len(objects) < len(entries):
        changes.warn("category that is no object, dropped", count=len(entries) - len(objects))
    free = _free_ids(_id_key(entry.get("id")) for entry in objects)
    table: dict[_Key, int] = {}
    repaired: dict[str, _Object] = {}
    for entry in objects:
        key = _id_key(entry.get("id"))
        category_id = as_int64(key)
        if category_id is None or key in table:
            category_id = next(free)
            changes.warn("category renumbered", f"{entry.get('id')!r:.40} to {category_id}")
        _repair_name(entry, category_id, changes)
        _repair_keypoints(entry, category_id, changes)
        twin = repaired.get(entry["name"])
        if twin is not None and _can_merge(twin, entry):
            changes.warn(
                "categories of one name merged", f"{entry['name']!r}: {category_id} is {twin['id']}"
            )
            category_id = twin["id"]
        else:
            if twin is not None:
                entry["name"] = f"{entry['name']} {category_id}"
                changes.warn("category of a name that is used with other keypoints, renamed")
            repaired[entry["name"]] = {**entry, "id": category_id}
        if key is not None:
            table.setdefault(key, category_id)
    return list(repaired.values()), table


def _can_merge(first: _Object, second: _Object) -> bool:
    """Whether two categories of one name are one class; the first gets missing keypoints."""
    if second.get("keypoints") and not first.get("keypoints"):
        first["keypoints"] = second["keypoints"]
        first["skeleton"] = second.get("skeleton", [])
    return not second.get("keypoints") or first["keypoints"] == second["keypoints"]


def _repair_name(entry: _Object, category_id: int, changes: Report) -> None:
    stated = entry.get("name")
    name = "" if stated is None else _replace_surrogates(str(stated)).strip()
    entry["name"] = name or f"class_{category_id}"
    if entry["name"] != stated:
        changes.warn("category name mended", f"id {category_id}: {stated!r:.40}, {entry['name']!r}")


def _repair_keypoints(entry: _Object, category_id: int, changes: Report) -> None:
    """Remove keypoints and a skeleton that cannot be read; count the skeleton from 1."""
    for removed in ((), ("skeleton",), ("keypoints", "skeleton")):
        candidate = {k: v for k, v in entry.items() if k not in removed} | {"id": category_id}
        report = Report("")
        parsed = parse_categories([candidate], report)
        if report.errors:
            continue
        for key in removed:
            if entry.pop(key, None):
                changes.warn(f"{key} of a category that cannot be read, removed", entry["name"])
        if report.warnings:
            entry["skeleton"] = [[start + 1, end + 1] for start, end in parsed.skeletons[0]]
            changes.warn("skeleton counted from 1", entry["name"])
        return


def _invent_categories(
    annotations: list[object], changes: Report
) -> tuple[list[_Object], dict[_Key, int]]:
    """Return categories for the ids that annotations name, of a file without any category."""
    keys = [_id_key(a.get("category_id")) for a in annotations if isinstance(a, dict)]
    distinct = sorted({key for key in keys if key is not None}, key=str)
    free = _free_ids(distinct)
    table = {}
    for key in distinct:
        number = as_int64(key)
        table[key] = next(free) if number is None else number
    names = [f"class_{_replace_surrogates(str(key))}" for key in distinct]
    if names:
        changes.warn("category added", *names)
    pairs = zip(names, table.values(), strict=True)
    return [{"id": number, "name": name} for name, number in pairs], table


# Images


class _ImageRepair:
    """Repairs the images of a file."""

    def __init__(self, options: RepairOptions, changes: Report) -> None:
        self.options = options
        self.changes = changes

    def repair(self, entries: list[object]) -> tuple[list[_Object], dict[_Key, int]]:
        """Return the repaired images, and the new id of each id of the file."""
        objects = [dict(entry) for entry in entries if isinstance(entry, dict)]
        if len(objects) < len(entries):
            self._drop("no object", count=len(entries) - len(objects))
        names = _names_by_id(objects)
        free = _free_ids(names)
        table: dict[_Key, int] = {}
        repaired = []
        for entry in objects:
            key = _id_key(entry.get("id"))
            if key is None:
                self._drop("without an id", str(entry.get("file_name")))
            elif len(names[key]) > 1:
                self._drop("whose id names several files", f"id {key!r:.40}")
            elif key in table:
                self._drop("that is listed twice", f"id {key!r:.40}")
            elif self._repair_image(entry, f"image {key!s:.40}"):
                number = as_int64(key)
                table[key] = next(free) if number is None else number
                if table[key] != entry["id"]:
                    self.changes.warn("image renumbered", f"{entry['id']!r:.40} to {table[key]}")
                repaired.append({**entry, "id": table[key]})
        return repaired, table

    def _drop(self, reason: str, *examples: str, count: int | None = None) -> None:
        kind = f"image {reason}, dropped with its annotations"
        self.changes.warn(kind, *examples, count=count)

    def _repair_image(self, entry: _Object, title: str) -> bool:
        """Mend the name and the size of an image. Returns whether it can be used."""
        root = self.options.image_root
        stated = entry.get("file_name")
        from_url = None if stated else name_from_url(entry.get("coco_url"))
        name = stated or from_url
        if not isinstance(name, str):
            self._drop("without a file_name", title)
            return False
        match = find_name(root, name, from_url is not None)
        if match is not None:
            name = match[0]
        elif not is_image_name(root, name):
            # An absolute name, or one with folders that the image folder does not have.
            name = next((n for n in shorter_names(name) if is_image_name(root, n)), name)
        entry["file_name"] = name
        if name != stated:
            self.changes.warn("file name mended", f"{title}: {stated!r:.60} to {name!r}")
        return self._repair_size(entry, name, title)

    def _repair_size(self, entry: _Object, name: str, title: str) -> bool:
        height = as_int64(entry.get("height")) or 0
        width = as_int64(entry.get("width")) or 0
        is_valid = min(height, width) > 0 and height * width <= self.options.max_pixels
        if is_valid and not self.options.check_images:
            return True
        try:
            path = safe_join(self.options.image_root, name)
            header = read_header(path, self.options.max_pixels)
        except UserError as error:
            self._drop("whose file cannot be used", f"{title}: {error}")
            return False
        actual = (header.height, header.width)
        if is_valid and self._has_size(path, height, width):
            return True
        if is_valid and (width, height) != actual:
            self._drop(
                "whose file has another size", f"{title}: {height} x {width}, the file {actual}"
            )
            return False
        entry["height"], entry["width"] = actual
        self.changes.warn("image size taken from the file", f"{title}: {actual}")
        return True

    def _has_size(self, path: Path, height: int, width: int) -> bool:
        try:  # with or without its EXIF orientation
            read_header(path, self.options.max_pixels, (height, width))
        except UserError:
            return False
        return True


def _repair_labels(
    images: Iterable[_Object], category_ids: Mapping[_Key, int], changes: Report
) -> None:
    """Renumber the categories that images name as labels; drop those that do not exist."""
    for image in images:
        stated = image.get("category_ids")
        if not stated:
            continue
        values = stated if isinstance(stated, list) else []
        labels = [_look_up(category_ids, value) for value in values]
        image["category_ids"] = [label for label in labels if label is not None]
        if image["category_ids"] != stated:
            changes.warn("category_ids of an image mended", f"image {image['id']}")


def _names_by_id(objects: Iterable[_Object]) -> dict[_Key, set[str]]:
    """Return the file names that are listed with each id."""
    names: dict[_Key, set[str]] = {}
    for entry in objects:
        key = _id_key(entry.get("id"))
        if key is not None:
            names.setdefault(key, set()).add(str(entry.get("file_name")))
    return names


# Annotations


class _AnnotationRepair:
    """Mends the fields of annotations one by one, so that they can be read."""

    def __init__(
        self,
        image_ids: Mapping[_Key, int],
        category_ids: Mapping[_Key, int],
        crowds: Crowds,
        changes: Report,
    ) -> None:
        self.image_ids = image_ids
        self.category_ids = category_ids
        self.crowds = crowds
        self.changes = changes

    def repair(self, entries: list[object]) -> list[_Object]:
        """Return the annotations that may be usable, with mended fields and distinct ids."""
        repaired = []
        for entry in entries:
            if not isinstance(entry, dict):
                self.changes.warn("annotation that is no object, dropped", f"{entry!r:.40}")
                continue
            title = f"annotation {entry.get('id')!s:.40}"
            image_id = _look_up(self.image_ids, entry.get("image_id"))
            category_id = _look_up(self.category_ids, entry.get("category_id"))
            if image_id is None:
                self.changes.warn("annotation without an image, dropped", title)
            elif category_id is None:
                self.changes.warn("annotation without a category, dropped", title)
            else:
                annotation = {**entry, "image_id": image_id, "category_id": category_id}
                self._repair_fields(annotation, title)
                repaired.append(annotation)
        self._number(repaired)
        return repaired

    def _repair_fields(self, annotation: _Object, title: str) -> None:
        annotation["segmentation"] = self._segmentation(annotation.get("segmentation"), title)
        if not _is_box(annotation.get("bbox")) and annotation.pop("bbox", None):
            self.changes.warn("bbox that is not four numbers, removed", title)
        points = annotation.get("keypoints")
        if points and not _are_keypoints(points):
            del annotation["keypoints"]
            annotation.pop("num_keypoints", None)
            self.changes.warn("keypoints that cannot be read, removed", title)
        stated = annotation.get("iscrowd") or 0
        annotation["iscrowd"] = int(_is_crowd(annotation) and self.crowds == "ignore")
        if annotation["iscrowd"] != stated:
            self.changes.warn("iscrowd set", f"{title}: {stated!r:.40} to {annotation['iscrowd']}")

    def _segmentation(self, stated: object, title: str) -> object:
        """Return the polygons or the RLE; polygons in other arrangements are rearranged."""
        if not isinstance(stated, list):
            return stated if isinstance(stated, dict) else []
        parts = _polygon_list(stated)
        if parts is not stated:
            self.changes.warn("polygon put into a list of polygons", title)
        kept = [part for part in parts if _is_polygon(part)]
        if len(kept) < len(parts) and any(parts):
            self.changes.warn("polygon that cannot be read, removed", title)
        return kept

    def _number(self, annotations: list[_Object]) -> None:
        keys = [_id_key(annotation.get("id")) for annotation in annotations]
        free = _free_ids(keys)
        seen: Counter[_Key | None] = Counter()
        for annotation, key in zip(annotations, keys, strict=True):
            seen[key] += 1
            if as_int64(key) is None or key == 0 or seen[key] > 1:
                annotation["id"] = next(free)
                self.changes.warn("annotation renumbered", f"{key!r:.40} to {annotation['id']}")


def _is_crowd(annotation: Mapping[str, Any]) -> bool:
    return str(annotation.get("iscrowd")).strip().lower() in ("1", "1.0", "true")


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and math.isfinite(value)  # type: ignore[arg-type]


def _polygon_list(stated: list[object]) -> list[object]:
    """Return a list of polygons of a flat list of numbers or a list of points, or the list."""
    if stated and all(map(_is_number, stated)):
        return [stated]
    if len(stated) >= 3 and all(map(_is_point, stated)):
        return [np.array(stated).ravel().tolist()]
    return stated


def _is_point(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_polygon(part: object) -> bool:
    """Whether a part has points; those with fewer than three are dropped by the checks."""
    return (
        isinstance(part, list) and len(part) % 2 == 0 and all(map(_is_number, part)) and part != []
    )


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _are_keypoints(points: object) -> bool:
    if not isinstance(points, list) or len(points) % 3 or not all(map(_is_number, points)):
        return False
    return all(visibility in (0, 1, 2) for visibility in points[2::3])


def _check_and_rewrite(repaired: _Object, options: RepairOptions, changes: Report) -> list[_Object]:
    """Check the mended content; return the annotations that are valid, as they are read."""
    converted: set[str] = set()
    while True:
        report = Report("")
        parsed = parse_tree(repaired, options.max_pixels, report)
        checked = check_dataset(parsed, report, options.max_pixels, None)
        kind = _kind_of_units(report, converted)
        if kind is None:
            break
        converted.add(kind)
        _convert_units(repaired, kind, report, changes)
    for kind, finding in report.errors.items():
        changes.warn(f"{kind}: annotation dropped", *finding.examples, count=finding.count)
    for kind, finding in report.warnings.items():
        if kind not in _NO_CHANGES and "as stated" not in kind and kind != BOX_IN_FRACTIONS:
            changes.warn(kind, *finding.examples, count=finding.count)
    return _Rewriter(repaired, parsed, checked, changes).rewrite()


def _kind_of_units(report: Report, converted: Set[str]) -> str | None:
    """Return the kind of units other than pixels and sizes that all annotations have."""
    found = {*report.errors, *report.warnings} - converted
    return next((kind for kind in _CONVERSIONS if kind in found), None)


def _convert_units(repaired: _Object, kind: str, report: Report, changes: Report) -> None:
    """Convert fractions of the image's size to pixels, or corners to sizes."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in repaired["images"]}
    for annotation in repaired["annotations"]:
        _CONVERSIONS[kind](annotation, *sizes[annotation["image_id"]])
    finding = {**report.warnings, **report.errors}[kind]
    name = kind.partition(";")[0]
    changes.warn(f"{name}, converted", *finding.examples, count=finding.count)


def _scale_polygons(annotation: _Object, width: int, height: int) -> None:
    if isinstance(annotation["segmentation"], list):
        annotation["segmentation"] = [
            (np.reshape(part, (-1, 2)) * (width, height)).ravel().tolist()
            for part in annotation["segmentation"]
        ]


def _scale_box(annotation: _Object, width: int, height: int) -> None:
    box = annotation.get("bbox")
    if box and max(box) <= 1:
        annotation["bbox"] = [v * side for v, side in zip(box, (width, height) * 2, strict=True)]


def _subtract_corners(annotation: _Object, _width: int, _height: int) -> None:
    box = annotation.get("bbox")
    if box and not annotation["segmentation"]:
        annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]


_CONVERSIONS: dict[str, Callable[[_Object, int, int], None]] = {
    POLYGON_IN_FRACTIONS: _scale_polygons,
    BOX_IN_FRACTIONS: _scale_box,
    BOX_AS_CORNERS: _subtract_corners,
}


class _Rewriter:
    """Writes the values that reading yields into the annotations of the file."""

    def __init__(
        self, repaired: _Object, parsed: ParsedCoco, checked: CheckedDataset, changes: Report
    ) -> None:
        self.entries: list[_Object] = repaired["annotations"]
        self.columns: AnnotationColumns = parsed.columns
        self.checked = checked
        self.changes = changes

    def rewrite(self) -> list[_Object]:
        """Return the valid annotations in the file's order."""
        valid: ValidAnnotations = self.checked.annotations
        places = self.columns.list_index[valid.rows]
        bare = self._objects_without_masks(valid)
        written = {}
        for position, place in enumerate(places.tolist()):
            if place >= 0:  # not a crowd that stands for a label
                written[place] = self._annotation(valid, position, self.entries[place])
                if bare[position]:
                    written[place]["iscrowd"] = 1
                    self.changes.warn(
                        "object without a mask, beside objects with masks: marked as a crowd",
                        f"annotation {valid.ids[position]}",
                    )
        return [written[place] for place in sorted(written)]

    def _objects_without_masks(self, valid: ValidAnnotations) -> list[bool]:
        """Which objects have no mask although most objects have one."""
        has_none = self.columns.segmentations.kinds[valid.rows] == NONE
        is_object = ~valid.crowd
        most_have_masks = (is_object & ~has_none).sum() > (is_object & has_none).sum()
        return [bool(flag) for flag in is_object & has_none & most_have_masks]

    def _annotation(self, valid: ValidAnnotations, position: int, entry: _Object) -> _Object:
        row = int(valid.rows[position])
        annotation = {**entry, "id": int(valid.ids[position])}
        box = valid.boxes[position].tolist()
        if valid.disagrees[position]:
            x0, y0, x1, y1 = valid.mask_boxes[position].tolist()
            box = [x0, y0, x1 - x0, y1 - y0]
            self.changes.warn(
                _DISAGREES, f"annotation {annotation['id']}: {entry['bbox']} to {box}"
            )
        if annotation.get("bbox") != box:
            annotation["bbox"] = box
        self._write_mask(annotation, row)
        if not np.isfinite(valid.areas[position]) or annotation != entry:
            annotation["area"] = self._area(valid, position, row, box)
        if not valid.has_points[position] and annotation.get("keypoints"):
            del annotation["keypoints"]
            annotation.pop("num_keypoints", None)
        return annotation

    def _write_mask(self, annotation: _Object, row: int) -> None:
        """Replace polygons that were clipped or partly dropped."""
        packed = self.columns.segmentations
        if packed.kinds[row] != POLYGONS:
            return
        polygons = packed.to_coco(row)
        if row in packed.clipped or len(polygons) < len(annotation["segmentation"]):
            annotation["segmentation"] = polygons

    def _area(self, valid: ValidAnnotations, position: int, row: int, box: list[float]) -> float:
        shape = self.columns.segmentations.shape(row)
        if shape is None:
            return box[2] * box[3]
        image = self.checked.images[int(valid.image_index[position])]
        return float(AnnotatedMasks.from_file([shape], image.height, image.width).area()[0])
