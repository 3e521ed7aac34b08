"""The guard of the user's files: no output replaces an input or the results of another job.

A tool checks the files that it is going to write before it starts its work. Only a file that does
not exist yet is written, so that links, `..` and names that differ in their case make no
difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from maskseg.errors import UserError

_RUN_FILES = ("metrics.jsonl", "last.pt", "best.pt", "step_*.pt")


def check_outputs(
    outputs: Iterable[Path], inputs: Iterable[str | Path | None] = (), key: str = "output"
) -> None:
    """Raise UserError for an output that is an input or exists.

    outputs: the files and folders that will be written; inputs: the files that are read; key: of
    the config, that names the outputs.
    """
    existing = [path for path in outputs if _exists(path)]
    if not existing:
        return
    read_files = [Path(path) for path in inputs if path]
    for path in existing:
        if any(is_same_file(path, other) for other in read_files):
            raise UserError(f"{key}={path} is an input file: choose another name")
    more = f" (and {len(existing) - 1} more files)" if len(existing) > 1 else ""
    raise UserError(f"{key}: {existing[0]} already exists{more}: choose another name or delete it")


def _exists(path: Path) -> bool:
    """Whether there is a file, also where the path leads through a folder that is still missing."""
    return os.path.lexists(path) or path.resolve().exists()


def check_no_run(folder: Path, key: str = "output") -> None:
    """Raise UserError for the folder of a training, whose files stay those of the training."""
    for pattern in _RUN_FILES:
        if folder.is_dir() and next(folder.glob(pattern), None) is not None:
            raise UserError(
                f"{key}={folder} already holds a run: choose another folder, "
                f"such as {folder / 'results'}"
            )


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths are the same file, also by links or by names of another case."""
    try:
        return first.samefile(second)
    except OSError:  # one of them does not exist
        return first.resolve() == second.resolve()


def find_free_name(path: Path) -> Path:
    """`path` if it does not exist or is an empty folder, else NAME_2, NAME_3 ..."""
    names = (path.with_name(f"{path.stem}_{i}{path.suffix}") for i in count(2))
    candidate = path
    while _is_taken(candidate):
        candidate = next(names)
    return candidate


def _is_taken(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return os.path.lexists(path)


def make_unique(names: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Change names so that all `name + suffix` differ, also where a disk ignores case."""
    taken: set[str] = set()
    unique = []
    for name in names:
        candidates = (name if i == 1 else f"{name}_{i}" for i in count(1))
        for candidate in candidates:
            files = {f"{candidate}{suffix}".casefold() for suffix in suffixes}
            if taken.isdisjoint(files):
                break
        taken |= files
        unique.append(candidate)
    return unique
