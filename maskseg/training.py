"""Training from Python: experiments with keyword arguments, and objects without a config.

The functions print what the command-line tools print, and leave the process as they found it:
handlers of signals, the state of torch's random generators, threads and logging. SIGTERM and Ctrl-C
finish and save the step; then the process's own handler gets the signal.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg import config as configs
from maskseg.commands import evaluate as evaluation_tool
from maskseg.commands.check_data import describe
from maskseg.commands.train import (
    Log,
    TrainingParts,
    compose_training,
    count_steps,
    train_parts,
    training_validation,
)
from maskseg.commands.train import train as train_config
from maskseg.config import Config
from maskseg.config.keywords import to_overrides
from maskseg.config.overrides import key_of
from maskseg.config.restore import load_predictor
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.single_image import SingleImage
from maskseg.engine.checkpoint import (
    best_threshold,
    checkpoint_path,
    inference_weights,
    load_checkpoint,
    load_weights,
)
from maskseg.engine.distributed import DistributedContext, run_while_others_wait
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.engine.trainer import Trainer
from maskseg.errors import Interrupted, UserError
from maskseg.inference.class_filter import ClassChoice
from maskseg.inference.prediction import PLOT_MIN_SCORE
from maskseg.inference.predictor import Predictor
from maskseg.inference.validation import ValidationSettings
from maskseg.models.fuse import for_inference
from maskseg.models.interfaces import TrainableModel
from maskseg.visualization.curves import read_metrics

_EVALUATE_ARGUMENTS = {"checkpoint": "run", "output": "output"}


@dataclass(frozen=True)
class TrainedRun:
    """A training that has ended.

    run_dir: its folder; metrics: of the last evaluation, such as `segm/AP`, {} without validation
    data; training: the objects that were trained, None where the config describes the model.
    """

    run_dir: Path
    metrics: dict[str, float] = field(repr=False)
    training: Training | None = field(default=None, repr=False)

    @property
    def checkpoint(self) -> Path:
        """The best checkpoint, else the last one."""
        return checkpoint_path(self.run_dir)

    def load(
        self,
        device: str = "auto",
        precision: str | None = None,
        min_score: float | None = None,
        classes: ClassChoice | None = None,
    ) -> Predictor:
        """Load the best model; the arguments are those of `maskseg.load`. Raises UserError."""
        if self.training is not None:
            return self.training.load(self.run_dir, device, precision, min_score, classes)
        overrides = [] if precision is None else [f"trainer.precision={precision}"]
        return load_predictor(self.run_dir, device, overrides, min_score, classes)


def train(experiment: str | None = None, **overrides: object) -> TrainedRun:
    """See `maskseg.train`."""
    if experiment is not None:
        overrides = {"experiment": experiment, **overrides}
    report = print if os.environ.get("RANK", "0") == "0" else None
    with _unchanged_process():
        config, command_line = compose_training(to_overrides(overrides), report)
        run_dir = train_config(config, command_line)
    return TrainedRun(run_dir, last_metrics(run_dir))


def evaluate(run: str | Path, output: str | Path, **overrides: object) -> dict[str, float]:
    """See `maskseg.evaluate`."""
    arguments = to_overrides({"checkpoint": Path(run), "output": Path(output)})
    further = to_overrides(overrides)
    for override in further:
        key = key_of(override)
        if key in _EVALUATE_ARGUMENTS:
            raise UserError(f"evaluate: {key} is the argument {_EVALUATE_ARGUMENTS[key]}")
    with _unchanged_process():
        return evaluation_tool.evaluate([*arguments, *further])


@dataclass(frozen=True)
class Training:
    """A training of Python objects, with the run folder, checkpoints and resume of an experiment.

    `trainer.resume` works with the same objects, built anew. Two things need a config and do not
    apply: `maskseg.load` cannot build the model of such a run, but `load` here can read its
    checkpoints; and `trainer.init` is refused: load the weights into the model first.

    model: a `GeneralizedRCNN`, or another `TrainableModel`, for the classes of the data.
    data: the training and validation files with their transforms.
    optimizer: makes the optimizer of parameter groups, such as `partial(torch.optim.AdamW,
        lr=7e-4)`. The learning rate is not scaled by the batch size.
    schedule: makes the learning-rate schedule, called as `schedule(optimizer, max_steps=...)`, such
        as `partial(maskseg.engine.schedules.cosine, warmup_steps=100)`. It advances at each step.
    trainer: all settings of the trainer.
    batch_size: images per step, over all processes and micro-batches.
    seed: of the order of the images and all random draws.
    name: the run folder is `runs/NAME/TIME`, unless there is a `run_dir`.
    evaluation: what is evaluated and drawn.
    """

    model: nn.Module
    data: CocoSource
    optimizer: Callable[..., Optimizer]
    schedule: Callable[..., LRScheduler]
    trainer: Trainer
    batch_size: int = 2
    seed: int = 0
    name: str = "objects"
    run_dir: str | Path | None = None
    evaluation: ValidationSettings = field(default_factory=ValidationSettings)

    def run(self) -> TrainedRun:
        """Train the model, in place.

        Raises UserError, before anything is written, where the data or a setting is wrong.
        """
        if self.trainer.init is not None:
            raise UserError("trainer.init needs a config: load the weights into the model first")
        with _unchanged_process():
            run_dir = train_parts(self._config(), self.trainer, self._build_parts)
        return TrainedRun(run_dir, last_metrics(run_dir), self)

    def load(
        self,
        run: str | Path,
        device: str = "auto",
        precision: str | None = None,
        min_score: float | None = None,
        classes: ClassChoice | None = None,
    ) -> Predictor:
        """Load a checkpoint or run folder of this training into a copy of the model.

        The arguments are those of `maskseg.load`. Raises UserError for weights that do not fit.
        """
        path = checkpoint_path(Path(run))
        torch_device = pick_device(device, "device")
        dtype = inference_dtype(precision or self.trainer.precision)
        model = deepcopy(self.model)
        checkpoint = load_checkpoint(path)
        load_weights(model, inference_weights(checkpoint), str(path))
        threshold = best_threshold(checkpoint)
        prepare = SingleImage(
            self.data.split("val").transforms,
            self.data.loading.divisor,
            self.data.reading.max_pixels,
        )
        fused = for_inference(model.to(torch_device), dtype)
        return Predictor(
            fused,
            self.data.categories,
            prepare,
            torch_device,
            min_score,
            classes,
            PLOT_MIN_SCORE if threshold is None else threshold,
        )

    def _config(self) -> Config:
        """The settings that are plain values, as a config for the checkpoints."""
        settings = asdict(self.evaluation)
        evaluation = {"pictures": settings.pop("num_images"), "batch": 1, "max_images": None}
        data: dict[str, object] = {"val_fraction": self.data.reading.val_fraction}
        for key, names in self.data.data_files().items():
            data[key.partition(".")[2]] = names
        return configs.make_config(
            {
                "name": self.name,
                "run_dir": None if self.run_dir is None else str(self.run_dir),
                "seed": self.seed,
                "batch_size": self.batch_size,
                "data": data,
                "trainer": asdict(self.trainer),
                "evaluation": {**settings, **evaluation},
            }
        )

    def _build_parts(
        self,
        config: Config,
        trainer: Trainer,
        context: DistributedContext,
        candidates: Sequence[Path],
        log: Log,
    ) -> TrainingParts:
        del candidates
        source = self.data
        run_while_others_wait(context, context.local_main, source.prepare)
        context.barrier()
        log(describe(source), flush=True)
        if "train" not in source.splits():
            raise UserError("data.train_json is not set: there is nothing to train on")
        _check_model(self.model, source)
        trainer = count_steps(config, trainer, source, log)
        torch.manual_seed(self.seed)
        model = trainer.place(self.model)
        optimizer = trainer.build_optimizer(model, self.optimizer, self.batch_size)
        scheduler = self.schedule(optimizer, max_steps=trainer.length.max_steps)
        validation = training_validation(config, source, trainer, context)
        return TrainingParts(trainer, source, model, optimizer, scheduler, validation)


def _check_model(model: nn.Module, source: CocoSource) -> None:
    """Raise UserError for a model that cannot be trained on the classes of the data."""
    if not isinstance(model, TrainableModel):
        raise UserError(
            f"a {type(model).__name__} has no losses and predictions: expected a TrainableModel"
        )
    count = getattr(getattr(model, "classifier", None), "num_classes", None)
    if count is not None and count != len(source.categories):
        raise UserError(
            f"the model has {count} classes, but the data has {len(source.categories)}: "
            f"{', '.join(source.categories.names)}"
        )


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The metrics of the last evaluation of a run, {} without one."""
    _, series = read_metrics(run_dir / "metrics.jsonl")
    last = max((max(values) for values in series.values()), default=0)
    return {name: values[last] for name, values in series.items() if last in values}


def _uses_gpus() -> bool:
    """Whether this process has used a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore torch's random state, and pass a signal on to the handler of the process."""
    gpus = range(torch.cuda.device_count()) if _uses_gpus() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    except Interrupted as stop:
        # The run is saved, and the handlers of the process are back.
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(stop.number)
        raise
