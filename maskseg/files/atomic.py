"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from maskseg.errors import UserError


@contextmanager
def replacing(path: Path, what: str) -> Iterator[IO[bytes]]:
    """A file to write to beside `path`; at the end it is flushed to the disk and renamed: a kill at any moment leaves the old one or the new one.

    what: named in the UserError that is raised where the disk is full or read-only; the old file is then intact. What killed processes
    left beside it is removed.
    """
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        remove_left(left)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        if "DataLoader worker" in str(
            error
        ):  # torch tells of a dead loader process wherever the main one happens to be
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: {what} could not be written ({reason}); an older one there is intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Values that are not finite raise ValueError: they are not JSON."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    with replacing(path, "the file") as file:
        file.write(text.encode())


def remove_left(temporary: Path) -> None:
    """A temporary file of `replacing` goes, unless the process that writes it still runs."""
    if not _alive(temporary):
        temporary.unlink(missing_ok=True)


def _alive(temporary: Path) -> bool:
    """Whether another process that still runs is writing it."""
    process = temporary.name.split(".")[-2]
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def _flush_folder(folder: Path) -> None:
    """The rename itself, where the system can flush a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
