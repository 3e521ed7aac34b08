"""Configs that are derived from others: from the config of a checkpoint, or a part of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.auto import open_keys
from maskseg.config.build import set_key
from maskseg.config.checkpoint_config import read_checkpoint_config
from maskseg.config.compose import (
    check_choice,
    check_overrides,
    choose_length,
    compose,
    keys_of,
    nearest,
)
from maskseg.config.overrides import key_of
from maskseg.config.path_values import quote_paths
from maskseg.config.show import show, split_options
from maskseg.engine.loggers import DEFAULT_LOGGERS
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import find_config, is_group

# Keys of the data that belong to the model, and that it keeps on other data.
_DATA_KEYS_OF_MODEL = ("num_classes", "num_things", "point_ranges", "test_transforms")
_KEYS_OF_CLASSES = ("data.num_classes", "data.num_things", "data.point_ranges")
# Keys of the model that may differ from those of the weights: they do not change the predictions,
# or a difference shows in the shapes of the weights.
_KEYS_OF_A_START = ("run_dir", "trainer.resume", "trainer.resume_changed_data")
# Keys that do not change the losses of a training (or beginnings of these keys).
_KEYS_WITHOUT_EFFECT = (
    *("name", "evaluation.", "trainer.init", "trainer.log_every", "trainer.checkpoint_every"),
    *("trainer.keep_checkpoints", "trainer.evaluate_every", "trainer.best_metric"),
    *("trainer.patience", "trainer.max_bad_steps", "trainer.channels_last", "trainer.plots"),
    *("trainer.loggers", "trainer.safetensors"),
    *("data.num_workers", "data.timeout", "data.check_images", "data.max_pixels"),
    *("data.size_range", "data.min_proposals"),  # by which other keys were chosen
    *("data.root", "data.images", "data.train_json", "data.val_json", "data.train_images"),
    *("data.val_images", "data.val_proposals", "data.val_semantic", "data.val_segments"),
    *("data.test_transforms", "data.train_proposals", "data.stuff_json", "data.cache"),
)
_MAX_VALUE = 60  # characters of a value in a message
_HARMLESS_KEYS = ("weights", "num_classes", "ranges", "frozen_stages", "loss_weight")


def from_checkpoint(
    text: str, overrides: Sequence[str], tool: str, base: DictConfig | None = None
) -> DictConfig:
    """The config of a trained model, with the keys of a tool and the overrides of the command line.

    text: the config of the checkpoint; tool: its own keys are those of `configs/<tool>.yaml`.
    base: keys that the config gets where the checkpoint has none of that name.
    The override `data=NAME` replaces the data group of the training, and keeps the checkpoint's
    number of classes, test transforms and segment sampler. `group@place=NAME` puts a file of a
    group in a place of the config.
    Raises Shown where the overrides contain an option of `maskseg.config.show`, and UserError.
    """
    overrides, options = split_options(quote_paths(overrides))
    trained = read_checkpoint_config(text)
    _reset_loggers(trained)
    data_choices = [override for override in overrides if key_of(override) == "data"]
    if data_choices:
        trained.data = _replace_data(trained, data_choices)
    config = cast(DictConfig, OmegaConf.merge(base or {}, trained, compose(tool, [])))
    placements = [override for override in overrides if "@" in override.partition("=")[0]]
    _place_groups(config, placements)
    OmegaConf.set_struct(config, True)
    defaults = config.copy()
    for override in overrides:
        if override not in data_choices and override not in placements:
            _apply_override(config, override)
    check_overrides(overrides, config, defaults.copy)
    for key in open_keys(config):
        raise UserError(
            f"{key}=auto: only a training chooses it: set it to a value, or leave it out"
        )
    show(options, config, group_choices([*data_choices, *placements]))
    return config


def _reset_loggers(config: DictConfig) -> None:
    """Set the default loggers: a checkpoint does not choose that a run is uploaded."""
    if isinstance(config.get("trainer"), DictConfig):
        set_key(config, "trainer.loggers", list(DEFAULT_LOGGERS))


def resumed_config(text: str, overrides: Sequence[str]) -> DictConfig:
    """The config of a training that is resumed, with the overrides of the command line.

    text: the config of its checkpoint. What belongs to one start (`run_dir`, `trainer.resume`) is
    that of the command line, and the classes are read from the data again. So are the loggers: a
    checkpoint does not choose that a run is uploaded to a service.
    Raises Shown where the overrides contain an option of `maskseg.config.show`, and UserError.
    """
    overrides, options = split_options(quote_paths(overrides))
    config = read_checkpoint_config(text)
    for key in (*_KEYS_OF_CLASSES, "run_dir", "trainer.resume"):
        set_key(config, key, None)
    set_key(config, "trainer.resume_changed_data", False)
    _reset_loggers(config)
    OmegaConf.set_struct(config, True)
    defaults = config.copy()
    for override in overrides:
        _apply_override(config, override)
    choose_length(config, overrides)
    check_overrides(overrides, config, defaults.copy)
    show(options, config, {})
    return config


def has_choices(overrides: Sequence[str]) -> bool:
    """Whether overrides choose, add or remove groups, so that they need the installed configs."""
    return any(
        override.startswith(("~", "+"))
        or "@" in override.partition("=")[0]
        or is_group(key_of(override))
        for override in overrides
    )


def _replace_data(trained: DictConfig, choices: Sequence[str]) -> DictConfig:
    """The data group that the command line chooses, with the keys that belong to the model."""
    data: DictConfig = compose("data_only", choices).data
    values = OmegaConf.to_container(trained.data, resolve=True)
    assert isinstance(values, dict)
    if "size_range" in data and "size_range" in values:  # the transforms refer to the size
        data.size = values["size"]
        values["test_transforms"] = trained.data.test_transforms
    for key in _DATA_KEYS_OF_MODEL:
        set_key(data, key, values.get(key))
    if "segment_sampler" in data:
        data.segment_sampler = trained.data.get("segment_sampler")
    return data


def _apply_override(config: DictConfig, override: str) -> None:
    """Set the value of an existing key. Raises UserError."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is not of the form key=value; --help shows commands")
    if is_group(key):
        raise UserError(f"{override}: {_explain_group(key, value)}")
    if key not in set(keys_of(config)):
        raise UserError(f"{override}: {nearest(key, config)}")
    parser = OverridesParser.create()
    try:
        OmegaConf.update(config, key, parser.parse_override(override).value())
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{override}: {' '.join(str(error).split())}") from error


