"""Suite `inference`: from images to pasted masks, for maskseg and torchvision's Mask R-CNN."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN
from torchvision.ops import box_iou

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import case, in_turn, machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.engine.precision import autocast, pick_device
from maskseg.masks.base import Rle
from maskseg.masks.predicted import MaskGrids
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops.paste import paste_crop
from maskseg.structures import Batch, Regions

_PARTS = (
    "backbone.trunk",
    "backbone",
    "proposer.head",
    "proposer",
    "classifier.pooler",
    "classifier.mlp",
    "heads.mask.pooler",
    "heads.mask",
)
# Channels and side of the convolutions that measure the machine's peak FLOP rate.
_CONVOLUTIONS = ((256, 128), (128, 128), (256, 64), (512, 32))


@torch.no_grad()
def inference(config: Config) -> SuiteResult:
    """Time Mask R-CNNs with the body `config.trunk` and equal weights.

    torchvision's model is compared with ours in fp32 and bf16, on `config.batch` images of the
    validation split of `config.data` with a shorter side of `config.size` pixels. Both end with
    masks in the image (ours as RLE), except in case `network`.

    Returns the cases; the share of each part in our time; and the floor: the time of the model's
    FLOPs at the rate of the machine's fastest convolution. Raises UserError.
    """
    device = pick_device(config.trainer.device)
    (batch,) = torchvision_model.batches(config, "val", 1)
    theirs, ours = torchvision_model.models(config.trunk, config.size)
    torchvision_model.center_scores(theirs, torchvision_model.torchvision_images(batch)[0])
    ours = torchvision_model.copy_weights(theirs, ours)
    theirs = theirs.to(device)
    fast = _prepare(ours, device, None)
    half = _prepare(ours, device, torch.bfloat16)
    batch = batch.to(device)
    images = torchvision_model.torchvision_images(batch)
    expected = theirs(images)
    detections = fast.predict(batch).detections
    rounded = half.predict(batch).detections
    per_image = len(detections) / len(batch)
    name = f"{config.trunk}, {len(batch)} x {config.size} px, {per_image:.0f} detections"
    whole = {
        "torchvision": lambda: theirs(images),
        "maskseg": lambda: _predict_rles(fast, batch),
        "maskseg bf16": lambda: _predict_rles(half, batch),
    }
    network: dict[str, Callable[[], object]] = {
        "torchvision": lambda: _predict_unpasted(theirs, images),
        "torchvision autocast bf16": lambda: _predict_unpasted(theirs, images, device),
        "maskseg": lambda: fast.predict(batch),
        "maskseg bf16": lambda: half.predict(batch),
    }
    agreement = {
        **_agreement(detections, expected, batch),
        "bf16, share of boxes at IoU 0.9": _matched_share(rounded, detections),
    }
    cases = [
        case(name, whole, config.rounds, device, agreement),
        case(f"{name}: network", network, config.rounds, device),
    ]
    also: dict[str, float | str] = {}
    also.update(_shares(fast, batch, config.rounds))
    also.update(_floor(fast, batch, cases[1]["seconds"]["maskseg"]))
    return {"suite": "inference", "machine": machine(device), "cases": cases, "also": also}


def _prepare(
    model: GeneralizedRCNN, device: torch.device, dtype: torch.dtype | None
) -> GeneralizedRCNN:
    return for_inference(model.to(device), dtype)


def _predict_rles(model: GeneralizedRCNN, batch: Batch) -> list[Rle]:
    """Predict, and encode the masks in their images as RLE."""
    masks = model.predict(batch).detections.masks
    return [] if masks is None else masks.to_rle()


def _predict_unpasted(
    theirs: MaskRCNN, images: list[Tensor], half: torch.device | None = None
) -> object:
    """Run torchvision's forward pass without pasting the masks."""
    postprocess = theirs.transform.postprocess
    theirs.transform.postprocess = lambda detections, *_: detections
    try:
        with autocast(half or images[0].device, "fp32" if half is None else "bf16"):
            return theirs(images)
    finally:
        theirs.transform.postprocess = postprocess


def _agreement(
    detections: Regions, expected: list[dict[str, Tensor]], batch: Batch
) -> dict[str, float]:
    """Largest differences between each detection and the nearest one of its class."""
    differences = {
        "detections apart": 0.0,
        "boxes apart, px": 0.0,
        "scores apart": 0.0,
        "soft masks apart": 0.0,
    }
    for i, theirs in enumerate(expected):
        ours = detections[detections.image_index == i]
        differences["detections apart"] += abs(len(ours) - len(theirs["boxes"]))
        if not len(ours) or not len(theirs["boxes"]):
            continue
        assert ours.labels is not None
        other_class = ours.labels[:, None] + 1 != theirs["labels"]
        distance = (ours.boxes[:, None] - theirs["boxes"]).abs().amax(dim=2) + 1e4 * other_class
        nearest, row = distance.min(dim=1)
        values = {
            "boxes apart, px": nearest,
            "scores apart": (ours.scores - theirs["scores"][row]).abs(),
        }
        height, width = (int(v) for v in batch.sizes[i])
        for name, value in values.items():
            differences[name] = max(differences[name], value.max().item())
        for k in range(len(ours)):
            mask = _paste_mask(ours, k, height, width)
            difference = (mask - theirs["masks"][row[k], 0].cpu()).abs().max().item()
            differences["soft masks apart"] = max(differences["soft masks apart"], difference)
    return differences


