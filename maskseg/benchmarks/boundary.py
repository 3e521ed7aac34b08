"""Suite `boundary`: how far masked pixels change the features inside of a segment, and pictures of convolutional feature masking step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from maskseg import config as configs
from maskseg.benchmarks.measure import machine
from maskseg.config.restore import open_data, single_image, trained_model
from maskseg.data.datasets.coco_segments import CocoSegments
from maskseg.engine.precision import pick_device
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentMasks
from maskseg.models.fuse import for_inference
from maskseg.models.interfaces import Classifier, Proposer
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops.geometry import Geometry
from maskseg.structures import Batch, Categories, Features, FeatureSpec, Regions
from maskseg.variants.cfm.boundary import (
    BoundaryStudy,
    boundary_picture,
    differences,
    plot_boundary,
)
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.pictures import step_pictures
from maskseg.visualization.curves import save_picture

LEAST = 0.01  # of the image: smaller segments are left out
DRAWN, STEPS, BEST = (
    4,
    3,
    20,
)  # images of which there are pictures; segments of each whose steps are drawn, the largest of so many


@torch.no_grad()
def boundary(config: Any, images: int = 20) -> dict[str, Any]:
    """The first validation images of `config.data` and their true segments: relative differences of the features by the distance to the border.

    config: with `data` and, of the network, `trainer.init` (a trained model; else that of `model`, as it would begin its training), `output`. Where
    there is an output FILE.json, FILE.png is the curve, FILE_001.png the differences of a segment of middle size, FILE_001_1.png the steps of CFM.
    -> numbers by level and distance, and how many segments they are of. Raises UserError.
    """
    source = open_data(config)
    source.segments["val"] = None  # proposals are made of the pixels
    model, of_model, categories = _model(config, source.categories)
    device = pick_device(config.trainer.device)
    model = for_inference(model.to(device))
    prepare, data = single_image(of_model), CocoSegments(source)
    levels = cast(
        dict[str, FeatureSpec], getattr(model.classifier, "at", None) or model.backbone.levels
    )
    study, segments = BoundaryStudy(), 0
    stem = Path(config.output).with_suffix("") if config.output else None
    for index in tqdm(range(min(images, len(data.names("val")))), desc="images", disable=None):
        batch = prepare(data.image("val", index)).to(device)
        masks = _segments(data.truths("val", index)[0], batch)
        features = model.features(batch)
        for k, inside in enumerate(masks):
            difference = differences(model, batch, inside, features)
            study.add(difference, inside, levels)
            if stem is not None and k == len(masks) // 2 and index < DRAWN:
                mean = model.pixel_mean.flatten().tolist()
                picture = boundary_picture(_pixels(batch), inside.numpy(), mean, difference, levels)
                save_picture(picture, f"{stem}_{index + 1:03d}.png")
        if stem is not None and index < DRAWN and isinstance(model.classifier, CFMClassifier):
            for k, steps in enumerate(_steps(model, batch, features, categories), start=1):
                save_picture(steps, f"{stem}_{index + 1:03d}_{k}.png")
        segments += len(masks)
    if not segments:
        raise UserError(
            f"no segment of the first {images} validation images has at least {LEAST:.0%} of its image"
        )
    numbers = study.numbers()
    if stem is not None:
        save_picture(plot_boundary(numbers), f"{stem}.png")
    return {
        "suite": "boundary",
        "machine": machine(device),
        "segments": segments,
        "difference": numbers,
    }


def _model(config: Any, categories: Categories) -> tuple[GeneralizedRCNN, Any, Categories]:
    """The network, the config that says how it takes images, and its classes. Raises UserError."""
    if config.trainer.init:
        model, config, categories = trained_model(Path(config.trainer.init), [], "predict")
    else:
        configs.set_categories(config, categories)
        torch.manual_seed(config.seed)
        model = configs.build_model(config)
    if not isinstance(model, GeneralizedRCNN):
        raise UserError(
            "the suite boundary looks at the backbone of models that find objects: set experiment=scenes_cfm, or trainer.init=RUN of one"
        )
    return model.eval(), config, categories


def _segments(truth: NDArray[Any], batch: Batch) -> list[Tensor]:
    """The segments of a map [H0, W0] in the network's pixels, bool [H, W] each, the largest first; not those that are all of the image."""
    height, width = batch.sizes[0].tolist()
    seen = Geometry.resize(truth.shape[0], truth.shape[1], height, width).sample(truth, -1)
    labels, counts = np.unique(seen[seen >= 0], return_counts=True)
    order = [
        k for k in np.argsort(-counts, kind="stable") if LEAST * seen.size <= counts[k] < seen.size
    ]
    return [torch.from_numpy(seen == labels[k]) for k in order]


def _pixels(batch: Batch) -> NDArray[np.uint8]:
    """The image of a batch of one as the network sees it, uint8 RGB [H, W, 3]."""
    height, width = batch.sizes[0].tolist()
    return np.ascontiguousarray(batch.images[0, :, :height, :width].permute(1, 2, 0).cpu().numpy())


def _steps(
    model: GeneralizedRCNN, batch: Batch, features: Features, categories: Categories
) -> list[NDArray[np.uint8]]:
    """Pictures of the largest of the best segments that were classified; where there are none, of the best proposals."""
    classifier = cast(CFMClassifier, model.classifier)
    proposals, _ = cast(Proposer, model.proposer)(features, batch)
    found = cast(Classifier, classifier).predict(features, proposals, batch.sizes)
    classes = model._outputs(features, proposals, batch).semantic["classes"][0]
    height, width = batch.sizes[0].tolist()
    drawn = []
    shown: Regions = found if len(found) else proposals
    shown = shown[torch.arange(min(BEST, len(shown)))]
    assert shown.masks is not None
    for row in shown.masks.area().argsort(descending=True, stable=True)[:STEPS]:
        own = shown[row[None]]
        assert isinstance(own.masks, SegmentMasks)
        name = list(classifier.at)[int(classifier._assign(own.boxes))]
        feature, at = features[name][0], classifier.at[name]
        cells = classifier.projected(own.masks, (feature.shape[1], feature.shape[2]), at)[0]
        inside = torch.nn.functional.pad(own.masks.members[0], (0, 1))[
            torch.from_numpy(own.masks.maps[0]).long()
        ].numpy()
        told = (
            ""
            if own.labels is None
            else f"{categories.names[int(own.labels)]} {float(own.scores):.2f}"
        )
        labels = classes[:height, :width].cpu().numpy()
        drawn.append(
            step_pictures(
                _pixels(batch),
                inside[:height, :width],
                cells,
                feature,
                at,
                labels,
                categories.names,
                name,
                told,
            )
        )
    return drawn
