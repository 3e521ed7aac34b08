"""Hash layers fitted to a backbone, and segments evaluated: what tools/fit_hash.py and tools/evaluate.py experiment=... do."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import check_made, single_image, trained_model
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.coco_segments import CocoSegments
from maskseg.data.datasets.segmentation_source import SegmentedSource
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.engine.logs import RunLog
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.engine.run_folder import made_folder
from maskseg.errors import UserError
from maskseg.files import replacing, write_json
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import PixelModel
from maskseg.structures import Categories
from maskseg.variants.hash.itq import ITQ, Fit
from maskseg.variants.hash.segmenter import HashSegmenter
from maskseg.variants.hash.study import SegmentStudy, check_study, flat, look, table
from maskseg.visualization.segments import (
    panel,
    plot_segmentation_iou,
    segment_panel,
    step_pictures,
)

Labels = NDArray[np.int32]


def fit(words: list[str]) -> None:
    """What `tools/fit_hash.py` does: a backbone with a hash layer learnt from a data set, as a checkpoint. Raises UserError."""
    path = next((w.partition("=")[2] for w in words if w.startswith("checkpoint=")), "")
    if path:
        model, config, categories = trained_model(
            Path(path), words, "fit_hash", configs.part("model.segmenter", ["model=mask_rcnn_hash"])
        )
    else:
        config, categories = configs.compose("fit_backbone", words), Categories((), ())
        model = _new_model(config)
    configs.require(config, "output")
    source = _source(config, not path or configs.names_data(words))
    split = _split(source, config.fit.split)
    source.names(split)
    fitter = _fitter(model, config)
    output = made_folder(Path(config.output))
    if (output / "last.pt").exists():
        raise UserError(f"output={output} already holds a checkpoint: choose another folder")
    model.to(pick_device(config.trainer.device)).eval()
    result = _fit(fitter, model, source, split, config)
    log = RunLog(output, 0, len(result.errors), configs.to_yaml(config))
    for step, error in enumerate(result.errors, start=1):
        log.numbers(step, "train", {"quantisation_error": error})
    log.numbers(len(result.errors), "val", result.numbers())
    log.close()
    _save(output / "last.pt", model, config, categories, result)
    print("  ".join(f"{name} {value:.4g}" for name, value in result.numbers().items()))
    print(f"written to {output}: last.pt, metrics.jsonl, tensorboard")


def evaluate(words: list[str]) -> None:
    """What `tools/evaluate.py experiment=...` does. Raises UserError before anything is written where checkpoint, data or keys are wrong."""
    config = configs.compose("segments", words)
    configs.require(config, "output")
    source = _source(config)
    names = source.names(config.split)
    if config.checkpoint:
        model, of_model, _ = trained_model(
            Path(config.checkpoint), [w for w in words if w.startswith("model.")], "fit_hash"
        )
    else:
        source.names(_split(source, config.fit.split))
        model, of_model = _new_model(config), config
    check_study(config.sweep, config.scales, config.base)
    _check_truth(source, config.split)
    fitter, dtype = _fitter(model, config), inference_dtype(config.trainer.precision)
    output = made_folder(Path(config.output))
    model.to(pick_device(config.trainer.device)).eval()
    if not config.checkpoint:
        _save(
            output / "hash.pt",
            model,
            config,
            Categories((), ()),
            _fit(fitter, model, source, _split(source, config.fit.split), config),
        )
    shown = for_inference(model, dtype)
    study = SegmentStudy(
        cast(PixelModel, shown),
        _segmenter(shown),
        single_image(of_model),
        config.sweep,
        config.scales,
        config.base,
    )
    for index, name in enumerate(tqdm(names, desc="evaluating", disable=None)):
        pixels, truths = source.image(config.split, index), source.truths(config.split, index)
        made = study.add(pixels, truths)
        if index < config.pictures:
            _draw(
                output,
                f"{index + 1:03d}_{Path(name).stem}",
                study,
                pixels,
                made[config.sweep[-1]],
                truths[0] if truths else None,
            )
    _write(output, study)
    print(
        f"{len(names)} images; written to {output}: metrics.json, table.txt, segmentation_iou.png, pictures"
    )


def _check_truth(source: SegmentedSource, split: str) -> None:
    """Raises UserError where some truth cannot be read, or none has a labelled pixel."""
    found = [
        any((truth >= 0).any() for truth in source.truths(split, index))
        for index in range(len(source.names(split)))
    ]
    if not any(found):
        raise UserError(f"split={split}: no image has a labelled pixel to compare with")


def _write(output: Path, study: SegmentStudy) -> None:
    numbers = study.numbers()
    write_json(output / "metrics.json", flat(numbers))
    text = table(numbers, study.base)
    with replacing(output / "table.txt", "the table") as file:
        file.write(f"{text}\n".encode())
    count = {value: values["num_segments"] for value, values in numbers["superpixels"].items()}
    rows = {
        method: [(count[value], values["segments"]) for value, values in of.items()]
        for method, of in numbers.items()
    }
    plot_segmentation_iou(rows, output / "segmentation_iou.png")
    print(text)


def _draw(
    output: Path,
    name: str,
    study: SegmentStudy,
    pixels: Tensor,
    made: tuple[Labels, Labels],
    truth: NDArray[Any] | None,
) -> None:
    """NAME.png: superpixels, bit planes, segments, truth; NAME_steps.png: what each step makes of the image."""
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    seen, (superpixels, segments) = study.seen(pixels), made
    codes = study.segmenter.of_pixels(seen.codes, seen.frame)
    own = (study.segmenter.means(seen.codes, superpixels, seen.frame) > 0.5).cpu().numpy()
    features = study.segmenter.cells_inside(seen.features, seen.frame).cpu().numpy()
    Image.fromarray(segment_panel(image, superpixels, codes.cpu().numpy(), segments, truth)).save(
        output / f"{name}.png"
    )
    steps = step_pictures(image, features, codes.cpu().numpy(), superpixels, own, segments)
    Image.fromarray(panel(steps, 4)).save(output / f"{name}_steps.png")


def _split(source: SegmentedSource, named: str) -> str:
    """The split that codes are learnt from: the named one; of data without splits all of it."""
    return "all" if named == "train" and source.splits() == ["all"] else named


def _source(config: Any, may_make: bool = True) -> SegmentedSource:
    """The data set with maps of segments that `config.data` names. Raises UserError, also for several processes: there is nothing to share out.
    may_make: as in `open_data`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this runs in one process: start it with python, not with torchrun")
    source = configs.build(config.data)
    if isinstance(source, CocoSource):
        if not may_make:
            check_made(source)
        source = CocoSegments(source)
    if may_make:
        source.prepare()
    return cast(SegmentedSource, source)


