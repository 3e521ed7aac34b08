"""The error that a user can mend: bad data, a bad key, a file that is not there."""

from __future__ import annotations


class UserError(Exception):
    """One clear message that names the file, the id or the key, and what to do. The tools print it and exit with 2."""

    def __str__(self) -> str:
        """The message; of one that a loader process sent (torch wraps it into its traceback), what the user wrote for."""
        text = super().__str__()
        mark = "\nmaskseg.errors.UserError: "
        return (
            text.rsplit(mark, 1)[1].strip() if text.startswith("Caught ") and mark in text else text
        )


class Interrupted(Exception):  # noqa: N818
    """A signal has ended the run, after it was saved. `code` is the exit code: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number, self.code = number, 128 + number
