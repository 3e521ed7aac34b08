"""Fit SVMs to the features of a trained model of convolutional feature masking."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.restore import (
    checkpoint_argument,
    open_data,
    prepare_segments,
    save_fitted,
    trained_model,
    training_config,
)
from maskseg.data.collate import collate
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.loader import BatchLoader
from maskseg.data.transforms import Flip
from maskseg.engine.checkpoint import checkpoint_path, load_weights
from maskseg.engine.distributed import DistributedContext
from maskseg.engine.loggers import RESULTS_FILE, check_loggers
from maskseg.engine.logs import RunLog, log_files, print_warnings
from maskseg.engine.precision import pick_device
from maskseg.engine.run_folder import make_folder
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.files.outputs import check_no_run, check_outputs
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Categories
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.draw import DrawSegments, FixedSegmentSampler
from maskseg.variants.cfm.segment_data import FolderSegments
from maskseg.variants.cfm.svm import OneVsRestSVM, SVMFit
from maskseg.variants.cfm.svm_classifier import CFMSvm

LAYER_PREFIX = "classifier.scores."
THRESHOLD_KEY = "model.classifier.score_threshold"
CLASS_METRICS = ("objective", "error", "missed")  # fields of `SVMFit`


def fit(arguments: list[str]) -> None:
    """Replace the softmax of a trained model by SVMs that are fitted to a dataset.

    Entry point of `tools/fit_svm.py`; writes a checkpoint. Raises UserError, before anything is
    written to `output`, if the checkpoint, the data or a key is invalid.
    """
    path = checkpoint_path(checkpoint_argument(arguments, "fit_svm"))
    trained, config, categories = trained_model(path, arguments, "fit_svm")
    configs.require_keys(config, "output")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this tool runs in one process: start it with python, not with torchrun")
    if not isinstance(trained, GeneralizedRCNN) or not isinstance(
        trained.classifier, CFMClassifier
    ):
        raise UserError(
            f"{path}: the model does not classify segments; SVMs need a model of model=cfm"
            " (experiment=scenes_cfm trains one)"
        )
    output = Path(config.output)
    if (output / "last.pt").exists():
        raise UserError(f"output={output} already holds a checkpoint: choose another folder")
    check_no_run(output)
    check_loggers(config.trainer.loggers)
    check_outputs([output / "config.yaml", output / "tensorboard", output / RESULTS_FILE])
    model = _replace_softmax(trained, config, arguments)
    fitter = _build_fitter(model, config, categories)
    source = open_data(config, categories, may_make=configs.names_data(arguments))
    if not isinstance(source.segments, FolderSegments):
        raise UserError(
            "data.segment_sampler is not set; it defines which segments are stuff and which are"
            " crowds"
        )
    sampler = FixedSegmentSampler(
        source.segments.make_sampler(categories.num_things, len(categories)),
        config.fit.negatives,
        config.fit.negative_below,
    )
    source.file("train")
    prepare_segments(model, source, ["train"], config, DistributedContext(), arguments)
    loaders = [_build_loader(source, sampler, config, flip=False)]
    if config.fit.flip:
        loaders.append(_build_loader(source, sampler, config, flip=True))
    device = pick_device(config.trainer.device)
    make_folder(output)
    model = model.to(device)
    result = _fit(fitter, model, loaders, source.reading.skip_bad)
    _log(output, result, config, categories.names)
    _save(output, model, config, categories, result)
    print(_format_table(result, categories.names))
    files = ("last.pt", "config.yaml", *log_files(config.trainer.loggers))
    print(f"written to {output}: {', '.join(files)}")


def _replace_softmax(
    trained: GeneralizedRCNN, config: Config, arguments: Sequence[str]
) -> GeneralizedRCNN:
    """Build the model with SVMs instead of softmax, none of which fires yet, and adapt its config.

    A model that already has SVMs keeps its keys.
    """
    if not isinstance(trained.classifier, CFMSvm):
        svm_config = configs.group_config(
            "model.classifier", ["model=cfm", "model/classifier=cfm_svm"]
        ).model.classifier
        configs.set_key(config, "model.classifier._target_", svm_config["_target_"])
        if not any(argument.startswith(f"{THRESHOLD_KEY}=") for argument in arguments):
            configs.set_key(config, THRESHOLD_KEY, svm_config.score_threshold)
    model = configs.build_model(config, configs.CHECKPOINT_TARGETS, pretrained=False)
    last_layer = {
        name: value for name, value in model.state_dict().items() if name.startswith(LAYER_PREFIX)
    }
    other_layers = {
        name: value
        for name, value in trained.state_dict().items()
        if not name.startswith(LAYER_PREFIX)
    }
    load_weights(model, {**last_layer, **other_layers}, "the checkpoint")
    assert isinstance(model, GeneralizedRCNN)  # as `trained` is
    return model.eval()


def _svm_classifier(model: GeneralizedRCNN) -> CFMSvm:
    """The classifier that `_replace_softmax` has put into the model."""
    assert isinstance(model.classifier, CFMSvm)
    return model.classifier


def _build_fitter(model: GeneralizedRCNN, config: Config, categories: Categories) -> OneVsRestSVM:
    return OneVsRestSVM(
        _svm_classifier(model).scores,
        config.fit.C,
        config.fit.positive_weight,
        config.fit.norm,
        config.fit.intercept_scaling,
        config.fit.max_samples,
        config.seed,
        categories.names,
    )


def _build_loader(
    source: CocoSource, sampler: FixedSegmentSampler, config: Config, flip: bool
) -> BatchLoader:
    """Load the training images once, with the transforms of a test, optionally flipped.

    Raises UserError.
    """
    batch_size = config.evaluation.batch
    transforms = list(source.split("val").transforms)
    if flip:
        transforms.append(Flip(1.0))
    transforms.append(DrawSegments(sampler, training=True))
    dataset = source.dataset_with("train", transforms, config.seed, source.reading.skip_bad)
    items = [(int(flip), index, 0) for index in range(len(dataset))]
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    return BatchLoader(
        source.split("train").key,
        dataset,
        batches,
        partial(collate, divisor=source.loading.divisor),
        source.loading.num_workers,
        source.loading.timeout,
    )


@torch.no_grad()
def _fit(
    fitter: OneVsRestSVM, model: GeneralizedRCNN, loaders: Sequence[BatchLoader], skip_bad: int
) -> SVMFit:
    """Fit the last layer of the classifier, in place, to the segments that were drawn."""
    fused = for_inference(model)
    classifier = _svm_classifier(fused)
    device = next(model.parameters()).device
    num_skipped = 0
    num_batches = sum(map(len, loaders))
    for batch in tqdm(chain(*loaders), total=num_batches, desc="reading features", disable=None):
        for message in batch.read_errors:
            num_skipped += 1
            print(f"warning: {message}", flush=True)
        if num_skipped > skip_bad:
            raise UserError(f"more than data.skip_bad={skip_bad} images cannot be read")
        batch = batch.to(device)
        assert batch.proposals is not None
        assert batch.targets is not None
        samples = fused.sampler(batch.proposals, batch.targets, batch.seeds_or_zeros())
        assert samples.masks is not None
        features = fused.features(batch)
        vectors = classifier.compute_vectors(
            features, samples.boxes, samples.image_index, samples.masks
        )
        fitter.update(vectors, samples.labels)
    count = len(fitter.reservoir()[1])
    megabytes = 4e-6 * count * fitter.layer.in_features
    print(
        f"{sum(fitter.seen)} segments seen, {count} kept: {megabytes:.0f} MB of features; solving",
        flush=True,
    )
    with print_warnings():
        fitter.fit()
    assert fitter.result is not None
    return fitter.result


def _log(output: Path, result: SVMFit, config: Config, names: Sequence[str]) -> None:
    """Log the sum of the objectives by step and, at the last step, the metrics of each class."""
    last = len(result.steps) - 1
    log = RunLog(output, 0, last, configs.to_yaml(config), loggers=list(config.trainer.loggers))
    for step, objective in enumerate(result.steps):
        scalars = {"objective": objective}
        if step == last:
            for metric in CLASS_METRICS:
                for name, value in zip(names, getattr(result, metric), strict=True):
                    scalars[f"{metric}/{name}"] = value
        log.log_scalars(step, "train", scalars)
    log.close()


def _save(
    output: Path, model: nn.Module, config: Config, categories: Categories, result: SVMFit
) -> None:
    """Write config.yaml and last.pt."""
    train_config = training_config(config)
    with replacing(output / "config.yaml", "the config") as file:
        file.write(configs.to_yaml(train_config, resolve=True).encode())
    save_fitted(output / "last.pt", model, train_config, categories, result.metrics())


def _format_table(result: SVMFit, names: Sequence[str]) -> str:
    """Format one line per class: positives, objective, and the shares on the wrong side."""
    width = max(map(len, names))
    lines = [f"{'class':<{width}} positives  objective   error  missed"]
    for name, count, objective, error, missed in zip(
        names, result.positives, result.objective, result.error, result.missed, strict=True
    ):
        lines.append(f"{name:<{width}} {count:9d} {objective:10.4g} {error:7.2%} {missed:7.2%}")
    return "\n".join(lines)
