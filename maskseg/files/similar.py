"""The path that was probably meant instead of one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

_MAX_ENTRIES = 10_000  # of a folder, that are compared


def suggest_path(path: Path, suffixes: Sequence[str] = ()) -> str:
    """The end of a message about a missing file or folder, "" where nothing is similar.

    It names the first folder of the path that does not exist, or the entry of the same folder with
    the most similar name. suffixes: of the files that are considered, all by default.
    """
    for parent in reversed(path.parents):
        if not parent.exists():
            return f"; there is no folder {parent}{_suggest_sibling(parent, ())}"
    return _suggest_sibling(path, suffixes)


def _suggest_sibling(path: Path, suffixes: Sequence[str]) -> str:
    names = [
        name for name in _list_names(path.parent) if not suffixes or name.endswith(tuple(suffixes))
    ]
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), lower, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / lower[close[0]]}?" if close else ""


def _list_names(folder: Path) -> list[str]:
    """The names in a folder; none where it cannot be read or is very large."""
    try:
        names = [
            entry.name for _, entry in zip(range(_MAX_ENTRIES), folder.iterdir(), strict=False)
        ]
    except OSError:
        return []
    return names if len(names) < _MAX_ENTRIES else []
