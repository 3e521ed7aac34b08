"""Read the config of a checkpoint, which may come from an unknown source, and check it.

The keys that are used are `model`, the groups of a training and the scalar keys beside them. The
model and the transforms may name the closed set of classes of `maskseg.config.trust`. For each of
the other groups, the checkpoint only selects one of the installed groups and sets values of its
keys: the classes that are built and the interpolations come from the installed configs. The only
interpolations that a checkpoint may bring are plain references to other keys.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.compose import check_kind, nearest
from maskseg.config.trust import (
    check_closed,
    checkpoint_targets,
    model_targets,
    refusal,
    superpixel_targets,
    targets_of,
    transform_targets,
)
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folder, config_folders, find_config, group_files

_PREFIX = "the checkpoint's config"
_REQUIRED = ("model", "data", "trainer", "evaluation")
_GROUPS = ("data", "optimizer", "scheduler", "trainer", "evaluation")
# The keys that `set_categories` adds to any data group.
_CATEGORY_KEYS: dict[str, object] = {"num_classes": None, "num_things": None, "point_ranges": None}
# The key of the data whose value is itself an installed group. It is built later, when the number
# of classes is known.
_NESTED_GROUP = "segment_sampler"
# The keys of the data whose values name classes, and the function that lists what they may name.
_CLASS_KEYS = {
    "train_transforms": transform_targets,
    "test_transforms": transform_targets,
    "superpixels": superpixel_targets,
}
# A plain reference to another key. The call of a resolver contains a colon.
_REFERENCE = re.compile(r"\$\{\w+(?:\.\w+)*\}")
# The key of a reference, or of the resolver `oc.select` that the installed configs use.
_REFERENCED_KEY = re.compile(r"\$\{(?:oc\.select:)?(\w+(?:\.\w+)*)")
_MAX_EXPANDED = 500_000  # characters after all references are replaced by their values
_VALUE_SIZE = 10  # characters that each value counts in addition
_MAX_DEPTH = 200  # nested levels, and references to references

Plain = dict[str, Any]


def read_checkpoint_config(text: str) -> DictConfig:
    """Parse the config of a checkpoint and check all of it before anything is built.

    Raises UserError with a message of one line.
    """
    trained = _parse(text)
    _check_targets(trained)
    values = _select_values(trained)
    _check_references(trained["model"], "model")
    _check_size(values)
    try:
        config = OmegaConf.create(values)
        resolved = cast(Plain, OmegaConf.to_container(config, resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{_PREFIX} cannot be used ({' '.join(str(error).split())})") from error
    _check_resolved(resolved)
    # The checked values replace their interpolations, which otherwise could be resolved to
    # something else later.
    data = resolved["data"]
    installed = _find_installed_group("data", trained["data"])
    for key in (*_CLASS_KEYS, _NESTED_GROUP):
        if key in data and values["data"][key] != installed.get(key):
            config.data[key] = data[key]
    if isinstance(data.get("num_workers"), int):
        config.data.num_workers = min(data["num_workers"], os.cpu_count() or 1)
    return config


def _select_values(trained: Plain) -> Plain:
    """The keys that are used: the model, the groups of a training and the keys beside them."""
    values: Plain = {"model": trained["model"]}
    for group in _GROUPS:
        if group in trained:
            values[group] = _merge_into_installed(group, trained[group], group)
    top_level = _read_yaml(config_folder() / "train.yaml")
    for key in trained:
        if key in top_level and key != "defaults":
            check_kind(f"{_PREFIX}: {key}", top_level[key], trained[key])
            check_closed(trained[key], place=key)
            values[key] = trained[key]
    return values


def _check_resolved(resolved: Plain) -> None:
    """Check the values behind references: the closed set of classes, and the types again."""
    model = resolved["model"]
    models = model_targets()
    if not isinstance(model, dict) or model.get("_target_") not in models:
        names = sorted(name.rpartition(".")[2] for name in models)
        raise UserError(f"{_PREFIX}: model is not one of {', '.join(names)}")
    check_closed(model, place="model")
    for group in _GROUPS:
        if group in resolved:
            _check_group(group, resolved[group])
    for key in ("train_transforms", "test_transforms"):
        _check_transforms(f"data.{key}", resolved["data"].get(key) or [])


def _check_group(group: str, values: Plain) -> None:
    installed = _find_installed_group(group, values)
    for key, value in values.items():
        if key.startswith("_"):
            continue
        place = f"{group}.{key}"
        if key == _NESTED_GROUP and value is not None:
            _check_group(key, _merge_into_installed(key, value, place))
            continue
        allowed: frozenset[str] = frozenset()
        if group == "data" and key in _CLASS_KEYS:
            allowed = _CLASS_KEYS[key]()
        check_closed(value, allowed, place)
        if "${" not in str(installed[key]):
            check_kind(f"{_PREFIX}: {place}", installed[key], value)


def _check_transforms(place: str, steps: Iterable[object]) -> None:
    transforms = transform_targets()
    for step in steps:
        if not isinstance(step, dict) or step.get("_target_") not in transforms:
            raise UserError(f"{_PREFIX}: {place} has {str(step)[:100]}, which is not a transform")


def _parse(text: str) -> Plain:
    """Parse the YAML text. Raises UserError for a text that is not the config of a training."""
    try:
        trained = parse_yaml(text)
        _check_types(trained)
        is_config = isinstance(trained, dict) and all(
            isinstance(trained.get(name), dict) for name in _REQUIRED
        )
        if not is_config:
            raise ValueError(
                f"it lacks one of {', '.join(_REQUIRED)}, or one of these is not a group of keys"
            )
    except ValueError as error:
        raise UserError(f"{_PREFIX} cannot be used ({error})") from error
    return cast(Plain, trained)


def _check_types(value: object) -> None:
    """Raise ValueError for keys that are not strings, and for types that no config has.

    YAML has more types, such as dates.
    """
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("it has a key that is not a string")
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
    """Raise UserError for a `_target_` that neither the closed set nor an installed group has."""
    allowed = checkpoint_targets()
    group_targets: set[object] = set()
    for name in (*_GROUPS, _NESTED_GROUP):
        group_targets.update(group.get("_target_") for group in _installed_groups(name))
    for target in targets_of(trained):
        if not isinstance(target, str):
            raise UserError(refusal(target))
        if target not in allowed and target not in group_targets:
            raise UserError(refusal(target))


def _merge_into_installed(group: str, values: object, place: str) -> Plain:
    """The installed group that `values` belong to, with these values.

    Raises UserError where there is no such group, or for a key or a type that it does not have.
    """
    if not isinstance(values, dict):
        raise UserError(f"{_PREFIX} cannot be used ({place} is not a group of keys)")
    installed = _find_installed_group(group, values)
    result = dict(installed)
    for key, value in values.items():
        if key not in installed:
            message = nearest(f"{place}.{key}", OmegaConf.create({place: installed}))
            raise UserError(f"{_PREFIX}: {message}")
        if value != installed[key]:
            result[key] = _check_value(key, value, installed[key], f"{place}.{key}")
    return result


def _find_installed_group(group: str, values: Plain) -> Plain:
    """The installed group with the same `_target_`; of several, the first that has all the keys.

    Raises UserError where there is none.
    """
    target = values.get("_target_")
    candidates = [keys for keys in _installed_groups(group) if keys.get("_target_") == target]
    if not candidates:
        raise UserError(refusal(target))
    for candidate in candidates:
        if values.keys() <= candidate.keys():
            return candidate
    return candidates[0]


def _check_value(key: str, value: object, default: object, place: str) -> object:
    """Check a value that differs from the installed one. -> the value to use."""
    if key.startswith("_"):
        raise UserError(f"{_PREFIX}: the key {key!r} of {place.rpartition('.')[0]} is refused")
    if key == _NESTED_GROUP and value is not None:
        return _merge_into_installed(key, value, place)
    _check_references(value, place)
    if "${" not in f"{default}{value}":
        check_kind(f"{_PREFIX}: {place}", default, value)
    return value


def _installed_groups(group: str) -> list[Plain]:
    """The keys of each file of a group, including those of the files in its defaults list.

    The files are those of this package and of the enabled plug-ins.
    """
    return _read_groups(group, config_folders())


@functools.cache
def _read_groups(group: str, folders: tuple[Path, ...]) -> list[Plain]:
    del folders  # a key of the cache
    added = _CATEGORY_KEYS if group == "data" else {}
    return [added | _merge_file(group, file) for file in group_files(group)]


def _merge_file(group: str, file: Path) -> Plain:
    values = dict(_read_yaml(file))
    merged: Plain = {}
    for entry in values.pop("defaults", []):
        if entry == "_self_":
            continue
        base = find_config(group, entry) if isinstance(entry, str) else None
        if base is None:
            raise UserError(f"{file}: its defaults list may only name files of the group {group}")
        merged |= _merge_file(group, base)
    return merged | values


@functools.cache
def _read_yaml(file: Path) -> Plain:
    return dict(parse_yaml(file.read_text(encoding="utf-8")))


def _strings(value: object, place: str) -> Iterator[tuple[str, str]]:
    """All strings in nested values, with their keys."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{place}.{index}")


