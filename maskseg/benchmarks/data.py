"""What feeds a training: pictures a second from files to batches, beside torchvision's detection pipeline on the same files.

The peer is what torchvision's detection references are made of: `CocoDetection` wrapped for transforms v2, boxes and full-size bitmaps of the
masks, flip, resize, float. Both sides resize to the same size in the data pipeline and work in one thread, as a loader's process does.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.transforms import v2

from maskseg.benchmarks.measure import case, in_turn, machine
from maskseg.config.restore import open_data
from maskseg.data import rgbx
from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.image_files import load_pixels, safe_join
from maskseg.data.loader import BatchLoader, keep_pages
from maskseg.data.sample import Sample
from maskseg.data.samplers import Item
from maskseg.data.transforms import Flip, ResizeShortestEdge
from maskseg.errors import UserError

SHORT, LONGEST = 800, 1333  # pixels
IMAGES, FEW = (
    50,
    10,
)  # images of the pipelines; of the mask targets alone, whose bitmaps are all held
BATCH = 2  # the references' batch a GPU
REGIONS, CELLS = (
    128,
    28,
)  # foreground regions of an image, cells of a mask target's side (512 regions, a quarter of them foreground)
CPU = torch.device("cpu")


def data(config: Any) -> dict[str, Any]:
    """The suite `data`: one process, the same with mask targets, a loader, mask targets alone. Raises UserError for data without masks."""
    if config.rounds < 1:
        raise UserError("rounds must be at least 1")
    source = open_data(config)
    if not source.train.has_masks():
        raise UserError(
            f"{source.name('train')}: not every object has a mask, which this suite needs"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_pages()  # as in our loader's processes; it serves both sides here
    try:
        return _measure(source, config)
    finally:
        torch.set_num_threads(threads)


def _measure(source: CocoSource, config: Any) -> dict[str, Any]:
    ours, chosen = _ours(source, config.seed, 0.5)
    theirs, rounds = _theirs(source, chosen, 0.5), config.rounds
    items: list[Item] = [(0, index, 0) for index in chosen]
    workers = max(1, source.num_workers)
    loader = BatchLoader(
        "data",
        ours,
        _batches(items * 2),
        partial(collate, divisor=source.divisor),
        workers,
        source.timeout,
    )
    peer: DataLoader[Any] = DataLoader(
        Subset(theirs, [*range(len(chosen))] * 2), BATCH, num_workers=workers, collate_fn=_listed
    )
    torch.manual_seed(config.seed)  # the peer's flips
    still = _unflipped(source, config.seed)
    plain = {
        "torchvision": lambda: _count(_peer_batches(theirs)),
        "maskseg": lambda: _count(_own_batches(ours, items, source.divisor)),
    }
    whole = {
        "torchvision": lambda: _count(map(_peer_targets, _peer_batches(theirs))),
        "maskseg": lambda: _count(map(_own_targets, _own_batches(ours, items, source.divisor))),
    }
    cases = [
        case(f"{len(items)} images, one process", plain, rounds, CPU, _agreement(*still)),
        case(f"{len(items)} images and their mask targets, one process", whole, rounds, CPU),
        case(
            f"{2 * len(items)} images, loader with {workers} processes",
            {"torchvision": lambda: _count(peer), "maskseg": lambda: _count(loader)},
            rounds,
            CPU,
        ),
        _targets_case(*still, source.divisor, rounds),
    ]
    also: dict[str, float | str] = {}
    for number, found in zip((len(items), len(items), 2 * len(items)), cases, strict=False):
        also |= {
            f"images a second, {found['name']}, {label}": number / seconds
            for label, seconds in found["seconds"].items()
        }
    return {
        "suite": "data",
        "machine": machine(CPU),
        "cases": cases,
        "also": also | _shares(ours, items, source.divisor, rounds),
    }


def _ours(source: CocoSource, seed: int, flips: float) -> tuple[CocoDataset, list[int]]:
    """The data set with the resize and flip of `data=coco`, one size instead of several; the indices of its first images with objects."""
    dataset = source.dataset("train", seed)
    dataset.transforms = [ResizeShortestEdge([SHORT], LONGEST), Flip(flips)]
    return dataset, [index for index, labels in enumerate(dataset.labels()) if labels][:IMAGES]


def _theirs(source: CocoSource, chosen: Sequence[int], flips: float) -> Subset[Any]:
    """The same images, in the same order, as torchvision's references read them."""
    steps: list[Any] = [
        v2.ToImage(),
        v2.RandomHorizontalFlip(flips),
        v2.RandomShortestSize([SHORT], LONGEST),
    ]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells what it reads
        files = CocoDetection(
            source.images["train"] or "", source.json["train"] or "", transforms=v2.Compose(steps)
        )
    place = {number: i for i, number in enumerate(files.ids)}
    wrapped = wrap_dataset_for_transforms_v2(files, target_keys=("boxes", "labels", "masks"))
    images, own = source.train.images, source.dataset("train").images
    return Subset(wrapped, [place[images[own[index]].id] for index in chosen])


def _listed(samples: list[Any]) -> tuple[Any, ...]:
    """The references' collate function: lists, as their models pad by themselves."""
    return tuple(zip(*samples, strict=True))


def _batches(items: Sequence[Any]) -> list[Any]:
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def _peer_batches(dataset: Subset[Any]) -> Iterator[Any]:
    return (_listed([dataset[i] for i in batch]) for batch in _batches(range(len(dataset))))


