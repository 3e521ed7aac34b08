"""Checkpoints: plain data, written whole or not at all, checked when they are read.

A checkpoint is a dictionary of state dicts, plain Python values, the config as a YAML string, categories and metrics. It is read with
`torch.load(weights_only=True)`, never otherwise: a file that somebody else made cannot run code.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskseg.errors import UserError

FORMAT = 1
Checkpoint = dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Written beside `path`, flushed to the disk and renamed: a kill at any moment leaves the old file or the new one.

    Raises UserError where the disk is full or read-only; the old file is then intact. Raises TypeError for values that are not plain data.
    """
    _check_plain(checkpoint, "checkpoint")
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: the checkpoint could not be written ({error}); an older one there is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]")
    elif not (isinstance(value, Tensor) or value is None or type(value) in (str, int, float, bool)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")


def load_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint, on the CPU. Raises UserError for a file that is missing, damaged (its checksums are compared) or not of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # torch reads an entry that is marked as a folder as whatever lies in memory
            damaged = damaged or next((i.filename for i in archive.infolist() if i.external_attr), None)
    except Exception as error:  # zipfile raises almost anything on damaged data
        raise UserError(f"{path}: not a checkpoint, or cut short ({error})") from error
    if damaged:
        raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong; use another checkpoint of the run")
    try:
        checkpoint: Checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: refused, it holds more than tensors and plain values ({str(error).splitlines()[0]})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT or "model" not in checkpoint:
        raise UserError(f"{path}: not a maskseg checkpoint of format {FORMAT}")
    return checkpoint


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str, partial: bool = False) -> list[str]:
    """Copies `state` into the model. Without `partial` every tensor must fit, else UserError names those that don't; with it, those that don't
    fit are left as they are and returned."""
    own = model.state_dict()
    misshapen = [f"{k} {list(v.shape)} instead of {list(own[k].shape)}" for k, v in state.items() if k in own and v.shape != own[k].shape]
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if (misshapen or missing or unexpected) and not partial:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''})"
            for kind, names in (("of another shape", misshapen), ("missing", missing), ("left over", unexpected))
            if names
        ]
        raise UserError(f"{source} does not fit this model: {'; '.join(parts)}; trainer.init_partial=true takes what fits")
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)
    return [*missing, *unexpected, *misshapen]


def newest(run_dir: Path) -> tuple[Path, Checkpoint] | None:
    """The valid checkpoint of the run with the most steps, warning of those that are not; None where there is none."""
    found: list[tuple[int, Path, Checkpoint]] = []
    for path in (run_dir / "last.pt", run_dir / "best.pt"):
        if not path.exists():
            continue
        try:
            checkpoint = load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}", flush=True)
            continue
        found.append((int(checkpoint["step"]), path, checkpoint))
        if path.name == "last.pt":
            break
    if not found:
        return None
    _, path, checkpoint = max(found, key=lambda f: f[0])
    return path, checkpoint
