"""Build objects from configs.

Only classes of this package, optimizers of torch and classes of enabled plug-ins are built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any, cast

import hydra
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from maskseg.config.auto import usual_size, with_usual_numbers
from maskseg.config.data_paths import check_data_paths
from maskseg.config.levels import fill_levels, needs_levels
from maskseg.config.memory import MemoryLimit, TooLargeError
from maskseg.config.trust import (
    CHECKPOINT_TARGETS,
    TRAIN_TARGETS,
    check_closed,
    check_targets,
    construct,
)
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError, describe_error
from maskseg.models.backbones.fpn import FPN
from maskseg.structures import Categories

_STAGES = ("backbone", "proposer", "classifier", "head", "segmenter")  # modules of a model


def build(
    config: DictConfig | Mapping[str, object],
    allowed: Collection[str] = TRAIN_TARGETS,
    **values: object,
) -> Any:
    """Build the object that a config with `_target_` describes.

    allowed: `TRAIN_TARGETS` for the user's own config, `CHECKPOINT_TARGETS` for that of a
        checkpoint; each together with the classes of the enabled plug-ins.
    values: further arguments of the constructor; not used with `CHECKPOINT_TARGETS`.
    Raises UserError for a name that is not allowed, and for values that a constructor refuses.
    """
    if allowed is CHECKPOINT_TARGETS:
        return construct(_resolve(config) if OmegaConf.is_config(config) else config)
    check_targets(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all", **values)
    except (HydraException, OmegaConfBaseException) as error:
        target = config.get("_target_", "a group without _target_")
        raise _to_user_error(error, target) from error


def build_optimizer(config: DictConfig, trainer: Trainer, model: nn.Module) -> Optimizer:
    """Build the optimizer of a training, with the learning rate for `batch_size`.

    Raises UserError for values that the optimizer rejects.
    """
    keys = _resolve(config.optimizer)
    base_batch_size = keys.pop("base_batch_size", None)
    return trainer.build_optimizer(model, build(keys), config.batch_size, base_batch_size)


def build_source(data: DictConfig, categories: Categories | None = None) -> Any:
    """Build the dataset that `config.data` describes.

    categories: those of a checkpoint. Raises UserError for a name that is not allowed, and for
    values that a constructor refuses.
    """
    check_targets(data)
    with usual_size(data):
        keys = cast(dict[str, Any], _resolve(data))
    target = keys.pop("_target_", None)
    try:
        source_class = hydra.utils.get_class(target)
        if not issubclass(source_class, CocoSource):
            return build(data)
        is_own = source_class.prepare is CocoSource.prepare and categories is None
        check_data_paths(keys, files_exist=is_own)
        values = hydra.utils.instantiate(OmegaConf.create(keys), _convert_="all")
        return source_class.from_keys(categories, **values)
    except (HydraException, OmegaConfBaseException, ImportError, TypeError) as error:
        raise _to_user_error(error, target) from error


def _to_user_error(error: Exception, target: object) -> UserError:
    """The UserError that a constructor raised, else one with the first line of the message."""
    cause = error.__cause__
    if isinstance(cause, UserError):
        return cause
    text = describe_error(cause or error)
    return UserError(f"config: {text} (in {target})")


def build_model(
    config: DictConfig, allowed: Collection[str] = TRAIN_TARGETS, pretrained: bool = True
) -> nn.Module:
    """Build the model that `config.model` describes.

    pretrained: let backbones load their pretrained weights. They never do with
        `allowed=CHECKPOINT_TARGETS`, because the weights of the checkpoint follow.
    Raises UserError, also for a model that needs more memory than the machine has.
    """
    model = cast(dict[str, object], _resolve(with_usual_numbers(config).model))
    if allowed is CHECKPOINT_TARGETS:
        # The whole model is checked before its backbone is built to read its levels.
        check_closed(model, place="model")
    _read_levels(model, allowed)
    if not pretrained or allowed is CHECKPOINT_TARGETS:
        _clear_weights(model)
    _check_memory(model, allowed)
    built = cast(nn.Module, build(model, allowed))
    for key in _STAGES:
        if model.get(key) is not None and not isinstance(getattr(built, key, None), nn.Module):
            raise UserError(f"model.{key} is not a stage of a model: {str(model[key])[:100]}")
    return built


def _resolve(config: object) -> Any:
    """Plain values, with interpolations replaced by their values. Raises UserError."""
    try:
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from error


def _read_levels(model: dict[str, object], allowed: Collection[str]) -> None:
    """Fill in what the stages need to know about the levels of the backbone, in place.

    A stage may also name a level of the trunk below a pyramid, which the pyramid then passes on.
    Raises UserError for a level that does not exist.
    """
    stages = {key: stage for key, stage in model.items() if key != "backbone"}
    if not needs_levels(stages):
        return
    backbone = _build_on_meta(model, allowed)
    trunk_levels = backbone.trunk.levels if isinstance(backbone, FPN) else {}
    configured = list(getattr(backbone, "extra_levels", []))
    extra_levels = list(configured)
    for key, stage in stages.items():
        used = fill_levels(stage, f"model.{key}", backbone.levels, trunk_levels)
        extra_levels += [name for name in used if name not in extra_levels]
    if extra_levels != configured:
        model["backbone"] = {**_group(model, "backbone"), "extra_levels": extra_levels}


def proposer_strides(config: DictConfig) -> dict[str, int]:
    """The stride of each level that the model's proposer reads; {} where it reads none.

    Raises UserError.
    """
    model = cast(dict[str, object], _resolve(with_usual_numbers(config).model))
    _read_levels(model, TRAIN_TARGETS)
    return cast(dict[str, int], _group(_group(model, "proposer"), "strides"))


def _group(model: dict[str, object], key: str) -> dict[str, object]:
    """The keys of a part of a model, none where it is no group of keys."""
    value = model.get(key)
    return dict(value) if isinstance(value, dict) else {}


def _build_on_meta(model: dict[str, object], allowed: Collection[str]) -> Any:
    """Build the backbone without memory for its weights. Raises UserError where there is none."""
    config = deepcopy(_group(model, "backbone"))
    _clear_weights(config)
    backbone = None
    if config:
        with torch.device("meta"):
            backbone = build(config, allowed)
    if not hasattr(backbone, "levels"):
        raise UserError(
            "model.backbone is not a backbone, and other parts of the model read its levels"
        )
    return backbone


def _check_memory(model: dict[str, object], allowed: Collection[str]) -> None:
    """Raise UserError for a model that needs more memory than the machine has.

    The model is built without memory for its weights, and no random number is drawn.
    """
    config = deepcopy(model)
    _clear_weights(config)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), MemoryLimit():
            build(config, allowed)
    except TooLargeError:
        raise
    except UserError:  # of a part that needs its values; the construction itself reports others
        return


def _clear_weights(node: object) -> None:
    """Set each key `weights` to None, in place."""
    if isinstance(node, list):
        for value in node:
            _clear_weights(value)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "weights":
                node[key] = None
            else:
                _clear_weights(value)


def set_categories(config: DictConfig, categories: Categories) -> None:
    """Set `data.num_classes`, `num_things` and `point_ranges`, to which the model's keys refer."""
    ranges = [list(point_range) for point_range in categories.point_ranges]
    set_key(config, "data.num_classes", len(categories))
    set_key(config, "data.num_things", categories.num_things)
    set_key(config, "data.point_ranges", ranges)


def make_config(values: Mapping[str, object]) -> DictConfig:
    """A config of plain values."""
    return OmegaConf.create(dict(values))


def set_key(config: DictConfig, key: str, value: object) -> None:
    """Set the value of a key, which need not exist."""
    OmegaConf.update(config, key, value, force_add=True)


def select_keys(config: DictConfig, pattern: DictConfig) -> DictConfig:
    """The keys of the top level that `pattern` has too, with their values."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key in pattern])


def require_keys(config: DictConfig, *keys: str) -> None:
    """Raise UserError for a key without a value."""
    for key in keys:
        if OmegaConf.is_missing(config, key):
            raise UserError(f"{key}=... is missing (--help shows commands)")


def to_yaml(config: DictConfig, resolve: bool = False) -> str:
    """The config as YAML text, for files and checkpoints."""
    return OmegaConf.to_yaml(config, resolve=resolve)
