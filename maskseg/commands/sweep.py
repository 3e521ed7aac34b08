"""Trains once for each point of a search; a trial is worth its best trainer.best_metric. The keys are those of tools/train.py, and Hydra's own.

  python tools/sweep.py --multirun experiment=scenes_r18 optimizer.lr=3e-4,7e-4,2e-3                       each value
  python tools/sweep.py --multirun experiment=scenes_r18 optimizer=sgd,adamw seed=0,1                      each pair of values
  python tools/sweep.py --multirun hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'
  python tools/sweep.py --multirun hydra/sweeper=optuna hydra/launcher=submitit_slurm hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 \\
      hydra.launcher.timeout_min=600 hydra.sweeper.n_jobs=4 'optimizer.lr=interval(1e-3, 4e-2)' 'model.heads.mask.layers=choice(2, 4)'
  python tools/sweep.py --multirun hydra/launcher=submitit_local model.backbone.trunk.name=resnet18,resnet34

Trials are in runs/<experiment>/sweep_<time>/<number>. optuna, submitit_local and submitit_slurm come with pip install maskseg[sweep].
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from maskseg import config as configs
from maskseg.commands import train
from maskseg.errors import Interrupted, UserError
from maskseg.files import parse_json, write_json
from maskseg.files.configs import config_folder

FAILED = (
    -1.0
)  # what a training is worth that broke off. NaN would end an Optuna sweep, and no AP is lower.
RESULT = "trial.json"


def prepare(words: Sequence[str]) -> tuple[Path, list[str], set[str]]:
    """Checks each value of the sweep that `words` describe. -> the sweep's folder, the words for Hydra, the keys searched. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "a sweep starts its trials itself, each in one process: run it without torchrun"
        )
    own = [word for word in words if word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    swept = [word for word in words if word not in own]
    if any(word.startswith("run_dir=") for word in swept):
        raise UserError(
            "run_dir: each trial has a folder of its own in the sweep's, which hydra.sweep.dir=... names"
        )
    points = list(configs.sweep_points(swept))
    keys = {word.partition("=")[0] for point in points for word in point if word not in points[0]}
    twice = [
        key for key in sorted(keys) if [word.partition("=")[0] for word in swept].count(key) > 1
    ]
    if twice:
        raise UserError(
            f"{twice[0]} is given twice, and Optuna would take the one value instead of the search"
        )
    composed = [configs.compose("train", point) for point in points]
    settings = configs.hydra_settings([*points[0], *own])
    if max(settings.launcher.get("tasks_per_node", 1), settings.launcher.get("nodes", 1)) > 1:
        raise UserError(
            "hydra.launcher: a trial is one process, nodes and tasks_per_node must be 1"
        )
    if any("val" not in configs.build(config.data).splits() for config in composed):
        raise UserError(
            "a trial is worth its best trainer.best_metric: validation data is missing (data.val_json)"
        )
    given = {word.partition("=")[0]: word.partition("=")[2] for word in own}
    if given.get("hydra.sweeper.direction", "maximize") != "maximize":
        raise UserError(
            "hydra.sweeper.direction: the highest trainer.best_metric is the best one, so it is always maximize"
        )
    folder = Path("runs") / composed[0].name / time.strftime("sweep_%Y-%m-%d_%H-%M-%S")
    folder = Path(settings.sweep.dir) if "hydra.sweep.dir" in given else folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"hydra.sweep.dir={folder} is not empty: choose another folder (hydra.sweeper.storage=... goes on with an Optuna study)"
        )
    quoted = str(folder).replace("'", "\\'")
    return (
        folder,
        [
            *_defaults(given, settings),
            *words,
            f"hydra.sweep.dir='{quoted}'",
            "hydra.sweep.subdir=${hydra.job.num}",
        ],
        keys,
    )


