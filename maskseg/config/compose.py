"""YAML and command line -> config, and what is said of a word that does not fit."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from maskseg.errors import UserError
from maskseg.files.configs import config_folder


def compose(name: str, overrides: Sequence[str]) -> DictConfig:
    """`configs/<name>.yaml` with the command line's overrides. Raises UserError, with the nearest right key, for one that does not fit."""
    for override in overrides:
        check_choice(override)
    with hydra.initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            config = hydra.compose(name, list(overrides))
            defaults = hydra.compose(name, [o for o in overrides if _is_group_choice(o)])
            OmegaConf.resolve(config.copy())
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, name, overrides)) from error
    _forget_removed(config, overrides)
    _forget_replaced(config, overrides)
    for override in overrides:
        check_override(override, config, defaults)
    return config


def check_choice(override: str) -> None:
    """Raises UserError for a group's choice that is not there (an optional group's would be passed over in silence), or no word of Hydra's."""
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        raise UserError(f"{override!r} is not of the form key=value; --help shows commands")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{override}: {' '.join(str(error).split())}") from error
    folder = config_folder() / key_of(override)
    if not key_of(override):
        raise UserError(f"{override}: there is no key before the '='")
    if (
        equals
        and folder.is_dir()
        and not value.startswith(("[", "{"))
        and not (folder / f"{value}.yaml").is_file()
    ):
        choices = sorted(p.stem for p in folder.glob("[!_]*.yaml"))
        close = difflib.get_close_matches(value, choices, n=1)
        raise UserError(
            f"{key} has no {value!r}{f'; did you mean {close[0]!r}?' if close else ''} (there are {', '.join(choices)})"
        )


def _forget_replaced(config: DictConfig, overrides: Sequence[str]) -> None:
    """What an experiment says of a stage of the model that the command line swaps for another kind goes with it."""
    for override in overrides:
        group, _, choice = override.partition("=")
        file = config_folder() / group / f"{choice}.yaml"
        of_model = f"{group}/".startswith("model/") and file.is_file()
        node = OmegaConf.select(config, group.replace("/", ".")) if of_model else None
        if isinstance(node, DictConfig):
            kept = _keys_of_file(file)
            with open_dict(node):
                for key in set(node) - kept:
                    del node[key]


def _keys_of_file(file: Path) -> set[Any]:
    """The keys that a group's file gives: its own, those of the files that it builds on, and the places of the groups that it chooses."""
    own = cast(DictConfig, OmegaConf.load(file))
    keys = set(own)
    for entry in own.get("defaults", []):
        if isinstance(
            entry, DictConfig
        ):  # `trunk` of `/model/trunk@trunk: resnet`, `backbone` of `backbone: fpn`
            name, _, place = str(next(iter(entry))).partition("@")
            keys.add((place or name).removeprefix("/").split(".")[0])
        elif entry != "_self_":
            keys |= _keys_of_file(file.parent / f"{entry}.yaml")
    return keys


def _forget_removed(config: DictConfig, overrides: Sequence[str]) -> None:
    """What an experiment says of a part that `~group@place` took away goes with it."""
    for override in overrides:
        place = override.partition("=")[0].partition("@")[2]
        parent, _, last = place.rpartition(".")
        node = OmegaConf.select(config, parent) if override.startswith("~") and parent else None
        if isinstance(node, DictConfig) and last in node:
            with open_dict(node):
                del node[last]


def key_of(override: str) -> str:
    """What `override` is about: `data` of `data=coco`, `a.b` of `~a.b`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


def _is_group_choice(override: str) -> bool:
    return (config_folder() / key_of(override)).is_dir() or "@" in override.split("=", 1)[0]


def check_override(override: str, config: DictConfig, defaults: DictConfig) -> None:
    """A value must have the type of the default that it replaces; a key may not be added."""
    key = key_of(override)
    if override.startswith("~") or _is_group_choice(override):
        return
    if override.startswith("+"):
        raise UserError(f"{override}: {nearest(key, defaults)}")
    old, new = OmegaConf.select(defaults, key), OmegaConf.select(config, key)
    check_kind(key, old, new)


def check_kind(key: str, old: Any, new: Any) -> None:
    """Raises UserError where a key's new value has not the type of its default, `old`. Null as a default takes anything."""
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
        return not (isinstance(old, int) and isinstance(new, float)) or new.is_integer()
    if isinstance(old, DictConfig | ListConfig | dict | list) or isinstance(
        new, DictConfig | ListConfig | dict | list
    ):
        return type(old) is type(new)
    return isinstance(old, str) or isinstance(new, str) is isinstance(old, str)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = (
        (int, "a whole number"),
        (float, "a number"),
        ((ListConfig, list), "a list"),
        ((DictConfig, dict), "a group of keys"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "text")


def keys_of(config: Any, prefix: str = "") -> Iterator[str]:
    """All keys of a config, with dots."""
    if isinstance(config, DictConfig):
        for key in map(str, config):
            yield f"{prefix}{key}"
            if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(
                config, key
            ):
                yield from keys_of(config[key], f"{prefix}{key}.")


def nearest(key: str, config: DictConfig) -> str:
    """One line for a key that is not there: which one may be meant."""
    known = list(keys_of(config)) + [p.name for p in config_folder().iterdir() if p.is_dir()]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # the right leaf under another parent
        close = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    return f"no such key {key!r}" + (
        f"; did you mean {close[0]!r}?"
        if close
        else "; the keys are those of configs/ (--help names the main ones)"
    )


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """One line for what Hydra says in many."""
    defaults = hydra.compose(name)
    chosen = [o for o in overrides if _is_group_choice(o)]
    with_groups = _try(functools.partial(hydra.compose, name, chosen)) or defaults
    for override in overrides:
        key = key_of(override)
        if not _is_group_choice(override) and key not in set(keys_of(with_groups)):
            return f"{override}: {nearest(key, with_groups)}"
    return " ".join(str(error).split())


def _try(function: Any) -> Any:
    try:
        return function()
    except (HydraException, OmegaConfBaseException):
        return None
