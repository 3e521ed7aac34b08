"""Checks of the training state in a checkpoint, before anything is restored from it.

The checksums of a checkpoint show that it is as it was written. These checks show that it can be
resumed: a wrong value would otherwise fail in the middle of the first step, or silently change the
training.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg.engine.checkpoint import Checkpoint
from maskseg.errors import UserError, describe_error

Key = TypeVar("Key")

_STATE_KEYS = ("optimizer", "scheduler", "scaler", "rng")  # of a training, beside its counters
_SCALER_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
_MAX_SHOWN = 60  # characters of a value in a message
_CUDA_RNG_BYTES = 16


class _FaultError(Exception):
    """A damaged value. key: its path in the checkpoint; problem: continues the sentence."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")


def check_training_state(checkpoint: Checkpoint, source: Path | str) -> None:
    """Check what does not depend on the model: counters, schedule, scaler and random states.

    source: the file of the checkpoint, for messages.

    Raises UserError for a checkpoint that contains only weights, and for a missing or wrong value,
    whose key it names.
    """
    if not any(key in checkpoint for key in _STATE_KEYS):
        raise UserError(
            f"{source}: the checkpoint has no state of an optimizer (a best.pt or converted "
            "weights): trainer.resume takes the run folder or its last.pt; trainer.init=... starts "
            "a new run from these weights"
        )
    try:
        step = _check_counters(checkpoint)
        _check_metrics(checkpoint)
        _check_ema_counter(checkpoint, step)
        num_groups = _check_optimizer_layout(_entry(checkpoint, "optimizer"))
        _check_schedule(_entry(checkpoint, "scheduler"), step, num_groups)
        _check_rates(checkpoint)
        _check_scaler(_entry(checkpoint, "scaler"))
        _check_rng(_entry(checkpoint, "rng"))
    except _FaultError as fault:
        raise _damaged(source, fault) from fault


def check_weights(model: nn.Module, checkpoint: Checkpoint, source: Path | str) -> None:
    """Check the dtypes of the weights, and names, shapes and dtypes of the EMA's.

    The names and shapes of the weights fit the model already. Raises UserError.
    """
    expected = model.state_dict()
    ema = checkpoint.get("ema")
    try:
        _check_tensors(expected, checkpoint["model"], "model")
        if ema is not None:
            _check_tensors(expected, ema["model"], "ema.model")
    except _FaultError as fault:
        raise _damaged(source, fault) from fault


def check_optimizer(optimizer: Optimizer, checkpoint: Checkpoint, source: Path | str) -> None:
    """Check that the state of the optimizer fits this one and its parameters. Raises UserError."""
    groups = checkpoint["optimizer"]["param_groups"]
    current = optimizer.state_dict()["param_groups"]
    if [_layout(group) for group in groups] != [_layout(group) for group in current]:
        raise UserError(
            f"{source}: the checkpoint is of another optimizer than this run's: resume with its "
            "config, or start from it by trainer.init"
        )
    try:
        for index, (group, own) in enumerate(zip(groups, current, strict=True)):
            _check_options(group, own, f"optimizer.param_groups[{index}]")
            _check_accepted(optimizer, group, f"optimizer.param_groups[{index}]")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _check_moments(checkpoint["optimizer"]["state"], parameters, checkpoint["step"])
    except _FaultError as fault:
        raise _damaged(source, fault) from fault


def check_scheduler(scheduler: LRScheduler, checkpoint: Checkpoint, source: Path | str) -> None:
    """Check that the values of the schedule are of the kinds that this one has.

    Raises UserError.
    """
    stored = checkpoint["scheduler"]
    try:
        for key, value in scheduler.state_dict().items():
            if key in stored and key != "lr_lambdas":
                _check_kind(stored[key], value, f"scheduler.{key}")
    except _FaultError as fault:
        raise _damaged(source, fault) from fault


def _damaged(source: Path | str, fault: _FaultError) -> UserError:
    return UserError(
        f"{source}: its training state is damaged: {fault}; resume another checkpoint of the run, "
        "or start from its weights by trainer.init"
    )


