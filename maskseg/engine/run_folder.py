"""The run folder: which folder a run writes to, what it resumes from, and how it was started."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from io import FileIO
from pathlib import Path
from typing import TypedDict

import torch

from maskseg.engine.checkpoint import (
    follow_latest,
    latest_valid,
    load_checkpoint,
    run_checkpoints,
    step_checkpoints,
)
from maskseg.engine.loop import TrainSettings
from maskseg.engine.run_search import LATEST
from maskseg.engine.state_checks import check_training_state
from maskseg.errors import UserError, describe_error
from maskseg.files import parse_json, write_json
from maskseg.files.locks import open_locked, release

LOCK_NAME = ".lock"
RUNS = Path("runs")  # has a folder for each experiment

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pycocotools",
    "hydra-core",
    "pillow",
    "faster-coco-eval",
    "safetensors",
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
        if self.path.parent.resolve() == self.home.resolve():
            point_latest(self.home, self.path.name)
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
    home = RUNS / name
    named = follow_latest(Path(run_dir)) if run_dir else None
    if settings.resume == "auto":
        return _choose_automatically(home, named)
    if settings.resume:
        source = follow_latest(Path(settings.resume))
        source_dir = source if source.is_dir() else follow_latest(source.parent)
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
    for path in [named] if named else newest_folders([home]):
        if _holds_checkpoint(path):
            folder = RunFolder(path, home, may_hold_run=True)
            folder.lock()
            folder.resume_from, folder.older = _latest(path)
            return folder
    return RunFolder(named, home, may_hold_run=True)


def find_config_text(resume: str, run_dir: str | None) -> tuple[str, Path] | None:
    """Find the config of the run that a training resumes. -> its YAML text, the run's folder.

    resume: the value of `trainer.resume`; `auto` is the run in `run_dir`, or the newest run of all
    experiments. None where there is no such run, or none of its checkpoints can be read: `choose`
    reports it.
    """
    if resume != "auto":
        source = follow_latest(Path(resume))
        folders = [source if source.is_dir() else follow_latest(source.parent)]
        paths = [source] if source.is_file() else run_checkpoints(folders[0])
        return _first_config(paths, folders[0])
    folders = [follow_latest(Path(run_dir))] if run_dir else newest_folders(RUNS.glob("*/"))
    for folder in folders:
        if _holds_checkpoint(folder):
            return _first_config(run_checkpoints(folder), folder)
    return None


def _first_config(paths: Sequence[Path], folder: Path) -> tuple[str, Path] | None:
    """The config of the first checkpoint that can be read."""
    for path in paths:
        with suppress(UserError):
            text = load_checkpoint(path).get("config")
            if isinstance(text, str):
                return text, folder
    return None


def newest_folders(homes: Iterable[Path]) -> list[Path]:
    """The folders below the given ones, the one that was changed last first; without links."""
    folders = []
    for home in homes:
        folders += [path for path in home.glob("*/") if not path.is_symlink()]
    return sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)


def point_latest(home: Path, name: str, process: int | None = None) -> None:
    """Let `latest` in the folder of an experiment point to the run `name`.

    A relative link, replaced atomically; where the disk has no links, a file with the name. What a
    user keeps there under that name is left alone, and a failure does not end a training. process:
    makes the name of the temporary file unique; by default the process id.
    """
    latest = home / LATEST
    is_own = latest.is_symlink() or not latest.exists() or _names_a_run(latest)
    if name == LATEST or not is_own:
        return
    temporary = home / f".{LATEST}.{os.getpid() if process is None else process}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(name, target_is_directory=True)
        except (OSError, NotImplementedError):
            temporary.write_text(f"{name}\n", encoding="utf-8")
        temporary.replace(latest)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _names_a_run(latest: Path) -> bool:
    """Whether `latest` is a file that `point_latest` has written."""
    return latest.is_file() and follow_latest(latest) != latest


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
        hint = ""
        if (folder / "best.pt").exists():
            hint = (
                "; best.pt has no state of an optimizer: trainer.init=... starts a new run from it"
            )
        raise UserError(f"{folder}: no checkpoint there can be resumed{hint}")
    path, checkpoint = latest
    print(f"resuming from {path}, step {checkpoint['step']}", flush=True)
    paths = run_checkpoints(folder)
    return path, paths[paths.index(path) + 1 :]


def _new_folder(home: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp if i == 0 else f"{stamp}_{i}" for i in range(1000))
    return next(home / name for name in names if not (home / name).exists())


def make_folder(folder: Path, key: str = "run_dir") -> Path:
    """Create the folder if it is missing, and return it. Raises UserError if it is not writable.

    key: of the config, that names the folder.
    """
    if folder.is_file():
        raise UserError(
            f"{key}={folder}: the folder cannot be made, it is a file: choose another name"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise _not_writable(folder, error, key) from error
    return folder


def _not_writable(folder: Path, error: OSError, key: str = "run_dir") -> UserError:
    return UserError(
        f"{key}={folder}: the folder cannot be made or written to ({describe_error(error)})"
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
