"""Config -> objects; nothing but our own classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from maskseg.errors import UserError
from maskseg.interfaces import Backbone, Level
from maskseg.modules.fpn import FPN
from maskseg.structures import Categories

# What a `_target_` may name. A config inside a checkpoint may have come with a downloaded file: it builds our own classes only.
TRUSTED = ("maskseg.", "torch.optim.")
FROM_CHECKPOINT = ("maskseg.",)


def check_targets(config: Any, allowed: Sequence[str]) -> None:
    """Raises UserError where a `_target_` names something outside `allowed`."""
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    if isinstance(plain, dict):
        target = plain.get("_target_")
        if target is not None and not (isinstance(target, str) and target.startswith(tuple(allowed)) and ".." not in target):
            raise UserError(f"config: _target_ {target!r} is refused; allowed are names that begin with {' or '.join(allowed)}")
        if target is not None and not _own(target, allowed):
            raise UserError(f"config: _target_ {target!r} is refused; it only passes through the package")
    for value in plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else ():
        check_targets(value, allowed)


def _own(target: str, allowed: Sequence[str]) -> bool:
    """Whether what the name leads to is defined where the name says, and not something that a module there has imported."""
    try:
        found = hydra.utils.get_object(target)
    except Exception:  # said again, and better, by the one who builds it
        return True
    return str(getattr(found, "__module__", "")).startswith(tuple(allowed)) and callable(found)


def build(config: Any, allowed: Sequence[str] = TRUSTED, **values: Any) -> Any:
    """The object that a config with `_target_` describes. Raises UserError for what its constructor refuses."""
    check_targets(config, allowed)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **values)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        text = str(cause or error).splitlines()[0]
        raise UserError(f"config: {text} (in {config.get('_target_', 'a group without _target_')})") from error


def build_model(config: DictConfig, allowed: Sequence[str] = TRUSTED, pretrained: bool = True) -> nn.Module:
    """`config.model` as a module. Without `pretrained`, no trunk loads weights: a checkpoint's follow."""
    model = config.copy().model
    _read_levels(model, allowed)
    if not pretrained:
        _forget_weights(model)
    return cast(nn.Module, build(model, allowed))


def _read_levels(model: DictConfig, allowed: Sequence[str]) -> None:
    """Fills `at` of stages that have such a key: what the backbone says of the `level` or the `levels` that they read. A pyramid hands on those of
    the trunk below it. Raises UserError for a level that is not there."""
    found = {str(key): model[key] for key in model}
    stages = {key: stage for key, stage in found.items() if isinstance(stage, DictConfig) and "at" in stage and stage.at is None}
    if not stages:
        return
    bare = model.copy().backbone
    _forget_weights(bare)
    with torch.device("meta"):  # no weight is made
        made = cast(Any, build(bare, allowed))
    below = cast(Backbone, made.trunk).levels if isinstance(made, FPN) else {}
    levels: dict[str, Level] = {**made.levels, **below}
    kept = list(getattr(made, "keep", []))
    for key, stage in stages.items():
        names = list(stage.levels) if "levels" in stage else [stage.level]
        if not names or not set(names) <= set(levels):
            told = f"levels={names}" if "levels" in stage else f"level={stage.level}"
            raise UserError(f"model.{key}.{told}: the backbone has {', '.join(levels)}")
        kept += [name for name in names if name not in made.levels and name not in kept]
        at = [{"_target_": f"{Level.__module__}.Level", **asdict(levels[name])} for name in names]
        stage.at = dict(zip(names, at, strict=True)) if "levels" in stage else at[0]
    if kept != list(getattr(made, "keep", [])):
        put(model, "backbone.keep", kept)


def _forget_weights(node: Any) -> None:
    if isinstance(node, DictConfig):
        for key in map(str, node):
            if key == "weights":
                node[key] = None
            elif not OmegaConf.is_interpolation(node, key):
                _forget_weights(node[key])


def set_categories(config: DictConfig, categories: Categories) -> None:
    """Fills `data.num_classes`, `num_things` and `point_ranges`, to which the model's keys refer."""
    ranges = [list(r) for r in categories.point_ranges]
    for key, value in {"num_classes": len(categories), "num_things": categories.num_things, "point_ranges": ranges}.items():
        put(config, f"data.{key}", value)


def put(config: DictConfig, key: str, value: Any) -> None:
    """Sets a key, one that the config does not have yet too."""
    OmegaConf.update(config, key, value, force_add=True)


def only(config: DictConfig, pattern: DictConfig) -> DictConfig:
    """The parts of a config that `pattern` has too, by the names of the first level."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key in pattern])


def require(config: DictConfig, *keys: str) -> None:
    """Raises UserError for a key without a value."""
    for key in keys:
        if OmegaConf.is_missing(config, key):
            raise UserError(f"{key}=... is missing (--help shows commands)")


def to_yaml(config: DictConfig, resolve: bool = False) -> str:
    """The config as text, for files and checkpoints."""
    return OmegaConf.to_yaml(config, resolve=resolve)
