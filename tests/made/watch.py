"""An audit hook that records processes, connections and file changes of this process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_STARTED = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.startfile",
    "pty.",
    "socket.",
    "urllib.",
    "ftplib.",
)
_CHANGED = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.",
    "tempfile.",
)
_CODE = ("pickle.find_class", "marshal.loads", "ctypes.dlopen")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_events: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    writes = (
        event == "open"
        and len(arguments) == 3
        and isinstance(arguments[2], int)
        and arguments[2] & _WRITING
    )
    if writes or event.startswith((*_STARTED, *_CHANGED, *_CODE)):
        _events.append(f"{event} {arguments!r}"[:300])


sys.addaudithook(_hook)  # a hook cannot be removed; it is inactive outside `watched`


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Record the processes, connections and file changes inside the context, one text each."""
    global _events
    dont_write_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    events: list[str] = []
    _events = events
    try:
        yield events
    finally:
        _events = None
        sys.dont_write_bytecode = dont_write_bytecode