def _entry(values: Mapping[Key, object], key: Key, place: str = "") -> object:
    if key not in values:
        raise _FaultError(f"{place}{key}", "is missing")
    return values[key]


def _shown(value: object) -> str:
    """A short description of a value for a message."""
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__}"
    return repr(value)[:_MAX_SHOWN]


def _is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number; a bool is none."""
    if not isinstance(value, int | float) or type(value) not in (int, float):
        return False
    return abs(value) <= sys.float_info.max  # which excludes NaN, too


def _check_count(value: object, key: str, most: float, least: int = 0) -> int:
    """Return a count. Raises _FaultError unless it is an integer from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        limit = "" if most == math.inf else f" to {most:g}"
        raise _FaultError(key, f"is {_shown(value)}, not an integer from {least}{limit}")
    return value


def _check_dict(value: object, key: str) -> dict[object, object]:
    if not isinstance(value, dict):
        raise _FaultError(key, f"is {_shown(value)}, not a dictionary")
    return value


def _check_list(value: object, key: str) -> Sequence[object]:
    if not isinstance(value, list | tuple) or not value:
        raise _FaultError(key, f"is {_shown(value)}, not a list of values")
    return value


def _check_numbers(value: object, key: str, length: int) -> list[int | float]:
    """Return a list of `length` finite numbers. Raises _FaultError."""
    values = _check_list(value, key)
    numbers = [number for number in values if _is_number(number)]
    if len(numbers) < len(values) or len(values) != length:
        raise _FaultError(key, f"is not a list of {length} finite numbers")
    return numbers


def _check_counters(checkpoint: Checkpoint) -> int:
    """Check the step, and the counters of evaluations. Returns the step."""
    step = _check_count(_entry(checkpoint, "step"), "step", math.inf)
    _check_count(_entry(checkpoint, "evaluated"), "evaluated", step)
    _check_count(_entry(checkpoint, "stale"), "stale", step)
    return step


def _check_metrics(checkpoint: Checkpoint) -> None:
    best = _entry(checkpoint, "best")
    if best is not None and type(best) not in (int, float):
        raise _FaultError("best", f"is {_shown(best)}, not a number")
    for name, value in _check_dict(_entry(checkpoint, "metrics"), "metrics").items():
        if not isinstance(name, str) or type(value) not in (int, float):
            raise _FaultError(f"metrics.{str(name)[:_MAX_SHOWN]}", f"is {_shown(value)}")


def _check_ema_counter(checkpoint: Checkpoint, step: int) -> None:
    ema = _entry(checkpoint, "ema")
    if ema is None:
        return
    values = _check_dict(ema, "ema")
    _check_dict(_entry(values, "model", "ema."), "ema.model")
    _check_count(_entry(values, "updates", "ema."), "ema.updates", step)


def _check_optimizer_layout(value: object) -> int:
    """Check the structure of the optimizer's state. Returns the number of parameter groups."""
    optimizer = _check_dict(value, "optimizer")
    groups = _check_list(_entry(optimizer, "param_groups", "optimizer."), "optimizer.param_groups")
    count = 0
    for index, entry in enumerate(groups):
        key = f"optimizer.param_groups[{index}]"
        group = _check_dict(entry, key)
        parameters = _check_list(_entry(group, "params", f"{key}."), f"{key}.params")
        if list(parameters) != list(range(count, count + len(parameters))):
            raise _FaultError(f"{key}.params", "does not number the parameters")
        count += len(parameters)
        if not all(isinstance(name, str) for name in group):
            raise _FaultError(key, "has a key that is not a string")
    state = _check_dict(_entry(optimizer, "state", "optimizer."), "optimizer.state")
    for number, moments in state.items():
        _check_count(number, f"optimizer.state: the key {_shown(number)}", count - 1)
        _check_dict(moments, f"optimizer.state[{number}]")
    return len(groups)