def _check_references(value: object, place: str) -> None:
    """Raise UserError for interpolations other than plain references, such as `${oc.env:HOME}`."""
    for key, text in _strings(value, place):
        has_resolver = "${" in _REFERENCE.sub("", text)
        has_escape = "${" in text and "\\" in text
        if has_resolver or has_escape:
            raise UserError(
                f"{_PREFIX}: {key}={text[:200]!r} is refused; only plain references "
                "${key} to other keys are allowed"
            )


def _check_size(config: Plain) -> None:
    """Raise UserError where references to references would expand almost without end."""
    sizes: dict[str, int] = {}

    def size_of(value: object, depth: int) -> int:
        if depth > _MAX_DEPTH:
            raise UserError(
                f"{_PREFIX} is refused: its values are nested or refer to each other in a chain of "
                f"more than {_MAX_DEPTH}"
            )
        size = _VALUE_SIZE
        if isinstance(value, str):
            size += len(value)
            for key in _REFERENCED_KEY.findall(value):
                size += size_of_key(key, depth + 1)
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                size += size_of(inner, depth + 1)
        return size

    def size_of_key(key: str, depth: int) -> int:
        if key not in sizes:
            sizes[key] = size_of(_select(config, key), depth)
        return sizes[key]

    if size_of(config, 0) > _MAX_EXPANDED:
        raise UserError(f"{_PREFIX} is refused: its values refer to each other too often")


def _select(config: Plain, key: str) -> object:
    """The value of a dotted key in plain values, None where there is none."""
    node: object = config
    for name in key.split("."):
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node
