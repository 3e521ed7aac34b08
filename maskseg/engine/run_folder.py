"""The run folder: which folder a run writes to, what it resumes from, and how it was started."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import TypedDict

import torch

from maskseg.engine.checkpoint import latest_valid, run_checkpoints, step_checkpoints
from maskseg.engine.loop import TrainSettings
from maskseg.engine.state_checks import check_training_state
from maskseg.errors import UserError, describe_error
from maskseg.files import parse_json, write_json
from maskseg.files.locks import open_locked, release

LOCK_NAME = ".lock"

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pycocotools",
    "hydra-core",
    "pillow",
    "faster-coco-eval",
)


@dataclass
class RunFolder:
    """The folder that a run writes to, locked from its making to the end of the run.

    path: None until `make` has chosen a new one below `home`;
    home: where the runs of the experiment lie;
    resume_from: the checkpoint to resume from, if any;
    older: those to resume from if it does not fit the run;
    may_hold_run: False where the folder must not hold a run yet.
    """

    path: Path | None
    home: Path
    resume_from: Path | None = None
    may_hold_run: bool = False
    older: list[Path] = field(default_factory=list)
    _lock: FileIO | None = None

    @property
    def candidates(self) -> list[Path]:
        """The checkpoints to resume from, in the order in which they are tried."""
        return [] if self.resume_from is None else [self.resume_from, *self.older]

    def make(self) -> Path:
        """Create the folder if it is missing, and lock it.

        Raises UserError if it is not writable, or if another process writes to it.
        """
        while self.path is None:
            folder = _new_folder(self.home)
            make_folder(self.home)
            try:
                folder.mkdir()
            except FileExistsError:  # a run that was started in the same second
                continue
            except OSError as error:
                raise _not_writable(folder, error) from error
            self.path = folder
        make_folder(self.path)
        self.lock()
        if not self.may_hold_run or (self.resume_from is None and _holds_checkpoint(self.path)):
            _check_free(self.path)  # another run has begun, or ended, there in the meantime
        return self.path

    def lock(self) -> None:
        """Lock a folder that exists. Raises UserError if another process holds the lock."""
        if self._lock is not None or self.path is None or not self.path.is_dir():
            return
        in_use = f"run_dir={self.path}: another process is training there; wait for its end"
        try:
            self._lock = open_locked(self.path / LOCK_NAME, in_use)
        except OSError as error:
            raise _not_writable(self.path, error) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None and self.path is not None:
            release(self._lock, self.path / LOCK_NAME)


def choose(name: str, run_dir: str | None, settings: TrainSettings) -> RunFolder:
    """Choose the folder to write to and the checkpoint to resume from, if any.

    name: of the experiment, whose folder is `runs/<name>`; run_dir: the folder that the user asks
    for. A folder that already holds a run is only used to resume that run, and is locked before its
    checkpoints are read. Raises UserError if a run would be overwritten, if another process writes
    to it, or if no checkpoint can be loaded.
    """
    home = Path("runs") / name
    named = Path(run_dir) if run_dir else None
    if settings.resume == "auto":
        return _choose_automatically(home, named)
    if settings.resume:
        source = Path(settings.resume)
        source_dir = source if source.is_dir() else source.parent
        if named is not None and named.resolve() != source_dir.resolve():
            _check_free(named)
            folder = RunFolder(named, home)
        else:
            folder = RunFolder(named or source_dir, home, may_hold_run=True)
            folder.lock()
        if source.is_dir():
            folder.resume_from, folder.older = _latest(source)
        else:
            folder.resume_from = source
        return folder
    if named:
        _check_free(named)
    return RunFolder(named, home)


def _choose_automatically(home: Path, named: Path | None) -> RunFolder:
    """Resume the run in `named`, else the newest one of the experiment, else start a new run."""
    if named:
        folders = [named]
    else:
        folders = sorted(home.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in folders:
        if _holds_checkpoint(path):
            folder = RunFolder(path, home, may_hold_run=True)
            folder.lock()
            folder.resume_from, folder.older = _latest(path)
            return folder
    return RunFolder(named, home, may_hold_run=True)


def _check_free(folder: Path) -> None:
    if _holds_checkpoint(folder) or (folder / "metrics.jsonl").exists():
        raise UserError(
            f"run_dir={folder} already holds a run: choose another folder, "
            "or trainer.resume=auto to resume it"
        )


def _holds_checkpoint(folder: Path) -> bool:
    return (
        (folder / "last.pt").exists()
        or (folder / "best.pt").exists()
        or bool(step_checkpoints(folder))
    )


def _latest(folder: Path) -> tuple[Path, list[Path]]:
    """The newest checkpoint of a run that can be resumed, and the older ones."""
    latest = latest_valid(folder, check_training_state)
    if latest is None:
        raise UserError(f"{folder}: no checkpoint there can be loaded")
    path, checkpoint = latest
    print(f"resuming from {path}, step {checkpoint['step']}", flush=True)
    paths = run_checkpoints(folder)
    return path, paths[paths.index(path) + 1 :]


def _new_folder(home: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp if i == 0 else f"{stamp}_{i}" for i in range(1000))
    return next(home / name for name in names if not (home / name).exists())


def make_folder(folder: Path) -> Path:
    """Create the folder if it is missing, and return it. Raises UserError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise _not_writable(folder, error) from error
    return folder


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"run_dir={folder}: the folder cannot be made or written to ({describe_error(error)})"
    )


def record(run_dir: Path, device: torch.device, world_size: int, step: int) -> None:
    """Add an entry to `environment.json`: command, versions, git revision and machine.

    The file has one entry for each time that the run was started. step: step that it starts from.
    """
    path = run_dir / "environment.json"
    starts = _read_starts(path)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    starts.append(
        {
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "from_step": step,
            "command": sys.argv,
            "versions": {
                "maskseg": _own_version(),
                "python": platform.python_version(),
                **_package_versions(),
            },
            "git": git_revision(Path(__file__).parents[2]),
            "machine": {
                "name": platform.node(),
                "system": platform.platform(),
                "cpus": os.cpu_count(),
                "gpu": gpu,
            },
            "device": str(device),
            "processes": world_size,
            "threads": torch.get_num_threads(),
        }
    )
    write_json(path, starts)


def _read_starts(path: Path) -> list[object]:
    """The earlier entries of `environment.json`; none where the file is absent or damaged."""
    try:
        starts = parse_json(path.read_bytes()) if path.exists() else []
        json.dumps(starts, indent=2, allow_nan=False)  # the entries are written again
    except (ValueError, RecursionError):
        return []
    return starts if isinstance(starts, list) else []


def _own_version() -> str:
    """The version of this package."""
    try:
        return version("maskseg")
    except PackageNotFoundError:  # it runs from a source tree and is not installed
        return str(sys.modules["maskseg"].__version__)


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


class Revision(TypedDict):
    """A commit, and whether tracked files differ from it."""

    revision: str
    changed: bool


def git_revision(folder: Path) -> Revision | None:
    """Return the commit that the folder is at, and whether tracked files differ from it.

    None if `folder` is not the root of a git repository. A package that is installed below another
    project's repository has no revision of its own.
    """

    def git(*arguments: str) -> str:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return process.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return {
            "revision": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
