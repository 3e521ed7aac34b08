"""What loader processes send arrives as it was, in few pieces."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from maskseg.data.collate import collate
from maskseg.data.sample import Sample
from maskseg.data.shared_memory import Packed, Parcel
from maskseg.masks.annotated import FileMasks, Polygons, Runs
from maskseg.structures import Batch


def a_batch(height: int = 300, width: int = 400) -> Batch:
    image = torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shapes = [
        Polygons((np.array([[1.0, 2], [30, 4], [9, 50]]),)),
        Runs(np.array([5, 9, height * width]), height, width),
    ]
    masks = FileMasks.from_file(shapes, height, width)
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


def test_a_batch_arrives_as_it_was() -> None:
    batch = a_batch()
    parcel = pickle.loads(pickle.dumps(Parcel(batch)))
    assert [tensor.nbytes for tensor in parcel.large] == [
        batch.images.nbytes
    ]  # one piece of shared memory, not one for each tensor
    found = parcel.open()
    assert torch.equal(found.images, batch.images)
    for name in ("boxes", "labels", "image_index", "crowd"):
        first, second = getattr(found.targets, name), getattr(batch.targets, name)
        assert torch.equal(first, second)
        assert first.dtype == second.dtype
    assert found.targets.masks.to_rle() == batch.targets.masks.to_rle()
    assert (found.image_ids, found.targets.keypoints, found.proposals) == (
        batch.image_ids,
        None,
        None,
    )
    found.images[0, 0, 0, 0] += 1  # what arrives can be written to
    found.targets.boxes[0, 0] = 5


def test_small_ones_need_no_shared_memory() -> None:
    batch = a_batch(40, 50)
    parcel = Parcel(batch)
    assert parcel.large == []
    assert torch.equal(parcel.open().images, batch.images)


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
    found = Packed(lambda samples: samples[0])([value]).open()
    assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value


class Pinnable:
    """Counts how often it was pinned."""

    times = 0

    def pin_memory(self) -> Pinnable:
        self.times += 1
        return self


def test_the_loaders_thread_pins_what_is_inside() -> None:
    assert Parcel(Pinnable()).pin_memory().times == 1
    assert Parcel([1, 2]).pin_memory() == [1, 2]
