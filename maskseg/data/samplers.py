"""Which images make which batch. The stream of batches is a function of the seed alone: not of the number of workers or processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

Item = tuple[int, int, int]  # epoch, index of the image, which repetition of it in this epoch


class StepSampler(Sampler[list[Item]]):
    """Batches for steps `start_step` .. `stop_step` - 1 of an endless stream of shuffled epochs.

    total_batch: images a step, over all processes; this process gets every `world`-th of them, from `rank` on, in `pieces` batches. groups: a number
    for each image;
    a batch holds images of one group only (aspect-ratio grouping). repeats: how often each image comes in an epoch on average (>= 1 each).
    """

    def __init__(
        self,
        num_images: int,
        total_batch: int,
        stop_step: int,
        seed: int = 0,
        start_step: int = 0,
        groups: Sequence[int] | None = None,
        repeats: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
        pieces: int = 1,
    ) -> None:
        if num_images < 1:
            raise ValueError("a sampler needs at least one image")
        if total_batch < 1:
            raise ValueError(f"total_batch must be at least 1, not {total_batch}")
        if total_batch % (world * pieces):
            raise ValueError(
                f"total_batch {total_batch} cannot be shared evenly by {world} processes in {pieces} pieces"
            )
        self.num_images, self.total_batch, self.seed = num_images, total_batch, seed
        self.start_step, self.stop_step, self.rank, self.world, self.pieces = (
            start_step,
            stop_step,
            rank,
            world,
            pieces,
        )
        self.groups = np.zeros(num_images, dtype=np.int64) if groups is None else np.asarray(groups)
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)

    def __len__(self) -> int:
        return max(self.stop_step - self.start_step, 0) * self.pieces

    def __iter__(self) -> Iterator[list[Item]]:
        for batch in islice(self._batches(), self.start_step, self.stop_step):
            own = batch[self.rank :: self.world]
            yield from (own[piece :: self.pieces] for piece in range(self.pieces))

    def _batches(self) -> Iterator[list[Item]]:
        waiting: dict[int, list[Item]] = {int(g): [] for g in np.unique(self.groups)}
        epoch = 0
        while True:
            for item in self._epoch(epoch):
                group = waiting[int(self.groups[item[1]])]
                group.append(item)
                if len(group) == self.total_batch:
                    yield list(group)
                    group.clear()
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Item]:
        rng = np.random.default_rng([self.seed, epoch])
        times = np.ones(self.num_images, dtype=np.int64)
        if self.repeats is not None:
            times = np.floor(self.repeats + rng.random(self.num_images)).astype(np.int64)
        index = np.repeat(np.arange(self.num_images), times)
        copy = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
        for i in rng.permutation(len(index)):
            yield epoch, int(index[i]), int(copy[i])


def aspect_groups(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """0 for landscape and square, 1 for portrait images; sizes are (height, width)."""
    return [int(height > width) for height, width in sizes]


def repeat_factors(labels: Sequence[Sequence[int]], threshold: float) -> list[float]:
    """LVIS's repeat factors (Gupta et al., section 4.3): an image of a class in a share f of all images comes max(1, sqrt(threshold / f)) times.

    labels: those of each image.
    """
    present = [set(image) for image in labels]
    count: dict[int, int] = {}
    for image in present:
        for label in image:
            count[label] = count.get(label, 0) + 1
    factor = {label: max(1.0, (threshold * len(labels) / n) ** 0.5) for label, n in count.items()}
    return [max((factor[label] for label in image), default=1.0) for image in present]
