"""The run folder: which folder a run writes to, what it resumes from, and how it was started."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from maskseg import __version__
from maskseg.engine.checkpoint import Checkpoint, latest_valid, load_checkpoint, step_checkpoints
from maskseg.engine.loop import TrainSettings
from maskseg.errors import UserError
from maskseg.files import parse_json, write_json

_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pycocotools",
    "hydra-core",
    "pillow",
    "faster-coco-eval",
)


def choose(config: Any, settings: TrainSettings) -> tuple[Path, Path | None]:
    """Choose the folder to write to and the checkpoint to resume from, if any.

    config: with `name` and `run_dir`. A folder that already holds a run is only used to resume that
    run. Raises UserError if the config would overwrite a run, or if no checkpoint can be loaded.
    """
    home = Path("runs") / config.name
    named = Path(config.run_dir) if config.run_dir else None
    if settings.resume == "auto":
        return _choose_automatically(home, named)
    if settings.resume:
        source = Path(settings.resume)
        source_dir = source if source.is_dir() else source.parent
        if named and named.resolve() != source_dir.resolve():
            _check_free(named)
        return named or source_dir, _latest(source) if source.is_dir() else source
    if named:
        _check_free(named)
    return named or _new_folder(home), None


def _choose_automatically(home: Path, named: Path | None) -> tuple[Path, Path | None]:
    """Resume the run in `named`, else the newest one of the experiment, else start a new run."""
    if named:
        folders = [named]
    else:
        folders = sorted(home.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
    for folder in folders:
        if _holds_checkpoint(folder):
            return folder, _latest(folder)
    return named or _new_folder(home), None


def _check_free(folder: Path) -> None:
    if _holds_checkpoint(folder) or (folder / "metrics.jsonl").exists():
        raise UserError(
            f"run_dir={folder} already holds a run: choose another folder, "
            "or trainer.resume=auto to resume it"
        )


def read(path: Path | None) -> Checkpoint | None:
    """Load the checkpoint that `choose` has returned, if any."""
    return None if path is None else load_checkpoint(path)


def _holds_checkpoint(folder: Path) -> bool:
    return (
        (folder / "last.pt").exists()
        or (folder / "best.pt").exists()
        or bool(step_checkpoints(folder))
    )


def _latest(folder: Path) -> Path:
    latest = latest_valid(folder)
    if latest is None:
        raise UserError(f"{folder}: no checkpoint there can be loaded")
    path, checkpoint = latest
    print(f"resuming from {path}, step {checkpoint['step']}", flush=True)
    return path


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
        raise UserError(
            f"run_dir={folder}: the folder cannot be made or written to ({error})"
        ) from error
    return folder


def record(run_dir: Path, device: torch.device, world_size: int, step: int) -> None:
    """Add an entry to `environment.json`: command, versions, git revision and machine.

    The file has one entry for each time that the run was started. step: step that it starts from.
    """
    path = run_dir / "environment.json"
    try:
        starts = parse_json(path.read_text()) if path.exists() else []
    except ValueError:
        starts = []
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    starts.append(
        {
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "from_step": step,
            "command": sys.argv,
            "versions": {
                "maskseg": __version__,
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


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_revision(folder: Path) -> dict[str, Any] | None:
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
