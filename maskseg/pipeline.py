"""Config -> data, model, training run: what the tools do, in functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from maskseg import config as configs
from maskseg import run_folder
from maskseg.data.loader import loader_error
from maskseg.data.source import CocoSource
from maskseg.engine.checkpoint import Checkpoint, best_weights, load_checkpoint, load_weights
from maskseg.engine.distributed import Group, processes
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.inference.batches import save_batch
from maskseg.inference.curves import plot_curves
from maskseg.inference.validation import Processes, Validation
from maskseg.rcnn import GeneralizedRCNN
from maskseg.segment_making import prepare_segments
from maskseg.structures import Batch, Categories
from maskseg.variants.image_classifier import ImageClassifier


def open_data(config: Any, known: Categories | None = None, group: Group | None = None, may_make: bool = True) -> CocoSource:
    """The data set of `config.data`, read and checked: the classes are those of the data, or `known` ones (a checkpoint's).

    may_make: whether files of a data set that has to be made first are written. Not where a checkpoint's config says where: whoever made
    the checkpoint would choose what is written on this machine.
    """
    source = configs.build(config.data)
    if not isinstance(source, CocoSource):
        raise UserError("the data set is one for measures of segments: tools/fit_hash.py and tools/evaluate.py experiment=... read it")
    source.known = known
    group = group or Group()
    if group.local_main and may_make:
        source.prepare()  # on a disk that the processes of a machine share
    if not may_make:
        check_made(source)
    group.wait()
    return source


def check_made(source: CocoSource) -> None:
    """Raises UserError for a file of the data set that is not there."""
    for split in source.splits():
        if not Path(str(source.json[split])).is_file():
            raise UserError(f"{source.name(split)}: there is no such file; data=NAME names the data set, and makes one that can be made")


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


def validation(config: Any, source: CocoSource, split: str, categories: Categories, group: Group | None = None) -> Validation:
    """The evaluation of `split` as `config.evaluation` says, shared out over the processes."""
    numbers, group = config.evaluation, group or Group()
    if numbers.batch < 1:
        raise UserError(f"evaluation.batch must be at least 1, not {numbers.batch}")
    source.file(split)
    counts = {len(points) for points in categories.keypoints if points}
    if numbers.oks_sigmas is not None and len(numbers.oks_sigmas) not in counts:
        raise UserError(f"evaluation.oks_sigmas has {len(numbers.oks_sigmas)} numbers, but the classes have {sorted(counts) or 'no'} keypoints")
    return Validation(
        lambda: source.test_loader(split, numbers.batch, numbers.max_images, group.rank, group.world),
        lambda: source.file(split).to_dict(),
        categories,
        numbers.max_detections,
        numbers.backend,
        numbers.pictures,
        numbers.min_score,
        lambda image_id: source.picture(split, image_id),
        Processes(group.rank, group.gather),
        numbers.oks_sigmas,
    )


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
        raise UserError("the model finds no objects: tools/fit_hash.py fits its hash layer, and experiment=scenes_hash_r18 trains one")
    optimizer = trainer.optimizer(model, configs.build(config.optimizer), config.total_batch)
    scheduler = configs.build(config.scheduler)(optimizer, max_steps=trainer.max_steps)
    check = validation(config, source, "val", categories, group) if "val" in source.splits() else None
    folder, found = group.share(run_folder.choose(config, trainer) if group.main else None)
    resume = run_folder.read(found)
    _start(model, optimizer, trainer, resume, config, say)
    _check(model, source, trainer)
    prepare_segments(model, source, source.splits(), config, group)
    group.wait()  # until all have found everything in order, nothing is written
    run_dir = run_folder.made_folder(folder)
    say(f"run folder: {run_dir}", flush=True)
    rate, pieces = _rate(optimizer, resume), f" in {trainer.accumulate} pieces" if trainer.accumulate > 1 else ""
    say(f"learning rate {rate} for {config.total_batch} images a step{pieces}, on {group.world} x {trainer.device}", flush=True)
    text = configs.to_yaml(config)
    if group.main:
        with replacing(run_dir / "config.yaml", "the config") as file:
            file.write(configs.to_yaml(config, resolve=True).encode())
        run_folder.record(run_dir, trainer.device, group.world, int(resume["step"]) if resume else 0)

    def report() -> None:
        plot_curves(run_dir / "metrics.jsonl", run_dir / "results.png")
        if check is not None:
            check.save(run_dir)

    about: Checkpoint = {"config": text, "categories": categories.to_dict()}
    batches = _batches(config, source, trainer, group, run_dir)
    try:
        trainer.run(model, optimizer, scheduler, batches, run_dir, about, check, resume, group, report)
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
    return f"{own:g}" if kept == own else f"{kept:g} (the checkpoint's; these keys would make it {own:g}: trainer.init starts anew with its weights)"


def _say_nothing(*_: object, **__: object) -> None:
    """For the processes that are not the first."""


def _batches(config: Any, source: CocoSource, trainer: Trainer, group: Group, run_dir: Path) -> Callable[[int], Iterable[Batch]]:
    """This process' batches from a step on; the first one of a run is drawn."""
    pin = trainer.device.type == "cuda"

    def batches(step: int) -> Iterable[Batch]:
        sizes = {"rank": group.rank, "world": group.world, "pieces": trainer.accumulate}
        path = run_dir / "train_batch.png"
        wanted = group.main and not path.exists()
        for batch in source.train_loader(config.total_batch, trainer.max_steps, config.seed, step, pin, **sizes):
            if wanted:
                _drawn(partial(save_batch, batch, source.categories, path))
                wanted = False
            yield batch

    return batches


def _check(model: nn.Module, source: CocoSource, trainer: Trainer) -> None:
    """Raises UserError where a part of the model has nothing to learn from."""
    _check_heads([getattr(model, "classifier", None), *getattr(model, "heads", {}).values()], source)
    _check_proposals(model, source)
    _check_codes(model, trainer)
    fitted_by = getattr(getattr(model, "classifier", None), "fitted_by", None)
    if fitted_by is not None:
        raise UserError(f"model.classifier is not trained by gradients: train a model with another one, then {fitted_by} checkpoint=... fits it")


def _check_heads(heads: Iterable[Any], source: CocoSource) -> None:
    """Raises UserError where a head has nothing to learn from."""
    adds, path = {getattr(head, "adds", "") for head in heads}, source.train.path
    if "masks" in adds and not source.train.has_masks():
        raise UserError(f"{path}: not every object has a mask, which the model needs; ~model/heads@model.heads.mask takes a mask head away")
    if "keypoints" in adds and not source.train.has_keypoints():
        raise UserError(f"{path}: no object has a visible keypoint, which the keypoint head needs; ~model/heads@model.heads.keypoint takes it away")


def _check_proposals(model: nn.Module, source: CocoSource) -> None:
    """Raises UserError where proposals are to come from files and there are none, or of another data set."""
    needed = getattr(getattr(model, "proposer", None), "needs", None) == "proposals"
    for split in source.splits() if needed else ():
        if source.proposals[split] is None:
            raise UserError(f"the model takes its proposals from files: data.{split}_proposals is not set (tools/propose.py makes them)")
        source.dataset(split)


def _check_codes(model: nn.Module, trainer: Trainer) -> None:
    """Raises UserError for a hash layer that nobody has fitted and nothing will teach."""
    weight = getattr(getattr(model, "segmenter", None), "loss_weight", None)
    if weight == 0 and not trainer.init and not trainer.resume:
        raise UserError("model.segmenter.loss_weight is 0 and no trainer.init brings a fitted layer (tools/fit_hash.py): its codes would be noise")


def _start(model: nn.Module, optimizer: Optimizer, trainer: Trainer, resume: Checkpoint | None, config: Any, say: Callable[..., None]) -> None:
    """Weights to start from. Raises UserError for a checkpoint that does not fit."""
    if resume is not None:
        load_weights(model, resume["model"], f"trainer.resume={trainer.resume}", hint="trainer.init with trainer.init_partial=true takes what fits")
        trainer.fits(optimizer, resume)
    elif trainer.init:
        checkpoint = load_checkpoint(checkpoint_path(Path(trainer.init)))
        left = load_weights(
            model, best_weights(checkpoint), f"trainer.init={trainer.init}", trainer.init_partial, "trainer.init_partial=true takes what fits"
        )
        say(f"started from {trainer.init}" + (f"; {len(left)} tensors do not fit: {', '.join(left[:5])}" if left else ""), flush=True)
        text = checkpoint.get("config")
        other = configs.model_differences(config, text if isinstance(text, str) else "")
        if other:
            more = f" and {len(other) - 5} more" if len(other) > 5 else ""
            say(f"warning: the weights were trained in another model: {', '.join(other[:5])}{more}", flush=True)
