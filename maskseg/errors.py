"""The error that a user can mend: bad data, a bad key, a file that is not there."""

from __future__ import annotations


class UserError(Exception):
    """One clear message that names the file, the id or the key, and what to do. The tools print it and exit with 2."""
