"""Checkpoint files: plain data, written atomically and verified when they are read.

A checkpoint is a dictionary of state dicts, plain Python values, the config as a YAML string,
categories and metrics. It is only ever read by `read_torch`, so that a file of unknown origin
cannot run code. `maskseg.config.trust` lists the classes that the stored config may instantiate.

A file whose name ends in `.safetensors` holds the same entries without the state of a training: the
weights as tensors, the other entries as JSON in its header.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskseg.engine.run_search import CHECKPOINTS, LATEST, describe_runs, newest_run
from maskseg.errors import UserError, describe_error
from maskseg.files import parse_json, remove_stale, replacing
from maskseg.files.similar import suggest_path
from maskseg.files.torch_files import read_torch

FORMAT = 1
SAFETENSORS = ".safetensors"  # the suffix of files in that format
BEST_SAFETENSORS = f"best{SAFETENSORS}"  # of a run, beside best.pt
FROM_OBJECTS = "from_objects"  # key of a checkpoint whose config does not describe its model
MAX_PLACE = 1000  # characters of a value's path in an error message
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
# Entries that only a training reads.
_TRAINING_KEYS = ("ema", "optimizer", "scheduler", "scaler", "rng", "evaluated", "stale")
_HEADER_KEY = "maskseg"  # of a safetensors file
Checkpoint = dict[str, Any]
Container = dict[object, object] | Sequence[object]


def save_checkpoint(path: Path, checkpoint: Mapping[str, object]) -> None:
    """Write a checkpoint atomically: a killed process leaves the old file or the new one.

    A path that ends in `.safetensors` gets that format.

    Raises UserError if the disk is full or read-only, in which case the old file is intact, or if
    the library safetensors is missing, and TypeError for values that are not plain data.
    """
    _check_plain(checkpoint, "checkpoint")
    if path.suffix == SAFETENSORS:
        content = _to_safetensors(checkpoint, path)
        with replacing(path, "the checkpoint") as file:
            file.write(content)
        return
    with replacing(path, "the checkpoint") as file:
        torch.save({"format": FORMAT, **checkpoint}, file)


def model_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint to use: the weights for inference and what describes them.

    It has no state of an optimizer, so that it cannot be resumed.
    """
    exported = {key: value for key, value in checkpoint.items() if key not in _TRAINING_KEYS}
    exported["model"] = inference_weights(checkpoint)
    return exported


def require_safetensors(what: str) -> None:
    """Raise UserError if the library safetensors is not installed. what: needs it."""
    if importlib.util.find_spec("safetensors") is None:
        raise UserError(f"{what} needs the library safetensors: pip install -e '.[safetensors]'")


def _to_safetensors(checkpoint: Mapping[str, object], path: Path) -> bytes:
    """The content of a safetensors file: the tensors of `model`, and a header with the rest."""
    require_safetensors(str(path))
    from safetensors.torch import save

    weights = checkpoint["model"]
    assert isinstance(weights, dict)
    # The format has one memory layout, and no two names for the same memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    header = {key: value for key, value in checkpoint.items() if key not in ("model", "ema")}
    metrics = header.get("metrics")
    if isinstance(metrics, dict):  # JSON has no NaN
        header["metrics"] = {key: value for key, value in metrics.items() if math.isfinite(value)}
    text = json.dumps({"format": FORMAT, **header}, allow_nan=False)
    content: bytes = save(tensors, {_HEADER_KEY: text})
    return content


def _read_safetensors(path: Path) -> object:
    """The entries of a safetensors file; None for a file of another program.

    Raises UserError for a damaged file, and if the library is missing.
    """
    require_safetensors(str(path))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a complete safetensors file ({describe_error(error)})"
        ) from error
    if text is None:
        return None
    try:
        header = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: the header is damaged ({describe_error(error)})") from error
    return {**header, "model": tensors} if isinstance(header, dict) else None


@dataclass(frozen=True, slots=True)
class _Place:
    """Path of a value inside a checkpoint. The text is only built for an error message."""

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
    """Raise TypeError for a value that is not plain data.

    Each container is visited once, because nested references to the same list can have
    exponentially many paths.
    """
    pending: list[tuple[Container, _Place]] = [({name: checkpoint}, _Place(None, ""))]
    visited: set[int] = set()
    while pending:
        container, place = pending.pop()
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            if isinstance(value, dict | list | tuple):
                if id(value) not in visited:
                    visited.add(id(value))
                    pending.append((value, _Place(place, key)))
            elif not _is_plain(value):
                raise TypeError(
                    f"{_Place(place, key)} is a {type(value).__name__}; "
                    "a checkpoint holds only tensors and plain values"
                )


def _is_plain(value: object) -> bool:
    """Whether a leaf value may be stored. Subclasses, such as NumPy's float64, may not."""
    return isinstance(value, Tensor) or value is None or type(value) in (str, int, float, bool)


