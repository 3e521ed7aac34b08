"""Suite `data`: images per second from files to batches, for maskseg and torchvision.

torchvision's pipeline is that of its detection references: `CocoDetection` wrapped for transforms
v2, boxes and full-size bitmaps of the masks, flip, resize, float. Both pipelines resize to the same
size and work in one thread, as a loader process does.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.transforms import v2

from maskseg.benchmarks.measure import case, in_turn, machine
from maskseg.benchmarks.results import Case, SuiteResult
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.data import rgbx
from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.image_files import load_pixels, safe_join
from maskseg.data.loader import BatchLoader, warm_up_malloc
from maskseg.data.sample import Sample
from maskseg.data.samplers import Item
from maskseg.data.transforms import Flip, ResizeShortestEdge, Transform
from maskseg.errors import UserError
from maskseg.structures import Batch

MIN_SIDE = 800  # pixels
MAX_SIDE = 1333  # pixels
IMAGES = 50
TARGET_IMAGES = 10  # images for the mask targets alone, whose bitmaps are all held in memory
BATCH = 2  # batch size per GPU of torchvision's references
REGIONS = 128  # foreground regions per image: a quarter of 512 regions
MASK_SIZE = 28  # cells per side of a mask target
CPU = torch.device("cpu")

T = TypeVar("T")
Target = dict[str, Tensor]  # torchvision's objects of an image: boxes, labels and masks
TorchvisionSample = tuple[Tensor, Target]
TorchvisionBatch = tuple[tuple[Tensor, ...], tuple[Target, ...]]


def data(config: Config) -> SuiteResult:
    """Time one process, the same with mask targets, a loader, and mask targets alone.

    Raises UserError for data without masks.
    """
    if config.rounds < 1:
        raise UserError("rounds must be at least 1")
    source = open_data(config)
    if not source.train.has_masks():
        raise UserError(
            f"{source.split('train').key}: not every object has a mask, which this suite needs"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    warm_up_malloc()  # as in our loader processes; both pipelines benefit here
    try:
        return _measure(source, config)
    finally:
        torch.set_num_threads(threads)


def _measure(source: CocoSource, config: Config) -> SuiteResult:
    rounds = config.rounds
    ours, indices = _our_dataset(source, config.seed, 0.5)
    theirs = _torchvision_dataset(source, indices, 0.5)
    items: list[Item] = [(0, index, 0) for index in indices]
    workers = max(1, source.loading.num_workers)
    loader = BatchLoader(
        "data",
        ours,
        _batches(items * 2),
        partial(collate, divisor=source.loading.divisor),
        workers,
        source.loading.timeout,
    )
    peer: DataLoader[TorchvisionSample] = DataLoader(
        Subset(theirs, [*range(len(indices))] * 2),
        BATCH,
        num_workers=workers,
        collate_fn=_collate_lists,
    )
    torch.manual_seed(config.seed)  # of torchvision's flips
    unflipped = _load_unflipped(source, config.seed)
    plain = {
        "torchvision": lambda: _count(_torchvision_batches(theirs)),
        "maskseg": lambda: _count(_our_batches(ours, items, source.loading.divisor)),
    }
    with_targets = {
        "torchvision": lambda: _count(map(_torchvision_targets, _torchvision_batches(theirs))),
        "maskseg": lambda: _count(
            map(_our_targets, _our_batches(ours, items, source.loading.divisor))
        ),
    }
    cases = [
        case(f"{len(items)} images, one process", plain, rounds, CPU, _agreement(*unflipped)),
        case(f"{len(items)} images and their mask targets, one process", with_targets, rounds, CPU),
        case(
            f"{2 * len(items)} images, loader with {workers} processes",
            {"torchvision": lambda: _count(peer), "maskseg": lambda: _count(loader)},
            rounds,
            CPU,
        ),
        _targets_case(*unflipped, source.loading.divisor, rounds),
    ]
    also: dict[str, float | str] = {}
    for number, result in zip((len(items), len(items), 2 * len(items)), cases, strict=False):
        for label, seconds in result["seconds"].items():
            also[f"images a second, {result['name']}, {label}"] = number / seconds
    return {
        "suite": "data",
        "machine": machine(CPU),
        "cases": cases,
        "also": also | _shares(ours, items, source.loading.divisor, rounds),
    }


def _our_dataset(source: CocoSource, seed: int, flips: float) -> tuple[CocoDataset, list[int]]:
    """Build our dataset, and find its first images with objects.

    The transforms are those of `data=coco`, with one size instead of several. flips: probability.
    """
    transforms: list[Transform] = [ResizeShortestEdge([MIN_SIDE], MAX_SIDE), Flip(flips)]
    dataset = source.dataset_with("train", transforms, seed)
    with_objects = [index for index, labels in enumerate(dataset.labels()) if labels]
    return dataset, with_objects[:IMAGES]


def _torchvision_dataset(
    source: CocoSource, indices: Sequence[int], flips: float
) -> Subset[TorchvisionSample]:
    """Build torchvision's dataset of the same images in the same order."""
    steps = [
        v2.ToImage(),
        v2.RandomHorizontalFlip(flips),
        v2.RandomShortestSize([MIN_SIDE], MAX_SIDE),
        v2.ToDtype(torch.float32, scale=True),
        v2.SanitizeBoundingBoxes(),
        v2.ToPureTensor(),
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints messages
        files = CocoDetection(
            source.split("train").images or "",
            source.split("train").single_file(),
            transforms=v2.Compose(steps),
        )
    positions = {image_id: i for i, image_id in enumerate(files.ids)}
    wrapped = wrap_dataset_for_transforms_v2(files, target_keys=("boxes", "labels", "masks"))
    records = source.train.images
    rows = source.dataset("train").images
    return Subset(wrapped, [positions[records[rows[index]].id] for index in indices])


def _collate_lists(samples: Sequence[TorchvisionSample]) -> TorchvisionBatch:
    """Collate as torchvision's references do: into lists, because their models pad the images."""
    images, targets = zip(*samples, strict=True)
    return images, targets


def _batches(items: Sequence[T]) -> list[list[T]]:
    return [list(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]


def _torchvision_batches(dataset: Subset[TorchvisionSample]) -> Iterator[TorchvisionBatch]:
    return (_collate_lists([dataset[i] for i in batch]) for batch in _batches(range(len(dataset))))


def _our_batches(dataset: CocoDataset, items: Sequence[Item], divisor: int) -> Iterator[Batch]:
    return (collate([dataset[item] for item in batch], divisor) for batch in _batches(items))


def _count(batches: Iterable[object]) -> int:
    """Count the batches without keeping them."""
    return sum(1 for _ in batches)


def _regions(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Simulate proposals of the objects with `boxes` [n, 4].

    Returns the object of each region, i64 [REGIONS], and boxes f32 [REGIONS, 4].
    """
    generator = torch.Generator().manual_seed(len(boxes))
    matched = torch.randint(len(boxes), (REGIONS,), generator=generator)
    regions = boxes[matched].float()
    extent = (regions[:, 2:] - regions[:, :2]).repeat(1, 2)
    noise = 2 * torch.rand(regions.shape, generator=generator) - 1
    return matched, regions + 0.1 * extent * noise


def _torchvision_targets(batch: TorchvisionBatch) -> list[Tensor]:
    """Compute mask targets as torchvision does, [REGIONS, MASK_SIZE, MASK_SIZE] per image."""
    masks = []
    for target in batch[1]:
        # torchvision's transforms drop objects whose box ends slightly outside the image, which can
        # be all objects.
        if len(target["boxes"]):
            matched, boxes = _regions(target["boxes"])
            masks.append(project_masks_on_boxes(target["masks"], boxes, matched, MASK_SIZE))
    return masks


def _our_targets(batch: Batch) -> list[Tensor]:
    """Compute the same targets as our mask head does with `target_mode=crop`."""
    targets = batch.targets
    assert targets is not None
    assert targets.masks is not None
    rows = [torch.nonzero(targets.image_index == i).squeeze(1) for i in range(len(batch.images))]
    regions = [(objects, *_regions(targets.boxes[objects])) for objects in rows]
    masks = targets.masks[torch.cat([objects[matched] for objects, matched, _ in regions])]
    boxes = torch.cat([boxes for _, _, boxes in regions])
    crops = masks.crop_and_resize(boxes, MASK_SIZE)
    return [crops[i : i + REGIONS] for i in range(0, len(crops), REGIONS)]


def _load_unflipped(source: CocoSource, seed: int) -> tuple[list[TorchvisionBatch], list[Sample]]:
    """Load a few images without flips, for which both pipelines keep the same objects.

    Returns torchvision's batches of one, and our samples.
    """
    ours, indices = _our_dataset(source, seed, 0.0)
    indices = indices[:TARGET_IMAGES]
    theirs = _torchvision_dataset(source, indices, 0.0)
    pairs = [(theirs[i], ours[(0, index, 0)]) for i, index in enumerate(indices)]
    same = [
        (_collate_lists([peer]), sample)
        for peer, sample in pairs
        if len(peer[1]["boxes"]) == len(sample.boxes)
    ]
    return [peer for peer, _ in same], [sample for _, sample in same]


def _agreement(peers: list[TorchvisionBatch], samples: list[Sample]) -> dict[str, float]:
    """Largest differences of the outputs without flips.

    torchvision rounds sizes down and we round to the nearest, so pixels are compared only for
    images of equal size.
    """
    pixels_apart = [0.0]
    boxes_apart = [0.0]
    for (images, targets), sample in zip(peers, samples, strict=True):
        if images[0].shape[-2:] == sample.image.shape[-2:]:
            pixels_apart.append(float((images[0] * 255 - sample.image).abs().max()))
        boxes_apart.append(float((targets[0]["boxes"] - sample.boxes).abs().max()))
    return {
        "pixels apart, grey levels of 255": max(pixels_apart),
        "boxes apart, px": max(boxes_apart),
    }


def _targets_case(
    peers: list[TorchvisionBatch], samples: list[Sample], divisor: int, rounds: int
) -> Case:
    """Time mask targets from ground truth in memory."""
    our_batches = [collate([sample], divisor) for sample in samples]
    runs = {
        "torchvision": lambda: [_torchvision_targets(batch) for batch in peers],
        "maskseg": lambda: [_our_targets(batch) for batch in our_batches],
    }
    fractions = []
    for theirs, ours in zip(runs["torchvision"](), runs["maskseg"](), strict=True):
        differs = (theirs[0] >= 0.5) != (ours[0] >= 0.5)
        fractions.append(float(differs.float().mean()))
    fraction = float(np.mean(fractions)) if fractions else 0.0
    return case(
        f"mask targets of {len(our_batches)} images, {REGIONS} regions each",
        runs,
        rounds,
        CPU,
        {"cells that differ": fraction},
    )


def _shares(
    dataset: CocoDataset, items: Sequence[Item], divisor: int, rounds: int
) -> dict[str, str]:
    """Share of each part in the time of our pipeline.

    The rest is boxes, masks, and building the samples.
    """
    records = [dataset.file.images[dataset.images[index]] for _, index, _ in items]
    samples = [dataset[item] for item in items]
    images = [load_pixels(safe_join(dataset.root, r.file_name)) for r in records]
    flipped = samples[::2]  # half of them, as with a probability of 0.5
    parts = {
        "whole": lambda: _count(_our_batches(dataset, items, divisor)),
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
