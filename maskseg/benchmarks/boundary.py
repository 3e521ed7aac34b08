"""Suite `boundary`: how much masking the pixels changes the features inside a segment.

It also draws the steps of convolutional feature masking (CFM).
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from maskseg import config as configs
from maskseg.benchmarks.measure import machine
from maskseg.benchmarks.results import Machine
from maskseg.config import Config
from maskseg.config.restore import open_data, single_image, trained_model
from maskseg.data.datasets.coco_segments import CocoSegments
from maskseg.engine.precision import pick_device
from maskseg.errors import UserError
from maskseg.files.outputs import check_outputs
from maskseg.masks.superpixel import SegmentMasks
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.structures import Batch, Categories, Features, Regions
from maskseg.variants.cfm.boundary import (
    BoundaryStudy,
    draw_boundary_study,
    plot_boundary,
    relative_differences,
)
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.pictures import FeatureMap, draw_steps
from maskseg.visualization.layout import save_image

MIN_AREA = 0.01  # of the image: smaller segments are dropped
DRAWN_IMAGES = 4
DRAWN_SEGMENTS = 3  # per image, whose steps are drawn: the largest of the best TOP_SEGMENTS
TOP_SEGMENTS = 20


class BoundaryResult(TypedDict):
    """The mean differences by level and distance, and the number of segments."""

    suite: str
    machine: Machine
    segments: int
    difference: dict[str, dict[str, float | None]]


@torch.no_grad()
def boundary(config: Config, images: int = 20) -> BoundaryResult:
    """Measure relative feature differences by the distance to the segment's border.

    Args:
        config: with `data`, `output`, and the network: `trainer.init` (a trained model), else
            `model` with initial weights. With output FILE.json, FILE.png is the curve, FILE_001.png
            shows the differences of a segment of median size, FILE_001_1.png the steps of CFM.
        images: number of validation images, whose ground-truth segments are used.

    Raises UserError.
    """
    stem = _output_stem(config)
    config.data.val_segments = None  # proposals are computed from the pixels
    source = open_data(config)
    model, model_config, categories = _model(config, source.categories)
    device = pick_device(config.trainer.device)
    model = for_inference(model.to(device))
    prepare = single_image(model_config)
    data = CocoSegments(source)
    classifier = model.classifier if isinstance(model.classifier, CFMClassifier) else None
    levels = model.backbone.levels if classifier is None else classifier.feature_specs
    study = BoundaryStudy()
    num_segments = 0
    for index in tqdm(range(min(images, len(data.names("val")))), desc="images", disable=None):
        batch = prepare(data.image("val", index)).to(device)
        masks = _segments(data.ground_truths("val", index)[0], batch)
        features = model.features(batch)
        differences = [relative_differences(model, batch, inside, features) for inside in masks]
        for difference, inside in zip(differences, masks, strict=True):
            study.add(difference, inside, levels)
        num_segments += len(masks)
        if stem is None or index >= DRAWN_IMAGES:
            continue
        name = f"{stem}_{index + 1:03d}"
        if masks:
            middle = len(masks) // 2  # the segment of median size
            mean = model.pixel_mean.flatten().tolist()
            drawing = draw_boundary_study(
                _pixels(batch), masks[middle].numpy(), mean, differences[middle], levels
            )
            save_image(drawing, f"{name}.png")
        if classifier is not None:
            drawings = _draw_steps(model, classifier, batch, features, categories)
            for k, steps in enumerate(drawings, start=1):
                save_image(steps, f"{name}_{k}.png")
    if not num_segments:
        raise UserError(
            f"no segment of the first {images} validation images covers at least "
            f"{MIN_AREA:.0%} of its image"
        )
    numbers = study.means()
    if stem is not None:
        save_image(plot_boundary(numbers), f"{stem}.png")
    return {
        "suite": "boundary",
        "machine": machine(device),
        "segments": num_segments,
        "difference": numbers,
    }


def _output_stem(config: Config) -> Path | None:
    """The path of the pictures without number and suffix; None without an output.

    Raises UserError if numbered pictures of another run are there.
    """
    if not config.output:
        return None
    stem = Path(config.output).with_suffix("")
    check_outputs(sorted(stem.parent.glob(f"{glob.escape(stem.name)}_[0-9]*.png")))
    return stem


def _model(config: Config, categories: Categories) -> tuple[GeneralizedRCNN, Config, Categories]:
    """Return the network, the config with its preprocessing, and its classes. Raises UserError."""
    if config.trainer.init:
        model, config, categories = trained_model(Path(config.trainer.init), [], "predict")
    else:
        configs.set_categories(config, categories)
        torch.manual_seed(config.seed)
        model = configs.build_model(config)
    if not isinstance(model, GeneralizedRCNN):
        raise UserError(
            "the suite boundary needs the backbone of a model that detects objects: "
            "set experiment=scenes_cfm, or trainer.init=RUN of one"
        )
    return model.eval(), config, categories


def _segments(truth: NDArray[np.integer], batch: Batch) -> list[Tensor]:
    """Resize a segment map [H0, W0] to the network's input and split it into bool [H, W] masks.

    The largest segment comes first. Small segments and a segment of the whole image are dropped.
    """
    height, width = batch.sizes[0].tolist()
    resized = AxisAlignedTransform.resize(truth.shape[0], truth.shape[1], height, width).sample(
        truth, -1
    )
    labels, counts = np.unique(resized[resized >= 0], return_counts=True)
    order = [
        k
        for k in np.argsort(-counts, kind="stable")
        if MIN_AREA * resized.size <= counts[k] < resized.size
    ]
    return [torch.from_numpy(resized == labels[k]) for k in order]


def _pixels(batch: Batch) -> NDArray[np.uint8]:
    """Return the network's input image of a batch of one, uint8 RGB [H, W, 3]."""
    height, width = batch.sizes[0].tolist()
    return np.ascontiguousarray(batch.images[0, :, :height, :width].permute(1, 2, 0).cpu().numpy())


