"""Trains a model from COCO-format data. Everything is a key=value; the keys are those of configs/train.yaml and its groups.

  python tools/train.py                                                      the embedded data set, minutes on a CPU
  python tools/train.py experiment=nuclei_r18 data.root=DIR                  real images from scratch
  python tools/train.py experiment=coco_r50_fpn_1x data.root=DIR total_batch=8
  python tools/train.py experiment=coco_r50_fpn_1x data=custom data.train_json=TRAIN.json data.val_json=VAL.json data.images=DIR
  python tools/train.py experiment=scenes_r18 trainer.max_steps=6000 trainer.resume=auto

experiment: {experiments}
debug:      smoke (seconds: does every part run?), overfit (does the model learn four images by heart?)
other keys: run_dir, seed, total_batch, trainer.max_steps, trainer.checkpoint_every, trainer.evaluate_every, trainer.precision,
            optimizer.lr, data.num_workers, model.backbone.trunk.weights ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from maskseg import config as configs
from maskseg.annotation.classifier import ImageClassifier
from maskseg.commands.check_data import describe
from maskseg.commands.evaluate import validation
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.loader import loader_error
from maskseg.engine import run_folder
from maskseg.engine.checkpoint import (
    Checkpoint,
    best_weights,
    checkpoint_path,
    load_checkpoint,
    load_weights,
)
from maskseg.engine.distributed import Group, processes
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch
from maskseg.variants.cfm.prepare import prepare_segments
from maskseg.visualization.batches import save_batch
from maskseg.visualization.curves import plot_curves


def train(config: Any) -> Path:
    """The whole of a training run. -> its folder. Raises UserError before anything is written where the data or the config is wrong."""
    trainer = cast(Trainer, configs.build(config.trainer))
    with processes(trainer.device) as group:
        return _train(config, trainer, group)


def _train(config: Any, trainer: Trainer, group: Group) -> Path:
    group.split(config.total_batch, trainer.accumulate)
    say = print if group.main else _say_nothing
    source = open_data(config, group=group)
    say(describe(source), flush=True)
    if "train" not in source.splits():
        raise UserError("data.train_json is not set: there is nothing to train on")
    categories = source.categories
    configs.set_categories(config, categories)
    trainer.skip_bad = config.data.skip_bad
    torch.manual_seed(config.seed)
    model = trainer.place(configs.build_model(config))
    if not isinstance(model, GeneralizedRCNN | ImageClassifier):
        raise UserError(
            "the model finds no objects: tools/fit_hash.py fits its hash layer, and experiment=scenes_hash_r18 trains one"
        )
    optimizer = trainer.optimizer(model, configs.build(config.optimizer), config.total_batch)
    scheduler = configs.build(config.scheduler)(optimizer, max_steps=trainer.max_steps)
    check = (
        validation(config, source, "val", categories, group) if "val" in source.splits() else None
    )
    folder, found = group.share(run_folder.choose(config, trainer) if group.main else None)
    resume = run_folder.read(found)
    _start(model, optimizer, trainer, resume, config, say)
    _check(model, source, trainer)
    prepare_segments(model, source, source.splits(), config, group)
    group.wait()  # until all have found everything in order, nothing is written
    run_dir = run_folder.made_folder(folder)
    say(f"run folder: {run_dir}", flush=True)
    rate, pieces = (
        _rate(optimizer, resume),
        f" in {trainer.accumulate} pieces" if trainer.accumulate > 1 else "",
    )
    say(
        f"learning rate {rate} for {config.total_batch} images a step{pieces}, on {group.world} x {trainer.device}",
        flush=True,
    )
    text = configs.to_yaml(config)
    if group.main:
        with replacing(run_dir / "config.yaml", "the config") as file:
            file.write(configs.to_yaml(config, resolve=True).encode())
        run_folder.record(
            run_dir, trainer.device, group.world, int(resume["step"]) if resume else 0
        )

    def report() -> None:
        plot_curves(run_dir / "metrics.jsonl", run_dir / "results.png")
        if check is not None:
            check.save(run_dir)

    about: Checkpoint = {"config": text, "categories": categories.to_dict()}
    batches = _batches(config, source, trainer, group, run_dir)
    try:
        trainer.run(
            model, optimizer, scheduler, batches, run_dir, about, check, resume, group, report
        )
    except RuntimeError as error:
        raise loader_error(error, source.name("train"), source.timeout) from error
    if group.main:
        if check is not None and check.table:
            print(check.table, flush=True)
        _drawn(lambda: plot_curves(run_dir / "metrics.jsonl", run_dir / "results.png"))
    return run_dir


def _drawn(draw: Callable[[], None]) -> None:
    """No picture is worth a training."""
    try:
        draw()
    except (OSError, UserError) as error:
        print(f"warning: a picture could not be made ({error})", flush=True)


def _rate(optimizer: Optimizer, resume: Checkpoint | None) -> str:
    """The rate after the warm-up. A resumed run keeps the checkpoint's."""
    own = float(optimizer.defaults["lr"])
    kept = own if resume is None else float(resume["scheduler"]["base_lrs"][0])
    return (
        f"{own:g}"
        if kept == own
        else f"{kept:g} (the checkpoint's; these keys would make it {own:g}: trainer.init starts anew with its weights)"
    )


