"""A journal of changed annotations next to a file.

Each line is flushed to disk before the change is confirmed, and is read again after a crash.
"""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path
from typing import Required, TypedDict

from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.files.locks import open_locked


class Annotation(TypedDict, total=False):
    """An annotation of a COCO file; it may have further fields, which are unchanged."""

    id: Required[int]
    image_id: Required[int]
    category_id: Required[int]
    iscrowd: int
    segmentation: object
    bbox: object
    area: object
    mask_by: object
    review: str


class Journal:
    """Complete annotations in the order of their changes, one line of JSON each.

    The last line of an annotation counts, so reading a line twice is harmless. An incomplete last
    line was being written when the process was killed; its change was never confirmed, and it is
    dropped.

    entries: the lines found at the start. One process at a time can open a journal. Raises
    UserError for a journal that another process has open, that is damaged, or that cannot be
    written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        try:
            text = path.read_bytes()
            self.length = text.rfind(b"\n") + 1
            self.entries: list[Annotation] = []
            for number, line in enumerate(text[: self.length].splitlines(), start=1):
                self.entries.append(self._parse_entry(line, number))
            if self.length < len(text):
                self._file.truncate(self.length)
        except (OSError, UserError):
            self._file.close()
            raise

    def _parse_entry(self, line: bytes, number: int) -> Annotation:
        try:
            entry: Annotation = parse_json(line)
            if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                return entry
        except ValueError:
            pass
        raise UserError(
            f"{self.path}: line {number} is damaged; repair it, or move the file away to continue "
            "without its decisions"
        )

    def append(self, text: str) -> None:
        """Append an annotation, JSON without line breaks; it is on disk when this returns.

        Raises UserError if it cannot be written; the journal is then unchanged.
        """
        line = text.encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self.length)
            raise UserError(
                f"{self.path}: the decision could not be saved ({error.strerror})"
            ) from error
        self.length += len(line)

    def clear(self) -> None:
        """Empty the journal, once its content is in the file itself."""
        self._file.truncate(0)
        os.fsync(self._file.fileno())
        self.length = 0

    def close(self) -> None:
        """Close the journal; an empty one is removed."""
        if not self._file.closed:
            if not self.length:
                self.path.unlink(missing_ok=True)
            self._file.close()


def _open(path: Path) -> FileIO:
    """Open a file for appending, locked until it is closed or the process ends."""
    in_use = (
        f"{path}: in use, the file is being reviewed by another process; stop that process first"
    )
    try:
        return open_locked(path, in_use)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); decisions are kept there until they "
            "are in the file itself"
        ) from error
