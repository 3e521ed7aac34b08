"""The config that a checkpoint holds: text that somebody else may have written -> a config that is safe to use.

What is used of it: `model`, the groups of a training and the numbers beside them. The model and the
transforms may name the closed set of `maskseg.config.trust`. Of each other group the file only
chooses which of the installed ones it is, and gives values to its keys: what is built comes from the
installed config, and so does every interpolation but plain references to other keys.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.compose import check_kind, nearest
from maskseg.config.trust import (
    FROM_CHECKPOINT,
    MODELS,
    SUPERPIXELS,
    TRANSFORMS,
    check_closed,
    refusal,
    targets_of,
)
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folder

_PREFIX = "the checkpoint's config"
_REQUIRED = ("model", "data", "trainer", "evaluation")
_GROUPS = ("data", "optimizer", "scheduler", "trainer", "evaluation")
_CATEGORY_KEYS: dict[str, Any] = {
    "num_classes": None,
    "num_things": None,
    "point_ranges": None,
}  # of `set_categories`, in any data group
_PARTIAL = "segment_sampler"  # key of the data whose value is a group of its own, built later with the numbers of classes
_REFERENCE = re.compile(r"\$\{\w+(?:\.\w+)*\}")  # to another key; a resolver has a colon
_REFERRED = re.compile(
    r"\$\{(?:oc\.select:)?(\w+(?:\.\w+)*)"
)  # the key of a reference, or of an installed config's resolver
_MAX_EXPANDED, _MAX_DEPTH = (
    500_000,
    200,
)  # characters behind all references, a value counts as ten; levels and references to references
_SLOTS = {
    "train_transforms": TRANSFORMS,
    "test_transforms": TRANSFORMS,
    "superpixels": SUPERPIXELS,
}  # keys of the data that name classes

Plain = dict[str, Any]


def read_checkpoint_config(text: str) -> DictConfig:
    """The config of a checkpoint, checked as a whole before anything is built. Raises UserError, in one line."""
    trained = _parse(text)
    _check_targets(trained)
    kept: Plain = {"model": trained["model"]}
    for group in (name for name in _GROUPS if name in trained):
        kept[group] = _over_installed(group, trained[group], group)
    numbers = _yaml(config_folder() / "train.yaml")
    for key in (name for name in trained if name in numbers and name != "defaults"):
        check_kind(f"{_PREFIX}: {key}", numbers[key], trained[key])
        check_closed(trained[key], place=key)
        kept[key] = trained[key]
    _check_references(trained["model"], "model")
    _check_size(kept)
    try:
        config = OmegaConf.create(kept)
        resolved = cast(Plain, OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{_PREFIX} cannot be used ({' '.join(str(error).split())})") from error
    _check_resolved(resolved)
    for key in (
        name
        for name in (*_SLOTS, _PARTIAL)
        if name in resolved["data"] and kept["data"][name] != _installed_value("data", name)
    ):
        config.data[key] = resolved["data"][
            key
        ]  # nothing is left in it that could be resolved otherwise later
    if isinstance(resolved["data"].get("num_workers"), int):
        config.data.num_workers = min(resolved["data"]["num_workers"], os.cpu_count() or 1)
    return config


def _installed_value(group: str, key: str) -> Any:
    """A key's value in the first installed file of a group that has it."""
    return next((values[key] for values in _installed(group) if key in values), None)


def _check_resolved(resolved: Plain) -> None:
    """Checks what references stand for: the closed set, and again the types."""
    model = resolved["model"]
    if not isinstance(model, dict) or model.get("_target_") not in MODELS:
        names = sorted(name.rpartition(".")[2] for name in MODELS)
        raise UserError(f"{_PREFIX}: model is none of {', '.join(names)}")
    check_closed(model, place="model")
    for group in (name for name in _GROUPS if name in resolved):
        _check_group(group, resolved[group])
    for key in ("train_transforms", "test_transforms"):
        _check_transforms(f"data.{key}", resolved["data"].get(key) or [])


def _check_group(group: str, values: Plain) -> None:
    installed = _fitting_group(group, values)
    for key in (name for name in values if not name.startswith("_")):
        place = f"{group}.{key}"
        if key == _PARTIAL and values[key] is not None:
            _check_group(key, _over_installed(key, values[key], place))
            continue
        check_closed(
            values[key], _SLOTS.get(key, frozenset()) if group == "data" else frozenset(), place
        )
        if "${" not in str(installed[key]):
            check_kind(f"{_PREFIX}: {place}", installed[key], values[key])


def _check_transforms(place: str, steps: list[Any]) -> None:
    for step in steps:
        if not isinstance(step, dict) or step.get("_target_") not in TRANSFORMS:
            raise UserError(f"{_PREFIX}: {place} has {str(step)[:100]}, which is no transform")


