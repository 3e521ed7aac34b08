"""Exceptions: errors that a user can fix (bad data, keys or files), and ends of other kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MAX_TEXT = 300  # characters of an exception in a message


class UserError(Exception):
    """A clear message that names the file, id or key, and what to do.

    The command-line tools print it and exit with code 2.
    """

    def __str__(self) -> str:
        """The message, without the traceback that torch adds to errors of data loader workers."""
        text = super().__str__()
        mark = "\nmaskseg.errors.UserError: "
        if text.startswith("Caught ") and mark in text:
            return text.rsplit(mark, 1)[1].strip()
        return text


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line: the system's reason, its text, or its class.

    Some exceptions, such as MemoryError, usually have no text.
    """
    reason = getattr(error, "strerror", None) or str(error)
    lines = str(reason).strip().splitlines()
    return lines[0][:_MAX_TEXT] if lines else type(error).__name__


def join_lines(error: BaseException) -> str:
    """The whole text of an exception in one line; "" if it has none."""
    return " ".join(str(error).split())[:_MAX_TEXT]


class Interrupted(BaseException):
    """A signal has ended the run, after its state was saved.

    Like KeyboardInterrupt, it is no Exception: a signal can arrive anywhere, also in code that
    takes any Exception for a damaged file.

    number: the signal; code: the exit code, 128 + `number`.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number
        self.code = 128 + number


class Shown(Exception):  # noqa: N818
    """The command line asks to print something, `text`, instead of a run of the tool."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@contextmanager
def warn_if_not_drawn(what: str, warn: Callable[[str], None] | None = None) -> Iterator[None]:
    """Turn any error of the block into a warning, except for signals and dead loader workers.

    what: description of the image; warn: takes the message, by default it is printed.
    """
    try:
        yield
    except Shown:
        raise
    except Exception as error:
        # torch raises the error of a dead loader worker at any point of the main process.
        if "DataLoader worker" in str(error):
            raise
        reason = join_lines(error) or type(error).__name__
        message = f"warning: {what} could not be drawn ({reason})"
        if warn is None:
            print(message, flush=True)
        else:
            warn(message)