def _check_schedule(value: object, step: int, num_groups: int) -> None:
    schedule = _check_dict(value, "scheduler")
    last = _check_count(
        _entry(schedule, "last_epoch", "scheduler."), "scheduler.last_epoch", math.inf
    )
    if last != step:
        raise _FaultError("scheduler.last_epoch", f"is {last}, but step is {step}")
    if "_step_count" in schedule:
        _check_count(schedule["_step_count"], "scheduler._step_count", step + 1)
    for key in ("base_lrs", "_last_lr"):
        _check_numbers(_entry(schedule, key, "scheduler."), f"scheduler.{key}", num_groups)


def _check_rates(checkpoint: Checkpoint) -> None:
    """Check that the optimizer and the schedule agree about the learning rates."""
    schedule = checkpoint["scheduler"]
    names = {"lr": "_last_lr", "initial_lr": "base_lrs"}
    for index, group in enumerate(checkpoint["optimizer"]["param_groups"]):
        for name, other in names.items():
            key = f"optimizer.param_groups[{index}].{name}"
            rate = group.get(name)
            expected = schedule[other][index]
            if isinstance(rate, Tensor) and rate.numel() == 1:
                rate = float(rate)
            if not _is_number(rate) or rate < 0:
                raise _FaultError(key, f"is {_shown(rate)}, not a learning rate")
            if not math.isclose(rate, expected, rel_tol=1e-6):
                raise _FaultError(key, f"is {rate:g}, but scheduler.{other} is {expected:g}")


def _check_scaler(value: object) -> None:
    """Check the loss scaler; it is empty for a precision that has none."""
    scaler = _check_dict(value, "scaler")
    if not scaler:
        return
    for name in _SCALER_KEYS:
        number = _entry(scaler, name, "scaler.")
        least = 0 if name == "_growth_tracker" else 1e-30
        if not _is_number(number) or number < least:
            raise _FaultError(f"scaler.{name}", f"is {_shown(number)}, not a positive number")
    _check_count(scaler["growth_interval"], "scaler.growth_interval", math.inf, least=1)
    _check_count(scaler["_growth_tracker"], "scaler._growth_tracker", math.inf)


def _check_rng(value: object) -> None:
    """Check the random states, one entry per rank."""
    for rank, entry in enumerate(_check_list(value, "rng")):
        key = f"rng[{rank}]"
        states = _check_dict(entry, key)
        state = _entry(states, "cpu", f"{key}.")
        if not isinstance(state, Tensor):
            raise _FaultError(f"{key}.cpu", f"is {_shown(state)}, not a random state")
        try:
            torch.Generator().set_state(state)
        except (RuntimeError, TypeError) as error:
            problem = f"is not a random state ({describe_error(error)})"
            raise _FaultError(f"{key}.cpu", problem) from error
        cuda = _entry(states, "cuda", f"{key}.")
        if cuda is not None and not _is_cuda_state(cuda):
            raise _FaultError(f"{key}.cuda", f"is {_shown(cuda)}, not a random state")


def _is_cuda_state(state: object) -> bool:
    return (
        isinstance(state, Tensor)
        and state.dtype == torch.uint8
        and state.shape == (_CUDA_RNG_BYTES,)
    )


def _check_tensors(
    expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], place: str
) -> None:
    """Check names, shapes and dtypes of a state dict."""
    for name in [*expected, *stored]:
        key = f"{place}.{name[:_MAX_SHOWN]}"
        if name not in stored:
            raise _FaultError(key, "is missing")
        if name not in expected:
            raise _FaultError(key, "is not a weight of this model")
        own = expected[name]
        value = stored[name]
        if value.shape != own.shape or value.dtype != own.dtype:
            raise _FaultError(key, f"is {_shown(value)}, not {_shown(own)}")


def _layout(group: Mapping[str, object]) -> tuple[set[str], int]:
    """The names of a parameter group's options, and its number of parameters."""
    parameters = group["params"]
    assert isinstance(parameters, list | tuple)
    return set(group), len(parameters)


def _check_options(group: Mapping[str, object], own: Mapping[str, object], place: str) -> None:
    """Check that the options of a parameter group have the kinds of the current ones."""
    for name, value in group.items():
        if name != "params":
            _check_kind(value, own[name], f"{place}.{name}")


