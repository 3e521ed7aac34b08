"""Decisions on the masks of a COCO JSON file, saved as they are made.

Writing the whole file at each click would be slow for several thousand images, so a decision goes into a journal beside the file (`NAME.journal`,
flushed to the disk), and the file itself is written again, whole or not at all, in the background: `delay` seconds after the first decision that
it lacks, when a page is opened, and at the end. A journal that a killed process left is read at the start. So no decision that was confirmed is
ever lost, and the file is true but for the last moments.

A decision is the annotation's own field "review": "accepted", "rejected", or "edited" for one whose mask was made anew (segmentation as
compressed RLE, bbox, area and mask_by with it). Annotations that have none of these are open. All other fields, and whatever else the file
holds, stay as they are; rejected annotations stay too, so that they can be taken back. Undo reaches back to when the file was opened.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from maskseg.annotation.review.journal import Journal
from maskseg.errors import UserError
from maskseg.files import parse_json, replacing
from maskseg.masks.base import Rle

DELAY = 2.0  # seconds
DECISIONS = ("accepted", "rejected", "edited")
OPEN = "open"

Annotation = dict[str, Any]


class Row(NamedTuple):
    """An annotation in the list; review: one of DECISIONS, or OPEN."""

    id: int
    image_id: int
    category_id: int
    review: str


class ReviewFile:
    """The annotations of a COCO JSON file under review. All methods may be called by several threads.

    source: the file; output: where the decisions go, `source` itself unless another one is named; one that is there already is gone on with.
    recovered: how many decisions a killed process had left in the journal. Raises UserError for a file that is no COCO data set, whose
    annotations have no ids of their own, or that another process reviews.
    """

    def __init__(self, source: Path, output: Path | None = None, delay: float = DELAY) -> None:
        self.path, self.delay = output or source, delay
        self._lock, self._folding = threading.RLock(), threading.Lock()
        self._timer: threading.Timer | None = None
        self._undo: list[tuple[int, str]] = []
        self.trouble = ""  # why the file could not be written of late
        self._load(self.path if self.path.exists() else source)
        if self.path != source and self.path.exists():
            self._compare(source)
        self._journal = Journal(self.path.with_name(f"{self.path.name}.journal"))
        try:
            self.recovered = self._replay()
            self.fold()
        except BaseException:
            self._journal.close()
            raise
        self.current = self.path if self.path.exists() else source  # the file to read masks from

    def _load(self, path: Path) -> None:
        tree = _read(path)
        self._keys = {key: json.dumps(value) for key, value in tree.items() if key != "annotations"}
        self._order = list(tree)
        self._texts = [json.dumps(annotation) for annotation in tree["annotations"]]
        self._rows = [_row(path, annotation) for annotation in tree["annotations"]]
        self._index = {row.id: index for index, row in enumerate(self._rows)}
        if len(self._index) < len(self._rows):
            raise UserError(f"{path}: several annotations have one id; give each its own")

    def _compare(self, source: Path) -> None:
        if sorted(_row(source, a).id for a in _read(source)["annotations"]) != sorted(self._index):
            raise UserError(
                f"{self.path}: it is there already, with other annotations than {source}; name another output"
            )

    def _replay(self) -> int:
        for entry in self._journal.entries:
            if entry["id"] not in self._index:
                raise UserError(
                    f"{self._journal.path}: annotation {entry['id']} is not in {self.path}; move the journal of another file away"
                )
            self._set(entry["id"], json.dumps(entry))
        return len(self._journal.entries)

    def rows(self) -> list[Row]:
        """All annotations, in the file's order."""
        with self._lock:
            return self._rows.copy()

    def annotation(self, number: int) -> Annotation:
        """The annotation as it is now. Raises KeyError for an id that is not there."""
        with self._lock:
            return dict(parse_json(self._texts[self._index[number]]))

    def decide(self, number: int, decision: Literal["accepted", "rejected"]) -> None:
        """Accepting an edited annotation leaves it edited. Raises KeyError; UserError where it cannot be saved, and nothing has changed then."""

        def change(annotation: Annotation) -> None:
            if (annotation.get("review"), decision) != ("edited", "accepted"):
                annotation["review"] = decision

        self._change(number, change)

    def redraw(self, number: int, mask: Rle, box: list[int], area: int, fallback: str = "") -> None:
        """A new mask; box: x, y, width, height of the mask, area: its pixels, fallback: why it is not GrabCut's. Raises as `decide` does."""
        made = {"technique": "review"} | ({"fallback": fallback} if fallback else {})
        self._change(
            number,
            lambda annotation: annotation.update(
                segmentation=mask, bbox=box, area=area, mask_by=made, review="edited"
            ),
        )

    def undo(self) -> int | None:
        """Takes the last decision back. -> the id of its annotation, which is exactly as it was before; None where there is none."""
        with self._lock:
            if not self._undo:
                return None
            number, text = self._undo[-1]
            self._save(number, text)
            self._undo.pop()
            return number

    def undoable(self) -> int:
        """How many decisions can be taken back."""
        return len(self._undo)

    def fold(self) -> None:
        """Writes the file, if it lacks a decision. Raises UserError where that fails; the decisions are still in the journal then."""
        with self._folding:
            with self._lock:
                length, texts = self._journal.length, self._texts.copy()
            if not length:
                return
            self._write(self.path, texts)
            with self._lock:
                self.trouble = ""
                if (
                    self._journal.length == length
                ):  # else it is needed still; reading it over the new file comes to the same
                    self._journal.clear()

    def export(self, path: Path) -> dict[str, int]:
        """Writes a copy without the rejected annotations. -> how many there are of each kind. Raises UserError."""
        with self._lock:
            reviews = [row.review for row in self._rows]
            texts = [
                text
                for text, review in zip(self._texts, reviews, strict=True)
                if review != "rejected"
            ]
        self._write(path, texts)
        return {kind: reviews.count(kind) for kind in (OPEN, *DECISIONS)}

    def close(self) -> None:
        """The file is true after it. Raises UserError where it cannot be written; the journal is then kept."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
        try:
            self.fold()
        finally:
            self._journal.close()

    def _change(self, number: int, change: Callable[[Annotation], None]) -> None:
        with self._lock:
            annotation = self.annotation(number)
            change(annotation)
            before, text = self._texts[self._index[number]], json.dumps(annotation)
            if text != before:
                self._save(number, text)
                self._undo.append((number, before))

    def _save(self, number: int, text: str) -> None:
        """The journal first: what is shown is what is saved."""
        self._journal.append(text)
        self._set(number, text)
        if not (self._timer and self._timer.is_alive()):
            self._timer = threading.Timer(self.delay, self._fold_late)
            self._timer.daemon = True
            self._timer.start()

    def _set(self, number: int, text: str) -> None:
        index = self._index[number]
        self._texts[index] = text
        self._rows[index] = _row(self.path, parse_json(text))

    def _fold_late(self) -> None:
        with self._lock:
            self._timer = None  # decisions from here on ask for another one
        try:
            self.fold()
        except UserError as error:
            self.trouble = str(error)

    def _write(self, path: Path, texts: list[str]) -> None:
        """One line for each annotation, the keys in the file's order."""
        annotations = "[\n" + ",\n".join(texts) + "\n]" if texts else "[]"
        values = (
            f"{json.dumps(key)}: {annotations if key == 'annotations' else self._keys[key]}"
            for key in self._order
        )
        with replacing(path, "the reviewed file") as file:
            file.write(("{" + ",\n".join(values) + "}\n").encode())


def review_of(annotation: Annotation) -> str:
    """One of DECISIONS, or OPEN."""
    review = annotation.get("review")
    return review if review in DECISIONS else OPEN


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON, the file is cut short or damaged ({error})") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(tree, dict) or not all(isinstance(tree.get(key), list) for key in lists):
        raise UserError(f"{path}: not a COCO data set, an object with the lists {', '.join(lists)}")
    return tree


def _row(path: Path, annotation: Any) -> Row:
    known = annotation if isinstance(annotation, dict) else {}
    number, image, category = (known.get(key) for key in ("id", "image_id", "category_id"))
    if not (type(number) is int and type(image) is int and type(category) is int):
        raise UserError(
            f"{path}: annotation {number} has no integer id, image_id and category_id; give each annotation its own id"
        )
    return Row(number, image, category, review_of(known))
