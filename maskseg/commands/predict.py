"""Draws what a model finds in images, and writes it as COCO results (predictions.json).

For models that cut images into segments or label pixels also NAME_segments.png, segments.json,
NAME_classes.png and NAME_ids.png. No file is replaced, but earlier results with overwrite=true.
Images that cannot be read are skipped and reported at the end, with exit code 2.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import build_predictor, checkpoint_argument, trained_model
from maskseg.engine.run_folder import make_folder
from maskseg.errors import UserError, join_lines, warn_if_not_drawn
from maskseg.evaluation.coco_results import Row, write_results
from maskseg.files import write_json
from maskseg.files.outputs import (
    check_no_run,
    check_outputs,
    find_free_name,
    make_unique,
    record_outputs,
)
from maskseg.inference.image_folder import category_id_map, image_files
from maskseg.inference.prediction import to_rgb_array
from maskseg.inference.predictor import Predictor
from maskseg.structures import Batch, FeatureSpec, Outputs
from maskseg.visualization.cam import cam_overlay, score_row

_RESULT_FILES = ("predictions.json", "segments.json", "image_scores.json")
_DRAWINGS = ("segments", "classes", "ids", "cam")  # NAME_segments.png ...
_MAX_NAMED = 5  # images in a message


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
    Raises UserError; for images that cannot be read, when the others have been written.
    """
    path = checkpoint_argument(arguments, "predict")
    model, config, categories = trained_model(path, arguments, "predict")
    configs.require_keys(config, "input")
    predictor = build_predictor(model, config, categories, config.trainer.device)
    files = [file.absolute() for file in image_files(config.input)]
    output = find_free_name(Path("predictions")) if config.output is None else Path(config.output)
    overlays = _overlay_paths(files, output)
    paths = _output_paths(output, overlays)
    check_no_run(output)
    check_outputs(paths, files, tool="predict", overwrite=config.overwrite)
    make_folder(output, "output")
    results = _Results(predictor, config.min_score)
    with record_outputs(paths, "predict", config.overwrite, output):
        _predict_images(results, files, overlays, output)


def _predict_images(
    results: _Results, files: Sequence[Path], overlays: Sequence[Path], output: Path
) -> None:
    """Predict and write. Raises UserError at the end for images that cannot be read."""
    unreadable = []
    progress = tqdm(zip(files, overlays, strict=True), "predicting", len(files), disable=None)
    for image_id, (file, overlay) in enumerate(progress, start=1):
        try:
            results.add(file, image_id, overlay)
        except (UserError, MemoryError, torch.OutOfMemoryError) as error:
            message = _describe(file, error)
            unreadable.append(message)
            tqdm.write(f"warning: image skipped: {message}")
    if len(unreadable) == len(files):
        raise UserError(f"no image could be predicted: {_join(unreadable)}")
    results.write(output)
    print(f"{len(files) - len(unreadable)} images, {results.summary()}: {output}", flush=True)
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(files)} images could not be predicted, the others are in "
            f"{output}: {_join(unreadable)}"
        )


def _overlay_paths(files: Sequence[Path], output: Path) -> list[Path]:
    """The path of the first drawing of each image, in the folders of the images."""
    root = Path(os.path.commonpath([file.parent for file in files]))
    names = []
    for file in files:
        suffix = "" if file.suffix == ".png" else file.suffix
        names.append(str(file.parent.relative_to(root) / f"{file.stem}{suffix}"))
    endings = [".png", *(f"_{kind}.png" for kind in _DRAWINGS)]
    return [output / f"{name}.png" for name in make_unique(names, endings)]


def _output_paths(output: Path, overlays: Sequence[Path]) -> list[Path]:
    """All files that may be written."""
    paths = [output / name for name in _RESULT_FILES]
    for overlay in overlays:
        paths += [overlay, *(_with_suffix(overlay, kind) for kind in _DRAWINGS)]
    return paths


def _describe(file: Path, error: BaseException) -> str:
    """Why an image could not be predicted, in one line that names it."""
    reason = join_lines(error)
    message = reason if str(file) in reason else f"{file}: {reason or 'not enough memory'}"
    if file.name.startswith("._"):
        message += " (macOS keeps metadata in files of such names; it can be deleted)"
    return message


def _join(messages: Sequence[str]) -> str:
    """The first messages, separated by semicolons."""
    text = "; ".join(messages[:_MAX_NAMED])
    if len(messages) > _MAX_NAMED:
        text += f" and {len(messages) - _MAX_NAMED} more"
    return text


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
        prediction = self.predictor.convert(batch, outputs, source=to_rgb_array(pixels))
        name = {"file_name": str(file)}
        self.detections += [row | name for row in prediction.to_coco(image_id)]
        with _drawing(file, overlay) as path:
            prediction.plot(min_score=self.min_score).save(path)
        if prediction.segment_regions is not None:
            self.segments += [row | name for row in prediction.segments_to_coco(image_id)]
            with _drawing(file, overlay, "segments") as path:
                prediction.plot("segments").save(path)
        if prediction.classes is not None:
            with _drawing(file, overlay, "ids") as path:
                Image.fromarray(category_id_map(prediction.classes, self.categories)).save(path)
            with _drawing(file, overlay, "classes") as path:
                prediction.plot("classes").save(path)

    def _add_image_scores(
        self, file: Path, pixels: Tensor, batch: Batch, outputs: Outputs, overlay: Path
    ) -> None:
        scores = score_row(outputs, 0, self.categories)
        self.image_scores.append({"image_id": batch.image_ids[0], "file_name": str(file), **scores})
        level = getattr(self.predictor.model, "level", None)
        assert isinstance(level, FeatureSpec)  # every image classifier has one
        with _drawing(file, overlay, "cam") as path:
            drawing = cam_overlay(pixels, batch, outputs, level, self.categories)
            Image.fromarray(drawing).save(path)

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
        return f"{count} objects with a score of {self.min_score:.4g} or more"


@contextmanager
def _drawing(file: Path, overlay: Path, kind: str = "") -> Iterator[Path]:
    """Yield the path of a drawing, in a folder that exists; a failure to draw is a warning."""
    path = _with_suffix(overlay, kind) if kind else overlay
    with warn_if_not_drawn(f"{file}: {path.name}", tqdm.write):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path


def _with_suffix(overlay: Path, name: str) -> Path:
    return overlay.with_name(f"{overlay.stem}_{name}.png")
