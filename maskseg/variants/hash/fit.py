"""Fitting of hash layers and evaluation of segments.

Implements `tools/fit_hash.py` and `tools/evaluate.py experiment=...`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.restore import (
    check_exists,
    save_fitted,
    single_image,
    trained_model,
    training_config,
)
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.coco_segments import CocoSegments
from maskseg.data.datasets.segmentation_source import SegmentedSource
from maskseg.engine.loggers import RESULTS_FILE, check_loggers
from maskseg.engine.logs import RunLog, log_files, print_warnings
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.engine.run_folder import make_folder
from maskseg.errors import UserError, warn_if_not_drawn
from maskseg.files import replacing, write_json
from maskseg.files.outputs import check_no_run, check_outputs, record_outputs
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import PixelModel
from maskseg.structures import Categories
from maskseg.variants.hash.itq import ITQ, ITQResult
from maskseg.variants.hash.pictures import plot_segmentation_iou, segment_panel, step_pictures
from maskseg.variants.hash.segmenter import HashSegmenter
from maskseg.variants.hash.study import (
    SegmentStudy,
    check_study,
    extract_features,
    flatten_metrics,
    format_table,
)
from maskseg.visualization.layout import arrange_panel

Labels = NDArray[np.int32]


def fit(overrides: list[str]) -> None:
    """Run `tools/fit_hash.py`: fit a hash layer to a data set and save model and layer.

    The model comes from checkpoint=... or from the experiment. Raises UserError.
    """
    path = configs.find_path(overrides, "checkpoint")
    if path:
        segmenter = configs.group_config("model.segmenter", ["model=mask_rcnn_hash"])
        model, config, categories = trained_model(Path(path), overrides, "fit_hash", segmenter)
    else:
        config = configs.compose("fit_backbone", overrides, print)
        categories = Categories((), ())
        model = _new_model(config)
    configs.require_keys(config, "output")
    source = _source(config, may_make=not path or configs.names_data(overrides))
    split = _fit_split(source, config.fit.split)
    source.names(split)
    fitter = _fitter(model, config)
    device = pick_device(config.trainer.device)
    output = Path(config.output)
    if (output / "last.pt").exists():
        raise UserError(f"output={output} already holds a checkpoint: choose another folder")
    check_no_run(output)
    check_loggers(config.trainer.loggers)
    check_outputs([output / "tensorboard", output / RESULTS_FILE])
    make_folder(output)
    model.to(device).eval()
    result = _fit(fitter, model, source, split, config)
    num_steps = len(result.errors)
    log = RunLog(
        output, 0, num_steps, configs.to_yaml(config), loggers=list(config.trainer.loggers)
    )
    for step, error in enumerate(result.errors, start=1):
        log.log_scalars(step, "train", {"quantisation_error": error})
    metrics = result.metrics()
    log.log_scalars(num_steps, "val", metrics)
    log.close()
    save_fitted(output / "last.pt", model, training_config(config), categories, result.metrics())
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    print(f"written to {output}: last.pt, {', '.join(log_files(config.trainer.loggers))}")


def evaluate(overrides: list[str]) -> None:
    """Run `tools/evaluate.py experiment=...`: compare segmentation methods on a data set.

    Raises UserError before anything is written if checkpoint, data or keys are invalid.
    """
    config = configs.compose("segments", overrides, print)
    configs.require_keys(config, "output")
    source = _source(config)
    names = source.names(config.split)
    if config.checkpoint:
        model_overrides = [text for text in overrides if text.startswith("model.")]
        model, model_config, _ = trained_model(Path(config.checkpoint), model_overrides, "fit_hash")
    else:
        source.names(_fit_split(source, config.fit.split))
        model = _new_model(config)
        model_config = config
    check_study(config.sweep, config.scales, config.base)
    _check_ground_truth(source, config.split)
    fitter = _fitter(model, config)
    dtype = inference_dtype(config.trainer.precision)
    device = pick_device(config.trainer.device)
    output = Path(config.output)
    images = _image_names(names[: config.pictures])
    check_no_run(output)
    files = ["metrics.json", "table.txt", "segmentation_iou.png", "hash.pt"]
    files += [f"{name}{suffix}.png" for name in images for suffix in ("", "_steps")]
    outputs = [output / file for file in files]
    check_outputs(outputs, tool="evaluate", overwrite=config.overwrite)
    make_folder(output, "output")
    model.to(device).eval()
    with record_outputs(outputs, "evaluate", config.overwrite, output):
        if not config.checkpoint:
            result = _fit(fitter, model, source, _fit_split(source, config.fit.split), config)
            train_config = training_config(config)
            save_fitted(
                output / "hash.pt", model, train_config, Categories((), ()), result.metrics()
            )
        inference_model = _pixel_model(for_inference(model, dtype))
        study = SegmentStudy(
            inference_model,
            _segmenter(inference_model),
            single_image(model_config),
            config.sweep,
            config.scales,
            config.base,
        )
        for index in tqdm(range(len(names)), desc="evaluating", disable=None):
            pixels = source.image(config.split, index)
            ground_truths = source.ground_truths(config.split, index)
            results = study.add(pixels, ground_truths)
            if index < config.pictures:
                ground_truth = ground_truths[0] if ground_truths else None
                with warn_if_not_drawn(f"{images[index]}.png"):
                    _draw(
                        output / images[index],
                        study,
                        pixels,
                        results[config.sweep[-1]],
                        ground_truth,
                    )
        _write(output, study)
    print(
        f"{len(names)} images; written to {output}: metrics.json, table.txt, "
        "segmentation_iou.png, images"
    )


def _image_names(names: Sequence[str]) -> list[str]:
    """The names of the images that are drawn, without their ends."""
    return [f"{index:03d}_{Path(name).stem}" for index, name in enumerate(names, start=1)]


def _check_ground_truth(source: SegmentedSource, split: str) -> None:
    """Read the ground truth of all images. Raises UserError if no pixel of them is labeled."""
    has_labels = False
    for index in range(len(source.names(split))):
        for labels in source.ground_truths(split, index):
            if (labels >= 0).any():
                has_labels = True
                break
    if not has_labels:
        raise UserError(f"split={split}: no image has a labeled pixel to compare with")


def _write(output: Path, study: SegmentStudy) -> None:
    """Write metrics.json, table.txt and segmentation_iou.png, and print the table."""
    metrics = study.metrics()
    write_json(output / "metrics.json", flatten_metrics(metrics))
    text = format_table(metrics, study.base)
    with replacing(output / "table.txt", "the table") as file:
        file.write(f"{text}\n".encode())
    num_superpixels = {
        value: values["num_segments"] for value, values in metrics["superpixels"].items()
    }
    curves = {}
    for method, rows in metrics.items():
        curves[method] = [
            (num_superpixels[value], values["segments"]) for value, values in rows.items()
        ]
    with warn_if_not_drawn("segmentation_iou.png"):
        plot_segmentation_iou(curves, output / "segmentation_iou.png")
    print(text)


def _draw(
    path: Path,
    study: SegmentStudy,
    pixels: Tensor,
    result: tuple[Labels, Labels],
    ground_truth: NDArray[np.integer] | None,
) -> None:
    """Draw a segmented image.

    PATH.png: superpixels, bit planes, segments and ground truth; PATH_steps.png: the result of each
    step. result: superpixels and segments.
    """
    image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    superpixels, segments = result
    segmenter = study.segmenter
    image_features = study.extract_features(pixels)
    frame = image_features.frame
    codes = segmenter.upsample_to_frame(image_features.codes, frame).cpu().numpy()
    means = segmenter.superpixel_means(image_features.codes, superpixels, frame)
    superpixel_codes = (means > 0.5).cpu().numpy()
    features = segmenter.crop_to_frame(image_features.features, frame).cpu().numpy()
    overview = segment_panel(image, superpixels, codes, segments, ground_truth)
    Image.fromarray(overview).save(path.with_name(f"{path.name}.png"))
    steps = step_pictures(image, features, codes, superpixels, superpixel_codes, segments)
    Image.fromarray(arrange_panel(steps, 4)).save(path.with_name(f"{path.name}_steps.png"))


def _fit_split(source: SegmentedSource, name: str) -> str:
    """The split to learn codes from: `name`, or `all` for data without splits."""
    return "all" if name == "train" and source.splits() == ["all"] else name


def _source(config: Config, may_make: bool = True) -> SegmentedSource:
    """Build the data set of segment maps that `config.data` describes.

    may_make: whether missing data may be generated, as in `open_data`. Raises UserError, also for
    more than one process: the work is not distributed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this runs in one process: start it with python, not with torchrun")
    built = configs.build_source(config.data)
    if isinstance(built, CocoSource):
        if not may_make:
            check_exists(built)
        built = CocoSegments(built)
    source: SegmentedSource = built
    if may_make:
        source.prepare()
    return source


