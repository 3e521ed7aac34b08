"""Compose configs from YAML files and the command line, with clear messages for wrong overrides."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.experiment import select_experiment
from maskseg.config.foreign_names import find_advice, find_key
from maskseg.config.overrides import key_of
from maskseg.config.path_values import quote_paths
from maskseg.config.schema import check_types
from maskseg.config.search_path import open_configs
from maskseg.config.show import show, split_options
from maskseg.errors import UserError
from maskseg.files.configs import find_config, group_files, groups, is_group
from maskseg.plugins import import_plugins
from maskseg.values import describe

_NO_YOLO = " (a data.yaml of ultralytics and YOLO labels are not read)"
_MIN_COMPLETED = 3  # characters of a wrong key that are enough to complete it
_CONTAINERS = (DictConfig, ListConfig, dict, list)


def compose(
    name: str, overrides: Sequence[str], report: Callable[[str], None] | None = None
) -> DictConfig:
    """Compose `configs/<name>.yaml` with the overrides of the command line.

    report: called with a line for each override that drops keys of the experiment.
    Imports the enabled plug-ins. Raises Shown where the overrides contain an option of
    `maskseg.config.show`, and UserError for an override that does not fit, with the closest valid
    key.
    """
    import_plugins()
    overrides, options = split_options(quote_paths(overrides))
    for override in overrides:
        check_choice(override)
    selected, messages = select_experiment(name, overrides)
    with open_configs():
        try:
            config = hydra.compose(name, selected)
            choices = _choices(name, selected) if options else {}
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(_explain(error, name, overrides)) from error
    if report is not None:
        for message in messages:
            report(message)
    choose_length(config, overrides)
    choices_only = [override for override in selected if _is_group_choice(override)]
    check_overrides(overrides, config, partial(_compose_defaults, name, choices_only))
    show(options, config, choices)
    return config


def choose_length(config: DictConfig, overrides: Sequence[str]) -> None:
    """Unset the one of `trainer.epochs` and `trainer.max_steps` that the other replaces.

    Raises UserError where the command line does not decide between them.
    """
    keys = ["trainer.epochs", "trainer.max_steps"]
    if any(OmegaConf.select(config, key) is None for key in keys):
        return
    given = {key_of(override) for override in overrides}.intersection(keys)
    if len(given) != 1:
        raise UserError(
            "trainer.epochs and trainer.max_steps are both set: exactly one of them is the length "
            "of the training; the other must be null"
        )
    keys.remove(given.pop())
    OmegaConf.update(config, keys[0], None)


def _compose_defaults(name: str, choices: Sequence[str]) -> DictConfig:
    """The config with the choices of groups alone."""
    with open_configs():
        return hydra.compose(name, list(choices))


def _choices(name: str, overrides: Sequence[str]) -> dict[str, str]:
    """The choice of each group; a group without a choice is left out."""
    runtime = hydra.compose(name, list(overrides), return_hydra_config=True).hydra.runtime
    choices = {str(key): str(value) for key, value in runtime.choices.items() if value is not None}
    return {key: choice for key, choice in choices.items() if not key.startswith("hydra/")}


def check_choice(override: str) -> None:
    """Check the syntax of an override, and the choice of a group.

    Hydra silently ignores a choice that does not exist if the group is optional.
    Raises UserError.
    """
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        raise UserError(f"{override!r} is not of the form key=value; --help shows commands")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{override}: {reason}; quote the value: \"{key}='{value}'\"") from error
    if not key_of(override):
        raise UserError(f"{override}: there is no key before the '='")
    if key_of(override).startswith(("hydra.", "hydra/")):
        raise UserError(
            f"{override}: only tools/sweep.py --multirun has keys of Hydra; run_dir=... names the "
            "folder of a training"
        )
    if parsed.is_sweep_override():
        raise UserError(
            f"{override}: several values of a key are a sweep, which tools/sweep.py --multirun "
            f"runs; a list is written '{key}=[{value}]'"
        )
    group = key_of(override)
    if not equals or not is_group(group) or value.startswith(("[", "{")):
        return
    if find_config(group, value) is None:
        raise UserError(f"{key} has no {value!r}{_choice_hint(group, value)}")


def _choice_hint(group: str, value: str) -> str:
    """What to choose from a group instead of a name that it does not have."""
    choices = [file.stem for file in group_files(group)]
    suffix = Path(value).suffix.lower()
    advice = {
        ("data", ".json"): f"; write data=custom data.train_json={value} data.images=FOLDER",
        ("data", ".yaml"): (
            f"; your own data: data=custom data.train_json=COCO.json data.images=FOLDER{_NO_YOLO}"
        ),
        ("model", ".pt"): f"; trainer.init={value} starts from the weights of a checkpoint",
        ("model", ".pth"): "; tools/convert.py converts such weights, trainer.init takes them",
    }.get((group, suffix.replace(".yml", ".yaml")))
    is_own_file = group == "data" and Path(value).is_file()
    named = None if is_own_file else find_config(group, Path(value).stem)
    close = difflib.get_close_matches(value.lower(), choices, n=1)
    if named is not None:
        advice = f"; write {group}={named.stem}, without a folder or suffix"
    elif close and not is_own_file:
        advice = f"; did you mean {close[0]!r}?"
    elif advice is None and group == "data" and Path(value).is_dir():
        advice = f"; write data=custom data.train_json=COCO.json data.images={value}"
    return f"{advice or ''} (there are {', '.join(choices)})"


def _is_group_choice(override: str) -> bool:
    return is_group(key_of(override)) or "@" in override.split("=", 1)[0]


def check_overrides(
    overrides: Sequence[str], config: DictConfig, make_defaults: Callable[[], DictConfig]
) -> None:
    """Check that the overrides add no key, and the types of all values of a config.

    The type of a key is that of its schema. A key without one, such as a parameter without
    annotation, takes values of the type of its default.
    make_defaults: returns the config without the overrides of values; composing it takes time.
    Raises UserError.
    """
    values = [o for o in overrides if not (o.startswith("~") or _is_group_choice(o))]
    for override in values:
        if override.startswith("+"):
            raise UserError(f"{override}: {nearest(key_of(override), make_defaults())}")
    try:
        typed = check_types(config)
        untyped = [key for key in map(key_of, values) if key not in typed]
        defaults = make_defaults() if untyped else config
        for key in untyped:
            check_kind(key, OmegaConf.select(defaults, key), OmegaConf.select(config, key))
    except OmegaConfBaseException as error:  # a key refers to one that has no value
        raise UserError(f"config: {str(error).splitlines()[0]}") from error


def check_kind(key: str, old: object, new: object) -> None:
    """Raise UserError where the new value of a key does not have the type of its default, `old`.

    A default of null accepts any value.
    """
    may_be_null = key.endswith("max_images")
    if not (new is None and may_be_null) and not _same_kind(old, new):
        raise UserError(f"{key}={new!r}: expected {_describe_kind(old)}, such as {old!r}")


def _same_kind(old: object, new: object) -> bool:
    if old is None or old == "???":
        return True
    if new is None:
        return not isinstance(old, int | float)
    for kind in (bool, _CONTAINERS):
        if isinstance(old, kind) or isinstance(new, kind):
            return type(old) is type(new)
    if isinstance(old, int) and isinstance(new, float):
        return new.is_integer()  # a whole number may be written as 10.0
    return isinstance(old, str) or not isinstance(new, str)


def _describe_kind(value: object) -> str:
    if isinstance(value, ListConfig | list):
        return "a list"
    return describe(dict if isinstance(value, DictConfig) else type(value))


def keys_of(config: object, prefix: str = "") -> Iterator[str]:
    """All keys of a config, with dots."""
    if not isinstance(config, DictConfig):
        return
    for key in map(str, config):
        yield f"{prefix}{key}"
        if OmegaConf.is_missing(config, key) or OmegaConf.is_interpolation(config, key):
            continue
        yield from keys_of(config[key], f"{prefix}{key}.")


def nearest(key: str, config: DictConfig) -> str:
    """One line for a key that does not exist, with the key, group or value to write instead."""
    known = [*keys_of(config), *(group for group in groups() if "/" not in group)]
    if key in known:
        return f"the key {key!r} exists already: write {key}=... without '+'"
    choices = _choices_with(key)
    if choices:
        group = key.partition(".")[0]
        return (
            f"no such key {key!r} here; {' or '.join(f'{group}={name}' for name in choices)} has it"
        )
    foreign = find_key(key, known)
    if foreign is not None and key.rpartition(".")[0] not in known:
        return f"no such key {key!r}; did you mean {foreign!r}?"
    advice = find_advice(key)
    if advice is not None:
        return f"no such key {key!r}; in maskseg: {advice}"
    similar = _similar_key(key, known) or foreign
    if similar is not None:
        return f"no such key {key!r}; did you mean {similar!r}?"
    return (
        f"no such key {key!r}; the keys are those of configs/: --help lists the main ones, "
        "--cfg job all"
    )


def _choices_with(key: str) -> list[str]:
    """The choices of a group whose files have a key of the group, such as `data.images`."""
    group, _, name = key.partition(".")
    if not name or not is_group(group):
        return []
    return [path.stem for path in group_files(group) if name in OmegaConf.load(path)]


def _similar_key(key: str, known: Sequence[str]) -> str | None:
    """The key with the most similar name, first of the same group."""
    group, _, name = key.rpartition(".")
    siblings = {
        candidate.rpartition(".")[2]: candidate
        for candidate in known
        if not group or candidate.rpartition(".")[0] == group
    }
    cutoff = 0.6 if group else 0.75
    close = [
        *_completions(key, known),
        *(siblings[match] for match in difflib.get_close_matches(name, siblings, 1, cutoff)),
        *(candidate for candidate in known if candidate.rpartition(".")[2] == name),
        *difflib.get_close_matches(key, known, n=1, cutoff=0.75),
    ]
    return close[0] if close else None


def _completions(key: str, known: Sequence[str]) -> list[str]:
    """The keys whose last part begins with that of `key`, the shortest first."""
    if len(key.rpartition(".")[2]) < _MIN_COMPLETED:
        return []
    longer = [candidate for candidate in known if candidate.startswith(key)]
    return sorted((c for c in longer if "." not in c[len(key) :]), key=len)


def _explain(error: Exception, name: str, overrides: Sequence[str]) -> str:
    """One line for an error of Hydra, whose messages have many."""
    choices = [override for override in overrides if _is_group_choice(override)]
    try:
        config = hydra.compose(name, choices)
    except (HydraException, OmegaConfBaseException):
        config = hydra.compose(name)
    known = set(keys_of(config))
    for override in overrides:
        key = key_of(override)
        is_wrong = key not in known or override.startswith("+")
        if is_wrong and not _is_group_choice(override):
            return f"{override}: {nearest(key, config)}"
        if f"Could not override '{key}'. No match in the defaults list" in str(error):
            return f"{override}: the config has no {key} that could be replaced"
    return " ".join(str(error).split())
