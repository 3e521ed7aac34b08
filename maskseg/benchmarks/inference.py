"""Suite `inference`: images to detections with masks in the image, beside torchvision's Mask R-CNN of the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from maskseg.benchmarks import torchvision_model
from maskseg.benchmarks.measure import case, in_turn, machine
from maskseg.engine.precision import autocast, pick_device
from maskseg.masks.predicted import SoftMasks
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
    "classifier.trunk",
    "heads.mask.pooler",
    "heads.mask",
)
_RATES = (
    (256, 128),
    (128, 128),
    (256, 64),
    (512, 32),
)  # channels and side of the convolutions that show what the machine can do


@torch.no_grad()
def inference(config: Any) -> dict[str, Any]:
    """Pictures of `config.data` (its validation split), `config.batch` at a time with a shorter side of `config.size` pixels, through a Mask R-CNN
    with the trunk `config.trunk`: torchvision's as it is, and ours in fp32 and bf16. Both end with masks in the image (ours as RLE); the case
    `network` leaves that out. -> cases, each part's share of our time, and the floor: FLOPs at the rate of the machine's fastest convolution.
    Raises UserError.
    """
    device = pick_device(config.trainer.device)
    (batch,) = torchvision_model.batches(config, "val", 1)
    theirs, ours = torchvision_model.models(config.trunk, config.size)
    torchvision_model.centre(theirs, torchvision_model.their_images(batch)[0])
    ours = torchvision_model.copied(theirs, ours)
    theirs, fast, half = (
        theirs.to(device),
        _fast(ours, device, None),
        _fast(ours, device, torch.bfloat16),
    )
    batch = batch.to(device)
    images = torchvision_model.their_images(batch)
    wanted, found, rounded = (
        theirs(images),
        fast.predict(batch).detections,
        half.predict(batch).detections,
    )
    name = (
        f"{config.trunk}, {len(batch)} x {config.size} px, {len(found) / len(batch):.0f} detections"
    )
    whole = {
        "torchvision": lambda: theirs(images),
        "maskseg": lambda: _finished(fast, batch),
        "maskseg bf16": lambda: _finished(half, batch),
    }
    network: dict[str, Callable[[], object]] = {
        "torchvision": lambda: _unpasted(theirs, images),
        "torchvision autocast bf16": lambda: _unpasted(theirs, images, device),
        "maskseg": lambda: fast.predict(batch),
        "maskseg bf16": lambda: half.predict(batch),
    }
    agreement = {
        **_agreement(found, wanted, batch),
        "bf16, share of boxes at IoU 0.9": _matched(rounded, found),
    }
    cases = [
        case(name, whole, config.rounds, device, agreement),
        case(f"{name}: network", network, config.rounds, device),
    ]
    also = {
        **_shares(fast, batch, config.rounds),
        **_floor(fast, batch, cases[1]["seconds"]["maskseg"]),
    }
    return {"suite": "inference", "machine": machine(device), "cases": cases, "also": also}


def _fast(
    model: GeneralizedRCNN, device: torch.device, dtype: torch.dtype | None
) -> GeneralizedRCNN:
    return for_inference(model.to(device), dtype)


def _finished(model: GeneralizedRCNN, batch: Batch) -> list[Any]:
    """The detections' masks as RLE in their images."""
    masks = model.predict(batch).detections.masks
    return [] if masks is None else masks.to_rle()


def _unpasted(theirs: Any, images: list[Tensor], half: torch.device | None = None) -> Any:
    """torchvision's forward without its last step."""
    keep = theirs.transform.postprocess
    theirs.transform.postprocess = lambda found, *_: found
    try:
        with autocast(half or images[0].device, "fp32" if half is None else "bf16"):
            return theirs(images)
    finally:
        theirs.transform.postprocess = keep


