"""The one file that knows Hydra: YAML and command line -> config -> objects."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
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
    for override in overrides:
        _check_choice(override)
    with hydra.initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            config = hydra.compose(name, list(overrides))
            defaults = hydra.compose(name, [o for o in overrides if _is_group_choice(o)])
            OmegaConf.resolve(config.copy())
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, name, overrides)) from error
    _forget_removed(config, overrides)
    for override in overrides:
        _check_override(override, config, defaults)
    return config


def _check_choice(override: str) -> None:
    """Raises UserError for a group's choice that is not there (an optional group's would be passed over in silence), or no word of Hydra's."""
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        raise UserError(f"{override!r} is not of the form key=value; --help shows commands")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{override}: {' '.join(str(error).split())}") from error
    folder = config_folder() / _key(override)
    if not _key(override):
        raise UserError(f"{override}: there is no key before the '='")
    if equals and folder.is_dir() and not value.startswith(("[", "{")) and not (folder / f"{value}.yaml").is_file():
        choices = sorted(p.stem for p in folder.glob("[!_]*.yaml"))
        close = difflib.get_close_matches(value, choices, n=1)
        raise UserError(f"{key} has no {value!r}{f'; did you mean {close[0]!r}?' if close else ''} (there are {', '.join(choices)})")


def _forget_removed(config: DictConfig, overrides: Sequence[str]) -> None:
    """What an experiment says of a part that `~group@place` took away goes with it."""
    for override in overrides:
        place = override.partition("=")[0].partition("@")[2]
        parent, _, last = place.rpartition(".")
        node = OmegaConf.select(config, parent) if override.startswith("~") and parent else None
        if isinstance(node, DictConfig) and last in node:
            with open_dict(node):
                del node[last]


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
    may_be_null = key.endswith("max_images")
    if not (new is None and may_be_null) and not _same_kind(old, new):
        raise UserError(f"{key}={new!r}: expected {_kind(old)}, such as {old!r}")


def _same_kind(old: Any, new: Any) -> bool:
    if new is None and isinstance(old, int | float):
        return False
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


def require(config: DictConfig, *keys: str) -> None:
    """Raises UserError for a key without a value."""
    for key in keys:
        if OmegaConf.is_missing(config, key):
            raise UserError(f"{key}=... is missing (--help shows commands)")


def to_yaml(config: DictConfig, resolve: bool = False) -> str:
    """The config as text, for files and checkpoints."""
    return OmegaConf.to_yaml(config, resolve=resolve)


def sweep_points(words: Sequence[str], most: int = 16) -> Iterator[list[str]]:
    """Words without a sweep that hold the values of one: all first values, then each other alone (of many the first `most`; of an interval its
    ends and a point between). Raises UserError for what is no word of Hydra's."""
    values = [list(itertools.islice(_swept(word), most)) for word in words]
    first = [options[0] for options in values]
    yield first
    for i, options in enumerate(values):
        yield from ([*first[:i], option, *first[i + 1 :]] for option in options[1:])


def _swept(word: str) -> list[str]:
    try:
        parsed = OverridesParser.create().parse_override(word)
        if not parsed.is_sweep_override():
            return [word]
        sweep = cast(Any, parsed.value())
        ends = (sweep.start, sweep.end, sweep.start + 0.618 * (sweep.end - sweep.start)) if parsed.is_interval_sweep() else ()
        return [f"{parsed.get_key_element()}={value}" for value in ends or parsed.sweep_string_iterator()]
    except HydraException as error:
        raise UserError(f"{word}: {' '.join(str(error).split())}") from error


def hydra_settings(words: Sequence[str]) -> Any:
    """Hydra's own keys (`sweep`, `sweeper`, `launcher`) for words without a sweep. Raises UserError, also where a plugin is not installed."""
    with hydra.initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            return hydra.compose("train", list(words), return_hydra_config=True).hydra
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file).rpartition("/")
            hint = "pip install maskseg[sweep] brings optuna, submitit_local and submitit_slurm"
            raise UserError(f"{group} has no {choice!r} (there are {', '.join(error.options or ())}); {hint}") from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(" ".join(str(error).split("\nTo append")[0].split())) from error


def from_checkpoint(text: str, overrides: Sequence[str], own: str) -> DictConfig:
    """The config of a trained model with the tool's own keys (`configs/<own>.yaml`) and the command line on top.

    `data=NAME` takes that data group instead of the training's, with the number of classes and the test transforms of the checkpoint.
    Raises UserError.
    """
    try:
        trained = cast(DictConfig, OmegaConf.create(text))
        if not all(isinstance(trained[k], DictConfig) for k in ("model", "data", "trainer", "evaluation")):
            raise TypeError("a part of it is no group of keys")
    except Exception as error:  # YAML's and OmegaConf's errors share no base
        raise UserError(f"the checkpoint's config cannot be used ({' '.join(str(error).split())})") from error
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