def _new_model(config: Any) -> nn.Module:
    """The experiment's model. Of one with classes there are none: it finds segments alone. Raises UserError."""
    if "segmenter" not in config.model:
        raise UserError(
            "the experiment's model has no segmenter; model=hash_net has one, and checkpoint=... names a trained model"
        )
    if "classifier" in config.model:
        raise UserError(
            "the experiment's model has to be trained first: name it with checkpoint=..."
        )
    torch.manual_seed(config.seed)
    return configs.build_model(config)


def _segmenter(model: nn.Module) -> HashSegmenter:
    segmenter = getattr(model, "segmenter", None)
    if not isinstance(segmenter, HashSegmenter):
        raise UserError(
            "the checkpoint's model has no hash layer: tools/fit_hash.py checkpoint=... makes one with it"
        )
    return segmenter


def _fitter(model: nn.Module, config: Any) -> ITQ:
    return ITQ(_segmenter(model).layer, config.fit.kept, config.fit.iterations, config.seed)


@torch.no_grad()
def _fit(fitter: ITQ, model: nn.Module, source: SegmentedSource, split: str, config: Any) -> Fit:
    """Learns the segmenter's layer from the features of a split's images, in place."""
    prepare = single_image(config)
    fast = cast(PixelModel, for_inference(model))
    device = next(model.parameters()).device
    names = source.names(split)[: config.fit.max_images]
    for index in tqdm(range(len(names)), desc="reading features", disable=None):
        seen = look(fast, _segmenter(fast), prepare(source.image(split, index)).to(device))
        fitter.update(_segmenter(fast).cells_inside(seen.features, seen.frame).flatten(1).T)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fitter.fit()
    for warning in told:
        print(f"warning: {warning.message}", flush=True)
    assert fitter.result is not None
    return fitter.result


def _save(path: Path, model: nn.Module, config: Any, categories: Categories, result: Fit) -> None:
    text = configs.to_yaml(
        configs.only(config, configs.compose("train", []))
    )  # what a training saves, without the tool's keys
    about = {"config": text, "categories": categories.to_dict()}
    save_checkpoint(
        path, {**about, "model": model.state_dict(), "step": 0, "metrics": result.numbers()}
    )
