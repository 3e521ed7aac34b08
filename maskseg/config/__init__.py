"""The one part that knows Hydra: YAML and command line -> config -> objects."""

from maskseg.config.build import FROM_CHECKPOINT, TRUSTED, build, build_model, check_targets, only, put, require, set_categories, to_yaml
from maskseg.config.compose import compose, config_folder, experiments
from maskseg.config.derived import flat, from_checkpoint, hydra_settings, model_differences, part, sweep_points

__all__ = [
    "FROM_CHECKPOINT",
    "TRUSTED",
    "build",
    "build_model",
    "check_targets",
    "compose",
    "config_folder",
    "experiments",
    "flat",
    "from_checkpoint",
    "hydra_settings",
    "model_differences",
    "only",
    "part",
    "put",
    "require",
    "set_categories",
    "sweep_points",
    "to_yaml",
]