def _draw_steps(
    model: GeneralizedRCNN,
    classifier: CFMClassifier,
    batch: Batch,
    features: Features,
    categories: Categories,
) -> list[NDArray[np.uint8]]:
    """Draw the largest of the best detections; without detections, of the best proposals."""
    proposals, _ = model.proposer(features, batch)
    detections = classifier.predict(features, proposals, batch.sizes)
    classes = model.build_outputs(features, proposals, batch).semantic["classes"][0]
    height, width = batch.sizes[0].tolist()
    drawings = []
    shown: Regions = detections if len(detections) else proposals
    shown = shown[torch.arange(min(TOP_SEGMENTS, len(shown)))]
    assert shown.masks is not None
    for row in shown.masks.area().argsort(descending=True, stable=True)[:DRAWN_SEGMENTS]:
        segment = shown[row[None]]
        assert isinstance(segment.masks, SegmentMasks)
        name = list(classifier.feature_specs)[int(classifier.assign_levels(segment.boxes))]
        feature = features[name][0]
        spec = classifier.feature_specs[name]
        shape = (feature.shape[1], feature.shape[2])
        cells = classifier.project_masks(segment.masks, shape, spec)[0]
        # A column for pixels outside any superpixel, whose label is -1.
        members = torch.nn.functional.pad(segment.masks.members[0], (0, 1))
        inside = members[torch.from_numpy(segment.masks.maps[0]).long()].numpy()
        title = ""
        if segment.labels is not None:
            title = f"{categories.names[int(segment.labels)]} {float(segment.scores):.2f}"
        labels = classes[:height, :width].cpu().numpy()
        drawings.append(
            draw_steps(
                _pixels(batch),
                inside[:height, :width],
                cells,
                FeatureMap(feature, spec, name),
                labels,
                categories.names,
                title,
            )
        )
    return drawings
