"""Checkpoint -> model: evaluation and prediction, as the tools and `maskseg.load` do them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, cast

from PIL import Image
from torch import nn
from tqdm import tqdm

from maskseg import config as configs
from maskseg.data.single import SingleImage
from maskseg.data.source import check_numbers
from maskseg.engine.checkpoint import best_weights, load_checkpoint, load_weights
from maskseg.engine.distributed import processes
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.errors import UserError
from maskseg.evaluation.rows import detection_rows, segment_rows, write_results
from maskseg.files import write_json
from maskseg.inference.cam_pictures import cam_overlay, score_row
from maskseg.inference.folder import class_pictures, image_files, overlay, segment_overlay
from maskseg.inference.predictor import Predictor, original_classes, original_segments
from maskseg.modules.folding import for_inference
from maskseg.pipeline import checkpoint_path, open_data, validation
from maskseg.rcnn import GeneralizedRCNN
from maskseg.run_folder import made_folder
from maskseg.segment_making import prepare_segments
from maskseg.structures import Categories
from maskseg.variants.image_classifier import ImageClassifier


def trained_model(path: Path, overrides: list[str], own: str, under: Any = None) -> tuple[nn.Module, Any, Categories]:
    """The model of a checkpoint, its config with the tool's keys, and its classes. under: parts that the model gets where it has none; their
    weights are not the checkpoint's. Raises UserError."""
    path = checkpoint_path(path)
    checkpoint = load_checkpoint(path)
    try:
        categories = Categories.from_dict(checkpoint["categories"])
        text = checkpoint["config"]
        if not isinstance(text, str):
            raise TypeError(f"the config is a {type(text).__name__}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: the checkpoint lacks its config or categories ({error})") from error
    config = configs.from_checkpoint(text, overrides, own, under)
    model = configs.build_model(config, configs.FROM_CHECKPOINT, pretrained=False)
    weights = best_weights(checkpoint)
    if under is not None:
        added = tuple(f"{name}." for name in under.model)
        weights = {k: v for k, v in weights.items() if not k.startswith(added)}
        weights |= {k: v for k, v in model.state_dict().items() if k.startswith(added)}
    load_weights(model, weights, str(path))
    return model.eval(), config, categories


def load_predictor(path: Path, device: str = "auto", overrides: list[str] | None = None) -> Predictor:
    """The predictor of a checkpoint or run folder. Raises UserError."""
    model, config, categories = trained_model(path, overrides or [], "predict")
    return _predictor(model, config, categories, device)


def single_image(config: Any) -> SingleImage:
    """What makes a batch of one picture as the evaluation would. Raises UserError."""
    check_numbers({"divisor": 1, "max_pixels": 1}, divisor=config.data.divisor, max_pixels=config.data.max_pixels)
    transforms = [configs.build(t, configs.FROM_CHECKPOINT) for t in config.data.test_transforms]
    return SingleImage(transforms, config.data.divisor, config.data.max_pixels)


def _predictor(model: nn.Module, config: Any, categories: Categories, device: str) -> Predictor:
    prepare, place = single_image(config), pick_device(device)
    return Predictor(for_inference(model.to(place), inference_dtype(config.trainer.precision)), categories, prepare, place)


def checkpoint_word(words: list[str], tool: str) -> Path:
    """The checkpoint that the command line names; its config is needed to read the rest of the words."""
    path = next((w.partition("=")[2] for w in words if w.startswith("checkpoint=")), "")
    if not path:
        raise UserError(f"checkpoint=... is missing: a .pt file or a run folder (tools/{tool}.py --help)")
    return Path(path)


