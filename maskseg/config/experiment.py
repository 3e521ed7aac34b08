"""An experiment and a model without the keys that belong to what the command line replaces.

Hydra merges the body of an experiment over all groups, also over one that the command line chooses
instead of the experiment's own: `optimizer=sgd` would keep the learning rate that the experiment
states for AdamW. Therefore the experiment is read here, its stale keys are dropped, and the rest is
registered in Hydra's ConfigStore under another name. The same is done for the file of a model, such
as `cfm_vgg16`, whose keys for its backbone do not fit another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from maskseg.config.overrides import key_of, place_of
from maskseg.files.configs import find_config, is_group

_DEFAULT_DESELECTED_BY = ("model", "data")
_WHOLE_CONFIG = ("experiment", "debug")  # groups whose files have keys of all others
_MAX_NAMED = 6  # keys in a message
TRIMMED = "_in_part"  # end of the name of an experiment without its stale keys
_SHARED = "_common"  # keys of this file of a group suit each choice of the group


@dataclass(frozen=True)
class Replacement:
    """A group that the command line chooses or removes, and its place in the config.

    text: the override, for messages; group: `model/trunk`; place: `model.backbone.trunk`.
    """

    text: str
    group: str
    place: str


def replacements(overrides: Sequence[str]) -> list[Replacement]:
    """The groups that the command line chooses (`group=name`, `group@place=name`) or removes."""
    choices = [override for override in overrides if key_of(override) not in _WHOLE_CONFIG]
    return [
        Replacement(choice, key_of(choice), place_of(choice))
        for choice in choices
        if is_group(key_of(choice))
    ]


def select_experiment(name: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """-> the overrides with the experiment to compose, and a message for each replaced group.

    name: the primary config. Without `experiment=...` its default experiment is used, unless the
    command line chooses the model or the data.
    """
    default = _default_choice(name, "experiment")
    if default is None:
        return list(overrides), []
    replaced = replacements(overrides)
    chosen, selected = _take_choice(overrides, "experiment")
    model = _default_choice(name, "model")
    messages: list[str] = []
    if chosen is None and any(r.group in _DEFAULT_DESELECTED_BY for r in replaced):
        selected.append("~experiment")
    else:
        path = find_config("experiment", default if chosen is None else chosen)
        if not replaced or path is None:
            return list(overrides), []
        # An experiment on a dataset of the user's own is often written with data=custom.
        own_data = f"data={_choice_of(path, 'data')}"
        changes = [replacement for replacement in replaced if replacement.text != own_data]
        registered, messages = _trim("experiment", path, changes)
        selected.append(f"experiment={registered}")
        model = _choice_of(path, "model") or model
    return _trim_model(selected, model, replaced, messages)


def _take_choice(overrides: Sequence[str], group: str) -> tuple[str | None, list[str]]:
    """-> the last choice of a group, None where there is none, and the other overrides."""
    choices = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == group]
    others = [o for o in overrides if o.partition("=")[0] != group]
    return (choices[-1] if choices else None), others


def _trim_model(
    overrides: list[str],
    default: str | None,
    replaced: Sequence[Replacement],
    messages: list[str],
) -> tuple[list[str], list[str]]:
    """Drop the keys of the model's file that belong to stages that the command line replaces.

    default: the model without `model=...` in the overrides. -> the overrides and all messages.
    """
    stages = [r for r in replaced if r.place.startswith("model.")]
    chosen, others = _take_choice(overrides, "model")
    name = default if chosen is None else chosen
    path = None if name is None else find_config("model", name)
    if not stages or path is None:
        return overrides, messages
    registered, more = _trim("model", path, stages)
    if not more:
        return overrides, messages
    return [*others, f"model={registered}"], [*messages, *more]


def _trim(group: str, path: Path, replaced: Sequence[Replacement]) -> tuple[str, list[str]]:
    """Register a file without the keys below replaced groups. -> its new name, and messages."""
    dropped: dict[Replacement, list[str]] = {r: [] for r in replaced}
    registered = _register(group, path, replaced, dropped)
    choice = f"{group}={path.stem}"
    return registered, [_message(r, keys, choice) for r, keys in dropped.items() if keys]


def _message(replacement: Replacement, keys: Sequence[str], choice: str) -> str:
    named = ", ".join(keys[:_MAX_NAMED])
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return f"{replacement.text} drops these keys of {choice}: {named}{more}"


def _read(path: Path) -> tuple[list[str | dict[str, str]], dict[str, object]]:
    """The defaults list and the keys of a config file, unresolved."""
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    entries = content.pop("defaults", [])
    return entries, {str(key): value for key, value in content.items()}


def _choice_of(experiment: Path, group: str) -> str | None:
    """The choice of a group by an experiment, or by the last one of those that it builds on."""
    choice = None
    for entry in _read(experiment)[0]:
        base = find_config("experiment", entry) if isinstance(entry, str) else None
        if base is not None:
            choice = _choice_of(base, group) or choice
        elif isinstance(entry, dict):
            choice = entry.get(f"override /{group}", choice)
    return choice


def _default_choice(name: str, group: str) -> str | None:
    """The choice of a group in the defaults list of a primary config, None where it has none.

    A config may include that of another tool, such as `train`, with its choices.
    """
    path = find_config("", name)
    for entry in _read(path)[0] if path else ():
        if isinstance(entry, dict) and group in entry:
            return entry[group]
        included = _default_choice(entry, group) if isinstance(entry, str) else None
        if included is not None:
            return included
    return None


def _register(
    group: str, path: Path, replaced: Sequence[Replacement], dropped: dict[Replacement, list[str]]
) -> str:
    """Register a file and those that it builds on without stale keys. -> its new name."""
    package = "_global_" if group == "experiment" else group
    entries, body = _read(path)
    defaults = []
    for entry in entries:
        base = find_config(group, entry) if isinstance(entry, str) else None
        if base is not None:
            entry = _register(group, base, replaced, dropped)
        if isinstance(entry, dict) and _is_replaced_default(next(iter(entry)), replaced):
            continue
        defaults.append(entry)
    # The keys of a file are those below its package.
    nested: dict[str, object] = body if package == "_global_" else {package: body}
    for replacement in replaced:
        _drop_under(nested, replacement, dropped)
    name = f"{path.stem}{TRIMMED}"
    ConfigStore.instance().store(name, {"defaults": defaults, **body}, group=group, package=package)
    return name


def _is_replaced_default(key: str, replaced: Sequence[Replacement]) -> bool:
    """Whether an entry of an experiment's defaults list chooses what the command line replaces."""
    place = place_of(key.removeprefix("override ").removeprefix("/"))
    for replacement in replaced:
        if f"{place}.".startswith(f"{replacement.place}."):
            key_below = place[len(replacement.place) + 1 :].partition(".")[0]
            if key_below not in _shared_keys(replacement.group):
                return True
    return False


