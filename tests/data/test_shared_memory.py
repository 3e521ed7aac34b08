"""Batches from loader processes arrive unchanged, in few shared-memory segments."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from maskseg.data.collate import collate
from maskseg.data.sample import Sample
from maskseg.data.shared_memory import SharedBatch, SharedCollate
from maskseg.masks.annotated import AnnotatedMasks, Polygons, RunLengths
from maskseg.structures import Batch


def a_batch(height: int = 300, width: int = 400) -> Batch:
    image = torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shapes = [
        Polygons((np.array([[1.0, 2], [30, 4], [9, 50]]),)),
        RunLengths(np.array([5, 9, height * width]), height, width),
    ]
    masks = AnnotatedMasks.from_file(shapes, height, width)
    boxes = torch.tensor([[1.0, 2, 30, 50], [0, 5, 1, 9]])
    sample = Sample(
        image,
        boxes,
        torch.tensor([3, 0]),
        torch.tensor([False, True]),
        masks,
        17,
        "a.png",
        (height, width),
    )
    return collate([sample, sample])


def test_a_batch_arrives_unchanged() -> None:
    batch = a_batch()
    shared = pickle.loads(pickle.dumps(SharedBatch(batch)))
    assert [tensor.nbytes for tensor in shared.large] == [
        batch.images.nbytes
    ]  # one shared-memory segment, not one per tensor
    found = shared.unpack()
    assert torch.equal(found.images, batch.images)
    for name in ("boxes", "labels", "image_index", "iscrowd"):
        first, second = getattr(found.targets, name), getattr(batch.targets, name)
        assert torch.equal(first, second)
        assert first.dtype == second.dtype
    assert found.targets.masks.to_rle() == batch.targets.masks.to_rle()
    assert (found.image_ids, found.targets.keypoints, found.proposals) == (
        batch.image_ids,
        None,
        None,
    )
    found.images[0, 0, 0, 0] += 1  # the memory is writable
    found.targets.boxes[0, 0] = 5


def test_small_tensors_need_no_shared_memory() -> None:
    batch = a_batch(40, 50)
    shared = SharedBatch(batch)
    assert shared.large == []
    assert torch.equal(shared.unpack().images, batch.images)


@pytest.mark.parametrize(
    "value",
    [
        7,
        None,
        "text",
        [1, (2, 3)],
        torch.zeros(0, 4),
        torch.ones(3, dtype=torch.bool),
        torch.zeros(5, 1 << 18)[:, ::2],
    ],
)
def test_anything_can_be_packed(value: object) -> None:
    found = SharedCollate(lambda samples: samples[0])([value]).unpack()
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


class Pinnable:
    """Counts the calls of `pin_memory`."""

    times = 0

    def pin_memory(self) -> Pinnable:
        self.times += 1
        return self


def test_the_loaders_thread_pins_the_value() -> None:
    assert SharedBatch(Pinnable()).pin_memory().times == 1
    assert SharedBatch([1, 2]).pin_memory() == [1, 2]
