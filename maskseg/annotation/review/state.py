"""Decisions on the masks of a COCO JSON file, saved as they are made.

Rewriting the whole file for each decision would be slow for several thousand images. A decision is
therefore appended to a journal next to the file (`NAME.journal`, flushed to disk). The file itself
is rewritten atomically in the background: `delay` seconds after the first decision it lacks, when a
page is opened, and at the end. The journal of a killed process is read at the start. No confirmed
decision is lost, and the file lags behind by a few seconds at most.

A decision is the field "review" of an annotation: "accepted", "rejected", "edited" for a new mask
(with segmentation as compressed RLE, bbox, area and mask_by) or another class, or "added" for an
annotation that the file did not have. Annotations without one of these are unreviewed. All other
fields, and everything else in the file, are unchanged. Rejected annotations stay in the file, so
that the decision can be revised; an added one is removed instead, unless it comes from a source
other than the file itself. Undo reaches back to the opening of the file.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from maskseg.annotation.review.journal import Annotation, Journal
from maskseg.errors import UserError
from maskseg.files import parse_json, replacing
from maskseg.masks.base import Rle

DELAY = 2.0  # seconds
DECISIONS = ("accepted", "rejected", "edited", "added")
UNREVIEWED = "unreviewed"
_REMOVED = "removed"  # in the journal only: an added annotation that is no longer there
_KEPT = ("edited", "added")  # decisions that say more than "accepted"


class Row(NamedTuple):
    """An annotation in the list; review: one of DECISIONS, or UNREVIEWED."""

    id: int
    image_id: int
    category_id: int
    review: str


class NewMask(NamedTuple):
    """A mask that replaces that of an annotation, or of a new one.

    box: x, y, width, height of the mask; area: number of its pixels; fallback_reason: why it is not
    the result of GrabCut, "" if it is.
    """

    rle: Rle
    box: list[int]
    area: int
    fallback_reason: str = ""


class ReviewFile:
    """The annotations of a COCO JSON file under review. All methods are thread-safe.

    source: the file; output: the file for the decisions, by default `source` itself; an existing
    output is continued, if it has the annotations of the source and others that were added;
    symbolic links are followed; delay: seconds until the file is rewritten.
    recovered: number of decisions that a killed process had left in the journal.
    current: the file to read masks from.
    write_error: why the last background write failed, else "".

    Raises UserError for a file that is not a COCO data set, has duplicate or missing annotation
    ids, or is being reviewed by another process.
    """

    def __init__(self, source: Path, output: Path | None = None, delay: float = DELAY) -> None:
        # A link stays a link: the file that it leads to is written, and only one process at a time
        # can review that file, by whichever name.
        source = _real_path(source)
        self.path = _real_path(output) if output else source
        self.delay = delay
        self.write_error = ""
        self._lock = threading.RLock()
        self._merging = threading.Lock()
        self._timer: threading.Timer | None = None
        self._undo: list[tuple[int, str | None]] = []  # id and text before; None: it was not there
        self._load(self.path if self.path.exists() else source)
        self._source_ids = self._find_source_ids(source)
        self._journal = Journal(self.path.with_name(f"{self.path.name}.journal"))
        try:
            self.recovered = self._replay()
            self.merge_journal()
        except BaseException:
            self._journal.close()
            raise
        self.current = self.path if self.path.exists() else source

    def _load(self, path: Path) -> None:
        tree, annotations = _read_tree(path)
        self._order = list(tree)
        self._keys = {key: json.dumps(value) for key, value in tree.items() if key != "annotations"}
        self._image_ids = _ids(tree["images"])
        self._category_ids = _ids(tree["categories"])
        rows = [_row(path, annotation) for annotation in annotations]
        self._index = {row.id: index for index, row in enumerate(rows)}
        if len(self._index) < len(rows):
            raise UserError(f"{path}: annotation ids are not unique; give each annotation its own")
        self._rows: list[Row | None] = [*rows]  # None: removed
        self._texts: list[str | None] = [json.dumps(annotation) for annotation in annotations]
        self._next_id = max(self._index, default=0) + 1
        self._removed: set[int] = set()

    def _find_source_ids(self, source: Path) -> frozenset[int]:
        """The ids of the annotations that are never removed: those of a separate source.

        Raises UserError if the output is not a review of the source.
        """
        if self.path == source:
            return frozenset()
        if not self.path.exists():
            return frozenset(self._index)
        _, annotations = _read_tree(source)
        source_rows = [_row(source, annotation) for annotation in annotations]
        source_ids = frozenset(row.id for row in source_rows)
        rows = {row.id: row for row in self.rows()}
        additions = [row for row in rows.values() if row.id not in source_ids]
        is_review = all(_is_same(row, rows.get(row.id)) for row in source_rows)
        if not is_review or any(row.review != "added" for row in additions):
            raise UserError(
                f"{self.path}: already exists, with other annotations than {source}; "
                "name another output"
            )
        return source_ids

    def _replay(self) -> int:
        """Apply the decisions in the journal. Returns their number."""
        for entry in self._journal.entries:
            review = entry.get("review")
            if entry["id"] not in self._index and review not in ("added", _REMOVED):
                raise UserError(
                    f"{self._journal.path}: annotation {entry['id']} is not in {self.path}; "
                    "this is the journal of another file: move it away"
                )
            self._set(entry["id"], None if review == _REMOVED else json.dumps(entry))
        return len(self._journal.entries)

    def rows(self) -> list[Row]:
        """All annotations, in the order of the file; added ones are last."""
        with self._lock:
            return [row for row in self._rows if row is not None]

    def annotation(self, number: int) -> Annotation:
        """The current state of an annotation, by id. Raises KeyError for an unknown id."""
        with self._lock:
            text = self._texts[self._index[number]]
            assert text is not None
            annotation: Annotation = parse_json(text)
            return annotation

    def decide(self, number: int, decision: Literal["accepted", "rejected"]) -> bool:
        """Accept or reject an annotation; accepting an edited or added one leaves it so.

        A rejected annotation stays; an added one is removed, unless it comes from a separate
        source. Returns whether it is still there. Raises KeyError for an unknown id; UserError
        if the decision cannot be saved, in which case nothing changes.
        """

        def change(annotation: Annotation) -> None:
            if decision == "rejected" or annotation.get("review") not in _KEPT:
                annotation["review"] = decision

        with self._lock:
            if decision == "rejected" and self.is_removable(number):
                self._change_text(number, None)
                return False
            self._change(number, change)
            return True

    def replace_mask(self, number: int, mask: NewMask) -> None:
        """Replace the mask of an annotation. Raises like `decide`."""

        def change(annotation: Annotation) -> None:
            _set_mask(annotation, mask)
            if annotation.get("review") != "added":
                annotation["review"] = "edited"

        self._change(number, change)

    def set_category(self, number: int, category_id: int) -> None:
        """Change the class of an annotation. Raises like `decide`."""
        self._check_id(category_id, self._category_ids)

        def change(annotation: Annotation) -> None:
            if annotation["category_id"] != category_id:
                annotation["category_id"] = category_id
                if annotation.get("review") != "added":
                    annotation["review"] = "edited"

        self._change(number, change)

    def add(self, image_id: int, category_id: int, mask: NewMask) -> int:
        """Add an annotation. Returns its id. Raises like `decide`."""
        self._check_id(image_id, self._image_ids)
        self._check_id(category_id, self._category_ids)
        with self._lock:
            number = self._next_id
            annotation: Annotation = {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "iscrowd": 0,
            }
            _set_mask(annotation, mask)
            annotation["review"] = "added"
            self._change_text(number, json.dumps(annotation))
            return number

    def _check_id(self, number: int, known: frozenset[int]) -> None:
        if number not in known:
            raise KeyError(number)

    def undo(self) -> int | None:
        """Undo the last decision. Returns the id of its annotation, None if there is nothing.

        The annotation is gone afterwards if the decision was to add it.
        """
        with self._lock:
            if not self._undo:
                return None
            number, text = self._undo[-1]
            self._save(number, text)
            self._undo.pop()
            return number

    def is_removable(self, number: int) -> bool:
        """Whether rejecting an annotation removes it. Raises KeyError for an unknown id."""
        if number in self._source_ids:
            return False
        return self.annotation(number).get("review") == "added"

    def is_removed(self, number: int) -> bool:
        """Whether an added annotation was removed again."""
        return number in self._removed

    def undoable(self) -> int:
        """Number of decisions that can be undone."""
        return len(self._undo)

    def merge_journal(self) -> None:
        """Write the file if decisions are missing in it, and empty the journal.

        Raises UserError if that fails; the decisions are still in the journal then.
        """
        with self._merging:
            with self._lock:
                length = self._journal.length
                texts = [text for text in self._texts if text is not None]
            if not length:
                return
            self._write(self.path, texts)
            with self._lock:
                self.write_error = ""
                # A decision that arrived during the write is only in the journal. Replaying the
                # journal on top of the new file is harmless, so it is kept as a whole.
                if self._journal.length == length:
                    self._journal.clear()

    def export(self, path: Path) -> dict[str, int]:
        """Write a copy without the rejected annotations. Returns the number of each kind.

        Raises UserError.
        """
        texts = []
        counts = dict.fromkeys((UNREVIEWED, *DECISIONS), 0)
        with self._lock:
            for text, row in zip(self._texts, self._rows, strict=True):
                if text is None or row is None:
                    continue
                counts[row.review] += 1
                if row.review != "rejected":
                    texts.append(text)
        self._write(path, texts)
        return counts

    def close(self) -> None:
        """Write the file and close it.

        Raises UserError if it cannot be written; the journal is kept then.
        """
        with self._lock:
            if self._timer:
                self._timer.cancel()
        try:
            self.merge_journal()
        finally:
            self._journal.close()

    def _change(self, number: int, change: Callable[[Annotation], None]) -> None:
        """Apply and save a change that can be undone; no effect if it changes nothing."""
        with self._lock:
            annotation = self.annotation(number)
            change(annotation)
            self._change_text(number, json.dumps(annotation))

    def _change_text(self, number: int, text: str | None) -> None:
        index = self._index.get(number)
        before = None if index is None else self._texts[index]
        if text != before:
            self._save(number, text)
            self._undo.append((number, before))

    def _save(self, number: int, text: str | None) -> None:
        """Save an annotation; the journal first, so that no unsaved state is ever visible.

        text: None removes it.
        """
        self._journal.append(text or json.dumps({"id": number, "review": _REMOVED}))
        self._set(number, text)
        if not (self._timer and self._timer.is_alive()):
            self._timer = threading.Timer(self.delay, self._merge_in_background)
            self._timer.daemon = True
            self._timer.start()

    def _set(self, number: int, text: str | None) -> None:
        row = None if text is None else _row(self.path, parse_json(text))
        index = self._index.get(number)
        if index is not None:
            self._texts[index] = text
            self._rows[index] = row
            if row is None:
                del self._index[number]
                self._removed.add(number)
        elif row is not None:
            self._removed.discard(number)
            self._index[number] = len(self._rows)
            self._texts.append(text)
            self._rows.append(row)
            self._next_id = max(self._next_id, number + 1)

    def _merge_in_background(self) -> None:
        with self._lock:
            self._timer = None  # decisions from now on need another write
        try:
            self.merge_journal()
        except UserError as error:
            self.write_error = str(error)

    def _write(self, path: Path, texts: list[str]) -> None:
        """Write a file with one line per annotation and the keys in their original order."""
        annotations = "[\n" + ",\n".join(texts) + "\n]" if texts else "[]"
        values = []
        for key in self._order:
            value = annotations if key == "annotations" else self._keys[key]
            values.append(f"{json.dumps(key)}: {value}")
        with replacing(path, "the reviewed file") as file:
            file.write(("{" + ",\n".join(values) + "}\n").encode())


def review_of(annotation: Mapping[str, object]) -> str:
    """The decision on an annotation: one of DECISIONS, or UNREVIEWED."""
    review = annotation.get("review")
    return str(review) if review in DECISIONS else UNREVIEWED


def _is_same(source_row: Row, row: Row | None) -> bool:
    """Whether an annotation of the output, None if absent, is that of the source with its id."""
    if row is None or row.image_id != source_row.image_id:
        return False
    return row.review != "added" or source_row.review == "added"


def _set_mask(annotation: Annotation, mask: NewMask) -> None:
    annotation["segmentation"] = mask.rle
    annotation["bbox"] = mask.box
    annotation["area"] = mask.area
    mask_by = {"technique": "review"}
    if mask.fallback_reason:
        mask_by["fallback"] = mask.fallback_reason
    annotation["mask_by"] = mask_by


def _ids(records: object) -> frozenset[int]:
    """The integer ids of a list of records."""
    assert isinstance(records, list)
    ids = [record.get("id") for record in records if isinstance(record, dict)]
    return frozenset(number for number in ids if type(number) is int)


def _real_path(path: Path) -> Path:
    """Return the path without symbolic links. Raises UserError for links that form a loop."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _read_tree(path: Path) -> tuple[dict[str, object], list[object]]:
    """Read a COCO data set: all its fields, and its list of annotations. Raises UserError."""
    try:
        tree = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: invalid JSON, the file is truncated or damaged ({error})"
        ) from error
    lists = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in lists):
        raise UserError(f"{path}: not a COCO data set, an object with the lists {', '.join(lists)}")
    return tree, tree["annotations"]


def _row(path: Path, annotation: object) -> Row:
    """The row of an annotation. Raises UserError for ids that are not integers."""
    fields = annotation if isinstance(annotation, dict) else {}
    number = fields.get("id")
    image_id = fields.get("image_id")
    category_id = fields.get("category_id")
    if not (type(number) is int and type(image_id) is int and type(category_id) is int):
        raise UserError(
            f"{path}: annotation {number} has no integer id, image_id and category_id; "
            "give each annotation its own id"
        )
    return Row(number, image_id, category_id, review_of(fields))