def _drop_under(
    content: dict[str, object], replacement: Replacement, dropped: dict[Replacement, list[str]]
) -> None:
    """Drop the keys of an experiment's body below the place of a replaced group."""
    parent_path, _, last = replacement.place.rpartition(".")
    parent: object = content
    for part in parent_path.split(".") if parent_path else ():
        parent = parent.get(part) if isinstance(parent, dict) else None
    if not isinstance(parent, dict) or parent.get(last) is None:
        return
    node = parent[last]
    kept: dict[object, object] = {}
    stale = node
    if isinstance(node, dict):
        kept = _kept_keys(node, replacement)
        stale = {key: value for key, value in node.items() if key not in kept}
    if kept:
        parent[last] = kept
    else:
        del parent[last]
    dropped[replacement] += [f"{key}={value}" for key, value in _leaves(stale, replacement.place)]


def _kept_keys(node: dict[object, object], replacement: Replacement) -> dict[object, object]:
    """The keys of a replaced group that suit the choice of the command line, too.

    These are the keys that all choices share, except for values that refer to a key that the choice
    does not have, such as `${data.root}` for `data=custom`.
    """
    shared = _shared_keys(replacement.group)
    known = _keys_of_choice(replacement.group, replacement.text.partition("=")[2])
    reference = re.compile(rf"\$\{{{re.escape(replacement.place)}\.(\w+)")
    return {
        key: value
        for key, value in node.items()
        if key in shared and known.issuperset(reference.findall(str(value)))
    }


def _keys_of_choice(group: str, name: str) -> set[object]:
    """The keys of a file of a group, with those of the files that it includes."""
    path = find_config(group, name)
    if path is None:
        return set()
    entries, body = _read(path)
    keys: set[object] = set(body)
    for entry in entries:
        if isinstance(entry, str):
            keys |= _keys_of_choice(group, entry)
    return keys


def _shared_keys(group: str) -> set[object]:
    """The keys that all choices of a group have in common by its file `_common.yaml`."""
    path = find_config(group, _SHARED)
    return set() if path is None else set(_read(path)[1])


def _leaves(value: object, place: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}")
    else:
        yield place, value
