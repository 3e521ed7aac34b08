"""SVMs fitted to the features of a trained model of masked features: what tools/fit_svm.py does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import checkpoint_word, open_data, trained_model
from maskseg.data.collate import collate
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.loader import BatchLoader
from maskseg.data.transforms import Flip
from maskseg.engine.checkpoint import checkpoint_path, load_weights, save_checkpoint
from maskseg.engine.distributed import Group
from maskseg.engine.logs import RunLog
from maskseg.engine.precision import pick_device
from maskseg.engine.run_folder import made_folder
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Categories
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.draw import FixedSegments
from maskseg.variants.cfm.prepare import prepare_segments
from maskseg.variants.cfm.svm import OneVsRestSVM, SVMFit
from maskseg.variants.cfm.svm_classifier import CFMSvm

LAYER, THRESHOLD = "classifier.scores.", "model.classifier.score_threshold"
PARTS = ("objective", "error", "missed")  # of an `SVMFit`, of each class


def fit(words: list[str]) -> None:
    """What `tools/fit_svm.py` does: a trained model with SVMs instead of its softmax, learnt from a data set, as a checkpoint.

    Raises UserError, before anything is written into `output`, where checkpoint, data or keys are wrong.
    """
    path = checkpoint_path(checkpoint_word(words, "fit_svm"))
    trained, config, categories = trained_model(path, words, "fit_svm")
    configs.require(config, "output")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this runs in one process: start it with python, not with torchrun")
    if not isinstance(trained, GeneralizedRCNN) or not isinstance(
        trained.classifier, CFMClassifier
    ):
        raise UserError(
            f"{path}: the model classifies no segments; SVMs are fitted to one of model=cfm (experiment=scenes_cfm trains one)"
        )
    output = Path(config.output)
    if (output / "last.pt").exists():
        raise UserError(f"output={output} already holds a checkpoint: choose another folder")
    model = _with_svm(trained, config, words)
    fitter = _fitter(model, config, categories)
    source = open_data(config, categories, may_make=configs.names_data(words))
    if not isinstance(source.segment_sampler, partial):
        raise UserError(
            "nothing says which segments are stuff and which are crowds: data.segment_sampler is not set"
        )
    draw = FixedSegments(
        source.segment_sampler(categories.num_things, len(categories)),
        config.fit.negatives,
        config.fit.negative_below,
    )
    source.file("train")
    prepare_segments(model, source, ["train"], config, Group(), words)
    loaders = [
        _loader(source, draw, config, mirrored)
        for mirrored in ([False, True] if config.fit.flip else [False])
    ]
    made_folder(output)
    result = _fit(fitter, model.to(pick_device(config.trainer.device)), loaders, source.skip_bad)
    _log(output, result, config, categories.names)
    _save(output, model, config, categories, result)
    print(_table(result, categories.names))
    print(f"written to {output}: last.pt, config.yaml, metrics.jsonl, tensorboard")


def _with_svm(trained: GeneralizedRCNN, config: Any, words: Sequence[str]) -> GeneralizedRCNN:
    """The model with SVMs in the place of its softmax, of which nothing fires yet, and its config. One that has them keeps their keys."""
    if not isinstance(trained.classifier, CFMSvm):
        own = configs.part(
            "model.classifier", ["model=cfm", "model/classifier=cfm_svm"]
        ).model.classifier
        configs.put(config, "model.classifier._target_", own._target_)
        if not any(word.startswith(f"{THRESHOLD}=") for word in words):
            configs.put(config, THRESHOLD, own.score_threshold)
    model = cast(
        GeneralizedRCNN, configs.build_model(config, configs.FROM_CHECKPOINT, pretrained=False)
    )
    kept = {
        name: value for name, value in trained.state_dict().items() if not name.startswith(LAYER)
    }
    load_weights(
        model,
        {
            **{name: value for name, value in model.state_dict().items() if name.startswith(LAYER)},
            **kept,
        },
        "the checkpoint",
    )
    return model.eval()


def _fitter(model: GeneralizedRCNN, config: Any, categories: Categories) -> OneVsRestSVM:
    keys = config.fit
    layer = cast(CFMSvm, model.classifier).scores
    return OneVsRestSVM(
        layer,
        keys.C,
        keys.positive_weight,
        keys.norm,
        keys.constant,
        keys.kept,
        config.seed,
        categories.names,
    )


def _loader(source: CocoSource, draw: FixedSegments, config: Any, mirrored: bool) -> BatchLoader:
    """The images of the training once, with the transforms of a test, and in a mirror. Raises UserError."""
    if config.evaluation.batch < 1:
        raise UserError(f"evaluation.batch must be at least 1, not {config.evaluation.batch}")
    dataset = source.dataset("train", config.seed)
    dataset.transforms, dataset.draw = (
        [*source.transforms["val"], *([Flip(1.0)] if mirrored else [])],
        draw,
    )
    items = [(int(mirrored), i, 0) for i in range(len(dataset))]
    batches = [
        items[i : i + config.evaluation.batch]
        for i in range(0, len(items), config.evaluation.batch)
    ]
    return BatchLoader(
        source.name("train"),
        dataset,
        batches,
        partial(collate, divisor=source.divisor),
        source.num_workers,
        source.timeout,
    )


@torch.no_grad()
def _fit(
    fitter: OneVsRestSVM, model: GeneralizedRCNN, loaders: Sequence[BatchLoader], skip_bad: int
) -> SVMFit:
    """Learns the classifier's last layer from the segments that were drawn, in place."""
    fast = for_inference(model)
    classifier, device = cast(CFMSvm, fast.classifier), next(model.parameters()).device
    skipped = 0
    for batch in tqdm(
        chain(*loaders), total=sum(map(len, loaders)), desc="reading features", disable=None
    ):
        for message in batch.skipped:
            skipped += 1
            print(f"warning: {message}", flush=True)
        if skipped > skip_bad:
            raise UserError(f"more than data.skip_bad={skip_bad} images cannot be read")
        here = batch.to(device)
        assert here.proposals is not None
        assert here.targets is not None
        samples = fast.sampler(here.proposals, here.targets, here.draw_seeds())
        assert samples.masks is not None
        fitter.update(
            classifier.vectors(
                fast.features(here), samples.boxes, samples.image_index, samples.masks
            ),
            samples.labels,
        )
    count, channels = len(fitter.sample[1]), fitter.layer.in_features
    print(
        f"{sum(fitter.seen)} segments seen, {count} kept: {4e-6 * count * channels:.0f} MB of features; solving",
        flush=True,
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitter.fit()
    for warning in told:
        print(f"warning: {warning.message}", flush=True)
    assert fitter.result is not None
    return fitter.result


def _log(output: Path, result: SVMFit, config: Any, names: Sequence[str]) -> None:
    """The objectives' sum by step; at the last one the numbers of each class too."""
    last = len(result.steps) - 1
    log = RunLog(output, 0, last, configs.to_yaml(config))
    for step, objective in enumerate(result.steps):
        own = (
            {
                f"{part}/{name}": v
                for part in PARTS
                for name, v in zip(names, getattr(result, part), strict=True)
            }
            if step == last
            else {}
        )
        log.numbers(step, "train", {"objective": objective, **own})
    log.close()


def _save(
    output: Path, model: nn.Module, config: Any, categories: Categories, result: SVMFit
) -> None:
    kept = configs.only(
        config, configs.compose("train", [])
    )  # what a training saves, without the tool's keys
    with replacing(output / "config.yaml", "the config") as file:
        file.write(configs.to_yaml(kept, resolve=True).encode())
    about = {"config": configs.to_yaml(kept), "categories": categories.to_dict()}
    save_checkpoint(
        output / "last.pt",
        {**about, "model": model.state_dict(), "step": 0, "metrics": result.numbers()},
    )


def _table(result: SVMFit, names: Sequence[str]) -> str:
    """A line a class: from how many positives, and what share of all segments and of the positives is on the wrong side."""
    width = max(map(len, names))
    lines = [f"{'class':<{width}} positives  objective   error  missed"]
    for name, count, objective, error, missed in zip(
        names, result.positives, result.objective, result.error, result.missed, strict=True
    ):
        lines.append(f"{name:<{width}} {count:9d} {objective:10.4g} {error:7.2%} {missed:7.2%}")
    return "\n".join(lines)