def _paste_mask(detections: Regions, k: int, height: int, width: int) -> Tensor:
    """Paste the soft mask of detection k into its image, f32 [height, width]."""
    masks = detections.masks
    assert isinstance(masks, MaskGrids)
    values, left, top = paste_crop(
        masks.grids[k].cpu(),
        detections.boxes[k].cpu(),
        height,
        width,
        masks.paste_mode,
        masks.interpolation,
    )
    full = torch.zeros((height, width))
    full[top : top + values.shape[0], left : left + values.shape[1]] = values
    return full


def _matched_share(rounded: Regions, detections: Regions) -> float:
    """Fraction of the bf16 detections that match an fp32 detection at an IoU above 0.9."""
    same_image = rounded.image_index[:, None] == detections.image_index
    overlap = box_iou(rounded.boxes, detections.boxes) * same_image
    return float((overlap.amax(dim=1) > 0.9).float().mean()) if overlap.numel() else 0.0


@contextmanager
def _time_parts(model: nn.Module) -> Iterator[dict[str, float]]:
    """Measure the seconds of each part, summed over its calls.

    A part within another counts in both.
    """
    seconds = dict.fromkeys(_PARTS, 0.0)
    handles = []
    for name in _PARTS:
        start: list[float] = []
        part = model.get_submodule(name)
        handles.append(
            part.register_forward_pre_hook(lambda *_, s=start: s.append(time.perf_counter()))
        )

        def add(*_: object, n: str = name, s: list[float] = start) -> None:
            seconds[n] += time.perf_counter() - s.pop()

        handles.append(part.register_forward_hook(add))
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _shares(model: GeneralizedRCNN, batch: Batch, rounds: int) -> dict[str, str]:
    """Share of each part in the time of `predict` on a CPU.

    Empty on a GPU, which works asynchronously.
    """
    if batch.images.is_cuda:
        return {}
    measurements = []
    for _ in range(rounds):
        with _time_parts(model) as seconds:
            start = time.perf_counter()
            model.predict(batch)
            whole = time.perf_counter() - start
        s = dict(seconds)
        parts = {
            "trunk": s["backbone.trunk"],
            "FPN": s["backbone"] - s["backbone.trunk"],
            "RPN head": s["proposer.head"],
        }
        parts |= {
            "proposals": s["proposer"] - s["proposer.head"],
            "box RoIAlign": s["classifier.pooler"],
            "box head": s["classifier.mlp"],
        }
        parts |= {
            "mask RoIAlign": s["heads.mask.pooler"],
            "mask head": s["heads.mask"] - s["heads.mask.pooler"],
        }
        measurements.append({**parts, "the rest": whole - sum(parts.values())} | {"": whole})
    shares = {}
    for name in measurements[0]:
        if name:
            share = median(m[name] / m[""] for m in measurements)
            shares[f"share of {name}"] = f"{100 * share:.1f}%"
    return shares


def _run_ten_times(conv: nn.Module, x: Tensor) -> None:
    for _ in range(10):
        conv(x)


def _floor(model: GeneralizedRCNN, batch: Batch, seconds: float) -> dict[str, float]:
    """Time of the model's FLOPs at the rate of the fastest convolution, and `seconds` over it."""
    with FlopCounterMode(display=False) as counter:
        model.predict(batch)
    device = batch.images.device
    rate = 0.0
    for channels, side in _CONVOLUTIONS:
        x = torch.randn((1, channels, side, side), device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(channels, channels, 3, padding=1).to(device)
        conv = conv.to(memory_format=torch.channels_last)
        rounds = in_turn({"": partial(_run_ten_times, conv, x)}, 6, device)[""]
        conv_seconds = median(rounds[1:]) / 10
        rate = max(rate, 2 * 9 * channels**2 * side**2 / conv_seconds)
    floor = counter.get_total_flops() / rate
    values = {
        "GFLOP": counter.get_total_flops() / 1e9,
        "GFLOP/s of the fastest convolution, fp32": rate / 1e9,
        "floor, s": floor,
    }
    return values | {"network over floor, fp32": seconds / floor}
