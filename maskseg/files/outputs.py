"""The guard of the user's files: no output replaces an input or the results of another job.

A tool checks the files that it is going to write before it starts its work. Only a file that does
not exist yet is written, so that links, `..` and names that differ in their case make no
difference. With `overwrite=true`, the earlier outputs of the same tool are replaced, too: each tool
records in the hidden file `RECORD` of a folder which files it has written there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from maskseg.errors import UserError
from maskseg.files.documents import parse_json

_RUN_FILES = (
    *("metrics.jsonl", "last.pt", "best.pt", "best.safetensors", "step_*.pt"),
    "loggers.json",
)
RECORD = ".maskseg_outputs.jsonl"
_CLOCK_TOLERANCE = 2.0  # seconds: some disks store no fractions of a modification time


def check_outputs(
    outputs: Iterable[Path],
    inputs: Iterable[str | Path | None] = (),
    key: str = "output",
    tool: str = "",
    overwrite: bool = False,
) -> None:
    """Raise UserError for an output that is an input or exists.

    outputs: the files and folders that will be written; inputs: the files that are read; key: of
    the config, that names the outputs; overwrite: earlier outputs of the same tool may exist, if
    they have not been changed since.
    """
    existing = [path for path in outputs if _exists(path)]
    if not existing:
        return
    _check_no_input(existing, [Path(path) for path in inputs if path], key)
    foreign = [path for path in existing if not _is_earlier_output(path, tool)]
    if overwrite and not foreign:
        return
    more = f" (and {len(existing) - 1} more files)" if len(existing) > 1 else ""
    advice = "choose another name or delete it"
    if overwrite:
        advice = f"overwrite=true replaces only earlier, unchanged files of this tool; {advice}"
    elif not foreign:
        advice = "choose another name, or overwrite=true replaces earlier outputs"
    named = foreign[0] if overwrite else existing[0]
    raise UserError(f"{key}: {named} already exists{more}: {advice}")


def _check_no_input(outputs: Sequence[Path], inputs: Sequence[Path], key: str) -> None:
    """Raise UserError for an output that is an input."""
    for path in outputs:
        if any(is_same_file(path, other) for other in inputs):
            raise UserError(f"{key}={path} is an input file: choose another name")


@dataclass(frozen=True)
class _Entry:
    """What a record says about a file. size and mtime: -1 while the file is being written."""

    tool: str
    size: int = -1
    mtime: float = -1.0


@contextmanager
def record_outputs(
    outputs: Iterable[Path], tool: str, overwrite: bool = False, folder: Path | None = None
) -> Iterator[None]:
    """Record which files a tool writes in the block, for a later `overwrite=true`.

    outputs: those of `check_outputs`, in folders that exist or that the block makes.
    folder: the folder of all results of the tool. With `overwrite`, the outputs of the earlier run
        that this one does not write are deleted from it, so that the results of two runs never mix.
    """
    paths = list(outputs)
    if overwrite and folder is not None:
        _remove_others(folder, paths, tool)
    started = _Entry(tool, mtime=time.time())
    folders = {path.parent for path in paths if path.parent.is_dir()}
    new_records = [place / RECORD for place in folders if not (place / RECORD).exists()]
    _write_entries({path: started for path in paths if path.parent in folders})
    try:
        yield
    finally:
        _write_entries({path: _describe(path, tool) for path in paths if path.parent.is_dir()})
        for record in new_records:  # of a tool that has failed before it wrote anything
            if all(entry.tool == "" for entry in _read_entries(record.parent).values()):
                record.unlink(missing_ok=True)


def _describe(path: Path, tool: str) -> _Entry:
    """The entry of a file that has been written; without a tool where there is none."""
    if not path.is_file():
        return _Entry("")
    status = path.stat()
    return _Entry(tool, status.st_size, status.st_mtime)


def _remove_others(folder: Path, outputs: Sequence[Path], tool: str) -> None:
    """Delete the unchanged outputs of an earlier run of a tool that this run does not write."""
    kept = {path.resolve() for path in outputs}
    for record in folder.rglob(RECORD):
        for name in _read_entries(record.parent):
            path = record.parent / name
            if path.resolve() not in kept and _is_earlier_output(path, tool):
                path.unlink()


def _is_earlier_output(path: Path, tool: str) -> bool:
    """Whether a file is what a tool has written, and has not been changed since."""
    entry = _read_entries(path.parent).get(path.name)
    if not tool or entry is None or entry.tool != tool or path.is_symlink() or not path.is_file():
        return False
    status = path.stat()
    if entry.size < 0:  # the tool was killed while it wrote its files
        return status.st_mtime >= entry.mtime - _CLOCK_TOLERANCE
    is_unchanged = abs(status.st_mtime - entry.mtime) <= _CLOCK_TOLERANCE
    return is_unchanged and status.st_size == entry.size


def _write_entries(entries: dict[Path, _Entry]) -> None:
    """Add lines to the records of the folders; the last line about a file counts.

    A folder that cannot be written to gets no record: its files are then never replaced.
    """
    lines: dict[Path, list[str]] = {}
    for path, entry in entries.items():
        line = json.dumps([path.name, entry.tool, entry.size, entry.mtime])
        lines.setdefault(path.parent, []).append(f"{line}\n")
    for folder, texts in lines.items():
        with suppress(OSError), (folder / RECORD).open("a", encoding="utf-8") as file:
            file.write("".join(texts))


def _read_entries(folder: Path) -> dict[str, _Entry]:
    """The entries of the files of a folder; damaged lines are ignored."""
    try:
        lines = (folder / RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    entries = {}
    for line in lines:
        with suppress(ValueError, TypeError):
            name, tool, size, mtime = _parse_line(line)
            entries[name] = _Entry(tool, size, mtime)
    return entries


def _parse_line(line: str) -> tuple[str, str, int, float]:
    """A line of a record. Raises ValueError or TypeError for a damaged one."""
    values = parse_json(line)
    if not isinstance(values, list):
        raise ValueError("not a list")
    name, tool, size, mtime = values
    if Path(str(name)).name != name:
        raise ValueError("not the name of a file")
    return str(name), str(tool), int(size), float(mtime)


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
