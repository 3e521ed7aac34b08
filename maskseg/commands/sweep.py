"""Runs a hyperparameter search: one training for each point of a sweep.

The objective of a trial is its best trainer.best_metric. The keys are those of tools/train.py, and
Hydra's own.

Each value:
  python tools/sweep.py --multirun experiment=scenes_r18 optimizer.lr=3e-4,7e-4,2e-3

Each pair of values:
  python tools/sweep.py --multirun experiment=scenes_r18 optimizer=sgd,adamw seed=0,1

A search in an interval:
  python tools/sweep.py --multirun hydra/sweeper=optuna hydra.sweeper.n_trials=20 \\
      'optimizer.lr=tag(log, interval(1e-4, 1e-2))'

Trials as the jobs of a Slurm cluster, or in other processes on this machine:
  python tools/sweep.py --multirun hydra/sweeper=optuna hydra/launcher=submitit_slurm \\
      hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 \\
      hydra.launcher.timeout_min=600 hydra.sweeper.n_jobs=4 \\
      'optimizer.lr=interval(1e-3, 4e-2)' 'model.heads.mask.layers=choice(2, 4)'
  python tools/sweep.py --multirun hydra/launcher=submitit_local \\
      model.backbone.trunk.name=resnet18,resnet34

Trials are in runs/<experiment>/sweep_<time>/<number>. Optuna, submitit_local and submitit_slurm are
installed by pip install -e '.[sweep]'.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from maskseg import config as configs
from maskseg.commands import train
from maskseg.config import Config
from maskseg.errors import Interrupted, UserError
from maskseg.files import parse_json, write_json
from maskseg.files.configs import config_folder
from maskseg.visualization.curves import read_metrics

# The objective of a training that failed. NaN would end an Optuna sweep, and no AP is lower.
FAILED = -1.0
RESULT_FILE = "trial.json"


class TrialResult(TypedDict):
    """The content of `trial.json`. problem: why the training failed, empty if it did not."""

    overrides: list[str]
    metric: str
    value: float
    problem: str


def main(arguments: list[str]) -> None:
    """Entry point of `tools/sweep.py`."""
    overrides = [argument for argument in arguments if argument not in ("--multirun", "-m")]
    if overrides == arguments:
        raise UserError(
            "a sweep needs --multirun, and key=a,b (--help shows commands); for a single training "
            "use tools/train.py"
        )
    folder, hydra_overrides, keys = prepare(overrides)
    sys.argv[1:] = ["--multirun", *hydra_overrides]
    try:
        hydra.main(str(config_folder().resolve()), "train", version_base="1.3")(run_trial)()
    except Exception as error:
        _raise_user_error(error)
        raise
    finally:
        num_completed = report_trials(folder, keys)
    if not num_completed:
        raise UserError("no trial was completed")


def prepare(overrides: Sequence[str]) -> tuple[Path, list[str], set[str]]:
    """Check the overrides of a sweep, including each of its values.

    -> the folder of the sweep, the overrides for Hydra, and the keys that are searched.
    Raises UserError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep starts its trials itself, each in one process: run it without torchrun"
        )
    overrides = configs.quote_swept_paths(overrides)
    hydra_overrides = [o for o in overrides if o.lstrip("+~").startswith(("hydra.", "hydra/"))]
    train_overrides = [override for override in overrides if override not in hydra_overrides]
    if any(override.startswith("run_dir=") for override in train_overrides):
        raise UserError(
            "run_dir: the folder of a trial is in that of the sweep, which hydra.sweep.dir=... sets"
        )
    points = list(configs.sweep_points(train_overrides))
    keys = _searched_keys(points, train_overrides)
    trial_configs = [configs.compose("train", point) for point in points]
    settings = configs.hydra_settings([*points[0], *hydra_overrides])
    if max(settings.launcher.get("tasks_per_node", 1), settings.launcher.get("nodes", 1)) > 1:
        raise UserError(
            "hydra.launcher: a trial is one process, nodes and tasks_per_node must be 1"
        )
    _check_validation_data(trial_configs)
    hydra_values = {o.partition("=")[0]: o.partition("=")[2] for o in hydra_overrides}
    if hydra_values.get("hydra.sweeper.direction", "maximize") != "maximize":
        raise UserError(
            "hydra.sweeper.direction: the highest trainer.best_metric is the best, so the "
            "direction is always maximize"
        )
    folder = _sweep_folder(trial_configs[0].name, hydra_values, settings)
    quoted = str(folder).replace("'", "\\'")
    added = [f"hydra.sweep.dir='{quoted}'", "hydra.sweep.subdir=${hydra.job.num}"]
    return folder, [*_default_overrides(hydra_values, settings), *overrides, *added], keys


