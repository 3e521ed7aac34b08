"""One input for one reader, within limits of memory and time."""

from __future__ import annotations

import contextlib
import resource
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fuzz.readers import Reader

MAX_SECONDS = 10.0
MAX_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Fault:
    """What is wrong with the reading of an input.

    kind: its exception and the innermost line of the package, equal for inputs with one cause.
    """

    kind: str
    detail: str


class TookTooLong(BaseException):
    """The time is over. Not an Exception, which readers catch."""


def find_fault(reader: Reader, data: bytes, folder: Path) -> tuple[Fault | None, bool]:
    """Write an input to a file of the folder, and read it.

    Returns what is wrong, if anything, and whether the input was refused. Allowed are a result and
    the exceptions that the reader documents, with a message.
    """
    path = reader.place(folder, data)
    try:
        with _limited_memory(), _limited_time():
            reader.read(path)
    except reader.errors as error:
        return _find_message_fault(reader, error), True
    except TookTooLong as error:
        kind = f"more than {MAX_SECONDS:g} s: {_innermost_line(error)}"
        return Fault(kind, _text(error)), False
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        kind = f"{type(error).__name__}: {_innermost_line(error)}"
        return Fault(kind, _text(error)), False
    return None, False


def _find_message_fault(reader: Reader, error: BaseException) -> Fault | None:
    message = str(error)
    line = _innermost_line(error)
    if not message.strip():
        return Fault(f"no message: {line}", _text(error))
    if isinstance(error.__cause__, MemoryError):
        return Fault(f"more than {MAX_BYTES} bytes of memory: {line}", _text(error))
    if reader.names_file and reader.file_name not in message:
        return Fault(f"a message without the file's name: {line}", _text(error))
    return None


def _innermost_line(error: BaseException) -> str:
    """Return file and line of the innermost frame inside the package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/maskseg/" in frame.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rpartition('/maskseg/')[2]}:{frame.lineno}"


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-4000:]


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Limit the address space, and check that at most MAX_BYTES of memory are used.

    A peak that an earlier input has reached is not seen again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    virtual, resident = _memory()
    # Libraries reserve address space for threads and heaps that they never use.
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 2 * MAX_BYTES, hard))
    peak_before = _peak()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    peak = _peak()
    if peak > peak_before and peak - resident > MAX_BYTES:
        raise MemoryError(f"{peak - resident} bytes")


def _memory() -> tuple[int, int]:
    """Return the address space and the resident memory of this process, in bytes."""
    virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
    page = resource.getpagesize()
    return int(virtual) * page, int(resident) * page


def _peak() -> int:
    """Return the highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