def _check_kind(value: object, own: object, key: str) -> None:
    """Check that a value has the kind of the current one: number, flag, text, list or tensor."""
    if own is None:
        is_valid = value is None or isinstance(value, bool) or _is_number(value)
    elif isinstance(own, bool):
        is_valid = value is None or isinstance(value, bool)
    elif isinstance(own, int | float):
        is_valid = _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1)
    elif isinstance(own, list | tuple):
        _check_kinds(value, own, key)
        return
    else:
        is_valid = isinstance(value, type(own))
    if not is_valid:
        raise _FaultError(key, f"is {_shown(value)}, where this run has {_shown(own)}")


def _check_kinds(value: object, own: Sequence[object], key: str) -> None:
    """Check the length of a list and the kinds of its values."""
    if not isinstance(value, list | tuple) or len(value) != len(own):
        raise _FaultError(key, f"is {_shown(value)}, where this run has {len(own)} values")
    for index, (inner, other) in enumerate(zip(value, own, strict=True)):
        _check_kind(inner, other, f"{key}[{index}]")


def _check_accepted(optimizer: Optimizer, group: Mapping[str, Any], place: str) -> None:
    """Check the options of a parameter group by the constructor of the optimizer."""
    names = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in group.items() if name in names and name != "params"}
    if "fused" in options:
        options["fused"] = None  # whether there is such a kernel depends on the device
    try:
        type(optimizer)([torch.zeros(1, requires_grad=True)], **options)
    except ValueError as error:
        raise _FaultError(
            place, f"is refused by the optimizer ({describe_error(error)})"
        ) from error


def _check_moments(
    state: Mapping[int, Mapping[str, object]], parameters: Sequence[Tensor], step: int
) -> None:
    """Check what the optimizer stores for each parameter.

    Parameters of as many dimensions have the same entries. An entry has the parameter's shape
    wherever it has it for any parameter; otherwise it is a number, or can be broadcast to it.
    """
    names: dict[bool, set[str]] = {True: set(), False: set()}
    full_size: set[str] = set()
    for number, moments in state.items():
        parameter = parameters[number]
        names[parameter.ndim > 1].update(moments)
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                full_size.add(name)
    for number, moments in state.items():
        parameter = parameters[number]
        place = f"optimizer.state[{number}]"
        for name in sorted(names[parameter.ndim > 1], key=str):
            key = f"{place}.{str(name)[:_MAX_SHOWN]}"
            value = _entry(dict(moments), name, f"{place}.")
            _check_moment(value, parameter, key, is_full_size=name in full_size)
            if name == "step":
                _check_optimizer_step(value, key, step)


def _check_moment(value: object, parameter: Tensor, key: str, is_full_size: bool) -> None:
    if isinstance(value, Tensor):
        fits = value.shape == parameter.shape
        if not is_full_size:
            fits = value.numel() == 1 or _broadcasts(value.shape, parameter.shape)
        if not fits or not value.is_floating_point():
            raise _FaultError(key, f"is {_shown(value)}, its parameter is {_shown(parameter)}")
        if not bool(torch.isfinite(value).all()):
            raise _FaultError(key, "has values that are not finite")
    elif is_full_size and value is not None:
        raise _FaultError(key, f"is {_shown(value)}, not a tensor")
    elif not (value is None or _is_number(value)):
        raise _FaultError(key, f"is {_shown(value)}, not a number")


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a shape of as many dimensions can be broadcast to `target`."""
    return len(shape) == len(target) and all(
        side in (1, other) for side, other in zip(shape, target, strict=True)
    )


def _check_optimizer_step(value: object, key: str, step: int) -> None:
    """Check the optimizer's count of its steps, which excludes skipped ones."""
    count = float(value) if isinstance(value, Tensor) else value
    if not _is_number(count) or not 0 <= count <= step or count != int(count):
        raise _FaultError(key, f"is {_shown(count)}, not a count of at most {step} steps")