def _check_state_dict(state: object, name: str) -> None:
    """Raise TypeError unless `state` maps names to dense tensors."""
    if not isinstance(state, dict):
        raise TypeError(f"{name} is a {type(state).__name__}, not a dictionary of tensors")
    for key, value in state.items():
        is_dense = (
            isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _DTYPES
        )
        if not isinstance(key, str) or not is_dense:
            raise TypeError(f"{name} holds values other than named dense tensors")


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint, `.pt` or `.safetensors`, into CPU memory.

    Raises UserError if the file is missing, damaged or not a checkpoint of this package. The
    checksums of a `.pt` file are verified; a `.safetensors` file has none, so that only damage to
    its header or its length is found.
    """
    path = Path(path)
    if not path.is_file():
        hint = describe_runs(path.parent)
        raise UserError(f"{path}: no such checkpoint{f'; {hint}' if hint else suggest_path(path)}")
    checkpoint = _read_file(path)
    version = checkpoint.get("format")
    if type(version) is not int or version != FORMAT or "model" not in checkpoint:
        raise UserError(f"{path}: not a maskseg checkpoint of format {FORMAT}")
    try:
        _check_plain(checkpoint, "checkpoint")
        _check_state_dict(checkpoint["model"], "its model")
        ema = checkpoint.get("ema")
        if ema is not None:
            _check_state_dict(ema.get("model") if isinstance(ema, dict) else None, "its EMA")
    except TypeError as error:
        raise UserError(f"{path}: refused, {error}") from error
    return checkpoint


def _read_file(path: Path) -> Checkpoint:
    """The entries of a file; {} for a file of another program. Raises UserError."""
    if path.suffix == SAFETENSORS:
        content = _read_safetensors(path)
    else:
        content = read_torch(path, "a checkpoint", "; use another checkpoint of the run")
    return content if isinstance(content, dict) else {}


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    partial: bool = False,
    hint: str = "",
) -> list[str]:
    """Copy `state` into the model.

    Args:
        model: the model to load into.
        state: tensors by name.
        source: where `state` comes from, for the error message.
        partial: load only the tensors that fit, and skip the others.
        hint: advice at the end of the error message.

    Returns the names of the tensors that were skipped. Raises UserError, which lists the
    mismatches,
    if not every tensor fits and `partial` is false.
    """
    current = model.state_dict()
    matching = {
        name: value
        for name, value in state.items()
        if name in current and value.shape == current[name].shape
    }
    skipped = _compare_weights(model, state)
    if any(skipped.values()) and not partial:
        raise _misfit(skipped, source, hint)
    model.load_state_dict(matching, strict=False)
    return [*skipped["missing"], *skipped["unexpected"], *skipped["of another shape"]]


def check_weights_fit(
    model: nn.Module, state: Mapping[str, Tensor], source: str, hint: str = ""
) -> None:
    """Check that names and shapes are those of the model. The arguments are as in `load_weights`.

    Raises UserError, which lists the mismatches.
    """
    skipped = _compare_weights(model, state)
    if any(skipped.values()):
        raise _misfit(skipped, source, hint)


def _compare_weights(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The tensors of a model and of `state` that do not fit each other, by the kind of mismatch."""
    current = model.state_dict()
    mismatched = []
    for name, value in state.items():
        if name in current and value.shape != current[name].shape:
            expected = list(current[name].shape)
            mismatched.append(f"{name} {list(value.shape)} instead of {expected}")
    return {
        "of another shape": mismatched,
        "missing": [name for name in current if name not in state],
        "unexpected": [name for name in state if name not in current],
    }


def _misfit(skipped: Mapping[str, list[str]], source: str, hint: str) -> UserError:
    problems: list[str] = []
    for kind, names in skipped.items():
        problems += _describe_names(kind, names)
    advice = f"; {hint}" if hint else ""
    return UserError(f"{source} does not fit this model: {'; '.join(problems)}{advice}")


def _describe_names(kind: str, names: list[str]) -> Iterable[str]:
    """Yield "COUNT KIND (NAMES)" with at most five names, or nothing for an empty list."""
    if names:
        more = " ..." if len(names) > 5 else ""
        yield f"{len(names)} {kind} ({', '.join(names[:5])}{more})"


