"""The options `--cfg=job` and `--info`: print a tool's config, or the groups, and run nothing.

They stand among the overrides of a command line, which each tool hands to `compose` or
`from_checkpoint`. `maskseg.cli` prints the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omegaconf import DictConfig, OmegaConf

from maskseg.config.experiment import TRIMMED
from maskseg.errors import Shown
from maskseg.files.configs import group_files, groups

SHOW_CONFIG = "--cfg=job"
SHOW_GROUPS = "--info"


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """-> the overrides, and the options of this module among the arguments."""
    options = [argument for argument in arguments if argument in (SHOW_CONFIG, SHOW_GROUPS)]
    return [argument for argument in arguments if argument not in options], options


def show(options: Sequence[str], config: DictConfig, choices: Mapping[str, str]) -> None:
    """Raise Shown with what the options ask for; return where there is no option.

    choices: the choice of each group, such as `model/heads@model.heads.mask` -> `mask`.
    """
    if SHOW_CONFIG in options:
        raise Shown(OmegaConf.to_yaml(config))
    if SHOW_GROUPS in options:
        raise Shown(describe_groups(choices))


def describe_groups(choices: Mapping[str, str]) -> str:
    """The choices of a command line with their alternatives, then the other groups."""
    lines = []
    for key, choice in sorted(choices.items()):
        lines.append(f"{key}={choice.removesuffix(TRIMMED)}")
        lines.append(f"    {' '.join(_files(key.partition('@')[0]))}")
    chosen = {key.partition("@")[0] for key in choices}
    others = [group for group in groups() if group not in chosen]
    if others:
        lines.append("\nother groups:")
        lines += [f"{group}: {' '.join(_files(group))}" for group in others]
    return "\n".join(lines)


def _files(group: str) -> list[str]:
    return [path.stem for path in group_files(group)]
