"""Draws what a model finds in images, and writes it as COCO results (predictions.json).

For models that cut images into segments or label pixels also NAME_segments.png, segments.json,
NAME_classes.png and NAME_ids.png.

  python tools/predict.py checkpoint=runs/scenes_r18/TIME input=photo.jpg output=DIR
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR
  python tools/predict.py checkpoint=best.pt input='FOLDER/*.png' output=DIR min_score=0.7
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR trainer.device=cpu
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR \\
      model.classifier.nms_threshold=0.4

Other keys: those of the checkpoint's own config (config.yaml beside it).
"""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import build_predictor, checkpoint_argument, trained_model
from maskseg.engine.run_folder import make_folder
from maskseg.evaluation.coco_results import Row, detection_rows, segment_rows, write_results
from maskseg.files import write_json
from maskseg.inference.image_folder import (
    detection_overlay,
    image_files,
    segment_overlay,
    semantic_overlay,
)
from maskseg.inference.predictor import Predictor, original_classes, original_segments
from maskseg.structures import Batch, FeatureSpec, Outputs
from maskseg.visualization.cam import cam_overlay, score_row


def main(arguments: list[str]) -> None:
    """Entry point of `tools/predict.py`."""
    predict(arguments)


def predict(arguments: list[str]) -> None:
    """Write the predictions of a model for each image into `output`.

    predictions.json: COCO results; `image_id` numbers the images from 1, `file_name` names them.
    NAME.png: the image with its detections.
    Models with segments: NAME_segments.png and segments.json (without classes; the score is the
        share of the image).
    Models that label pixels: NAME_classes.png (with a legend) and NAME_ids.png (category ids,
        65535 for none).
    Image classifiers: NAME_cam.png and image_scores.json instead of all of these.
    Raises UserError.
    """
    path = checkpoint_argument(arguments, "predict")
    model, config, categories = trained_model(path, arguments, "predict")
    configs.require_keys(config, "input")
    predictor = build_predictor(model, config, categories, config.trainer.device)
    files = [file.absolute() for file in image_files(config.input)]
    output = make_folder(Path(config.output))
    results = _Results(predictor, config.min_score)
    root = Path(os.path.commonpath([file.parent for file in files]))
    for image_id, file in enumerate(tqdm(files, desc="predicting", disable=None), start=1):
        suffix = "" if file.suffix == ".png" else file.suffix
        overlay = output / file.parent.relative_to(root) / f"{file.stem}{suffix}.png"
        overlay.parent.mkdir(parents=True, exist_ok=True)
        results.add(file, image_id, overlay)
    results.write(output)
    print(f"{len(files)} images, {results.summary()}: {output}")


class _Results:
    """The predictions of all images. min_score: of the detections that are drawn."""

    def __init__(self, predictor: Predictor, min_score: float) -> None:
        self.predictor = predictor
        self.categories = predictor.categories
        self.min_score = min_score
        self.detections: list[Row] = []
        self.segments: list[Row] = []
        self.image_scores: list[Row] = []

    def add(self, file: Path, image_id: int, overlay: Path) -> None:
        """Predict an image and draw the results; `overlay` is the path of its first drawing."""
        pixels = self.predictor.prepare.read(file)
        batch, outputs = self.predictor.outputs(pixels, image_id, file.name)
        if outputs.image_scores is not None:
            self._add_image_scores(file, pixels, batch, outputs, overlay)
            return
        rows = detection_rows(batch, outputs, self.categories)
        self.detections += [{**row, "file_name": str(file)} for row in rows]
        drawing = detection_overlay(pixels, rows, self.categories, self.min_score)
        Image.fromarray(drawing).save(overlay)
        segments = original_segments(batch, outputs)
        if segments is not None:
            rows = segment_rows(image_id, segments)
            self.segments += [{**row, "file_name": str(file)} for row in rows]
            drawing = segment_overlay(pixels, segments)
            Image.fromarray(drawing).save(_with_suffix(overlay, "segments"))
        classes = original_classes(batch, outputs)
        if classes is not None:
            drawing, ids = semantic_overlay(pixels, classes, self.categories)
            Image.fromarray(drawing).save(_with_suffix(overlay, "classes"))
            Image.fromarray(ids).save(_with_suffix(overlay, "ids"))

    def _add_image_scores(
        self, file: Path, pixels: Tensor, batch: Batch, outputs: Outputs, overlay: Path
    ) -> None:
        scores = score_row(outputs, 0, self.categories)
        self.image_scores.append({"image_id": batch.image_ids[0], "file_name": str(file), **scores})
        level = getattr(self.predictor.model, "level", None)
        assert isinstance(level, FeatureSpec)  # every image classifier has one
        drawing = cam_overlay(pixels, batch, outputs, level, self.categories)
        Image.fromarray(drawing).save(_with_suffix(overlay, "cam"))

    def write(self, output: Path) -> None:
        """Write the JSON files. Raises UserError."""
        if self.image_scores:
            write_json(output / "image_scores.json", self.image_scores)
            return
        write_results(output / "predictions.json", self.detections)
        if self.segments:
            write_results(output / "segments.json", self.segments)

    def summary(self) -> str:
        """What was found, for the console."""
        if self.image_scores:
            return "their classes and class activation maps (NAME_cam.png)"
        count = sum(row["score"] >= self.min_score for row in self.detections)
        return f"{count} objects with a score of {self.min_score} or more"


def _with_suffix(overlay: Path, name: str) -> Path:
    return overlay.with_name(f"{overlay.stem}_{name}.png")
