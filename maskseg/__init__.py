"""maskseg: a modular, pure-Python framework to train, evaluate and use Mask R-CNN-style models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskseg.errors import UserError

if TYPE_CHECKING:
    from maskseg.inference.class_filter import ClassChoice
    from maskseg.inference.predictor import Predictor
    from maskseg.training import TrainedRun

__version__ = "0.1.0"

__all__ = ["UserError", "__version__", "evaluate", "load", "train"]


# Functions import what they need when they are called: the loader processes must not pay for
# importing torch.


def load(
    run: str | Path,
    device: str = "auto",
    precision: str | None = None,
    min_score: float | None = None,
    classes: ClassChoice | None = None,
    **overrides: object,
) -> Predictor:
    """Load a trained model: `maskseg.load("runs/.../best.pt")("photo.jpg")`.

    run: a checkpoint or a run folder (its best.pt, else last.pt).
    device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1` ... or `mps`.
    precision: `fp32`, `bf16` or `fp16` of the convolutions; by default that of the training.
    min_score: drop objects below it; by default, all objects that the model returns are kept.
    classes: names or category ids of the classes to keep.
    overrides: further keys of the checkpoint's config, spelled as in `train`:
        `model__classifier__nms_threshold=0.4`.

    Raises `UserError`, also for keys that have no effect here, such as `trainer__device`.
    """
    from maskseg.config.keywords import to_overrides
    from maskseg.config.restore import load_predictor

    if precision is not None:
        overrides["trainer.precision"] = precision
    return load_predictor(Path(run), device, to_overrides(overrides), min_score, classes)


def train(experiment: str | None = None, **overrides: object) -> TrainedRun:
    """Train an experiment, as `tools/train.py` does.

    experiment: a name of configs/experiment; by default that of the tool.
    overrides: keys of the config, with two underscores for a dot:
        `train("scenes_r18", trainer__max_steps=60, data="custom", data__train_json="a.json")`, or
        with dots in a dictionary, `train("scenes_r18", **{"trainer.max_steps": 60})`.

    Returns the run folder, the final metrics, and `load()`. `maskseg.training.Training` trains
    Python objects without a config. Raises `UserError`, before anything is written, where the data
    or the config is wrong.
    """
    from maskseg.training import train as train_experiment

    return train_experiment(experiment, **overrides)


def evaluate(run: str | Path, output: str | Path, **overrides: object) -> dict[str, float]:
    """Evaluate a checkpoint or run folder, as `tools/evaluate.py` does. -> the metrics.

    output: a new folder for metrics, detections and plots; overrides: as in `train`.
    Raises `UserError`.
    """
    from maskseg.training import evaluate as evaluate_run

    return evaluate_run(run, output, **overrides)
