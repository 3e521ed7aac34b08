"""Atomic writing of files."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from maskseg.errors import UserError, describe_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Writer(BufferedWriter):
    """A file that keeps the first error of the system.

    torch.save replaces it by an error that does not name the reason.
    """

    error: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write `data`. Raises OSError."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


# Of the Windows API.
_SYNCHRONIZE = 0x100000
_ACCESS_DENIED = 5
_WAIT_TIMEOUT = 258


@contextmanager
def replacing(path: Path, what: str) -> Iterator[IO[bytes]]:
    """Yield a temporary file that replaces `path` when the context ends without an error.

    The file is flushed to the disk before it is renamed, so that a process killed at any time
    leaves the old content or the new one. Temporary files of killed processes are removed.

    Args:
        path: the file to write.
        what: its description in the error message.

    Raises UserError if the disk is full or read-only; the old file is then intact.
    """
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        remove_stale(stale)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file: _Writer | None = None
    try:
        with _Writer(FileIO(temporary, "w")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch raises the error of a dead loader worker at any point of the main process.
        if "DataLoader worker" in str(error):
            raise
        cause = file.error if file is not None and file.error is not None else error
        raise UserError(
            f"{path}: {what} could not be written ({describe_error(cause)}); "
            "an older one there is intact"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: object) -> None:
    """Write an indented JSON file atomically. Raises ValueError for NaN and infinity."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    with replacing(path, "the file") as file:
        file.write(text.encode())


def remove_stale(temporary: Path) -> None:
    """Remove a temporary file of `replacing`, unless its process is still running."""
    if not _is_being_written(temporary):
        temporary.unlink(missing_ok=True)


def _is_being_written(temporary: Path) -> bool:
    """Whether another running process owns the file. The process id is part of the file name."""
    process = temporary.name.split(".")[-2]
    if not process.isdigit() or int(process) == os.getpid():
        return False
    if sys.platform == "win32":  # where os.kill would end the process or send Ctrl-C
        return _runs_on_windows(int(process))
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # the process belongs to another user
        return True
    return True


if sys.platform == "win32":

    def _runs_on_windows(process: int) -> bool:
        """Whether a process is running."""
        handle = ctypes.windll.kernel32.OpenProcess(_SYNCHRONIZE, False, process)
        if not handle:
            return bool(ctypes.windll.kernel32.GetLastError() == _ACCESS_DENIED)
        state = ctypes.windll.kernel32.WaitForSingleObject(handle, 0)
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(state == _WAIT_TIMEOUT)


def _flush_folder(folder: Path) -> None:
    """Flush the rename itself to the disk, on systems that can flush a folder."""
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