def evaluate(words: list[str]) -> dict[str, float]:
    """What `tools/evaluate.py` does with its key=value words: writes metrics.json, per_class.json, detections.json and pictures into `output`.

    Under torchrun the images are shared out. Raises UserError before anything is written where checkpoint, data or keys are wrong.
    """
    model, config, categories = trained_model(checkpoint_word(words, "evaluate"), words, "evaluate")
    own_data = configs.names_data(words)
    configs.require(config, "output")
    if not isinstance(model, GeneralizedRCNN | ImageClassifier):
        raise UserError("the checkpoint's model finds segments and no objects: experiment=... evaluates them (tools/evaluate.py --help)")
    device = pick_device(config.trainer.device)
    with processes(device) as group:
        source = open_data(config, categories, group, own_data)
        check = validation(config, source, config.split, categories, group)
        source.semantic_maps(config.split)
        prepare_segments(model, source, [config.split], config, group, words)
        output = made_folder(Path(config.output))
        check.pictures = config.pictures
        metrics = check(for_inference(model.to(device), inference_dtype(config.trainer.precision)), 0)
        if group.main:
            write_json(output / "metrics.json", {k: v if math.isfinite(v) else None for k, v in metrics.items()})
            write_json(output / "per_class.json", check.per_class())
            if check.evaluator is not None:
                write_results(output / "detections.json", check.evaluator.rows)
            pictures = [*(["detections.json"] if check.evaluator is not None else []), *check.save(output)]
            print(check.table)
            print(f"written to {output}: metrics.json, per_class.json, {', '.join(pictures)}")
        group.wait()
    return metrics


def predict(words: list[str]) -> None:
    """What `tools/predict.py` does: an overlay a picture and predictions.json (COCO results; `image_id` counts the pictures from 1 and `file_name`
    names them) in `output`; of a model that cuts images into segments also NAME_segments.png and segments.json (the same without classes;
    the score is the share of the image), of one that labels pixels NAME_classes.png (with a legend) and NAME_ids.png (category ids, 65535 for none),
    of a classifier of images NAME_cam.png and image_scores.json instead. Raises UserError."""
    model, config, categories = trained_model(checkpoint_word(words, "predict"), words, "predict")
    configs.require(config, "input")
    predictor = _predictor(model, config, categories, config.trainer.device)
    files = image_files(config.input)
    output = made_folder(Path(config.output))
    files = [file.absolute() for file in files]
    top = Path(os.path.commonpath([file.parent for file in files]))
    rows, segments, classified = [], [], []
    for i, file in enumerate(tqdm(files, desc="predicting", disable=None), start=1):
        pixels = predictor.prepare.read(file)
        batch, outputs = predictor.outputs(pixels, i, file.name)
        picture = output / file.parent.relative_to(top) / f"{file.stem}{'' if file.suffix == '.png' else file.suffix}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        if outputs.image_scores is not None:
            classified.append({"image_id": i, "file_name": str(file), **score_row(outputs, 0, categories)})
            level = cast(ImageClassifier, predictor.model).level
            Image.fromarray(cam_overlay(pixels, batch, outputs, level, categories)).save(picture.with_name(f"{picture.stem}_cam.png"))
            continue
        found = detection_rows(batch, outputs, categories)
        rows += [{**row, "file_name": str(file)} for row in found]
        Image.fromarray(overlay(pixels, found, categories, config.min_score)).save(picture)
        own = original_segments(batch, outputs)
        if own is not None:
            segments += [{**row, "file_name": str(file)} for row in segment_rows(i, own)]
            Image.fromarray(segment_overlay(pixels, own)).save(picture.with_name(f"{picture.stem}_segments.png"))
        classes = original_classes(batch, outputs)
        if classes is not None:
            drawn, ids = class_pictures(pixels, classes, categories)
            Image.fromarray(drawn).save(picture.with_name(f"{picture.stem}_classes.png"))
            Image.fromarray(ids).save(picture.with_name(f"{picture.stem}_ids.png"))
    if classified:
        write_json(output / "image_scores.json", classified)
        print(f"{len(files)} pictures, their classes and where these are seen (NAME_cam.png): {output}")
        return
    write_results(output / "predictions.json", rows)
    if segments:
        write_results(output / "segments.json", segments)
    print(f"{len(files)} pictures, {sum(r['score'] >= config.min_score for r in rows)} objects with a score of {config.min_score} or more: {output}")
