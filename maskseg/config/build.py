"""Config -> objects; nothing but our own classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import asdict
from typing import Any, cast

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from maskseg.config.trust import FROM_CHECKPOINT, TRUSTED, check_closed, check_targets, construct
from maskseg.errors import UserError
from maskseg.models.backbones.fpn import FPN
from maskseg.models.interfaces import Backbone
from maskseg.structures import Categories, FeatureSpec


def build(config: Any, allowed: Collection[str] = TRUSTED, **values: Any) -> Any:
    """The object that a config with `_target_` describes. allowed: `TRUSTED` for the user's own config, `FROM_CHECKPOINT` for that of a
    file. Raises UserError for what is refused, also by a constructor."""
    if allowed is FROM_CHECKPOINT:
        return construct(_resolved(config) if OmegaConf.is_config(config) else config)
    check_targets(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **values)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        text = str(cause or error).splitlines()[0]
        raise UserError(
            f"config: {text} (in {config.get('_target_', 'a group without _target_')})"
        ) from error


def build_model(
    config: DictConfig, allowed: Collection[str] = TRUSTED, pretrained: bool = True
) -> nn.Module:
    """`config.model` as a module. Without `pretrained`, no trunk loads weights: a checkpoint's follow. With `allowed=FROM_CHECKPOINT` none does."""
    model = _resolved(config.model)
    if allowed is FROM_CHECKPOINT:
        check_closed(
            model, place="model"
        )  # all of it, before the backbone is built to be asked for its levels
    _read_levels(model, allowed)
    if not pretrained or allowed is FROM_CHECKPOINT:
        _forget_weights(model)
    return cast(nn.Module, build(model, allowed))


def _resolved(config: Any) -> Any:
    """Plain values, with those that interpolations stand for. Raises UserError."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from error


def _read_levels(model: dict[str, Any], allowed: Collection[str]) -> None:
    """Fills `at` of stages that have such a key: what the backbone says of the `level` or the `levels` that they read. A pyramid hands on those of
    the trunk below it. Raises UserError for a level that is not there."""
    stages = {
        key: stage
        for key, stage in model.items()
        if isinstance(stage, dict) and "at" in stage and stage["at"] is None
    }
    if not stages:
        return
    backbone = _without_memory(model, allowed)
    below = cast(Backbone, backbone.trunk).levels if isinstance(backbone, FPN) else {}
    levels: dict[str, FeatureSpec] = {**backbone.levels, **below}
    handed_on = list(getattr(backbone, "keep", []))
    kept = list(handed_on)
    for key, stage in stages.items():
        names = _level_names(stage, f"model.{key}", levels)
        kept += [name for name in names if name not in backbone.levels and name not in kept]
        at = [
            {"_target_": f"{FeatureSpec.__module__}.FeatureSpec", **asdict(levels[name])}
            for name in names
        ]
        stage["at"] = dict(zip(names, at, strict=True)) if "levels" in stage else at[0]
    if kept != handed_on:
        model["backbone"]["keep"] = kept


def _without_memory(model: dict[str, Any], allowed: Collection[str]) -> Any:
    """The backbone, without a single weight. Raises UserError where there is none."""
    bare = deepcopy(model.get("backbone"))
    _forget_weights(bare)
    with torch.device("meta"):
        backbone = None if bare is None else build(bare, allowed)
    if not hasattr(backbone, "levels"):
        raise UserError(
            "model.backbone is no backbone, and other parts of the model read its levels"
        )
    return backbone


def _level_names(stage: dict[str, Any], place: str, levels: Mapping[str, FeatureSpec]) -> list[str]:
    """The levels that a stage reads. Raises UserError for one that the backbone does not have."""
    names = stage["levels"] if "levels" in stage else [stage.get("level")]
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name in levels for name in names)
    ):
        key = f"levels={names}" if "levels" in stage else f"level={stage.get('level')}"
        raise UserError(f"{place}.{key}: the backbone has {', '.join(levels)}")
    return names


def _forget_weights(node: Any) -> None:
    """Sets each key `weights` to None, in place."""
    if isinstance(node, list):
        for value in node:
            _forget_weights(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "weights":
                node[key] = None
            else:
                _forget_weights(value)


def set_categories(config: DictConfig, categories: Categories) -> None:
    """Fills `data.num_classes`, `num_things` and `point_ranges`, to which the model's keys refer."""
    ranges = [list(r) for r in categories.point_ranges]
    for key, value in {
        "num_classes": len(categories),
        "num_things": categories.num_things,
        "point_ranges": ranges,
    }.items():
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
