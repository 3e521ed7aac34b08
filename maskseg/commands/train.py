"""Trains a model from COCO-format data.

Everything is a key=value; the keys are those of configs/train.yaml and its groups
(docs/config.md lists them all).

  python tools/train.py                                        the built-in synthetic dataset
  python tools/train.py experiment=nuclei_r18 data.root=DIR    real images, from scratch, on a CPU
  python tools/train.py experiment=custom_r18 data.train_json=ALL.json data.images=DIR
  python tools/train.py experiment=custom_r50 data.train_json=TRAIN.json data.val_json=VAL.json \\
      data.images=DIR trainer.epochs=50
  python tools/train.py experiment=coco_r50_fpn_1x data.root=DIR batch_size=8
  python tools/train.py trainer.resume=runs/scenes_r18/latest   resume a run with its own config
  python tools/train.py experiment=scenes_r18 trainer.max_steps=6000 trainer.resume=auto

experiment: {experiments}
debug:      smoke (seconds: does every part run?), overfit (can the model overfit four images?)
other keys: run_dir, seed, batch_size, trainer.max_steps, trainer.epochs,
            trainer.checkpoint_every, trainer.evaluate_every, trainer.precision, trainer.init,
            optimizer.lr, data.size, data.val_fraction, data.num_workers,
            model.backbone.trunk.weights ...
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg import config as configs
from maskseg.commands.check_data import describe
from maskseg.commands.evaluate import build_validation, check_heads
from maskseg.config import Config
from maskseg.config.auto import open_keys
from maskseg.config.fitted import (
    choose_trunk_weights,
    fit_to_objects,
    take_from_checkpoint,
)
from maskseg.config.initial_weights import load_initial_weights
from maskseg.config.path_values import quote_interpolation
from maskseg.config.restore import open_data, prepare_segments
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.loader import loader_error
from maskseg.engine import run_folder
from maskseg.engine.checkpoint import (
    BEST_SAFETENSORS,
    FROM_OBJECTS,
    Checkpoint,
    follow_latest,
    load_checkpoint,
)
from maskseg.engine.distributed import DistributedContext, init_distributed
from maskseg.engine.loggers import RESULTS_FILE, STATE_FILE
from maskseg.engine.logs import PER_CLASS_FILE
from maskseg.engine.resume import (
    DIVISION,
    changed_files,
    check_categories,
    hash_files,
)
from maskseg.engine.state import TrainState
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError, warn_if_not_drawn
from maskseg.files import replacing
from maskseg.files.outputs import check_outputs
from maskseg.inference.validation import SHEETS, Validation
from maskseg.models.interfaces import TrainableModel
from maskseg.structures import Batch, Categories
from maskseg.visualization.batches import save_batch
from maskseg.visualization.curves import plot_curves
from maskseg.visualization.labels import draw_labels
from maskseg.visualization.layout import save_image

_WARMUP_SHARE = 10  # a training of n epochs has at least this many times the steps of its warm-up
_NUM_BATCHES = 3  # training batches that are drawn


def main(arguments: list[str]) -> None:
    """Entry point of `tools/train.py`."""
    report = print if os.environ.get("RANK", "0") == "0" else None
    run_dir = train(*compose_training(arguments, report))
    print(f"run folder: {run_dir}")


def compose_training(
    arguments: Sequence[str], report: Callable[[str], None] | None = None
) -> tuple[Config, Sequence[str] | None]:
    """The config of a training, and the second argument of `train`.

    A resume takes the config of its run, with the keys of the command line, unless the command line
    chooses groups, such as `experiment`: then the whole config is that of the command line.
    `trainer.resume=auto` alone is the newest run of all experiments; with other keys it needs
    `run_dir`, or is a run of the experiment.
    """
    resume = configs.find_path(arguments, "trainer.resume")
    run_dir = configs.find_path(arguments, "run_dir") or None
    is_alone = len([a for a in arguments if not a.startswith("--")]) == 1
    takes_own = resume not in ("", "null") and not configs.has_choices(arguments)
    if not takes_own or (resume == "auto" and not run_dir and not is_alone):
        return configs.compose("train", arguments, report), None
    # `latest` and `auto` are resolved once: another run may start in the meantime.
    resume = resume if resume == "auto" else str(follow_latest(Path(resume)))
    found = run_folder.find_config_text(resume, run_dir)
    if found is None:
        return configs.compose("train", arguments, report), None
    text, folder = found
    config = configs.resumed_config(text, arguments)
    if resume == "auto":
        resume = str(folder)
        config.run_dir = quote_interpolation(resume)
    config.trainer.resume = quote_interpolation(resume)
    if report is not None:
        report(f"the config is that of {folder} ({config.name}), with the keys of the command line")
    return config, arguments


@dataclass(frozen=True)
class TrainingParts:
    """What a training is made of. validation: None without validation data."""

    trainer: Trainer
    source: CocoSource
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    validation: Validation | None


Log = Callable[..., None]
# The checkpoints are those that the training may resume.
BuildParts = Callable[[Config, Trainer, DistributedContext, Sequence[Path], Log], TrainingParts]


def train(config: Config, overrides: Sequence[str] | None = None) -> Path:
    """Run a whole training. -> its folder.

    overrides: the command line, where the config is that of a checkpoint, whose author does not
        choose where a dataset or segments are made; None for the user's own config.
    Raises UserError, before anything is written, where the data or the config is wrong.
    """
    build_parts = partial(_build_parts, may_make=overrides is None)
    return train_parts(config, configs.build(config.trainer), build_parts, overrides)


def train_parts(
    config: Config,
    trainer: Trainer,
    build_parts: BuildParts,
    overrides: Sequence[str] | None = None,
) -> Path:
    """Run a training whose parts a function builds, once the processes are joined. -> its folder.

    config: with `name`, `run_dir`, `seed`, `batch_size`, `data`; it is stored in the checkpoints.
    overrides: as in `train`.
    Raises UserError, before anything is written, where the data or the config is wrong.
    """
    with init_distributed(trainer.torch_device, trainer.distributed_timeout) as context:
        config, trainer = _take_from_rank_zero(config, trainer, context)
        overrides = context.broadcast(overrides)
        folder = run_folder.choose(config.name, config.run_dir, trainer) if context.main else None
        try:
            if folder is not None:
                _check_run_dir(folder)
            return _train(config, trainer, context, folder, build_parts, overrides)
        finally:
            if folder is not None:
                folder.close()


def _take_from_rank_zero(
    config: Config, trainer: Trainer, context: DistributedContext
) -> tuple[Config, Trainer]:
    """The config and settings of rank 0: the run that is resumed is the one that it has chosen."""
    settings = {field.name: getattr(trainer, field.name) for field in fields(trainer)}
    config, settings = context.broadcast((config, settings))
    return config, trainer if context.main else replace(trainer, **settings)


def _check_run_dir(folder: run_folder.RunFolder) -> None:
    """Raise UserError for a folder that holds no run, but files that the run would replace."""
    path = folder.path
    if path is None or folder.resume_from is not None:
        return
    if any((path / name).exists() for name in ("environment.json", "metrics.jsonl")):
        return  # a run that ended before its first checkpoint: it is started again
    images = [f"{name}.png" for name in (*SHEETS, "results", "labels")]
    images += [train_batch_name(i) for i in range(_NUM_BATCHES)]
    files = ["config.yaml", "tensorboard", RESULTS_FILE, PER_CLASS_FILE, STATE_FILE]
    files += [BEST_SAFETENSORS, *images]
    check_outputs((path / name for name in files), key="run_dir")


def train_batch_name(index: int) -> str:
    """The file name of the drawing of a training batch."""
    return f"train_batch_{index + 1}.png"


def _train(
    config: Config,
    trainer: Trainer,
    context: DistributedContext,
    folder: run_folder.RunFolder | None,
    build_parts: BuildParts,
    overrides: Sequence[str] | None,
) -> Path:
    """folder: None on ranks other than 0."""
    context.split_batch(config.batch_size, trainer.accumulate_grad_batches)
    log = print if context.main else _print_nothing
    candidates = context.broadcast(folder.candidates if folder else [])
    parts = build_parts(config, trainer, context, candidates, log)
    trainer = parts.trainer
    source = parts.source
    model = parts.model
    optimizer = parts.optimizer
    validation = parts.validation
    categories = source.categories

    # Initial weights or the state to resume, and checks that need the model
    if trainer.init and not candidates:
        load_initial_weights(model, trainer, config, categories, log)
    metadata: Checkpoint = {
        "config": configs.to_yaml(config),
        "categories": categories.to_dict(),
        "data_files": hash_files(source.data_files()) | source.split_hash(),
    }
    if "model" not in config:
        metadata[FROM_OBJECTS] = True
    state = trainer.build_state(model, optimizer, parts.scheduler, metadata, context)
    resume = _read_resumable(state, candidates, trainer, log)
    if resume is not None:
        _check_resume(resume, metadata, config, trainer, categories, log)
    _check_model(model, source, trainer)
    if "model" in config:
        prepare_segments(model, source, source.splits(), config, context, overrides)
    context.barrier()  # nothing is written before all processes have passed their checks

    # Run folder
    run_dir = context.broadcast(folder.make() if folder else Path())
    log(f"run folder: {run_dir}", flush=True)
    log(_describe_rate(config, optimizer, trainer, context, resume), flush=True)
    if context.main:
        _record_start(config, run_dir, trainer, context, resume)
        if trainer.plots and (resume is None or changed_files(resume, metadata["data_files"])):
            _draw_labels(source, run_dir / "labels.png")

    # Loop
    batches = _make_batches(config, source, trainer, context, run_dir)
    if resume is not None:
        state.load(resume)
    report = partial(_report, run_dir, validation) if trainer.plots else None
    try:
        trainer.run(state, batches, run_dir, validation, report, source.reading.skip_bad)
    except (RuntimeError, ValueError) as error:
        raise _explain(error, config, source) from error
    if context.main and trainer.plots:
        with warn_if_not_drawn("results.png"):
            _plot_curves(run_dir)
    return run_dir


def _print_shared_images(source: CocoSource) -> None:
    warning = source.shared_images()
    if warning:
        print(warning, flush=True)


def _build_parts(
    config: Config,
    trainer: Trainer,
    context: DistributedContext,
    candidates: Sequence[Path],
    log: Log,
    may_make: bool,
) -> TrainingParts:
    """Build the parts of a training from its config.

    may_make: make the files of a dataset that can be made, see `open_data`. Raises UserError.
    """
    # Data
    may_make = context.broadcast(may_make)
    _take_chosen_numbers(config, candidates)  # the transforms of the source refer to data.size
    source = open_data(config, context=context, may_make=may_make)
    log(describe(source), flush=True)
    if context.main:
        _print_shared_images(source)
    if "train" not in source.splits():
        raise UserError("data.train_json is not set: there is nothing to train on")
    categories = source.categories
    configs.set_categories(config, categories)
    source = fit_to_objects(config, source, log)
    trainer = count_steps(config, trainer, source, log)

    # Model, optimizer, schedule, validation
    torch.manual_seed(config.seed)
    replaced = bool(candidates) or (trainer.init is not None and not trainer.init_partial)
    choose_trunk_weights(config, context, log, needed=not replaced)
    model = trainer.place(_build_model(config, pretrained=not replaced))
    optimizer = configs.build_optimizer(config, trainer, model)
    scheduler = configs.build(config.scheduler)(optimizer, max_steps=trainer.length.max_steps)
    validation = training_validation(config, source, trainer, context)
    return TrainingParts(trainer, source, model, optimizer, scheduler, validation)


def _explain(error: RuntimeError | ValueError, config: Config, source: CocoSource) -> Exception:
    """Convert an error of torch whose cause is known into a UserError; return others unchanged."""
    if isinstance(error, RuntimeError):
        return loader_error(error, source.split("train").key, source.loading.timeout)
    if "more than 1 value per channel" not in str(error):
        return error
    return UserError(
        f"batch_size={config.batch_size}: batch normalization cannot be trained on a single value "
        "per channel: use a batch size of at least 2 per process and micro-batch, larger images, "
        "or another norm, such as GN"
    )


def _take_chosen_numbers(config: Config, candidates: Sequence[Path]) -> None:
    """Set the keys that are `auto` as in the checkpoint that is resumed."""
    if not open_keys(config):
        return
    for path in candidates:
        try:
            text = load_checkpoint(path)["config"]
        except UserError:
            continue  # reported when it is resumed
        if isinstance(text, str):
            take_from_checkpoint(config, text)
        return


def count_steps(
    config: Config, trainer: Trainer, source: CocoSource, log: Callable[..., None]
) -> Trainer:
    """Convert epochs to steps, in the config too, which the checkpoints store.

    With `trainer.epochs`, the learning-rate warm-up takes at most a tenth of the steps.
    """
    if not trainer.uses_epochs:
        return trainer
    images = source.images_per_epoch()
    in_steps = trainer.in_steps(images, config.batch_size)
    length = in_steps.length
    for key in ("max_steps", "evaluate_every", "checkpoint_every"):
        configs.set_key(config, f"trainer.{key}", getattr(length, key))
    configs.set_key(config, "trainer.epochs", None)
    if trainer.epochs is None:
        return in_steps
    log(
        f"{trainer.epochs:g} epochs of {images:g} images: {length.max_steps} steps of "
        f"{config.batch_size} images",
        flush=True,
    )
    limit = max(length.max_steps // _WARMUP_SHARE, 1)
    if "scheduler" in config and config.scheduler.get("warmup_steps", 0) > limit:
        configs.set_key(config, "scheduler.warmup_steps", limit)
        log(f"learning-rate warm-up: {limit} steps, a tenth of the training", flush=True)
    return in_steps


def _build_model(config: Config, pretrained: bool) -> nn.Module:
    """Build the model. Raises UserError for one that cannot be trained by this tool.

    pretrained: load the pretrained weights of its backbone, which no other weights replace.
    """
    model = configs.build_model(config, pretrained=pretrained)
    if not isinstance(model, TrainableModel):
        raise UserError(
            "the model finds no objects: tools/fit_hash.py fits its hash layer, and "
            "experiment=scenes_hash_r18 trains one"
        )
    return model


def training_validation(
    config: Config, source: CocoSource, trainer: Trainer, context: DistributedContext
) -> Validation | None:
    """The evaluation during the training; None without validation data."""
    if "val" not in source.splits():
        return None
    num_images = None if trainer.plots else 0
    return build_validation(config, source, "val", source.categories, context, num_images)


def _report(run_dir: Path, validation: Validation | None) -> None:
    """Draw the curves and the results of the last evaluation."""
    with warn_if_not_drawn("results.png"):
        _plot_curves(run_dir)
    if validation is not None:
        validation.save(run_dir)


def _plot_curves(run_dir: Path) -> None:
    plot_curves(run_dir / "metrics.jsonl", run_dir / "results.png")


def _print_nothing(*_: object, **__: object) -> None:
    """The log of all ranks but rank 0."""


def _record_start(
    config: Config,
    run_dir: Path,
    trainer: Trainer,
    context: DistributedContext,
    resume: Checkpoint | None,
) -> None:
    """Write the config and the environment of the run."""
    step = int(resume["step"]) if resume else 0
    run_folder.record(run_dir, trainer.torch_device, context.world_size, step)
    with replacing(run_dir / "config.yaml", "the config") as file:
        file.write(configs.to_yaml(config, resolve=True).encode())


def _describe_rate(
    config: Config,
    optimizer: Optimizer,
    trainer: Trainer,
    context: DistributedContext,
    resume: Checkpoint | None,
) -> str:
    """The learning rate after the warm-up; a resumed run keeps that of its checkpoint."""
    configured = float(optimizer.defaults["lr"])
    rate = configured if resume is None else float(resume["scheduler"]["base_lrs"][0])
    text = f"learning rate {rate:g}"
    if rate != configured:
        text += (
            f" (the checkpoint's; these keys would make it {configured:g}: trainer.init starts a "
            "new run with its weights)"
        )
    text += f" for a batch size of {config.batch_size}"
    if trainer.accumulate_grad_batches > 1:
        text += f" in {trainer.accumulate_grad_batches} micro-batches"
    return f"{text}, on {context.world_size} x {trainer.torch_device}"


def _make_batches(
    config: Config,
    source: CocoSource,
    trainer: Trainer,
    context: DistributedContext,
    run_dir: Path,
) -> Callable[[int], Iterable[Batch]]:
    """-> a function from a step to the batches of this process from that step on.

    With `trainer.plots` the first batches of a run are drawn, also where an earlier attempt has
    drawn its own: the data may have been corrected since.
    """

    def batches(step: int) -> Iterable[Batch]:
        paths: list[Path] = []
        if context.main and trainer.plots and step == 0:
            paths = [run_dir / train_batch_name(i) for i in range(_NUM_BATCHES)]
        loader = source.train_loader(
            config.batch_size,
            trainer.length.max_steps,
            config.seed,
            step,
            pin=trainer.torch_device.type == "cuda",
            rank=context.rank,
            world=context.world_size,
            pieces=trainer.accumulate_grad_batches,
        )
        for batch in loader:
            if paths:
                path = paths.pop(0)
                with warn_if_not_drawn(path.name):
                    save_batch(batch, source.categories, path)
            yield batch

    return batches


def _draw_labels(source: CocoSource, path: Path) -> None:
    """Draw what the training data has: classes, sizes, places and aspect ratios of its objects."""
    with warn_if_not_drawn(path.name):
        file = source.train
        save_image(draw_labels(file.objects(), source.categories.names), path)


def _check_model(model: nn.Module, source: CocoSource, trainer: Trainer) -> None:
    """Raise UserError where a part of the model cannot be trained on the data."""
    _check_objects(model, source)
    for split in source.splits():
        check_heads(model, source.file(split))
    _check_proposals(model, source)
    _check_codes(model, trainer)
    fitted_by = getattr(getattr(model, "classifier", None), "fitted_by", None)
    if fitted_by is not None:
        raise UserError(
            "model.classifier is not trained by gradients: train a model with another one, then "
            f"{fitted_by} checkpoint=... fits it"
        )


def _check_objects(model: nn.Module, source: CocoSource) -> None:
    """Raise UserError where the training images show nothing that the model learns from."""
    file = source.train
    if isinstance(getattr(model, "classifier", None), nn.Module):
        has_targets = source.has_objects("train")
    else:  # a model of whole images or of pixels
        has_targets = bool(file.num_annotations) or source.split("train").semantic is not None
    if has_targets:
        return
    message = f"{file.name}: no training image has an object to learn from"
    num_crowds = sum(crowds for _, _, crowds in file.class_counts())
    if num_crowds and source.reading.crowds == "ignore":
        message += (
            f"; {num_crowds} annotations have iscrowd=1: data.crowds=objects reads them as objects "
            "(CVAT marks every mask as a crowd)"
        )
    raise UserError(f"{message}; tools/check_data.py reports what was dropped")


def _check_proposals(model: nn.Module, source: CocoSource) -> None:
    """Raise UserError where the model takes proposals from files that are missing or do not fit."""
    if getattr(getattr(model, "proposer", None), "needs", None) != "proposals":
        return
    for split in source.splits():
        if source.split(split).proposals is None:
            raise UserError(
                f"the model takes its proposals from files: data.{split}_proposals is not set "
                "(tools/propose.py makes them)"
            )
        source.dataset(split)


def _check_codes(model: nn.Module, trainer: Trainer) -> None:
    """Raise UserError for a hash layer that is neither fitted nor trained."""
    weight = getattr(getattr(model, "segmenter", None), "loss_weight", None)
    if weight == 0 and not trainer.init and not trainer.resume:
        raise UserError(
            "model.segmenter.loss_weight is 0 and no trainer.init brings a fitted layer "
            "(tools/fit_hash.py): its codes would be random"
        )


def _check_resume(
    checkpoint: Checkpoint,
    metadata: Checkpoint,
    config: Config,
    trainer: Trainer,
    categories: Categories,
    log: Callable[..., None],
) -> None:
    """Check that a run can go on with this data, and report the keys that differ.

    metadata: of this run. Raises UserError where classes or data files have changed.
    """
    name = f"trainer.resume={trainer.resume}"
    check_categories(checkpoint, categories, name)
    for key in changed_files(checkpoint, metadata["data_files"]):
        message = _describe_change(key, config, checkpoint, metadata)
        if not trainer.resume_changed_data:
            raise UserError(
                f"{name}: {message}; trainer.resume_changed_data=true resumes with the new data"
            )
        log(f"warning: {message}", flush=True)
    text = checkpoint.get("config")
    differences = configs.config_differences(config, text) if isinstance(text, str) else []
    changes = [difference for difference in differences if configs.changes_numbers(difference)]
    for difference in differences:
        if difference not in changes:
            log(f"resumed with {difference}", flush=True)
    if changes:
        log(
            f"warning: resumed with other settings, so that the run differs from one without a "
            f"stop: {'; '.join(changes)}",
            flush=True,
        )


def _describe_change(key: str, config: Config, checkpoint: Checkpoint, metadata: Checkpoint) -> str:
    """What has changed, for a key of `changed_files`."""
    value = f"{key}={config.data.get(key.partition('.')[2])}"
    if key != DIVISION:
        return f"{value} has changed since the checkpoint was saved"
    if DIVISION not in metadata["data_files"]:
        return (
            "the checkpoint was validated on a part of its training file (data.val_fraction), "
            "which is not divided here"
        )
    if DIVISION not in checkpoint["data_files"]:
        return f"{value} validates on images that the checkpoint was trained on"
    return f"{value} gives other validation images than those of the checkpoint"


def _read_resumable(
    state: TrainState, paths: Sequence[Path], trainer: Trainer, log: Callable[..., None]
) -> Checkpoint | None:
    """Read the first checkpoint that the run can resume, and warn about those before it.

    Returns None if there are no paths. Raises UserError if none can be resumed.
    """
    errors: list[UserError] = []
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
            state.check(
                checkpoint,
                path,
                f"trainer.resume={trainer.resume}",
                "trainer.init with trainer.init_partial=true takes what fits",
            )
        except UserError as error:
            errors.append(error)
            continue
        for refusal in errors:
            log(f"warning: {refusal}", flush=True)
        if errors:
            log(f"resuming from {path}, step {checkpoint['step']}", flush=True)
        return checkpoint
    if errors:
        raise errors[0]
    return None
