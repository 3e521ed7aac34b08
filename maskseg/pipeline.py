"""Config -> data, model, run: what the tools do, in functions."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from maskseg import config as configs
from maskseg.data.single import SingleImage
from maskseg.data.source import CocoSource
from maskseg.engine.checkpoint import Checkpoint, load_checkpoint, load_weights, newest
from maskseg.engine.trainer import Trainer, autocast, pick_device
from maskseg.errors import UserError
from maskseg.evaluation.rows import detection_rows, write_results
from maskseg.inference.curves import plot_curves
from maskseg.inference.folder import image_files, overlay
from maskseg.inference.predictor import Predictor
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
        file = source.train if split == "train" else source.val
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
            _ = source.train if split == "train" else source.val
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


def trained_model(path: Path, overrides: list[str], own: str) -> tuple[nn.Module, Any, Categories]:
    """The model of a checkpoint, its config with the tool's keys, and its classes. Raises UserError."""
    path = checkpoint_path(path)
    checkpoint = load_checkpoint(path)
    try:
        categories = Categories.from_dict(checkpoint["categories"])
        text = str(checkpoint["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the checkpoint lacks its config or categories ({error})") from error
    config = configs.from_checkpoint(text, overrides, own)
    configs.check_targets(config.model, configs.FROM_CHECKPOINT)
    model = configs.build_model(config, configs.FROM_CHECKPOINT, pretrained=False)
    load_weights(model, checkpoint["model"], str(path))
    return model.eval(), config, categories


def load_predictor(path: Path, device: str = "auto", overrides: list[str] | None = None) -> Predictor:
    """The predictor of a checkpoint or run folder. Raises UserError."""
    model, config, categories = trained_model(path, overrides or [], "predict")
    return _predictor(model, config, categories, device)


def _predictor(model: nn.Module, config: Any, categories: Categories, device: str) -> Predictor:
    transforms = [configs.build(t, configs.FROM_CHECKPOINT) for t in config.data.test_transforms]
    return Predictor(model, categories, SingleImage(transforms, config.data.divisor, config.data.max_pixels), pick_device(device))


def _checkpoint_word(words: list[str], tool: str) -> Path:
    """The checkpoint that the command line names; its config is needed to read the rest of the words."""
    path = next((w.partition("=")[2] for w in words if w.startswith("checkpoint=")), "")
    if not path:
        raise UserError(f"checkpoint=... is missing: a .pt file or a run folder (tools/{tool}.py --help)")
    return Path(path)


def validation(config: Any, source: CocoSource, split: str, categories: Categories) -> Validation:
    """The evaluation of `split` as `config.evaluation` says."""
    numbers = config.evaluation
    return Validation(
        lambda: source.test_loader(split, numbers.batch, numbers.max_images),
        lambda: (source.train if split == "train" else source.val).to_dict(),
        categories,
        numbers.max_detections,
        numbers.backend,
        numbers.pictures,
    )


def evaluate(words: list[str]) -> dict[str, float]:
    """What `tools/evaluate.py` does with its key=value words: writes metrics.json, per_class.json, detections.json and pictures into `output`.

    Raises UserError before anything is written where checkpoint, data or keys are wrong.
    """
    model, config, categories = trained_model(_checkpoint_word(words, "evaluate"), words, "evaluate")
    output = _made(Path(config.output))
    source = open_data(config, categories)
    check = validation(config, source, config.split, categories)
    check.pictures = config.pictures
    device = pick_device(config.trainer.device)
    with autocast(device, config.trainer.precision):
        metrics = check(model.to(device), 0)
    assert check.evaluator is not None
    _write_json(output / "metrics.json", metrics)
    _write_json(output / "per_class.json", check.evaluator.per_class())
    write_results(output / "detections.json", check.evaluator.rows)
    check.save_pictures(output / "pictures.png")
    print(check.table)
    print(f"written to {output}: metrics.json, per_class.json, detections.json, pictures.png")
    return metrics


def _write_json(path: Path, values: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def predict(words: list[str]) -> None:
    """What `tools/predict.py` does: an overlay a picture and predictions.json (COCO results; `image_id` counts the pictures from 1 and `file_name`
    names them) in `output`. Raises UserError."""
    model, config, categories = trained_model(_checkpoint_word(words, "predict"), words, "predict")
    predictor = _predictor(model, config, categories, config.trainer.device)
    files = image_files(config.input)
    output = _made(Path(config.output))
    rows = []
    for i, file in enumerate(tqdm(files, desc="predicting", disable=None), start=1):
        pixels = predictor.prepare.read(file)
        batch, outputs = predictor.outputs(pixels, i, file.name)
        found = detection_rows(batch, outputs, categories)
        rows += [{**row, "file_name": str(file)} for row in found]
        Image.fromarray(overlay(pixels, found, categories, config.min_score)).save(
            output / f"{file.stem}{'' if file.suffix == '.png' else file.suffix}.png"
        )
    write_results(output / "predictions.json", rows)
    print(f"{len(files)} pictures, {sum(r['score'] >= config.min_score for r in rows)} objects with a score of {config.min_score} or more: {output}")


def train(config: Any) -> Path:
    """The whole of a training run. -> its folder. Raises UserError before anything is written where the data or the config is wrong."""
    trainer = cast(Trainer, configs.build(config.trainer))
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
    run_dir, resume = _run_dir(config, trainer)
    if resume is not None:
        load_weights(model, resume["model"], f"trainer.resume={trainer.resume}")
    elif trainer.init:
        left = load_weights(model, load_checkpoint(checkpoint_path(Path(trainer.init)))["model"], trainer.init, trainer.init_partial)
        print(f"started from {trainer.init}" + (f"; {len(left)} tensors do not fit: {', '.join(left[:5])}" if left else ""), flush=True)
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


def _run_dir(config: Any, trainer: Trainer) -> tuple[Path, Checkpoint | None]:
    """The folder to write to, and the checkpoint to go on from. A folder that holds a run is only used to go on with it."""
    home = Path("runs") / config.name
    named = Path(config.run_dir) if config.run_dir else None
    if trainer.resume and trainer.resume != "auto":
        source = Path(trainer.resume)
        checkpoint = _newest(source) if source.is_dir() else load_checkpoint(source)
        return _made(named or (source if source.is_dir() else source.parent)), checkpoint
    if trainer.resume == "auto":
        runs = [named] if named else sorted(home.glob("*/"), key=lambda p: p.stat().st_mtime, reverse=True)
        for folder in runs:
            if (folder / "last.pt").exists() or (folder / "best.pt").exists():
                return folder, _newest(folder)
    if named and any((named / name).exists() for name in ("last.pt", "best.pt", "metrics.jsonl")):
        raise UserError(f"run_dir={named} already holds a run: choose another folder, or trainer.resume=auto to go on with it")
    return _made(named or _fresh(home)), None


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


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise UserError(f"run_dir={folder}: the folder cannot be made or written to ({error})") from error
    return folder