def _own_batches(dataset: CocoDataset, items: Sequence[Item], divisor: int) -> Iterator[Any]:
    return (collate([dataset[item] for item in batch], divisor) for batch in _batches(items))


def _count(batches: Any) -> int:
    """Takes batches until there are no more, and keeps none."""
    return sum(1 for _ in batches)


def _regions(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Regions that stand for the objects with `boxes` [n, 4]: which object i64 [REGIONS], boxes f32 [REGIONS, 4] about as good as proposals."""
    draw = torch.Generator().manual_seed(len(boxes))
    matched = torch.randint(len(boxes), (REGIONS,), generator=draw)
    own = boxes[matched].float()
    extent = (own[:, 2:] - own[:, :2]).repeat(1, 2)
    return matched, own + 0.1 * extent * (2 * torch.rand(own.shape, generator=draw) - 1)


def _peer_targets(batch: Any) -> list[Tensor]:
    """Mask targets of a batch as torchvision's mask loss makes them, [REGIONS, CELLS, CELLS] each."""
    found = []
    for target in batch[1]:
        if len(
            target["boxes"]
        ):  # their transforms drop objects whose box ends a hair outside of the image, now and then all of them
            matched, boxes = _regions(target["boxes"])
            found.append(project_masks_on_boxes(target["masks"], boxes, matched, CELLS))
    return found


def _own_targets(batch: Any) -> list[Tensor]:
    """The same as our mask head makes them (`target_rule=crop`)."""
    targets = batch.targets
    rows = [torch.nonzero(targets.image_index == i).squeeze(1) for i in range(len(batch.images))]
    drawn = [(own, *_regions(targets.boxes[own])) for own in rows]
    masks = targets.masks[torch.cat([own[matched] for own, matched, _ in drawn])]
    return [*masks.crop_resize(torch.cat([boxes for _, _, boxes in drawn]), CELLS).split(REGIONS)]


def _unflipped(source: CocoSource, seed: int) -> tuple[list[Any], list[Sample]]:
    """The first few images of both sides where both have the same objects: batches of one of theirs, samples of ours."""
    ours, chosen = _ours(source, seed, 0.0)
    chosen = chosen[:FEW]
    theirs = _theirs(source, chosen, 0.0)
    pairs = [(theirs[i], ours[(0, index, 0)]) for i, index in enumerate(chosen)]
    same = [
        (_listed([peer]), own) for peer, own in pairs if len(peer[1]["boxes"]) == len(own.boxes)
    ]
    return [peer for peer, _ in same], [own for _, own in same]


def _agreement(peers: list[Any], samples: list[Sample]) -> dict[str, float]:
    """How far the outputs are apart without flips; their resize rounds sizes down, ours to the nearest: pixels where the sizes are the same."""
    pixels_apart, boxes_apart = [0.0], [0.0]
    for (images, targets), own in zip(peers, samples, strict=True):
        if images[0].shape[-2:] == own.image.shape[-2:]:
            pixels_apart.append(float((images[0] * 255 - own.image).abs().max()))
        boxes_apart.append(float((targets[0]["boxes"] - own.boxes).abs().max()))
    return {
        "pixels apart, grey levels of 255": max(pixels_apart),
        "boxes apart, px": max(boxes_apart),
    }


def _targets_case(
    peers: list[Any], samples: list[Sample], divisor: int, rounds: int
) -> dict[str, Any]:
    """Mask targets from truths in memory."""
    owns = [collate([sample], divisor) for sample in samples]
    things = {
        "torchvision": lambda: [_peer_targets(batch) for batch in peers],
        "maskseg": lambda: [_own_targets(batch) for batch in owns],
    }
    pairs = [
        (a[0] >= 0.5, b[0] >= 0.5)
        for a, b in zip(things["torchvision"](), things["maskseg"](), strict=True)
    ]
    differ = np.mean([float((a != b).float().mean()) for a, b in pairs]) if pairs else 0.0
    return case(
        f"mask targets of {len(owns)} images, {REGIONS} regions each",
        things,
        rounds,
        CPU,
        {"cells that differ": float(differ)},
    )


def _shares(
    dataset: CocoDataset, items: Sequence[Item], divisor: int, rounds: int
) -> dict[str, str]:
    """What of our pipeline's time each part takes; the rest is boxes, masks, and the making of samples."""
    records = [dataset.file.images[dataset.images[index]] for _, index, _ in items]
    samples = [dataset[item] for item in items]
    images = [load_pixels(safe_join(dataset.root, r.file_name)) for r in records]
    flipped = samples[::2]  # half of them, as with a probability of 0.5
    parts = {
        "whole": lambda: _count(_own_batches(dataset, items, divisor)),
        "decode": lambda: _count(
            load_pixels(safe_join(dataset.root, r.file_name)) for r in records
        ),
        "resize": lambda: _count(
            rgbx.resize(image, *sample.size) for image, sample in zip(images, samples, strict=True)
        ),
        "flip": lambda: _count(rgbx.flip(sample.image, -1) for sample in flipped),
        "collate": lambda: _count(collate(batch, divisor) for batch in _batches(samples)),
    }
    seconds = {name: median(values) for name, values in in_turn(parts, rounds, CPU).items()}
    whole = seconds.pop("whole")
    seconds["boxes, masks and the rest"] = max(whole - sum(seconds.values()), 0.0)
    return {
        f"share of {name}": f"{value / whole:.0%} ({1000 * value / len(items):.2f} ms an image)"
        for name, value in seconds.items()
    }
