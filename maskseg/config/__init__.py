"""The one part that knows Hydra: YAML and command line -> config -> objects."""

from maskseg.config.build import build, build_model, only, put, require, set_categories, to_yaml
from maskseg.config.compose import compose
from maskseg.config.derived import (
    flat,
    from_checkpoint,
    hydra_settings,
    model_differences,
    names_data,
    part,
    sweep_points,
)
from maskseg.config.trust import FROM_CHECKPOINT, TRUSTED, check_closed, check_targets, construct
from maskseg.files.configs import config_folder, experiments

__all__ = [
    "FROM_CHECKPOINT",
    "TRUSTED",
    "build",
    "build_model",
    "check_closed",
    "check_targets",
    "compose",
    "config_folder",
    "construct",
    "experiments",
    "flat",
    "from_checkpoint",
    "hydra_settings",
    "model_differences",
    "names_data",
    "only",
    "part",
    "put",
    "require",
    "set_categories",
    "sweep_points",
    "to_yaml",
]