def _new_model(config: Config) -> nn.Module:
    """Build the experiment's model, which must segment only: it is not trained.

    Raises UserError for a model without a segmenter, or with a classifier.
    """
    if "segmenter" not in config.model:
        raise UserError(
            "the experiment's model has no segmenter; model=hash_net has one, and checkpoint=... "
            "names a trained model"
        )
    if "classifier" in config.model:
        raise UserError(
            "the experiment's model has to be trained first: name it with checkpoint=..."
        )
    torch.manual_seed(config.seed)
    return configs.build_model(config)


def _pixel_model(model: nn.Module) -> PixelModel:
    """The model, which has a backbone. Raises UserError if it has none."""
    if not isinstance(model, PixelModel):
        raise UserError(f"a {type(model).__name__} has no backbone whose features could be hashed")
    return model


def _segmenter(model: nn.Module) -> HashSegmenter:
    """The model's segmenter. Raises UserError if it is not a `HashSegmenter`."""
    segmenter = getattr(model, "segmenter", None)
    if not isinstance(segmenter, HashSegmenter):
        raise UserError(
            "the checkpoint's model has no hash layer: tools/fit_hash.py checkpoint=... adds one"
        )
    return segmenter


def _fitter(model: nn.Module, config: Config) -> ITQ:
    """An ITQ for the layer of the model's segmenter."""
    settings = config.fit
    return ITQ(_segmenter(model).layer, settings.max_samples, settings.iterations, config.seed)


@torch.no_grad()
def _fit(
    fitter: ITQ, model: nn.Module, source: SegmentedSource, split: str, config: Config
) -> ITQResult:
    """Fit the segmenter's layer in place to the features of a split's images."""
    prepare = single_image(config)
    inference_model = _pixel_model(for_inference(model))
    segmenter = _segmenter(inference_model)
    device = next(model.parameters()).device
    names = source.names(split)[: config.fit.max_images]
    for index in tqdm(range(len(names)), desc="reading features", disable=None):
        batch = prepare(source.image(split, index)).to(device)
        image_features = extract_features(inference_model, segmenter, batch)
        cells = segmenter.crop_to_frame(image_features.features, image_features.frame)
        fitter.update(cells.flatten(1).T)
    with print_warnings():
        fitter.fit()
    assert fitter.result is not None
    return fitter.result
