"""Draws what a model finds in pictures, and writes it as COCO results (predictions.json); of models that cut pictures into segments or label pixels
also those (NAME_segments.png, segments.json; NAME_classes.png, NAME_ids.png).

  python tools/predict.py checkpoint=runs/scenes_r18/TIME input=photo.jpg output=DIR
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR
  python tools/predict.py checkpoint=best.pt input='FOLDER/*.png' output=DIR min_score=0.7
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR trainer.device=cpu
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR model.classifier.nms_threshold=0.4

Other keys: those of the checkpoint's own config (config.yaml beside it).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from PIL import Image
from tqdm import tqdm

from maskseg import config as configs
from maskseg.annotation.classifier import ImageClassifier
from maskseg.config.restore import _predictor, checkpoint_word, trained_model
from maskseg.engine.run_folder import made_folder
from maskseg.evaluation.coco_results import detection_rows, segment_rows, write_results
from maskseg.files import write_json
from maskseg.inference.image_folder import class_pictures, image_files, overlay, segment_overlay
from maskseg.inference.predictor import original_classes, original_segments
from maskseg.visualization.cam import cam_overlay, score_row


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
        picture = (
            output
            / file.parent.relative_to(top)
            / f"{file.stem}{'' if file.suffix == '.png' else file.suffix}.png"
        )
        picture.parent.mkdir(parents=True, exist_ok=True)
        if outputs.image_scores is not None:
            classified.append(
                {"image_id": i, "file_name": str(file), **score_row(outputs, 0, categories)}
            )
            level = cast(ImageClassifier, predictor.model).level
            Image.fromarray(cam_overlay(pixels, batch, outputs, level, categories)).save(
                picture.with_name(f"{picture.stem}_cam.png")
            )
            continue
        found = detection_rows(batch, outputs, categories)
        rows += [{**row, "file_name": str(file)} for row in found]
        Image.fromarray(overlay(pixels, found, categories, config.min_score)).save(picture)
        own = original_segments(batch, outputs)
        if own is not None:
            segments += [{**row, "file_name": str(file)} for row in segment_rows(i, own)]
            Image.fromarray(segment_overlay(pixels, own)).save(
                picture.with_name(f"{picture.stem}_segments.png")
            )
        classes = original_classes(batch, outputs)
        if classes is not None:
            drawn, ids = class_pictures(pixels, classes, categories)
            Image.fromarray(drawn).save(picture.with_name(f"{picture.stem}_classes.png"))
            Image.fromarray(ids).save(picture.with_name(f"{picture.stem}_ids.png"))
    if classified:
        write_json(output / "image_scores.json", classified)
        print(
            f"{len(files)} pictures, their classes and where these are seen (NAME_cam.png): {output}"
        )
        return
    write_results(output / "predictions.json", rows)
    if segments:
        write_results(output / "segments.json", segments)
    print(
        f"{len(files)} pictures, {sum(r['score'] >= config.min_score for r in rows)} objects with a score of {config.min_score} or more: {output}"
    )


def main(arguments: list[str]) -> None:
    """Entry point of `tools/predict.py`."""
    predict(arguments)
