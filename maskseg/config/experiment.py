"""An experiment without the keys that belong to what the command line replaces.

Hydra merges the body of an experiment over all groups, also over one that the command line chooses
instead of the experiment's own: `optimizer=sgd` would keep the learning rate that the experiment
states for AdamW. Therefore the experiment is read here, its stale keys are dropped, and the rest is
registered in Hydra's ConfigStore under another name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    default = _default_experiment(name)
    if default is None:
        return list(overrides), []
    replaced = replacements(overrides)
    chosen = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == "experiment"]
    others = [o for o in overrides if o.partition("=")[0] != "experiment"]
    if not chosen and any(r.group in _DEFAULT_DESELECTED_BY for r in replaced):
        return [*others, "~experiment"], []
    experiment = chosen[-1] if chosen else default
    path = find_config("experiment", experiment)
    if not replaced or path is None:
        return list(overrides), []
    dropped: dict[Replacement, list[str]] = {r: [] for r in replaced}
    registered = _register(path, replaced, dropped)
    messages = [_message(r, keys, experiment) for r, keys in dropped.items() if keys]
    return [*others, f"experiment={registered}"], messages


def _message(replacement: Replacement, keys: Sequence[str], experiment: str) -> str:
    named = ", ".join(keys[:_MAX_NAMED])
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return f"{replacement.text} drops these keys of experiment={experiment}: {named}{more}"


def _default_experiment(name: str) -> str | None:
    """The experiment in the defaults list of a primary config, None where it has no such entry.

    A config may include that of another tool, such as `train`, with its experiment.
    """
    path = find_config("", name)
    config: Any = {} if path is None else OmegaConf.load(path)
    for entry in config.get("defaults", []):
        if OmegaConf.is_dict(entry) and "experiment" in entry:
            return str(entry.experiment)
        included = (
            _default_experiment(entry) if isinstance(entry, str) and entry != "_self_" else None
        )
        if included is not None:
            return included
    return None


def _register(
    path: Path, replaced: Sequence[Replacement], dropped: dict[Replacement, list[str]]
) -> str:
    """Register the experiment and those that it builds on without stale keys. -> its new name."""
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    defaults = []
    for entry in content.pop("defaults", []):
        base = find_config("experiment", entry) if isinstance(entry, str) else None
        if base is not None:
            entry = _register(base, replaced, dropped)
        if isinstance(entry, dict) and _is_replaced_default(next(iter(entry)), replaced):
            continue
        defaults.append(entry)
    for replacement in replaced:
        _drop_under(content, replacement, dropped)
    name = f"{path.stem}{TRIMMED}"
    ConfigStore.instance().store(
        name, {"defaults": defaults, **content}, group="experiment", package="_global_"
    )
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
    content: dict[Any, Any], replacement: Replacement, dropped: dict[Replacement, list[str]]
) -> None:
    """Drop the keys of an experiment's body below the place of a replaced group."""
    parent_path, _, last = replacement.place.rpartition(".")
    parent: Any = content
    for part in parent_path.split(".") if parent_path else ():
        parent = parent.get(part) if isinstance(parent, dict) else None
    node = parent.get(last) if isinstance(parent, dict) else None
    if node is None:
        return
    shared = _shared_keys(replacement.group)
    kept = {key: node[key] for key in node if key in shared} if isinstance(node, dict) else {}
    stale = (
        {key: node[key] for key in node if key not in shared} if isinstance(node, dict) else node
    )
    if kept:
        parent[last] = kept
    else:
        del parent[last]
    dropped[replacement] += [f"{key}={value}" for key, value in _leaves(stale, replacement.place)]


def _shared_keys(group: str) -> set[Any]:
    """The keys that all choices of a group have in common by its file `_common.yaml`."""
    path = find_config(group, _SHARED)
    return set() if path is None else set(OmegaConf.load(path))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}")
    else:
        yield place, value