def _agreement(found: Regions, wanted: list[dict[str, Tensor]], batch: Batch) -> dict[str, float]:
    """The largest differences, each detection beside the nearest one of its class."""
    apart = {
        "detections apart": 0.0,
        "boxes apart, px": 0.0,
        "scores apart": 0.0,
        "soft masks apart": 0.0,
    }
    for i, theirs in enumerate(wanted):
        own = found[found.image_index == i]
        apart["detections apart"] += abs(len(own) - len(theirs["boxes"]))
        if not len(own) or not len(theirs["boxes"]):
            continue
        assert own.labels is not None
        distance = (own.boxes[:, None] - theirs["boxes"]).abs().amax(dim=2) + 1e4 * (
            own.labels[:, None] + 1 != theirs["labels"]
        )
        nearest, row = distance.min(dim=1)
        values = {
            "boxes apart, px": nearest,
            "scores apart": (own.scores - theirs["scores"][row]).abs(),
        }
        height, width = (int(v) for v in batch.sizes[i])
        for name, value in values.items():
            apart[name] = max(apart[name], value.max().item())
        for k in range(len(own)):
            difference = _pasted(own, k, height, width) - theirs["masks"][row[k], 0].cpu()
            apart["soft masks apart"] = max(
                apart["soft masks apart"], difference.abs().max().item()
            )
    return apart


def _pasted(own: Regions, k: int, height: int, width: int) -> Tensor:
    masks = own.masks
    assert isinstance(masks, SoftMasks)
    values, left, top = paste_crop(
        masks.grids[k].cpu(),
        own.boxes[k].cpu(),
        height,
        width,
        masks.paste_rule,
        masks.interpolation,
    )
    full = torch.zeros((height, width))
    full[top : top + values.shape[0], left : left + values.shape[1]] = values
    return full


def _matched(rounded: Regions, found: Regions) -> float:
    overlap = box_iou(rounded.boxes, found.boxes) * (
        rounded.image_index[:, None] == found.image_index
    )
    return float((overlap.amax(dim=1) > 0.9).float().mean()) if overlap.numel() else 0.0


@contextmanager
def _clocked(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds of each part, summed over its calls (a part within another counts in both)."""
    seconds, handles = dict.fromkeys(_PARTS, 0.0), []
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
    """Of the time of `predict` on a CPU; empty on a GPU, which works on while Python goes ahead."""
    if batch.images.is_cuda:
        return {}
    found = []
    for _ in range(rounds):
        with _clocked(model) as seconds:
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
            "box head": s["classifier.trunk"],
        }
        parts |= {
            "mask RoIAlign": s["heads.mask.pooler"],
            "mask head": s["heads.mask"] - s["heads.mask.pooler"],
        }
        found.append({**parts, "the rest": whole - sum(parts.values())} | {"": whole})
    return {
        f"share of {name}": f"{100 * median(f[name] / f[''] for f in found):.1f}%"
        for name in found[0]
        if name
    }


def _ten_times(conv: nn.Module, x: Tensor) -> None:
    for _ in range(10):
        conv(x)


def _floor(model: GeneralizedRCNN, batch: Batch, seconds: float) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter:
        model.predict(batch)
    device = batch.images.device
    rate = 0.0
    for channels, side in _RATES:
        x = torch.randn((1, channels, side, side), device=device).contiguous(
            memory_format=torch.channels_last
        )
        conv = (
            nn.Conv2d(channels, channels, 3, padding=1)
            .to(device)
            .to(memory_format=torch.channels_last)
        )
        taken = median(in_turn({"": partial(_ten_times, conv, x)}, 6, device)[""][1:]) / 10
        rate = max(rate, 2 * 9 * channels**2 * side**2 / taken)
    floor = counter.get_total_flops() / rate
    told = {
        "GFLOP": counter.get_total_flops() / 1e9,
        "GFLOP/s of the fastest convolution, fp32": rate / 1e9,
        "floor, s": floor,
    }
    return told | {"network over floor, fp32": seconds / floor}
