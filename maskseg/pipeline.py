"""Config -> data, model, training run: what the tools do, in functions."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from maskseg import config as configs
from maskseg.data.source import CocoSource
from maskseg.engine.checkpoint import Checkpoint, load_checkpoint, load_weights, newest
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.inference.curves import plot_curves
from maskseg.inference.validation import Validation
from maskseg.structures import Categories


def open_data(config: Any, known: Categories | None = None) -> CocoSource:
    """The data set of `config.data`, read and checked: the classes are those of the data, or `known` ones (a checkpoint's)."""
    source = cast(CocoSource, configs.build(config.data))
    source.known = known
    source.prepare()
    return source


def describe(source: CocoSource) -> str:
    """The per-class table and the warnings of each split. Raises UserError for data that cannot be used."""
    parts = []
    for split in source.splits():
        file = source.file(split)
        parts.append(f"{split}: {file.path}\n{file.class_table()}")
        if file.report.warnings:
            parts.append(file.report.text())
    return "\n\n".join(parts)


def check_data(config: Any) -> str:
    """Reads and checks both files. -> what to print. Raises UserError with the report."""
    source = open_data(config)
    if not source.splits():
        raise UserError("nothing to check: set data.train_json or data.val_json")
    problems = []
    for split in source.splits():
        try:
            source.file(split)
        except UserError as error:
            problems.append(str(error))
            if split == "train":
                source.known = None
                source.json["train"] = None
    if problems:
        raise UserError("\n\n".join(problems))
    _ = source.categories
    return describe(source)


def checkpoint_path(path: Path) -> Path:
    """A checkpoint, or the best (else the last) one of a run folder."""
    if path.is_dir():
        return path / "best.pt" if (path / "best.pt").is_file() else path / "last.pt"
    return path


def validation(config: Any, source: CocoSource, split: str, categories: Categories) -> Validation:
    """The evaluation of `split` as `config.evaluation` says."""
    numbers = config.evaluation
    if numbers.batch < 1:
        raise UserError(f"evaluation.batch must be at least 1, not {numbers.batch}")
    source.file(split)
    return Validation(
        lambda: source.test_loader(split, numbers.batch, numbers.max_images),
        lambda: source.file(split).to_dict(),
        categories,
        numbers.max_detections,
        numbers.backend,
        numbers.pictures,
    )


def train(config: Any) -> Path:
    """The whole of a training run. -> its folder. Raises UserError before anything is written where the data or the config is wrong."""
    trainer = cast(Trainer, configs.build(config.trainer))
    if config.total_batch < 1:
        raise UserError(f"total_batch must be at least 1, not {config.total_batch}")
    source = open_data(config)
    print(describe(source), flush=True)
    if "train" not in source.splits():
        raise UserError("data.train_json is not set: there is nothing to train on")
    categories = source.categories
    configs.set_num_classes(config, len(categories))
    trainer.skip_bad = config.data.skip_bad
    torch.manual_seed(config.seed)
    model = trainer.place(configs.build_model(config))
    optimizer = trainer.optimizer(model, configs.build(config.optimizer), config.total_batch)
    scheduler = configs.build(config.scheduler)(optimizer, max_steps=trainer.max_steps)
    check = validation(config, source, "val", categories) if "val" in source.splits() else None
    folder, resume = _run_dir(config, trainer)
    _start(model, optimizer, trainer, resume)
    if any(getattr(head, "adds", "") == "masks" for head in cast(Any, model).heads.values()) and not source.train.has_masks():
        raise UserError(f"{source.train.path}: not every object has a mask, which the mask head needs; ~model/heads@model.heads.mask takes it away")
    run_dir = made_folder(folder)
    print(f"run folder: {run_dir}", flush=True)
    print(f"learning rate {optimizer.param_groups[0]['lr']:g} for {config.total_batch} images a step, on {trainer.device}", flush=True)
    text = configs.to_yaml(config)
    (run_dir / "config.yaml").write_text(configs.to_yaml(config, resolve=True))

    def batches(step: int) -> Any:
        return source.train_loader(config.total_batch, trainer.max_steps, config.seed, step, pin=trainer.device.type == "cuda")

    about: Checkpoint = {"config": text, "categories": categories.to_dict()}
    trainer.run(model, optimizer, scheduler, batches, run_dir, about, check, resume)
    if check is not None and check.table:
        print(check.table, flush=True)
        check.save_pictures(run_dir / "validation.png")
    plot_curves(run_dir / "metrics.jsonl", run_dir / "results.png")
    return run_dir


def _start(model: nn.Module, optimizer: Optimizer, trainer: Trainer, resume: Checkpoint | None) -> None:
    """Weights to start from. Raises UserError for a checkpoint that does not fit."""
    if resume is not None:
        load_weights(model, resume["model"], f"trainer.resume={trainer.resume}")
        trainer.fits(optimizer, resume)
    elif trainer.init:
        state = load_checkpoint(checkpoint_path(Path(trainer.init)))["model"]
        left = load_weights(model, state, f"trainer.init={trainer.init}", trainer.init_partial)
        print(f"started from {trainer.init}" + (f"; {len(left)} tensors do not fit: {', '.join(left[:5])}" if left else ""), flush=True)


def _run_dir(config: Any, trainer: Trainer) -> tuple[Path, Checkpoint | None]:
    """The folder to write to, and the checkpoint to go on from. A folder that holds a run is only used to go on with it."""
    home = Path("runs") / config.name
    named = Path(config.run_dir) if config.run_dir else None
    if trainer.resume and trainer.resume != "auto":
        source = Path(trainer.resume)
        checkpoint = _newest(source) if source.is_dir() else load_checkpoint(source)
        return named or (source if source.is_dir() else source.parent), checkpoint
    if trainer.resume == "auto":
        runs = [named] if named else sorted(home.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
        for folder in runs:
            if (folder / "last.pt").exists() or (folder / "best.pt").exists():
                return folder, _newest(folder)
    held = ("last.pt", "best.pt") if trainer.resume == "auto" else ("last.pt", "best.pt", "metrics.jsonl")
    if named and any((named / name).exists() for name in held):
        raise UserError(f"run_dir={named} already holds a run: choose another folder, or trainer.resume=auto to go on with it")
    return named or _fresh(home), None


def _newest(folder: Path) -> Checkpoint:
    found = newest(folder)
    if found is None:
        raise UserError(f"{folder}: no checkpoint there can be loaded")
    print(f"going on from {found[0]}, step {found[1]['step']}", flush=True)
    return found[1]


def _fresh(home: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    names = (stamp if i == 0 else f"{stamp}_{i}" for i in range(1000))
    return next(home / name for name in names if not (home / name).exists())


def made_folder(folder: Path) -> Path:
    """The folder, made where it is missing. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise UserError(f"run_dir={folder}: the folder cannot be made or written to ({error})") from error
    return folder
