"""Checkpoints: plain data, written whole or not at all, checked when they are read.

A checkpoint is a dictionary of state dicts, plain Python values, the config as a YAML string, categories and metrics. It is read by
`read_torch`, never otherwise: a file that somebody else made cannot run code. What its config may build: `maskseg.config.trust`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.files import remove_left, replacing
from maskseg.files.torch_files import read_torch

FORMAT = 1
MAX_PLACE = 1000  # characters of a value's place in a message
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
}
Checkpoint = dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Written beside `path`, flushed to the disk and renamed: a kill at any moment leaves the old file or the new one.

    Raises UserError where the disk is full or read-only; the old file is then intact. Raises TypeError for values that are not plain data.
    """
    _check_plain(checkpoint, "checkpoint")
    with replacing(path, "the checkpoint") as file:
        torch.save({"format": FORMAT, **checkpoint}, file)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value is in a checkpoint; its text is made for a message alone."""

    parent: _Place | None
    key: object

    def __str__(self) -> str:
        keys: list[str] = []
        place: _Place | None = self
        while place is not None:
            keys.append(f"[{place.key}]" if isinstance(place.key, int) else f".{place.key}"[:100])
            place = place.parent
        return "".join(reversed(keys)).lstrip(".")[:MAX_PLACE]


def _check_plain(checkpoint: object, name: str) -> None:
    """Raises TypeError for a value that is no plain data. What is there twice is checked once: shared lists can be nested without end."""
    pending: list[tuple[Any, _Place]] = [({name: checkpoint}, _Place(None, ""))]
    seen: set[int] = set()
    while pending:
        container, place = pending.pop()
        for key, value in (
            container.items() if isinstance(container, dict) else enumerate(container)
        ):
            if isinstance(value, dict | list | tuple):
                if id(value) not in seen:
                    seen.add(id(value))
                    pending.append((value, _Place(place, key)))
            elif not (
                isinstance(value, Tensor) or value is None or type(value) in (str, int, float, bool)
            ):
                raise TypeError(
                    f"{_Place(place, key)} is a {type(value).__name__}; a checkpoint holds tensors and plain values only"
                )


def _check_state(state: object, name: str) -> None:
    """Raises TypeError for what is no state dict: dense tensors by name."""
    if not isinstance(state, dict):
        raise TypeError(f"{name} is a {type(state).__name__} instead of tensors by name")
    for key, value in state.items():
        dense = (
            isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _DTYPES
        )
        if not isinstance(key, str) or not dense:
            raise TypeError(f"{name} holds something else than dense tensors by name")


def load_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint, on the CPU. Raises UserError for a file that is missing, damaged (its checksums are compared) or not of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    checkpoint: Checkpoint = read_torch(path, "a checkpoint", "; use another checkpoint of the run")
    stated = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if type(stated) is not int or stated != FORMAT or "model" not in checkpoint:
        raise UserError(f"{path}: not a maskseg checkpoint of format {FORMAT}")
    try:
        _check_plain(checkpoint, "it")
        _check_state(checkpoint["model"], "its model")
        if checkpoint.get("ema") is not None:
            _check_state(
                checkpoint["ema"].get("model") if isinstance(checkpoint["ema"], dict) else None,
                "its moving average",
            )
    except TypeError as error:
        raise UserError(f"{path}: refused, {error}") from error
    return checkpoint


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    partial: bool = False,
    hint: str = "",
) -> list[str]:
    """Copies `state` into the model. Without `partial` every tensor must fit, else UserError names those that don't; with it, those that don't
    fit are left as they are and returned. hint: what to do, at the end of the message."""
    own = model.state_dict()
    misshapen = [
        f"{k} {list(v.shape)} instead of {list(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if (misshapen or missing or unexpected) and not partial:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''})"
            for kind, names in (
                ("of another shape", misshapen),
                ("missing", missing),
                ("left over", unexpected),
            )
            if names
        ]
        raise UserError(
            f"{source} does not fit this model: {'; '.join(parts)}{hint and f'; {hint}'}"
        )
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)
    return [*missing, *unexpected, *misshapen]


def best_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights to use: the moving average where the training kept one."""
    weights: dict[str, Tensor] = (checkpoint.get("ema") or checkpoint)["model"]
    return weights


class Keeper:
    """`last.pt` of a run, and beside it the `keep` ones before it by number: `step_0001000.pt`."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir, self.keep, self.path = run_dir, keep, run_dir / "last.pt"
        self.step: int | None = None  # of last.pt
        if self.path.exists():
            try:
                self.step = int(load_checkpoint(self.path)["step"])
            except (UserError, KeyError):  # damaged: not worth a number
                self.step = None

    def save(self, checkpoint: Checkpoint) -> None:
        """At every moment one of them is whole. Raises UserError as `save_checkpoint`; nothing is lost then."""
        if (
            self.keep
            and self.step is not None
            and self.step != checkpoint["step"]
            and self.path.exists()
        ):
            self._number(self.run_dir / f"step_{self.step:07d}.pt")
        save_checkpoint(self.path, checkpoint)
        self.step = int(checkpoint["step"])
        for old in numbered(self.run_dir)[self.keep :]:
            old.unlink(missing_ok=True)

    def _number(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        try:
            os.link(self.path, path)  # last.pt stays there until the new one takes its place
        except OSError:  # a file system without links
            self.path.replace(path)


def numbered(run_dir: Path) -> list[Path]:
    """The checkpoints kept by number, the newest first: a run that went back and on again has written lower numbers later."""
    found = [p for p in run_dir.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name)]
    return sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def newest(run_dir: Path) -> tuple[Path, Checkpoint] | None:
    """The newest valid checkpoint of the run, warning of those that are not; None where there is none. What killed saves left is removed."""
    for left in run_dir.glob(".*.pt.*.tmp"):
        remove_left(left)
    for path in [run_dir / "last.pt", *numbered(run_dir), run_dir / "best.pt"]:
        if not path.exists():
            continue
        try:
            return path, load_checkpoint(path)
        except UserError as error:
            print(f"warning: {error}", flush=True)
    return None


def checkpoint_path(path: Path) -> Path:
    """A checkpoint, or the best (else the last) one of a run folder."""
    if path.is_dir():
        return path / "best.pt" if (path / "best.pt").is_file() else path / "last.pt"
    return path