def inference_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights for inference: the EMA of the weights if the training kept one."""
    weights: dict[str, Tensor] = (checkpoint.get("ema") or checkpoint)["model"]
    return weights


def best_threshold(checkpoint: Checkpoint) -> float | None:
    """The score threshold with the highest F1 in the last evaluation; None if it is not known.

    That of masks for a model that finds masks, else that of boxes.
    """
    metrics = checkpoint.get("metrics")
    if not isinstance(metrics, dict):
        return None
    for kind in ("segm", "bbox"):
        value = metrics.get(f"{kind}/best_threshold")
        if type(value) is float and 0 <= value <= 1:
            return value
    return None


class CheckpointManager:
    """Writes `last.pt` of a run and keeps the previous `keep` ones as `step_0001000.pt`.

    A checkpoint is confirmed when a step that starts from its weights has finite losses and
    gradients. Until then the one before it is kept too, whatever `keep` is, so that a run that
    diverges leaves a good checkpoint.

    step: step of `last.pt`; None if there is none or it is damaged.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.path = run_dir / "last.pt"
        self.step: int | None = None
        self._confirmed = True
        if self.path.exists():
            # None if it is damaged, so that it is not kept under a step's name.
            self.step = checkpoint_step(self.path)

    def save(self, checkpoint: Checkpoint) -> None:
        """Save `last.pt`. At every moment at least one checkpoint of the run is complete.

        Raises UserError as `save_checkpoint` does, without losing a checkpoint.
        """
        if self.step is not None and self.step != checkpoint["step"] and self.path.exists():
            self._keep_as(self._path_of(self.step))
        save_checkpoint(self.path, checkpoint)
        self.step = int(checkpoint["step"])
        self._confirmed = False
        self._remove_old(max(self.keep, 1))

    def confirm(self) -> None:
        """The weights of `last.pt` are good: remove what was only kept until this is known."""
        if not self._confirmed:
            self._confirmed = True
            self._remove_old(self.keep)

    def set_aside_diverged(self, step: int) -> list[str]:
        """Rename the checkpoints from `step` on to `diverged_0001000.pt`.

        Their weights give losses or gradients that are not finite, so that a resume would fail
        again. -> descriptions of the renamed files.
        """
        renamed = []
        for path in [*step_checkpoints(self.run_dir), self.path]:
            if not path.exists():
                continue
            saved = checkpoint_step(path)
            if saved is not None and saved >= step:
                target = self.run_dir / f"diverged_{saved:07d}.pt"
                path.replace(target)
                renamed.append(f"{path.name} is now {target} (trainer.resume={target} resumes it)")
        if not self.path.exists():
            self.step = None
        return renamed

    def _path_of(self, step: int) -> Path:
        return self.run_dir / f"step_{step:07d}.pt"

    def _remove_old(self, keep: int) -> None:
        for old in step_checkpoints(self.run_dir)[keep:]:
            old.unlink(missing_ok=True)

    def _keep_as(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        try:
            os.link(self.path, path)  # last.pt stays in place until the new one replaces it
        except OSError:  # the file system has no hard links
            self.path.replace(path)


def step_checkpoints(run_dir: Path) -> list[Path]:
    """List the `step_*.pt` of a run, the most recently written first.

    The order is that of the modification times: a run that was resumed from an earlier step has
    written lower step numbers later.
    """
    paths = [p for p in run_dir.glob("step_*.pt") if re.fullmatch(r"step_\d+\.pt", p.name)]
    return sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def checkpoint_step(path: Path) -> int | None:
    """Return the step of a checkpoint, None if it cannot be loaded or has none."""
    try:
        step = load_checkpoint(path).get("step")
    except UserError:
        return None
    return step if type(step) is int and step >= 0 else None


def run_checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run that have the state of the training, the newest first.

    A resume tries them in this order.
    """
    paths = [run_dir / "last.pt", *step_checkpoints(run_dir)]
    return [path for path in paths if path.exists()]


def latest_valid(
    run_dir: Path, check: Callable[[Checkpoint, Path], None] | None = None
) -> tuple[Path, Checkpoint] | None:
    """Find the newest checkpoint of a run that can be loaded, and warn about those that cannot.

    check: raises UserError for a checkpoint that cannot be used.

    Temporary files of killed processes are removed. Returns None if no checkpoint can be loaded.
    """
    for temporary in run_dir.glob(".*.pt.*.tmp"):
        remove_stale(temporary)
    for path in run_checkpoints(run_dir):
        try:
            checkpoint = load_checkpoint(path)
            if check is not None:
                check(checkpoint, path)
            return path, checkpoint
        except UserError as error:
            print(f"warning: {error}", flush=True)
    return None


def checkpoint_path(path: Path) -> Path:
    """Return the checkpoint itself, or `best.pt`, else `last.pt`, of a run folder.

    Where a disk has no links, `latest` is a file with the name of the folder; where there is no
    such entry, it is the newest run. Raises UserError for a folder without a checkpoint, with the
    runs below it.
    """
    path = follow_latest(path)
    if path.name == LATEST and not path.exists():
        path = newest_run(path.parent) or path
    if not path.is_dir():
        return path
    for name in CHECKPOINTS:
        if (path / name).is_file():
            return path / name
    reason = describe_runs(path) or f"{path}: there is no {' or '.join(CHECKPOINTS)} in this folder"
    raise UserError(reason)


def follow_latest(path: Path) -> Path:
    """Return the run folder that `runs/<experiment>/latest` names, or a file in it.

    Another path is unchanged.
    """
    if path.name != LATEST:
        return follow_latest(path.parent) / path.name if path.parent.name == LATEST else path
    name = ""
    try:
        if path.is_symlink():
            name = str(path.readlink())
        elif path.is_file():
            name = Path(path.read_text(encoding="utf-8", errors="replace").strip()).name
        target = path.parent / name
        return target if name and target.is_dir() else path
    except (OSError, ValueError):  # a content that is no name of a file
        return path
