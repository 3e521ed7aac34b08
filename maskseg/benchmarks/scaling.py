"""Suite `growth`: how time and memory grow with the size of an image, with detections, objects, classes and loader processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import log
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg import config as configs
from maskseg.benchmarks.measure import case, machine
from maskseg.config.restore import open_data
from maskseg.engine.precision import pick_device
from maskseg.errors import UserError
from maskseg.masks.annotated import FileMasks, Polygons
from maskseg.models.fuse import for_inference
from maskseg.models.layers.conv_norm import channels_last
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories, Targets

SIZES = (256, 362, 512, 724, 1024)  # shorter side, pixels
DETECTIONS = (12, 25, 50, 100, 200, 400)
OBJECTS = (1, 4, 12, 50, 100, 200, 400)
CLASSES = (1, 10, 80, 365, 1203)  # the last three are COCO's, Objects365's and LVIS'
WORKERS = (0, 1, 2, 4)
_IMAGES = 240  # that the loader gives in each round
_LVIS = {"score_threshold": 1e-4, "max_detections": 300}  # the rule of its evaluation
_DIRECTIONS = 8  # in which the features of regions differ most; scores and deltas read these

Things = Mapping[int, Callable[[], object]]


def scaling(config: Any) -> dict[str, Any]:
    """Mask R-CNNs with the trunk `config.trunk` and random weights on noise with a shorter side of `config.size` pixels, and the loader of the
    training split of `config.data`. Predictions end with RLE, training steps with gradients.

    -> axes, each with its points (value, median seconds, memory_mb) and the slopes of both. Raises UserError.
    """
    if config.size < 32 or config.rounds < 1:
        raise UserError(
            f"size must be at least 32 and rounds at least 1, not {config.size} and {config.rounds}"
        )
    device, size = pick_device(config.trainer.device), int(config.size)
    picture = _picture(size).to(device)
    common = partial(_model, config.trunk, picture)
    coco = _fast(common(80))
    learning = _learning(common(80))
    sizes = {value: partial(_predict, coco, _picture(value).to(device)) for value in SIZES}
    kept = {
        value: partial(_predict, coco, picture, score_threshold=1e-3, max_detections=value)
        for value in DETECTIONS
    }
    objects = {
        value: partial(_step, learning, _with_objects(picture, value, 80)) for value in OBJECTS
    }
    axes = [
        _axis(
            "image size", "shorter side, pixels (work: its square)", sizes, config.rounds, device
        ),
        _axis("detections", "detections kept of a picture", kept, config.rounds, device),
        _axis("objects, training step", "objects in the picture", objects, config.rounds, device),
    ]
    del coco, learning, sizes, kept, objects
    many = {value: partial(_predict, _fast(common(value)), picture, **_LVIS) for value in CLASSES}
    axes.append(_axis("classes", "classes", many, config.rounds, device))
    del many
    steps = {
        value: partial(_step, _learning(common(value)), _with_objects(picture, 12, value))
        for value in CLASSES
    }
    axes.append(_axis("classes, training step", "classes", steps, config.rounds, device))
    del steps
    axes.append(_loader_axis(config))
    return {
        "suite": "scaling",
        "machine": machine(device),
        "about": f"{config.trunk}, {size} px",
        "axes": axes,
    }


def slope(values: Sequence[float], numbers: Sequence[float]) -> float | None:
    """The exponent p of the power law number = c * value^p, a least-squares fit to the logarithms of the upper half of the values.

    None where fewer than two of its points are positive.
    """
    start = (len(values) - 1) // 2
    pairs = [
        (log(v), log(n))
        for v, n in zip(values[start:], numbers[start:], strict=True)
        if v > 0 and n > 0
    ]
    if len(pairs) < 2:
        return None
    x, y = np.array(pairs).T
    return float(np.polyfit(x, y, 1)[0])


def _axis(
    name: str, label: str, things: Things, rounds: int, device: torch.device
) -> dict[str, Any]:
    found = case(name, {str(value): thing for value, thing in things.items()}, rounds, device)
    points = [
        {"value": v, "seconds": found["seconds"][str(v)], "memory_mb": found["memory_mb"][str(v)]}
        for v in things
    ]
    return _with_slopes(name, label, points)


def _with_slopes(name: str, label: str, points: list[dict[str, float]]) -> dict[str, Any]:
    values = [p["value"] for p in points]
    slopes = {key: slope(values, [p[key] for p in points]) for key in ("seconds", "memory_mb")}
    return {"name": name, "label": label, "points": points, "slope": slopes}


def _picture(size: int) -> Batch:
    """One picture of size x 4/3 size, noise with structures of all sizes."""
    draw = torch.Generator().manual_seed(0)
    height, width = size, round(size * 4 / 3)
    octaves = [
        torch.rand((1, 3, max(height // s, 1), max(width // s, 1)), generator=draw)
        for s in (128, 32, 8, 2)
    ]
    image = torch.stack([F.interpolate(o, (height, width), mode="bilinear") for o in octaves]).mean(
        dim=0
    )
    bottom, right = -height % 32, -width % 32
    pixels = F.pad((image * 255).to(torch.uint8), (0, right, 0, bottom))
    frame = torch.tensor([[height, width]])
    return Batch(pixels, frame, frame, [0], ["noise"])


def _with_objects(batch: Batch, number: int, classes: int) -> Batch:
    """The picture with so many polygons of twelve points, 12 to 96 pixels wide, as truth."""
    random = np.random.default_rng(number)
    height, width = (int(v) for v in batch.sizes[0])
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radii = np.exp(
        random.uniform(np.log(6), np.log(min(48, height / 3)), (number, 1))
    ) * random.uniform(0.7, 1.0, (number, 12))
    middle = random.uniform(0, 1, (number, 2)) * (
        np.array([width, height]) - 2 * radii.max(axis=1, keepdims=True)
    ) + radii.max(axis=1, keepdims=True)
    points = middle[:, None] + radii[..., None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    masks = FileMasks.from_file([Polygons((p,)) for p in points], height, width)
    labels = torch.from_numpy(random.integers(classes, size=number))
    zeros = torch.zeros(number, dtype=torch.int64)
    targets = Targets(masks.boxes(), labels, zeros, zeros.bool(), masks).to(batch.images.device)
    return Batch(
        batch.images, batch.sizes, batch.original_sizes, batch.image_ids, batch.names, targets
    )


@torch.no_grad()
def _model(trunk: str, batch: Batch, classes: int) -> GeneralizedRCNN:
    """Mask R-CNN with random weights whose scores, of proposals and of classes, and whose boxes differ within the picture of `batch`."""
    torch.manual_seed(0)
    config = configs.compose(
        "train", ["experiment=coco_r50_fpn_1x", f"model.backbone.trunk.name={trunk}"]
    )
    configs.set_categories(
        config, Categories(tuple(map(str, range(classes))), tuple(range(classes)))
    )
    model = (
        cast(GeneralizedRCNN, configs.build_model(config, pretrained=False))
        .to(batch.images.device)
        .eval()
    )
    parts = cast(Any, model)
    features, rpn, box = model.features(batch), parts.proposer.head, parts.classifier
    logits, deltas = rpn(features["p4"])
    rpn.objectness.weight *= 2 / logits.std()
    rpn.deltas.weight *= 0.2 / deltas.std()
    proposals = parts.proposer(features, batch)[0]
    x = box.trunk(box.pooler(features, proposals.boxes, proposals.image_index))
    middle = x.mean(dim=0)
    _, size, directions = torch.linalg.svd(x - middle, full_matrices=False)
    read = directions[:_DIRECTIONS] * ((len(x) / _DIRECTIONS) ** 0.5 / size[:_DIRECTIONS, None])
    for layer, deviation in ((box.scores, 3.0), (box.deltas, 0.5)):
        layer.weight.copy_(
            deviation * torch.randn((len(layer.weight), len(read)), device=x.device) @ read
        )
        layer.bias.copy_(-(layer.weight @ middle))
    box.scores.bias[-1] += 5.0  # most regions are background
    return model


def _fast(model: GeneralizedRCNN) -> GeneralizedRCNN:
    return for_inference(model)


def _learning(model: GeneralizedRCNN) -> GeneralizedRCNN:
    return channels_last(model).train()


@torch.no_grad()
def _predict(model: GeneralizedRCNN, batch: Batch, **settings: float) -> int:
    """A picture to detections with RLE; settings: of the classifier. -> how many there are."""
    for name, value in settings.items():
        setattr(model.classifier, name, value)
    masks = model.predict(batch).detections.masks
    return 0 if masks is None else len(masks.to_rle())


def _step(model: GeneralizedRCNN, batch: Batch) -> None:
    model.zero_grad(set_to_none=True)
    losses: list[Tensor] = list(model(batch).values())
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)  # gradients would count as held before the next thing


def _loader_axis(config: Any) -> dict[str, Any]:
    """Seconds an image from the second batch on, while all processes work; memory of the loader processes."""
    source = open_data(config)
    if "train" not in source.splits():
        raise UserError("data.train_json is not set: there is nothing to load")
    number, points = max(8, _IMAGES // config.total_batch), []
    for workers in WORKERS:
        source.num_workers = workers
        loader = partial(source.train_loader, config.total_batch, number, config.seed)
        seconds = sorted(_seconds_an_image(loader()) for _ in range(config.rounds))[
            config.rounds // 2
        ]
        points.append({"value": workers, "seconds": seconds, "memory_mb": _memory(loader())})
    return _with_slopes("loader processes, an image", "loader processes", points)


def _seconds_an_image(batches: Iterable[Batch]) -> float:
    iterator, images = iter(batches), 0
    next(iterator)
    start = time.perf_counter()
    for batch in iterator:
        images += len(batch)
    return (time.perf_counter() - start) / images


def _memory(batches: Iterable[Batch]) -> float:
    """Megabytes that the loader processes have for themselves in the middle of the work, 0 without any; Linux only."""
    most = 0.0
    for k, _ in enumerate(batches):
        if k % 8 == 4:
            most = max(
                most, sum(_private(child.pid) for child in multiprocessing.active_children())
            )
    return most


def _private(process: int | None) -> float:
    file = Path(f"/proc/{process}/smaps_rollup")
    lines = file.read_text().splitlines() if file.is_file() else []
    return sum(float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("Private_"))
