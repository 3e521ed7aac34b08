"""The points of a sweep, and Hydra's own settings for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from maskseg.config.search_path import open_configs
from maskseg.errors import UserError

_GOLDEN_RATIO = 0.618  # position of the value that is checked inside an interval


def sweep_points(overrides: Sequence[str], max_values: int = 16) -> Iterator[list[str]]:
    """Points of a sweep that together contain each of its values, as overrides without a sweep.

    The first point has the first value of each override. In each other point, one override has
    another value. max_values: values to use of one override; for an interval, these are its ends
    and a value between them. Raises UserError for an override that Hydra cannot parse.
    """
    values = [list(itertools.islice(_values_of(item), max_values)) for item in overrides]
    first = [options[0] for options in values]
    yield first
    for index, options in enumerate(values):
        for option in options[1:]:
            yield [*first[:index], option, *first[index + 1 :]]


def _values_of(override: str) -> list[str]:
    """An override for each value of a sweep; without a sweep, the override itself."""
    if override.startswith("--"):  # an option, see maskseg.config.show
        return [override]
    try:
        parsed = OverridesParser.create().parse_override(override)
        if not parsed.is_sweep_override():
            return [override]
        key = parsed.get_key_element()
        if parsed.is_interval_sweep():
            sweep = cast(Any, parsed.value())
            inside = sweep.start + _GOLDEN_RATIO * (sweep.end - sweep.start)
            return [f"{key}={value}" for value in (sweep.start, sweep.end, inside)]
        return [f"{key}={value}" for value in parsed.sweep_string_iterator()]
    except HydraException as error:
        raise UserError(f"{override}: {' '.join(str(error).split())}") from error


def hydra_settings(overrides: Sequence[str]) -> Any:
    """Hydra's own keys (`sweep`, `sweeper`, `launcher`) for overrides without a sweep.

    Raises UserError, also where a plugin is not installed.
    """
    with open_configs():
        try:
            return hydra.compose("train", list(overrides), return_hydra_config=True).hydra
        except MissingConfigException as error:
            group, _, choice = str(error.missing_cfg_file).rpartition("/")
            raise UserError(
                f"{group} has no {choice!r} (there are {', '.join(error.options or ())}); "
                "pip install -e '.[sweep]' installs optuna, submitit_local and submitit_slurm"
            ) from error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            message = str(error).split("\nTo append")[0]
            raise UserError(" ".join(message.split())) from error
