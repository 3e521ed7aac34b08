"""Many trainings in search of the best numbers: python tools/sweep.py --multirun key=a,b"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from maskseg import cli, config, sweeps
from maskseg.errors import UserError

USAGE = """
Trains once for each point of a search; a trial is worth its best trainer.best_metric. The keys are those of tools/train.py, and Hydra's own.

  python tools/sweep.py --multirun experiment=scenes_r18 optimizer.lr=3e-4,7e-4,2e-3                       each value
  python tools/sweep.py --multirun experiment=scenes_r18 optimizer=sgd,adamw seed=0,1                      each pair of values
  python tools/sweep.py --multirun hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'
  python tools/sweep.py --multirun hydra/sweeper=optuna hydra/launcher=submitit_slurm hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 \\
      hydra.launcher.timeout_min=600 hydra.sweeper.n_jobs=4 'optimizer.lr=interval(1e-3, 4e-2)' 'model.heads.mask.layers=choice(2, 4)'
  python tools/sweep.py --multirun hydra/launcher=submitit_local model.backbone.trunk.name=resnet18,resnet34

Trials are in runs/<experiment>/sweep_<time>/<number>. optuna, submitit_local and submitit_slurm come with pip install maskseg[sweep].
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(_sweep, USAGE, argv)


def _sweep(words: list[str]) -> None:
    rest = [word for word in words if word not in ("--multirun", "-m")]
    if rest == words:
        raise UserError("a sweep needs --multirun, and key=a,b (--help shows commands); one training alone is tools/train.py")
    folder, overrides, keys = sweeps.prepare(rest)
    sys.argv[1:] = ["--multirun", *overrides]
    try:
        hydra.main(str(config.config_folder().resolve()), "train", version_base="1.3")(_trial)()
    except Exception as error:
        sweeps.explain(error)
        raise
    finally:
        completed = sweeps.report(folder, keys)
    if not completed:
        raise UserError("no trial was completed")


def _trial(_: object) -> float:
    """Composes again, by our own rules; see docs/decisions/0005-sweeps.md."""
    GlobalHydra.instance().clear()
    own = HydraConfig.get()
    return sweeps.trial(list(own.overrides.task), Path(own.sweep.dir) / own.sweep.subdir)


if __name__ == "__main__":
    sys.exit(main())
