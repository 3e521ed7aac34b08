"""Where a run writes, what it goes on from, and what it says of how it was made."""

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
from maskseg.engine.checkpoint import Checkpoint, load_checkpoint, newest, numbered
from maskseg.engine.trainer import Trainer
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


def choose(config: Any, trainer: Trainer) -> tuple[Path, Path | None]:
    """The folder to write to, and the checkpoint to go on from. A folder that holds a run is only used to go on with it. Raises UserError."""
    home = Path("runs") / config.name
    named = Path(config.run_dir) if config.run_dir else None
    if trainer.resume and trainer.resume != "auto":
        source = Path(trainer.resume)
        own = source if source.is_dir() else source.parent
        if named and named.resolve() != own.resolve():
            _check_free(named)
        return named or own, _newest(source) if source.is_dir() else source
    if trainer.resume == "auto":
        runs = (
            [named]
            if named
            else sorted(home.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
        )
        for folder in runs:
            if _holds_checkpoint(folder):
                return folder, _newest(folder)
    if named and trainer.resume != "auto":
        _check_free(named)
    return named or _fresh(home), None


def _check_free(folder: Path) -> None:
    if _holds_checkpoint(folder) or (folder / "metrics.jsonl").exists():
        raise UserError(
            f"run_dir={folder} already holds a run: choose another folder, or trainer.resume=auto to go on with it"
        )


def read(path: Path | None) -> Checkpoint | None:
    """The checkpoint that `choose` has found, if it has."""
    return None if path is None else load_checkpoint(path)


def _holds_checkpoint(folder: Path) -> bool:
    return (folder / "last.pt").exists() or (folder / "best.pt").exists() or bool(numbered(folder))


def _newest(folder: Path) -> Path:
    found = newest(folder)
    if found is None:
        raise UserError(f"{folder}: no checkpoint there can be loaded")
    print(f"going on from {found[0]}, step {found[1]['step']}", flush=True)
    return found[0]


def _fresh(home: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp if i == 0 else f"{stamp}_{i}" for i in range(1000))
    return next(home / name for name in names if not (home / name).exists())


def made_folder(folder: Path) -> Path:
    """The folder, made where it is missing. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise UserError(
            f"run_dir={folder}: the folder cannot be made or written to ({error})"
        ) from error
    return folder


def record(run_dir: Path, device: torch.device, world: int, step: int) -> None:
    """`environment.json`: for each time the run was started, the command, the versions, the git revision and the machine."""
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
                **_versions(),
            },
            "git": git_revision(Path(__file__).parents[2]),
            "machine": {
                "name": platform.node(),
                "system": platform.platform(),
                "cpus": os.cpu_count(),
                "gpu": gpu,
            },
            "device": str(device),
            "processes": world,
            "threads": torch.get_num_threads(),
        }
    )
    write_json(path, starts)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """The commit that the folder is at and whether files differ from it; None outside a git repository of the project's own."""

    def git(*words: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return run.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return {
            "revision": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None