def _explain_group(group: str, value: str) -> str:
    """Why a group cannot be chosen beside a checkpoint, and what to write instead."""
    if group == "model" and Path(value).suffix:
        return f"checkpoint={value} names the file of a model"
    problem = "the checkpoint has a config of its own; data=NAME chooses other data"
    if group == "experiment":
        return problem
    return f"{problem}, {group.replace('/', '.')}.KEY=VALUE sets a key of the checkpoint's"


def group_choices(overrides: Sequence[str]) -> dict[str, str]:
    """The choices of groups among overrides: group or group@place -> name."""
    choices = [o.partition("=") for o in overrides if is_group(key_of(o))]
    return {group: name for group, _, name in choices}


def names_data(overrides: Sequence[str], key: str = "data") -> bool:
    """Whether the command line names the dataset, or the part `key` of it.

    Otherwise the config of the checkpoint names it.
    """
    return any(key_of(override) in ("data", key) for override in overrides)


def _place_groups(config: DictConfig, overrides: Sequence[str]) -> None:
    """Replace the value of each place by `group@place=NAME`.

    Raises UserError for a group or a place that does not exist.
    """
    for override in overrides:
        check_choice(override)
        group, _, place = override.partition("=")[0].partition("@")
        file = find_config(group, override.partition("=")[2])
        if file is None or OmegaConf.select(config, place) is None:
            raise UserError(
                f"{override}: there is no such group, or no {place} in the checkpoint's config"
            )
        values = OmegaConf.load(file)
        if "defaults" in values:
            raise UserError(
                f"{override}: a group with a defaults list can only be chosen for a new model"
            )
        OmegaConf.update(config, place, values, merge=False)


def group_config(key: str, overrides: Sequence[str]) -> DictConfig:
    """A config with one key only, as `train` composes it with the overrides."""
    config = OmegaConf.create()
    value = OmegaConf.select(compose("train", overrides), key)
    OmegaConf.update(config, key, value, force_add=True)
    return config


def model_differences(config: DictConfig, text: str) -> list[str]:
    """Compare the model of a config with that of a checkpoint's config.

    Weights can have the right shapes and still give other predictions, for example with another
    pixel mean or another stride.

    text: the config of the checkpoint. -> the keys that both have, with different values, as
    `key=checkpoint's value (here config's value)`.
    """
    try:
        trained = read_checkpoint_config(text)
    except UserError:
        return []
    trained_values = flatten(OmegaConf.to_container(trained.model, resolve=True), "model.")
    values = flatten(OmegaConf.to_container(config.model, resolve=True), "model.")
    differences = []
    for key, trained_value in trained_values.items():
        if key not in values or key.rsplit(".", 1)[-1] in _HARMLESS_KEYS:
            continue
        if trained_value != values[key]:
            differences.append(f"{key}={trained_value} (here {values[key]})")
    return differences


def config_differences(config: DictConfig, text: str) -> list[str]:
    """The keys in which a config differs from that of the checkpoint that it resumes.

    text: the config of the checkpoint. Keys that a resume always sets are left out. -> for each
    key, `key: old value -> new value`.
    """
    old_values = flatten(parse_yaml(text))
    new_values = flatten(OmegaConf.to_container(config, resolve=False))
    differences = []
    for key in [*old_values, *(key for key in new_values if key not in old_values)]:
        if key in _KEYS_OF_A_START or key not in old_values:
            continue
        new_value = new_values.get(key, "no such key")
        if old_values[key] != new_value:
            old_text = str(old_values[key])[:_MAX_VALUE]
            differences.append(f"{key}: {old_text} -> {str(new_value)[:_MAX_VALUE]}")
    return differences


def changes_numbers(difference: str) -> bool:
    """Whether a difference of `config_differences` can change what is computed in a training.

    The contents of data files are compared by themselves, whatever their place is.
    """
    key = difference.partition(": ")[0]
    return not key.startswith(_KEYS_WITHOUT_EFFECT)


def flatten(node: object, prefix: str = "") -> dict[str, object]:
    """Nested plain values as dotted key -> value. A list is a value."""
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    values: dict[str, object] = {}
    for name, inner in node.items():
        values |= flatten(inner, f"{prefix}{name}.")
    return values
