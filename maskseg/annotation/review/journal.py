"""A journal of annotations beside a file: each line is flushed to the disk before it counts, and is read again after a kill."""

from __future__ import annotations

import errno
import os
import sys
from io import FileIO
from pathlib import Path
from typing import Any

from maskseg.errors import UserError
from maskseg.files import parse_json

if sys.platform != "win32":
    import fcntl


class Journal:
    """Annotations in the order in which they changed, whole, as one line of JSON each. Of several with one id the last one counts, so that a line
    may be read twice.

    A last line without its end was being written when the process was killed: nobody was told that it is saved, and it is dropped.
    entries: the lines that were there. Opened by one process at a time. Raises UserError for a journal that another one has open, that is
    damaged, or that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        try:
            text = path.read_bytes()
            self.length = text.rfind(b"\n") + 1
            self.entries = [
                self._entry(line, n)
                for n, line in enumerate(text[: self.length].splitlines(), start=1)
            ]
            if self.length < len(text):
                self._file.truncate(self.length)
        except (OSError, UserError):
            self._file.close()
            raise

    def _entry(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = parse_json(line)
            if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                return entry
        except ValueError:
            pass
        raise UserError(
            f"{self.path}: line {number} is damaged; mend it, or move the file away to go on without the decisions in it"
        )

    def append(self, text: str) -> None:
        """One annotation as JSON without line breaks; on the disk when this returns. Raises UserError where it cannot be written; the journal is then
        as it was."""
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
        """After what it holds is in the file itself."""
        self._file.truncate(0)
        os.fsync(self._file.fileno())
        self.length = 0

    def close(self) -> None:
        """An empty one is removed."""
        if not self._file.closed:
            if not self.length:
                self.path.unlink(missing_ok=True)
            self._file.close()


def _opened(path: Path) -> FileIO:
    """The file, to append to, locked until it is closed or the process ends."""
    while True:
        try:
            file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); decisions are kept there until they are in the file itself"
            ) from error
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(
                os.fstat(file.fileno()), path.stat()
            ):  # not one that its owner has just removed
                return file
        except OSError as error:
            file.close()
            raise UserError(
                f"{path}: in use, the file is being reviewed by another process; end that one first"
            ) from error
        file.close()