def _check_validation_data(trial_configs: Sequence[Config]) -> None:
    """Raise UserError for a dataset without a validation split."""
    for config in trial_configs:
        if "val" not in configs.build_source(config.data).splits():
            raise UserError(
                "the objective of a trial is its best trainer.best_metric: validation data is "
                "missing (data.val_json)"
            )


def _searched_keys(points: Sequence[Sequence[str]], overrides: Sequence[str]) -> set[str]:
    """The keys with more than one value. Raises UserError for one that is given twice."""
    keys: set[str] = set()
    for point in points:
        keys.update(item.partition("=")[0] for item in point if item not in points[0])
    all_keys = [override.partition("=")[0] for override in overrides]
    for key in sorted(keys):
        if all_keys.count(key) > 1:
            raise UserError(
                f"{key} is given twice, and Optuna would use the single value instead of the search"
            )
    return keys


def _sweep_folder(experiment: str, hydra_values: dict[str, str], settings: Config) -> Path:
    """The folder of the sweep, which must be new or empty. Raises UserError."""
    if "hydra.sweep.dir" in hydra_values:
        folder = Path(settings.sweep.dir)
    else:
        folder = Path("runs") / experiment / time.strftime("sweep_%Y-%m-%d_%H-%M-%S")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"hydra.sweep.dir={folder} is not empty: choose another folder "
            "(hydra.sweeper.storage=... continues an Optuna study)"
        )
    return folder


