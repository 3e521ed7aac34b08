"""The runs below a folder, for a path that names a folder of runs instead of a run."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = ("best.pt", "last.pt")
LATEST = "latest"  # beside the runs of an experiment: a link to the one that was started last
_MAX_NAMED = 5  # runs in a message


def is_run(folder: Path) -> bool:
    """Whether a folder has a checkpoint of a run."""
    return any((folder / name).is_file() for name in CHECKPOINTS)


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder, such as `runs/scenes_r18`, or in its subfolders; the newest first."""
    candidates = [*folder.glob("*/"), *folder.glob("*/*/")]
    runs = [path for path in candidates if not path.is_symlink() and is_run(path)]
    return sorted(runs, key=_modification_time, reverse=True)


def newest_run(folder: Path) -> Path | None:
    """The run in a folder whose checkpoints were written last, None where there is none."""
    return next(iter(find_runs(folder)), None)


def _modification_time(run: Path) -> int:
    files = [run / name for name in CHECKPOINTS]
    return max(file.stat().st_mtime_ns for file in files if file.is_file())


def describe_runs(folder: Path) -> str:
    """Name the runs of a folder of runs, for a message; "" where there are none.

    The working directory, as the parent of a name without a folder, is not meant as one.
    """
    runs = find_runs(folder) if folder.name else []
    if not runs:
        return ""
    named = ", ".join(str(run) for run in runs[:_MAX_NAMED])
    more = f" and {len(runs) - _MAX_NAMED} more" if len(runs) > _MAX_NAMED else ""
    return f"{folder} is a folder of runs: name one of {named}{more}, or {folder / LATEST}"
