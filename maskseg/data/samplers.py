"""Samplers: which images form which batch.

The sequence of batches depends on the seed only, not on the number of workers or processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

Item = tuple[int, int, int]  # epoch, index of the image, repetition of the image in this epoch


class StepSampler(Sampler[list[Item]]):
    """Batches for the steps `start_step` to `stop_step` - 1 of an endless series of epochs.

    Each epoch is shuffled. A batch may contain images of two epochs.

    batch_size: images per step, over all processes.
    groups: a number for each image; a batch holds images of one group only (aspect-ratio grouping).
    repeats: how often each image occurs in an epoch on average (each at least 1).
    rank, world_size: this process and the number of processes, which share each batch.
    micro_batches: parts that the share of a process is split into (gradient accumulation).
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        stop_step: int,
        seed: int = 0,
        start_step: int = 0,
        groups: Sequence[int] | None = None,
        repeats: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
    ) -> None:
        if num_images < 1:
            raise ValueError("a sampler needs at least one image")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if batch_size % (world_size * micro_batches):
            raise ValueError(
                f"batch_size {batch_size} cannot be divided evenly among {world_size} processes "
                f"with {micro_batches} micro-batches each"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.stop_step = stop_step
        self.seed = seed
        self.start_step = start_step
        self.groups = np.zeros(num_images, dtype=np.int64) if groups is None else np.asarray(groups)
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self.rank = rank
        self.world_size = world_size
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return max(self.stop_step - self.start_step, 0) * self.micro_batches

    def __iter__(self) -> Iterator[list[Item]]:
        for batch in islice(self._batches(), self.start_step, self.stop_step):
            share = batch[self.rank :: self.world_size]
            for first in range(self.micro_batches):
                yield share[first :: self.micro_batches]

    def _batches(self) -> Iterator[list[Item]]:
        """Yield the batches of all processes, from step 0 on, without end."""
        incomplete: dict[int, list[Item]] = {int(group): [] for group in np.unique(self.groups)}
        epoch = 0
        while True:
            for item in self._epoch(epoch):
                _, image, _ = item
                batch = incomplete[int(self.groups[image])]
                batch.append(item)
                if len(batch) == self.batch_size:
                    yield list(batch)
                    batch.clear()
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Item]:
        rng = np.random.default_rng([self.seed, epoch])
        counts = np.ones(self.num_images, dtype=np.int64)
        if self.repeats is not None:
            # Rounds up at random, with the fraction as probability: the mean is the repeat factor.
            counts = np.floor(self.repeats + rng.random(self.num_images)).astype(np.int64)
        images = np.repeat(np.arange(self.num_images), counts)
        repetitions = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
        for i in rng.permutation(len(images)):
            yield epoch, int(images[i]), int(repetitions[i])


def aspect_groups(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return 0 for landscape and square images, 1 for portrait; sizes: (height, width)."""
    return [int(height > width) for height, width in sizes]


def repeat_factors(labels: Sequence[Sequence[int]], threshold: float) -> list[float]:
    """Return LVIS's repeat factors (Gupta et al., "LVIS", CVPR 2019, section 4.3).

    An image with a class that occurs in a fraction f of all images is repeated
    max(1, sqrt(threshold / f)) times; the largest factor of its classes counts.

    labels: the labels of each image's objects.
    """
    labels_per_image = [set(image) for image in labels]
    image_counts: dict[int, int] = {}
    for image in labels_per_image:
        for label in image:
            image_counts[label] = image_counts.get(label, 0) + 1
    factors = {
        label: max(1.0, (threshold * len(labels) / count) ** 0.5)
        for label, count in image_counts.items()
    }
    return [max((factors[label] for label in image), default=1.0) for image in labels_per_image]