def _defaults(given: dict[str, str], settings: Any) -> list[str]:
    """Words for Hydra where its or a plugin's own default does harm; those on the command line come after them."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises a trial's error as it is
    logging.getLogger("alembic").setLevel(logging.WARNING)  # Optuna's, which lists its plugins
    words = ["hydra/job_logging=stdout"] if "hydra/job_logging" not in given else []
    if "direction" in settings.sweeper:
        words.append("hydra.sweeper.direction=maximize")
        if "submitit_folder" not in settings.launcher:
            words.append(
                "hydra.sweeper.n_jobs=1"
            )  # trials one after the other: each may learn from the one before
    if given.get("hydra/launcher") == "submitit_local" and torch.cuda.device_count():
        words.append(
            "hydra.launcher.gpus_per_node=1"
        )  # else submitit hides the GPUs from the trials
    return words


def trial(words: Sequence[str], folder: Path) -> float:
    """Trains with the words of one trial in `folder`. -> its objective, `FAILED` where the training broke off after it had begun.

    Raises UserError for what is wrong before that; SystemExit after a signal, so that a cluster sees the job end without a result.
    A trial that a cluster starts again goes on from its last checkpoint.
    """
    own = [
        word.removesuffix("=null") if word.startswith("~") else word for word in words
    ]  # Hydra's sweepers make ~key=null of ~key
    resume = (
        [] if any(word.startswith("trainer.resume=") for word in own) else ["trainer.resume=auto"]
    )
    config = configs.compose("train", [*own, *resume])
    config.run_dir = str(folder)
    metric, problem = str(config.trainer.best_metric), ""
    try:
        train.train(config)
    except Interrupted as stop:
        raise SystemExit(stop.code) from stop
    except (UserError, torch.OutOfMemoryError) as error:
        if not (folder / "config.yaml").exists():  # the training never began
            raise
        problem = " ".join(str(error).split())
        print(f"trial {folder}: {problem}; it is worth {FAILED:g}", flush=True)
    value = FAILED if problem else objective(folder, metric)
    result = {"words": list(words), "metric": metric, "value": value, "problem": problem}
    write_json(folder / RESULT, result)
    return value


def objective(folder: Path, metric: str) -> float:
    """The highest value of a metric in a run's evaluations. Raises UserError where there is none."""
    lines = [parse_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    known = {key: None for line in lines if line["kind"] == "val" for key in line}
    values = [float(line[metric]) for line in lines if line["kind"] == "val" and metric in line]
    if not values:
        names = ", ".join(key for key in known if "/" in key)
        raise UserError(f"trainer.best_metric={metric!r} is not among the metrics: {names}")
    return max((value for value in values if math.isfinite(value)), default=FAILED)


def report(folder: Path, keys: set[str]) -> int:
    """Prints the trials there are, the best first, with the values of `keys`; writes the same to `results.txt`. -> how many were completed."""
    found: list[tuple[Path, Any]] = [
        (path.parent, parse_json(path.read_text())) for path in folder.glob(f"*/{RESULT}")
    ]
    if not found:
        return 0
    found.sort(key=lambda pair: (bool(pair[1]["problem"]), -pair[1]["value"], int(pair[0].name)))
    lines = [f"{found[0][1]['metric']:>10}  trial"]
    for path, result in found:
        point = [word for word in result["words"] if word.partition("=")[0] in keys]
        value = "failed" if result["problem"] else f"{result['value']:.4f}"
        lines.append(
            "  ".join(
                [
                    f"{value:>10}",
                    str(path),
                    *point,
                    *([result["problem"]] if result["problem"] else []),
                ]
            )
        )
    completed = sum(not result["problem"] for _, result in found)
    lines += [f"best trial: {found[0][0]}"] if completed else []
    print("\n".join(lines), flush=True)
    (folder / "results.txt").write_text("\n".join(lines) + "\n")
    return completed


def explain(error: Exception) -> None:
    """Raises UserError, one line, for what Hydra or a plugin says in many."""
    text = " ".join(str(error).split())
    if type(error).__module__.startswith("hydra"):
        hint = "; an interval needs hydra/sweeper=optuna" if "INTERVAL" in text else ""
        raise UserError(text + hint) from error
    if type(error).__module__.startswith("submitit"):
        raise UserError(
            f"a trial's job ended without a result, see .submitit/ in the sweep's folder: {text[:300]}"
        ) from error
    if isinstance(error, ValueError) and text.startswith("No trials are completed"):
        raise UserError("no trial was completed") from error


def main(arguments: list[str]) -> None:
    """Entry point of `tools/sweep.py`."""
    rest = [argument for argument in arguments if argument not in ("--multirun", "-m")]
    if rest == arguments:
        raise UserError(
            "a sweep needs --multirun, and key=a,b (--help shows commands); one training alone is tools/train.py"
        )
    folder, overrides, keys = prepare(rest)
    sys.argv[1:] = ["--multirun", *overrides]
    try:
        hydra.main(str(config_folder().resolve()), "train", version_base="1.3")(run_trial)()
    except Exception as error:
        explain(error)
        raise
    finally:
        completed = report(folder, keys)
    if not completed:
        raise UserError("no trial was completed")


def run_trial(_: object) -> float:
    """The task function of Hydra. Composes again, by our own rules; see docs/decisions/0005-sweeps.md."""
    GlobalHydra.instance().clear()
    own = HydraConfig.get()
    return trial(list(own.overrides.task), Path(own.sweep.dir) / own.sweep.subdir)
