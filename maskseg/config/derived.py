"""Configs that come of other ones: that of a checkpoint, the points of a sweep."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.build import put
from maskseg.config.checkpoint_config import read_checkpoint_config
from maskseg.config.compose import check_choice, check_override, compose, key_of, keys_of, nearest
from maskseg.errors import UserError
from maskseg.files.configs import config_folder


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
        ends = (
            (sweep.start, sweep.end, sweep.start + 0.618 * (sweep.end - sweep.start))
            if parsed.is_interval_sweep()
            else ()
        )
        return [
            f"{parsed.get_key_element()}={value}"
            for value in ends or parsed.sweep_string_iterator()
        ]
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
            raise UserError(
                f"{group} has no {choice!r} (there are {', '.join(error.options or ())}); {hint}"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise UserError(" ".join(str(error).split("\nTo append")[0].split())) from error


def from_checkpoint(
    text: str, overrides: Sequence[str], own: str, under: DictConfig | None = None
) -> DictConfig:
    """The config of a trained model with the tool's own keys (`configs/<own>.yaml`) and the command line on top.

    `data=NAME` takes that data group instead of the training's, with the checkpoint's number of classes, test transforms and draw of segments;
    `group@place=NAME` puts a group's choice in a place. under: keys that the checkpoint's config gets where it has none of that name.
    Raises UserError.
    """
    trained = read_checkpoint_config(text)
    chosen = [o for o in overrides if key_of(o) == "data"]
    if chosen:
        group = compose("data_only", chosen).data
        for key in ("num_classes", "num_things", "point_ranges", "test_transforms"):
            put(group, key, trained.data.get(key))
        if "segment_sampler" in group:
            group.segment_sampler = trained.data.get("segment_sampler")
        trained.data = group
    tool = compose(own, [])
    config = cast(DictConfig, OmegaConf.merge(under or {}, trained, tool))
    placed = [o for o in overrides if "@" in o.partition("=")[0]]
    _place_groups(config, placed)
    OmegaConf.set_struct(config, True)
    defaults = config.copy()
    for override in (o for o in overrides if o not in (*chosen, *placed)):
        key, equals, _ = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not of the form key=value; --help shows commands")
        if key not in set(keys_of(config)):
            raise UserError(f"{override}: {nearest(key, config)}")
        parser = OverridesParser.create()
        try:
            OmegaConf.update(config, key, parser.parse_override(override).value())
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{override}: {' '.join(str(error).split())}") from error
        check_override(override, config, defaults)
    return config


def names_data(overrides: Sequence[str], key: str = "data") -> bool:
    """Whether the command line names the data set (or a part of it, `key`), so that the checkpoint's config does not."""
    return any(key_of(override) in ("data", key) for override in overrides)


def _place_groups(config: DictConfig, words: Sequence[str]) -> None:
    """`group@place=NAME` instead of what is in that place. Raises UserError where there is no such group or place."""
    for word in words:
        check_choice(word)
        group, _, place = word.partition("=")[0].partition("@")
        file = config_folder() / group / f"{word.partition('=')[2]}.yaml"
        if not file.is_file() or OmegaConf.select(config, place) is None:
            raise UserError(
                f"{word}: there is no such group, or no {place} in the checkpoint's config"
            )
        chosen = OmegaConf.load(file)
        if "defaults" in chosen:
            raise UserError(
                f"{word}: a group that is made of others can only be chosen for a new model"
            )
        OmegaConf.update(config, place, chosen, merge=False)


def part(key: str, words: Sequence[str]) -> DictConfig:
    """A config of one key alone, as `train` composes it with these words."""
    nothing = OmegaConf.create()
    OmegaConf.update(nothing, key, OmegaConf.select(compose("train", words), key), force_add=True)
    return nothing


def model_differences(config: DictConfig, text: str) -> list[str]:
    """Keys of the model that a checkpoint's config and this one both have with different values, as `key=theirs (here ours)`.

    Weights of the same shapes fit all the same, and then find something else: another mean of the pixels, another stride.
    """
    try:
        trained = read_checkpoint_config(text)
    except UserError:
        return []
    theirs, ours = (
        flat(OmegaConf.to_container(whole.model, resolve=True), "model.")
        for whole in (trained, config)
    )
    passing = (
        "weights",
        "num_classes",
        "ranges",
        "frozen_stages",
        "loss_weight",
    )  # what may differ without harm, or has another shape
    keys = [
        k
        for k in theirs
        if k in ours and theirs[k] != ours[k] and k.rsplit(".", 1)[-1] not in passing
    ]
    return [f"{key}={theirs[key]} (here {ours[key]})" for key in keys]


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested plain values -> dotted key -> value; lists are values."""
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {
        key: value
        for name, inner in node.items()
        for key, value in flat(inner, f"{prefix}{name}.").items()
    }
