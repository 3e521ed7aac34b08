"""The one file that knows Hydra: YAML and command line -> config -> objects."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import maskseg
from maskseg.errors import UserError

# What a `_target_` may name. A config inside a checkpoint may have come with a downloaded file: it builds our own classes only.
TRUSTED = ("maskseg.", "torch.optim.")
FROM_CHECKPOINT = ("maskseg.",)


def config_folder() -> Path:
    """`configs/` inside the installed package, or beside it in a checkout."""
    inside = Path(maskseg.__file__).parent / "configs"
    return inside if inside.is_dir() else Path(maskseg.__file__).parent.parent / "configs"


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """`configs/<name>.yaml` with the command line's overrides. Raises UserError, with the nearest right key, for one that does not fit."""
    with hydra.initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            config = hydra.compose(name, list(overrides))
            defaults = hydra.compose(name, [o for o in overrides if _is_group_choice(o)])
            OmegaConf.resolve(config.copy())
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_explain(error, name, overrides)) from error
    for override in overrides:
        _check_override(override, config, defaults)
    return config


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


def _is_group_choice(override: str) -> bool:
    return (config_folder() / _key(override)).is_dir() or "@" in override.split("=", 1)[0]


def _check_override(override: str, config: DictConfig, defaults: DictConfig) -> None:
    """A value must have the type of the default that it replaces; a key may not be added."""
    key = _key(override)
    if override.startswith("~") or _is_group_choice(override):
        return
    if override.startswith("+"):
        raise UserError(f"{override}: {_nearest(key, defaults)}")
    old, new = OmegaConf.select(defaults, key), OmegaConf.select(config, key)
    if not _same_kind(old, new):
        raise UserError(f"{key}={new!r}: expected {_kind(old)}, such as {old!r}")


def _same_kind(old: Any, new: Any) -> bool:
    if old is None or new is None or old == "???":
        return True
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, int | float) and isinstance(new, int | float):
        return not (isinstance(old, int) and isinstance(new, float)) or new == int(new)
    if isinstance(old, DictConfig | ListConfig) or isinstance(new, DictConfig | ListConfig):
        return type(old) is type(new)
    return isinstance(old, str) or isinstance(new, str) is isinstance(old, str)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = ((int, "a whole number"), (float, "a number"), (ListConfig, "a list"), (DictConfig, "a group of keys"))
    return next((name for kind, name in names if isinstance(value, kind)), "text")


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, DictConfig):
        for key in map(str, config):
            yield f"{prefix}{key}"
            if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
                yield from _keys(config[key], f"{prefix}{key}.")


def _nearest(key: str, config: DictConfig) -> str:
    known = list(_keys(config)) + [p.name for p in config_folder().iterdir() if p.is_dir()]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # the right leaf under another parent
        close = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"no such key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "; the keys are those of configs/ (--help names the main ones)")


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """One line for what Hydra says in many."""
    defaults = hydra.compose(name)
    for override in overrides:
        key, _, value = override.partition("=")
        folder = config_folder() / _key(override)
        if "=" not in override and not override.startswith("~"):
            return f"{override!r} is not of the form key=value; --help shows commands"
        if folder.is_dir() and not (folder / f"{value}.yaml").is_file():
            choices = sorted(p.stem for p in folder.glob("[!_]*.yaml"))
            close = difflib.get_close_matches(value, choices, n=1)
            return f"{key} has no {value!r}{f'; did you mean {close[0]!r}?' if close else ''} (there are {', '.join(choices)})"
    chosen = [o for o in overrides if _is_group_choice(o)]
    with_groups = _try(functools.partial(hydra.compose, name, chosen)) or defaults
    for override in overrides:
        key = _key(override)
        if not _is_group_choice(override) and key not in set(_keys(with_groups)):
            return f"{override}: {_nearest(key, with_groups)}"
    return " ".join(str(error).split())


def _try(function: Any) -> Any:
    try:
        return function()
    except (HydraException, OmegaConfBaseException):
        return None


def check_targets(config: Any, allowed: Sequence[str]) -> None:
    """Raises UserError where a `_target_` names something outside `allowed`."""
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    if isinstance(plain, dict):
        target = plain.get("_target_")
        if target is not None and not (isinstance(target, str) and target.startswith(tuple(allowed)) and ".." not in target):
            raise UserError(f"config: _target_ {target!r} is refused; allowed are names that begin with {' or '.join(allowed)}")
    for value in plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else ():
        check_targets(value, allowed)


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
    if not pretrained:
        _forget_weights(model)
    return cast(nn.Module, build(model, allowed))


def _forget_weights(node: Any) -> None:
    if isinstance(node, DictConfig):
        for key in map(str, node):
            if key == "weights":
                node[key] = None
            elif not OmegaConf.is_interpolation(node, key):
                _forget_weights(node[key])


def set_num_classes(config: DictConfig, number: int) -> None:
    """Fills `data.num_classes`, to which the model's keys refer."""
    OmegaConf.update(config, "data.num_classes", number, force_add=True)


def to_yaml(config: DictConfig, resolve: bool = False) -> str:
    """The config as text, for files and checkpoints."""
    return OmegaConf.to_yaml(config, resolve=resolve)


def from_checkpoint(text: str, overrides: Sequence[str], own: str) -> DictConfig:
    """The config of a trained model with the tool's own keys (`configs/<own>.yaml`) and the command line on top.

    `data=NAME` takes that data group instead of the training's, with the number of classes and the test transforms of the checkpoint.
    Raises UserError.
    """
    trained = cast(DictConfig, OmegaConf.create(text))
    check_targets(trained, FROM_CHECKPOINT + TRUSTED)
    chosen = [o for o in overrides if _key(o) == "data"]
    if chosen:
        group = compose("data_only", chosen).data
        group.num_classes, group.test_transforms = trained.data.num_classes, trained.data.test_transforms
        trained.data = group
    tool = compose(own, [])
    config = cast(DictConfig, OmegaConf.merge(trained, tool))
    OmegaConf.set_struct(config, True)
    defaults = config.copy()
    for override in (o for o in overrides if o not in chosen):
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not of the form key=value; --help shows commands")
        if key not in set(_keys(config)):
            raise UserError(f"{override}: {_nearest(key, config)}")
        parser = OverridesParser.create()
        try:
            OmegaConf.update(config, key, parser.parse_override(override).value())
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{override}: {' '.join(str(error).split())}") from error
        _check_override(override, config, defaults)
    return config


def experiments() -> list[str]:
    """Names of the experiments there are."""
    return sorted(p.stem for p in (config_folder() / "experiment").glob("*.yaml"))