def _parse(text: str) -> Plain:
    try:
        trained = parse_yaml(text)
        _check_types(trained)
        if not isinstance(trained, dict) or not all(
            isinstance(trained.get(name), dict) for name in _REQUIRED
        ):
            raise ValueError(f"it lacks one of {', '.join(_REQUIRED)}, or one is no group of keys")
    except ValueError as error:
        raise UserError(f"{_PREFIX} cannot be used ({error})") from error
    return cast(Plain, trained)


def _check_types(value: Any) -> None:
    """Raises ValueError for what YAML has and a config has not, such as dates, and for keys that are no text."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("it has a key that is no text")
        for inner in value.values():
            _check_types(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_types(inner)
    elif not (value is None or type(value) in (str, int, float, bool)):
        raise ValueError(f"it has a {type(value).__name__}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("it has a number of more than 64 bits")


def _check_targets(trained: Plain) -> None:
    """Raises UserError for a name that is neither in the closed set nor that of an installed group."""
    groups = {group.get("_target_") for name in (*_GROUPS, _PARTIAL) for group in _installed(name)}
    for target in targets_of(trained):
        if not isinstance(target, str) or (target not in FROM_CHECKPOINT and target not in groups):
            raise UserError(refusal(target))


def _over_installed(group: str, theirs: Any, place: str) -> Plain:
    """The installed group of theirs with their values. Raises UserError where there is none, or for a key or a type that it does not have."""
    if not isinstance(theirs, dict):
        raise UserError(f"{_PREFIX} cannot be used ({place} is no group of keys)")
    installed = _fitting_group(group, theirs)
    result = dict(installed)
    for key, value in theirs.items():
        if key not in installed:
            raise UserError(
                f"{_PREFIX}: {nearest(f'{place}.{key}', OmegaConf.create({place: installed}))}"
            )
        if value != installed[key]:
            result[key] = _checked_value(key, value, installed[key], f"{place}.{key}")
    return result


def _fitting_group(group: str, theirs: Plain) -> Plain:
    """The installed group of the same `_target_`, of several the first that has all of their keys. Raises UserError."""
    candidates = [own for own in _installed(group) if own.get("_target_") == theirs.get("_target_")]
    if not candidates:
        raise UserError(refusal(theirs.get("_target_")))
    fitting = [own for own in candidates if theirs.keys() <= own.keys()]
    return (fitting or candidates)[0]


def _checked_value(key: str, value: Any, default: Any, place: str) -> Any:
    if key.startswith("_"):
        raise UserError(f"{_PREFIX}: the key {key!r} of {place.rpartition('.')[0]} is refused")
    if key == _PARTIAL and value is not None:
        return _over_installed(key, value, place)
    _check_references(value, place)
    if "${" not in f"{default}{value}":
        check_kind(f"{_PREFIX}: {place}", default, value)
    return value


@functools.cache
def _installed(group: str) -> list[Plain]:
    """The keys of each file of a group, those of the files that it builds on included."""
    added = _CATEGORY_KEYS if group == "data" else {}
    return [added | _merged(file) for file in sorted((config_folder() / group).glob("[!_]*.yaml"))]


def _merged(file: Path) -> Plain:
    own = dict(_yaml(file))
    merged: Plain = {}
    for entry in own.pop("defaults", []):
        if entry != "_self_":
            merged |= _merged(file.parent / f"{entry}.yaml")
    return merged | own


@functools.cache
def _yaml(file: Path) -> Plain:
    return dict(parse_yaml(file.read_text(encoding="utf-8")))


def _strings(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(inner, f"{place}.{key}")


def _check_references(value: Any, place: str) -> None:
    """Raises UserError for an interpolation that is no plain reference, such as `${oc.env:HOME}`."""
    for where, text in _strings(value, place):
        if "${" in _REFERENCE.sub("", text) or ("${" in text and "\\" in text):
            raise UserError(
                f"{_PREFIX}: {where}={text[:200]!r} is refused; only ${{key}} may stand for another key's value"
            )


def _check_size(config: Plain) -> None:
    """Raises UserError where references to references would expand without end."""
    sizes: dict[str, int] = {}

    def size_of(value: Any, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise UserError(
                f"{_PREFIX} is refused: its values are nested or refer to each other in a chain of more than {_MAX_DEPTH}"
            )
        if isinstance(value, str):
            return (
                10
                + len(value)
                + sum(size_of_key(key, depth + 1) for key in _REFERRED.findall(value))
            )
        if isinstance(value, dict | list):
            return 10 + sum(
                size_of(inner, depth + 1)
                for inner in (value.values() if isinstance(value, dict) else value)
            )
        return 10

    def size_of_key(key: str, depth: int) -> int:
        if key not in sizes:
            sizes[key] = size_of(_select(config, key), depth)
        return sizes[key]

    if size_of(config, 0) > _MAX_EXPANDED:
        raise UserError(f"{_PREFIX} is refused: its values refer to each other too often")


def _select(config: Plain, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        else:
            return None
    return node
