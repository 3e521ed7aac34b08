"""Locks that keep two processes from writing to the same place.

The operating system releases a lock when its process ends, however it ends. A child made by fork
does not hold the locks of its parent, so that a loader process that outlives a killed training does
not keep the run folder locked.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import ModuleType

from maskseg.errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    fcntl: ModuleType | None
    try:
        import fcntl
    except ImportError:  # a system without locks
        fcntl = None

# What flock and msvcrt report for a file that is locked already.
_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_LOCKED_FILES: weakref.WeakSet[FileIO] = weakref.WeakSet()


class InUseError(UserError):
    """Another process, or another part of this one, holds the lock."""


def open_locked(path: Path, in_use: str, on_wait: Callable[[], None] | None = None) -> FileIO:
    """Open a file for appending and lock it until it is closed or the process ends.

    in_use: the error message where it is locked; on_wait: called before waiting for the lock.

    Raises InUseError where the file is locked and `on_wait` is None, and OSError where it cannot be
    opened. A file system without locks gives a file that is not locked.
    """
    while True:
        file = path.open("ab", buffering=0)
        try:
            if not _try_lock(file):
                if on_wait is None:
                    raise InUseError(in_use)
                on_wait()
                _wait_for_lock(file)
            # Its previous owner may have removed the file between opening and locking: try again.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                _LOCKED_FILES.add(file)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def lock(path: Path, in_use: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock file, which is removed at the end. The arguments are those of `open_locked`."""
    file = open_locked(path, in_use, on_wait)
    try:
        yield
    finally:
        release(file, path)


def release(file: FileIO, path: Path) -> None:
    """Remove a lock file and release its lock."""
    if file.closed:
        return
    if sys.platform != "win32":  # while the lock is held, so that nobody else's file is removed
        path.unlink(missing_ok=True)
    file.close()


def _try_lock(file: FileIO) -> bool:
    """Lock a file. -> False where another holds the lock."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        elif fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True


def _wait_for_lock(file: FileIO) -> None:
    if sys.platform == "win32":
        while not _try_lock(file):
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    elif fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)


def _close_in_child() -> None:
    """Close the inherited files in a forked child: the lock is then the parent's alone."""
    for file in list(_LOCKED_FILES):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
