"""Suite `scaling`: growth of time and memory.

The axes are the image size and the numbers of detections, objects, classes and loader processes.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import log
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg import config as configs
from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import Axis, Point, ScalingResult, Slopes
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.engine.precision import pick_device
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.models.box_head import BoxHead
from maskseg.models.fuse import for_inference
from maskseg.models.layers.conv_norm import channels_last
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.rpn import RPN, RPNHead
from maskseg.structures import Batch, Categories, Features, Regions, Targets

SIZES = (256, 362, 512, 724, 1024)  # shorter side, pixels
DETECTIONS = (12, 25, 50, 100, 200, 400)
OBJECTS = (1, 4, 12, 50, 100, 200, 400)
CLASSES = (1, 10, 80, 365, 1203)  # the last three are COCO's, Objects365's and LVIS'
WORKERS = (0, 1, 2, 4)
_LOADER_IMAGES = 240  # per round
_LVIS = {"score_threshold": 1e-4, "max_detections": 300}  # as in the LVIS evaluation
_COMPONENTS = 8  # principal components of the region features that scores and deltas depend on

Runs = Mapping[int, Callable[[], object]]  # functions to time, by the value of the axis


def scaling(config: Config) -> ScalingResult:
    """Time Mask R-CNNs and the data loader along several axes.

    The models have the body `config.trunk` and random weights. Their input is noise with a shorter
    side of `config.size` pixels. Predictions end with RLE, training steps with gradients. The
    loader is that of the training split of `config.data`.

    Returns axes, each with its points (value, median seconds, memory_mb) and the slopes of both.
    Raises UserError.
    """
    if config.size < 32 or config.rounds < 1:
        raise UserError(
            f"size must be at least 32 and rounds at least 1, not {config.size} and {config.rounds}"
        )
    device = pick_device(config.trainer.device)
    size = int(config.size)
    image = _noise_image(size).to(device)
    build = partial(_model, config.trunk, image)
    coco = for_inference(build(80))
    training = _prepare_training(build(80))
    sizes = {value: partial(_predict, coco, _noise_image(value).to(device)) for value in SIZES}
    detections = {
        value: partial(_predict, coco, image, score_threshold=1e-3, max_detections=value)
        for value in DETECTIONS
    }
    objects = {
        value: partial(_step, training, _with_objects(image, value, 80)) for value in OBJECTS
    }
    rounds = config.rounds
    size_label = "shorter side, pixels (work: its square)"
    axes = [
        _axis("image size", size_label, sizes, rounds, device),
        _axis("detections", "detections kept per image", detections, rounds, device),
        _axis("objects, training step", "objects in the image", objects, rounds, device),
    ]
    # The models of an axis are freed before those of the next one are built.
    del coco, training, sizes, detections, objects
    predictions = {
        value: partial(_predict, for_inference(build(value)), image, **_LVIS) for value in CLASSES
    }
    axes.append(_axis("classes", "classes", predictions, rounds, device))
    del predictions
    steps = {
        value: partial(_step, _prepare_training(build(value)), _with_objects(image, 12, value))
        for value in CLASSES
    }
    axes.append(_axis("classes, training step", "classes", steps, rounds, device))
    del steps
    axes.append(_loader_axis(config))
    return {
        "suite": "scaling",
        "machine": machine(device),
        "about": f"{config.trunk}, {size} px",
        "axes": axes,
    }


def slope(values: Sequence[float], numbers: Sequence[float]) -> float | None:
    """Fit the exponent p of the power law number = c * value^p.

    The fit is least squares of the logarithms, for the upper half of the values. Returns None if
    fewer than two of those points are positive.
    """
    start = (len(values) - 1) // 2
    x = []
    y = []
    for value, number in zip(values[start:], numbers[start:], strict=True):
        if value > 0 and number > 0:
            x.append(log(value))
            y.append(log(number))
    if len(x) < 2:
        return None
    return float(np.polyfit(x, y, 1)[0])


def _axis(name: str, label: str, runs: Runs, rounds: int, device: torch.device) -> Axis:
    result = case(name, {str(value): run for value, run in runs.items()}, rounds, device)
    points: list[Point] = []
    for value in runs:
        seconds = result["seconds"][str(value)]
        memory = result["memory_mb"][str(value)]
        points.append({"value": value, "seconds": seconds, "memory_mb": memory})
    return _with_slopes(name, label, points)


def _with_slopes(name: str, label: str, points: list[Point]) -> Axis:
    values = [p["value"] for p in points]
    slopes: Slopes = {
        "seconds": slope(values, [p["seconds"] for p in points]),
        "memory_mb": slope(values, [p["memory_mb"] for p in points]),
    }
    return {"name": name, "label": label, "points": points, "slope": slopes}


def _noise_image(size: int) -> Batch:
    """Return one image of size x 4/3 size, noise with structures of all scales."""
    generator = torch.Generator().manual_seed(0)
    height = size
    width = round(size * 4 / 3)
    octaves = []
    for scale in (128, 32, 8, 2):
        shape = (1, 3, max(height // scale, 1), max(width // scale, 1))
        octave = torch.rand(shape, generator=generator)
        octaves.append(F.interpolate(octave, (height, width), mode="bilinear"))
    image = torch.stack(octaves).mean(dim=0)
    bottom = -height % 32
    right = -width % 32
    pixels = F.pad((image * 255).to(torch.uint8), (0, right, 0, bottom))
    frame = torch.tensor([[height, width]])
    return Batch(pixels, frame, frame, [0], ["noise"])


def _with_objects(batch: Batch, number: int, classes: int) -> Batch:
    """Add ground truth: `number` polygons of twelve points, 12 to 96 pixels wide."""
    rng = np.random.default_rng(number)
    height, width = (int(v) for v in batch.sizes[0])
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    scale = np.exp(rng.uniform(np.log(6), np.log(min(48, height / 3)), (number, 1)))
    radii = scale * rng.uniform(0.7, 1.0, (number, 12))
    margin = radii.max(axis=1, keepdims=True)
    center = rng.uniform(0, 1, (number, 2)) * (np.array([width, height]) - 2 * margin) + margin
    points = center[:, None] + radii[..., None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    masks = AnnotatedMasks.from_file([Polygons((p,)) for p in points], height, width)
    labels = torch.from_numpy(rng.integers(classes, size=number))
    zeros = torch.zeros(number, dtype=torch.int64)
    targets = Targets(masks.boxes(), labels, zeros, zeros.bool(), masks).to(batch.images.device)
    return Batch(
        batch.images, batch.sizes, batch.original_sizes, batch.image_ids, batch.file_names, targets
    )


@torch.no_grad()
def _model(trunk: str, batch: Batch, classes: int) -> GeneralizedRCNN:
    """Build a Mask R-CNN whose random scores and boxes vary within the image of `batch`."""
    torch.manual_seed(0)
    config = configs.compose(
        "train", ["experiment=coco_r50_fpn_1x", f"model.backbone.trunk.name={trunk}"]
    )
    configs.set_categories(
        config, Categories(tuple(map(str, range(classes))), tuple(range(classes)))
    )
    model = configs.build_model(config, pretrained=False).to(batch.images.device).eval()
    assert isinstance(model, GeneralizedRCNN)
    assert isinstance(model.proposer, RPN)
    assert isinstance(model.proposer.head, RPNHead)
    assert isinstance(model.classifier, BoxHead)
    features = model.features(batch)
    _vary_proposals(model.proposer.head, features["p4"])
    proposals, _ = model.proposer(features, batch)
    _vary_detections(model.classifier, features, proposals)
    return model


def _vary_proposals(head: RPNHead, feature: Tensor) -> None:
    """Scale the weights so that scores and boxes vary, given the features of one level."""
    logits, deltas = head(feature)
    head.objectness.weight *= 2 / logits.std()
    head.deltas.weight *= 0.2 / deltas.std()


def _vary_detections(box: BoxHead, features: Features, proposals: Regions) -> None:
    """Make the scores and deltas of an image's proposals vary.

    They become random combinations of the principal components of the region features.
    """
    x = box.mlp(box.pooler(features, proposals.boxes, proposals.image_index))
    mean = x.mean(dim=0)
    _, size, directions = torch.linalg.svd(x - mean, full_matrices=False)
    read = directions[:_COMPONENTS] * ((len(x) / _COMPONENTS) ** 0.5 / size[:_COMPONENTS, None])
    for layer, deviation in ((box.cls_score, 3.0), (box.bbox_pred, 0.5)):
        layer.weight.copy_(
            deviation * torch.randn((len(layer.weight), len(read)), device=x.device) @ read
        )
        layer.bias.copy_(-(layer.weight @ mean))
    box.cls_score.bias[-1] += 5.0  # most regions are background


def _prepare_training(model: GeneralizedRCNN) -> GeneralizedRCNN:
    return channels_last(model).train()


@torch.no_grad()
def _predict(model: GeneralizedRCNN, batch: Batch, **settings: float) -> int:
    """Predict detections with RLE masks. settings: of the classifier. Returns their number."""
    for name, value in settings.items():
        setattr(model.classifier, name, value)
    masks = model.predict(batch).detections.masks
    return 0 if masks is None else len(masks.to_rle())


def _step(model: GeneralizedRCNN, batch: Batch) -> None:
    model.zero_grad(set_to_none=True)
    losses: list[Tensor] = list(model(batch).values())
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)  # gradients would count as in use before the next run


def _loader_axis(config: Config) -> Axis:
    """Time per image from the second batch on, when all processes work, and their memory."""
    source = open_data(config)
    if "train" not in source.splits():
        raise UserError("data.train_json is not set: there is nothing to load")
    number = max(8, _LOADER_IMAGES // config.batch_size)
    points: list[Point] = []
    for workers in WORKERS:
        config.data.num_workers = workers
        loader = partial(open_data(config).train_loader, config.batch_size, number, config.seed)
        times = sorted(_seconds_per_image(loader()) for _ in range(config.rounds))
        seconds = times[config.rounds // 2]
        points.append({"value": workers, "seconds": seconds, "memory_mb": _memory(loader())})
    return _with_slopes("loader processes, an image", "loader processes", points)


def _seconds_per_image(batches: Iterable[Batch]) -> float:
    iterator = iter(batches)
    images = 0
    next(iterator)
    start = time.perf_counter()
    for batch in iterator:
        images += len(batch)
    return (time.perf_counter() - start) / images


def _memory(batches: Iterable[Batch]) -> float:
    """Private memory of the loader processes in megabytes, 0 without any; Linux only."""
    peak = 0.0
    for k, _ in enumerate(batches):
        if k % 8 == 4:
            workers = multiprocessing.active_children()
            peak = max(peak, sum(_private_memory(worker.pid) for worker in workers))
    return peak


def _private_memory(process: int | None) -> float:
    file = Path(f"/proc/{process}/smaps_rollup")
    lines = file.read_text().splitlines() if file.is_file() else []
    return sum(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Private_"))