def _default_overrides(hydra_values: dict[str, str], settings: Config) -> list[str]:
    """Overrides of defaults of Hydra and its plugins that do not suit a sweep of trainings.

    Those of the command line follow after them and take precedence.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises the error of a trial unchanged
    logging.getLogger("alembic").setLevel(logging.WARNING)  # of Optuna, which lists its plugins
    overrides = []
    if "hydra/job_logging" not in hydra_values:
        overrides.append("hydra/job_logging=stdout")
    if "direction" in settings.sweeper:
        overrides.append("hydra.sweeper.direction=maximize")
        if "submitit_folder" not in settings.launcher:
            # Trials run one after the other, so that each can learn from those before.
            overrides.append("hydra.sweeper.n_jobs=1")
    if hydra_values.get("hydra/launcher") == "submitit_local" and torch.cuda.device_count():
        # By default, submitit hides the GPUs from the trials.
        overrides.append("hydra.launcher.gpus_per_node=1")
    return overrides


def run_trial(_: object) -> float:
    """The task function of Hydra.

    The config is composed again by `maskseg.config`; see docs/decisions/0005-sweeps.md.
    """
    GlobalHydra.instance().clear()
    settings = HydraConfig.get()
    folder = Path(settings.sweep.dir) / settings.sweep.subdir
    return train_trial(list(settings.overrides.task), folder)


def train_trial(overrides: Sequence[str], folder: Path) -> float:
    """Train with the overrides of one trial in `folder`.

    -> the objective; `FAILED` where the training failed after its start.
    A trial that a cluster starts again continues from its last checkpoint.
    Raises UserError for errors before the start of the training, and SystemExit after a signal, so
    that for a cluster the job ends without a result.
    """
    # Hydra's sweepers turn ~key into ~key=null.
    train_overrides = [o.removesuffix("=null") if o.startswith("~") else o for o in overrides]
    if not any(override.startswith("trainer.resume=") for override in train_overrides):
        train_overrides.append("trainer.resume=auto")
    config = configs.compose("train", train_overrides, print)
    config.run_dir = str(folder)
    metric = str(config.trainer.best_metric)
    problem = ""
    try:
        train.train(config)
    except Interrupted as stop:
        raise SystemExit(stop.code) from stop
    except (UserError, torch.OutOfMemoryError) as error:
        if not (folder / "config.yaml").exists():  # the training did not start
            raise
        problem = " ".join(str(error).split())
        print(f"trial {folder}: {problem}; its objective is {FAILED:g}", flush=True)
    value = FAILED if problem else objective(folder, metric)
    result: TrialResult = {
        "overrides": list(overrides),
        "metric": metric,
        "value": value,
        "problem": problem,
    }
    write_json(folder / RESULT_FILE, result)
    return value


def objective(folder: Path, metric: str) -> float:
    """The highest finite value of a metric in the evaluations of a run, else `FAILED`.

    Raises UserError where the run does not have the metric.
    """
    _, evaluations = read_metrics(folder / "metrics.jsonl")
    if metric not in evaluations:
        names = ", ".join(key for key in evaluations if "/" in key)
        raise UserError(f"trainer.best_metric={metric!r} is not among the metrics: {names}")
    values = evaluations[metric].values()
    return max((value for value in values if math.isfinite(value)), default=FAILED)


def report_trials(folder: Path, keys: set[str]) -> int:
    """Print the trials with the values of the searched keys, the best first.

    Writes the same text to `results.txt`. -> the number of completed trials.
    """
    files = folder.glob(f"*/{RESULT_FILE}")
    # Trials have numbers; a folder of another name was put there by somebody.
    trials = [(f.parent, _read_result(f)) for f in files if f.parent.name.isdecimal()]
    if not trials:
        return 0
    trials.sort(
        key=lambda trial: (bool(trial[1]["problem"]), -trial[1]["value"], int(trial[0].name))
    )
    best_folder, best_result = trials[0]
    lines = [f"{best_result['metric']:>10}  trial"]
    for path, result in trials:
        value = "failed" if result["problem"] else f"{result['value']:.4f}"
        point = [item for item in result["overrides"] if item.partition("=")[0] in keys]
        cells = [f"{value:>10}", str(path), *point]
        if result["problem"]:
            cells.append(result["problem"])
        lines.append("  ".join(cells))
    num_completed = sum(not result["problem"] for _, result in trials)
    if num_completed:
        lines.append(f"best trial: {best_folder}")
    print("\n".join(lines), flush=True)
    (folder / "results.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return num_completed


def _read_result(file: Path) -> TrialResult:
    """Read the result of a trial. Raises UserError for a file that is damaged."""
    try:
        content = parse_json(file.read_bytes())
        overrides = [_to_printable(override) for override in content["overrides"]]
        value = float(content["value"])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError(
            f"{file}: not the result of a trial, or damaged; move its folder away"
        ) from error
    return {
        "overrides": overrides,
        "metric": _to_printable(content.get("metric")),
        "value": value,
        "problem": _to_printable(content.get("problem") or ""),
    }


def _to_printable(value: object) -> str:
    """Return the text of a value. JSON can contain halves of a character, which no file can."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _raise_user_error(error: Exception) -> None:
    """Raise a UserError of one line for a known error of Hydra or a plugin, else return."""
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("hydra"):
        hint = "; an interval needs hydra/sweeper=optuna" if "INTERVAL" in text else ""
        raise UserError(text + hint) from error
    if type(error).__module__.startswith("submitit"):
        raise UserError(
            "the job of a trial ended without a result, see .submitit/ in the folder of the sweep: "
            f"{text[:300]}"
        ) from error
    if isinstance(error, ValueError) and text.startswith("No trials are completed"):
        raise UserError("no trial was completed") from error