def _say_nothing(*_: object, **__: object) -> None:
    """For the processes that are not the first."""


def _batches(
    config: Any, source: CocoSource, trainer: Trainer, group: Group, run_dir: Path
) -> Callable[[int], Iterable[Batch]]:
    """This process' batches from a step on; the first one of a run is drawn."""
    pin = trainer.device.type == "cuda"

    def batches(step: int) -> Iterable[Batch]:
        sizes = {"rank": group.rank, "world": group.world, "pieces": trainer.accumulate}
        path = run_dir / "train_batch.png"
        wanted = group.main and not path.exists()
        for batch in source.train_loader(
            config.total_batch, trainer.max_steps, config.seed, step, pin, **sizes
        ):
            if wanted:
                _drawn(partial(save_batch, batch, source.categories, path))
                wanted = False
            yield batch

    return batches


def _check(model: nn.Module, source: CocoSource, trainer: Trainer) -> None:
    """Raises UserError where a part of the model has nothing to learn from."""
    _check_heads(
        [getattr(model, "classifier", None), *getattr(model, "heads", {}).values()], source
    )
    _check_proposals(model, source)
    _check_codes(model, trainer)
    fitted_by = getattr(getattr(model, "classifier", None), "fitted_by", None)
    if fitted_by is not None:
        raise UserError(
            f"model.classifier is not trained by gradients: train a model with another one, then {fitted_by} checkpoint=... fits it"
        )


def _check_heads(heads: Iterable[Any], source: CocoSource) -> None:
    """Raises UserError where a head has nothing to learn from."""
    adds, path = {getattr(head, "adds", "") for head in heads}, source.train.path
    if "masks" in adds and not source.train.has_masks():
        raise UserError(
            f"{path}: not every object has a mask, which the model needs; ~model/heads@model.heads.mask takes a mask head away"
        )
    if "keypoints" in adds and not source.train.has_keypoints():
        raise UserError(
            f"{path}: no object has a visible keypoint, which the keypoint head needs; ~model/heads@model.heads.keypoint takes it away"
        )


def _check_proposals(model: nn.Module, source: CocoSource) -> None:
    """Raises UserError where proposals are to come from files and there are none, or of another data set."""
    needed = getattr(getattr(model, "proposer", None), "needs", None) == "proposals"
    for split in source.splits() if needed else ():
        if source.proposals[split] is None:
            raise UserError(
                f"the model takes its proposals from files: data.{split}_proposals is not set (tools/propose.py makes them)"
            )
        source.dataset(split)


def _check_codes(model: nn.Module, trainer: Trainer) -> None:
    """Raises UserError for a hash layer that nobody has fitted and nothing will teach."""
    weight = getattr(getattr(model, "segmenter", None), "loss_weight", None)
    if weight == 0 and not trainer.init and not trainer.resume:
        raise UserError(
            "model.segmenter.loss_weight is 0 and no trainer.init brings a fitted layer (tools/fit_hash.py): its codes would be noise"
        )


def _start(
    model: nn.Module,
    optimizer: Optimizer,
    trainer: Trainer,
    resume: Checkpoint | None,
    config: Any,
    say: Callable[..., None],
) -> None:
    """Weights to start from. Raises UserError for a checkpoint that does not fit."""
    if resume is not None:
        load_weights(
            model,
            resume["model"],
            f"trainer.resume={trainer.resume}",
            hint="trainer.init with trainer.init_partial=true takes what fits",
        )
        trainer.fits(optimizer, resume)
    elif trainer.init:
        checkpoint = load_checkpoint(checkpoint_path(Path(trainer.init)))
        left = load_weights(
            model,
            best_weights(checkpoint),
            f"trainer.init={trainer.init}",
            trainer.init_partial,
            "trainer.init_partial=true takes what fits",
        )
        say(
            f"started from {trainer.init}"
            + (f"; {len(left)} tensors do not fit: {', '.join(left[:5])}" if left else ""),
            flush=True,
        )
        text = checkpoint.get("config")
        other = configs.model_differences(config, text if isinstance(text, str) else "")
        if other:
            more = f" and {len(other) - 5} more" if len(other) > 5 else ""
            say(
                f"warning: the weights were trained in another model: {', '.join(other[:5])}{more}",
                flush=True,
            )


def main(arguments: list[str]) -> None:
    """Entry point of `tools/train.py`."""
    run_dir = train(configs.compose("train", arguments))
    print(f"run folder: {run_dir}")
