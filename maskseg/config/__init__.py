"""Configs: compose them from YAML files and the command line, check them, and build their objects.

Apart from `maskseg.commands.sweep`, only this package uses Hydra.
"""

from omegaconf import DictConfig as Config

from maskseg.config.build import (
    build,
    build_model,
    build_optimizer,
    build_source,
    make_config,
    require_keys,
    select_keys,
    set_categories,
    set_key,
    to_yaml,
)
from maskseg.config.compose import compose
from maskseg.config.derived import (
    changes_numbers,
    config_differences,
    flatten,
    from_checkpoint,
    group_choices,
    group_config,
    has_choices,
    model_differences,
    names_data,
    resumed_config,
)
from maskseg.config.path_values import find_path, quote_swept_paths
from maskseg.config.show import SHOW_GROUPS, describe_groups
from maskseg.config.sweeps import hydra_settings, sweep_points
from maskseg.config.trust import (
    CHECKPOINT_TARGETS,
    TRAIN_TARGETS,
    check_closed,
    check_targets,
    construct,
)
from maskseg.files.configs import config_folder, experiments

__all__ = [
    "CHECKPOINT_TARGETS",
    "SHOW_GROUPS",
    "TRAIN_TARGETS",
    "Config",
    "build",
    "build_model",
    "build_optimizer",
    "build_source",
    "changes_numbers",
    "check_closed",
    "check_targets",
    "compose",
    "config_differences",
    "config_folder",
    "construct",
    "describe_groups",
    "experiments",
    "find_path",
    "flatten",
    "from_checkpoint",
    "group_choices",
    "group_config",
    "has_choices",
    "hydra_settings",
    "make_config",
    "model_differences",
    "names_data",
    "quote_swept_paths",
    "require_keys",
    "resumed_config",
    "select_keys",
    "set_categories",
    "set_key",
    "sweep_points",
    "to_yaml",
]
