"""The flat structures: all fields are indexed and moved together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.predicted import MaskGrids
from maskseg.structures import Batch, Categories, Regions, Samples, Targets


def test_categories_round_trip() -> None:
    categories = Categories(("cat", "dog", "tree"), (17, 18, 3))
    assert len(categories) == 3
    assert categories.to_dict() == {"names": ["cat", "dog", "tree"], "ids": [17, 18, 3]}
    assert Categories.from_dict(categories.to_dict()) == categories


@pytest.mark.parametrize(("names", "ids"), [(("cat",), (1, 2)), (("cat", "dog"), (1, 1))])
def test_categories_need_one_distinct_id_per_name(
    names: tuple[str, ...], ids: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="one distinct id per name"):
        Categories(names, ids)


def three_targets(make_targets: Callable[..., Targets]) -> Targets:
    return make_targets(
        [[(0, 0, 10, 20, 2)], [(5, 5, 9, 9, 0, True), (1, 2, 31, 30, 1)]], [(32, 32), (32, 40)]
    )


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_targets_can_be_indexed(make_targets: Callable[..., Targets], index: torch.Tensor) -> None:
    targets = three_targets(make_targets)
    chosen = targets[index]
    rows = [2, 0] if index.dtype == torch.int64 else [0, 2]
    assert len(targets) == 3
    assert len(chosen) == 2
    assert chosen.labels.tolist() == [{0: 2, 1: 0, 2: 1}[r] for r in rows]
    assert chosen.image_index.tolist() == [{0: 0, 1: 1, 2: 1}[r] for r in rows]
    assert chosen.iscrowd.tolist() == [False, False]
    assert torch.equal(chosen.boxes, targets.boxes[rows])
    assert isinstance(chosen.masks, AnnotatedMasks)
    assert torch.allclose(chosen.masks.boxes(), chosen.boxes)
    assert chosen.masks.frames.tolist() == [{0: [32, 32], 2: [32, 40]}[r] for r in rows]


def test_regions_can_be_indexed_with_and_without_masks() -> None:
    regions = Regions(
        torch.rand(4, 4), torch.tensor([0, 0, 1, 1]), torch.tensor([0.9, 0.3, 0.8, 0.7])
    )
    chosen = regions[torch.tensor([True, False, False, True])]
    assert chosen.labels is None
    assert chosen.masks is None
    assert chosen.scores.tolist() == pytest.approx([0.9, 0.7])
    masks = MaskGrids(torch.arange(4.0).view(4, 1, 1), regions.boxes, torch.tensor([[8, 8]] * 4))
    labelled = Regions(
        regions.boxes, regions.image_index, regions.scores, torch.tensor([3, 2, 1, 0]), masks
    )[torch.tensor([3, 1])]
    assert labelled.labels is not None
    assert labelled.labels.tolist() == [0, 2]
    assert isinstance(labelled.masks, MaskGrids)
    assert labelled.masks.grids.flatten().tolist() == [3.0, 1.0]
    assert len(labelled[torch.zeros(2, dtype=torch.bool)]) == 0


def test_foreground_has_the_matched_regions(
    make_targets: Callable[..., Targets],
) -> None:
    targets = three_targets(make_targets)
    boxes = torch.arange(16.0).view(4, 4)
    samples = Samples(
        boxes,
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([3, 2, 1, 3]),
        torch.tensor([0, 0, 2, 0]),
        3,
        targets,
        torch.arange(2),
    )
    foreground = samples.foreground()
    assert foreground.boxes.tolist() == boxes[1:3].tolist()
    assert foreground.image_index.tolist() == [0, 1]
    assert foreground.labels.tolist() == [2, 1]
    assert foreground.matched_gt.tolist() == [0, 2]
    assert foreground.targets is targets


def test_batch_can_be_moved_and_pickled(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([(30, 40), (64, 20)], [[(0, 0, 10, 20, 2)], []])
    assert len(batch) == 2
    assert batch.images.shape == (2, 3, 64, 64)
    moved = batch.to("meta")
    assert moved.targets is not None
    targets = moved.targets
    tensors = [
        moved.images,
        moved.sizes,
        moved.original_sizes,
        targets.boxes,
        targets.labels,
        targets.image_index,
        targets.iscrowd,
    ]
    assert all(t.device.type == "meta" for t in tensors)
    assert moved.image_ids == [0, 1]
    assert make_batch([(30, 40)]).to("meta").targets is None
    copy = pickle.loads(pickle.dumps(batch))
    assert torch.equal(copy.images, batch.images)
    assert copy.targets.masks.to_rle() == batch.targets.masks.to_rle()


@pytest.mark.parametrize(
    "values",
    [
        {"names": ["a"], "ids": [2**70]},
        {"names": ["a"], "ids": [float("inf")]},
        {"names": ["a"], "ids": [True]},
        {"names": [["a"]], "ids": [1]},
        {"names": ["a"], "ids": [1], "num_stuff": 2},
        {"names": ["a"], "ids": [1], "num_stuff": -1},
        {"names": ["a"], "ids": [1], "keypoints": [[1]]},
        {"names": ["a"]},
    ],
)
def test_categories_from_invalid_values(values: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, KeyError)):
        Categories.from_dict(values)
