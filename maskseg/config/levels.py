"""What the stages of a model need to know about the backbone: strides, channels, cell centers.

Keys of a stage that are null are filled in from `backbone.levels`, so that no stride or number of
channels is written twice in a config and a backbone can be replaced by one with other levels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import hydra

from maskseg.errors import UserError
from maskseg.structures import FeatureSpec

# Keys that are filled in where they are null.
FILLED_KEYS = ("strides", "in_channels", "feature_spec", "feature_specs")

Levels = Mapping[str, FeatureSpec]


def needs_levels(node: object) -> bool:
    """Whether a key below this node is filled in from the backbone."""
    if not isinstance(node, dict):
        return False
    return any(_is_open(node, key) for key in FILLED_KEYS) or any(
        needs_levels(inner) for inner in node.values()
    )


def fill_levels(stage: object, place: str, levels: Levels, trunk_levels: Levels) -> list[str]:
    """Fill in the keys of a stage and of the parts below it, in place.

    levels: of the backbone; trunk_levels: of the trunk below a pyramid, which a stage may name too.
    -> the names of the trunk's levels that are used. Raises UserError for a level that does not
    exist, or for levels with different channels where one number is needed.
    """
    extra: list[str] = []
    _fill(stage, place, list(levels), levels, trunk_levels, extra)
    return extra


def _is_open(node: Mapping[str, object], key: str) -> bool:
    return key in node and node[key] is None


def _fill(
    node: object,
    place: str,
    names: list[str],
    levels: Levels,
    trunk_levels: Levels,
    extra: list[str],
) -> None:
    """names: the levels that the stage around this node reads."""
    if not isinstance(node, dict):
        return
    if "strides" in node:
        names = _fill_strides(node, place, levels)
    elif isinstance(node.get("pooler"), dict) and "strides" in node["pooler"]:
        names = _fill_strides(node["pooler"], f"{place}.pooler", levels)
    if _is_open(node, "in_channels"):
        node["in_channels"] = _channels(names, place, levels)
    for key in ("feature_spec", "feature_specs"):
        if _is_open(node, key):
            extra += _fill_specs(node, key, place, {**levels, **trunk_levels}, levels)
    for key, inner in node.items():
        _fill(inner, f"{place}.{key}", names, levels, trunk_levels, extra)


def _fill_strides(node: dict[str, object], place: str, levels: Levels) -> list[str]:
    """-> the names of the levels."""
    if node["strides"] is None:
        limit = getattr(hydra.utils.get_class(str(node["_target_"])), "max_stride", None)
        node["strides"] = {
            name: spec.stride
            for name, spec in levels.items()
            if limit is None or spec.stride <= limit
        }
    strides = node["strides"]
    if not isinstance(strides, dict) or not strides or not strides.keys() <= levels.keys():
        raise UserError(f"{place}.strides={strides}: the backbone has {', '.join(levels)}")
    return list(strides)


def _channels(names: list[str], place: str, levels: Levels) -> int:
    channels = {levels[name].channels for name in names}
    if len(channels) != 1:
        raise UserError(
            f"{place}.in_channels is not set, and the levels {', '.join(names)} have different "
            f"numbers of channels: {', '.join(map(str, sorted(channels)))}"
        )
    return channels.pop()


def _fill_specs(
    node: dict[str, object], key: str, place: str, known: Levels, levels: Levels
) -> list[str]:
    """-> the names among them that are the trunk's."""
    value = node["levels"] if key == "feature_specs" else [node.get("level")]
    names = value if isinstance(value, list) else []
    if not names or not all(isinstance(name, str) and name in known for name in names):
        text = f"levels={value}" if key == "feature_specs" else f"level={node.get('level')}"
        raise UserError(f"{place}.{text}: the backbone has {', '.join(known)}")
    target = f"{FeatureSpec.__module__}.{FeatureSpec.__name__}"
    specs = {name: {"_target_": target, **asdict(known[name])} for name in names}
    node[key] = specs if key == "feature_specs" else specs[names[0]]
    return [name for name in names if name not in levels]
