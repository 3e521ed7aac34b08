"""The keypoint head: equality with torchvision's loss, selection of regions and points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypointrcnn_loss

from maskseg.errors import UserError
from maskseg.models.keypoint_head import KeypointHead
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.structures import Regions, Samples, Targets

RANGES = [(0, 3), (0, 0), (3, 5)]
C = 16


@pytest.fixture
def head() -> KeypointHead:
    torch.manual_seed(0)
    return KeypointHead(
        MultiLevelRoIAlign({"p2": 4}, 14), RANGES, in_channels=C, channels=8, layers=2
    )


def samples(
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    count: int = 30,
    labels: list[int] | None = None,
) -> Samples:
    boxes = make_boxes(count, 96, 96, generator)
    label = (
        torch.tensor(labels, dtype=torch.int64)
        if labels is not None
        else torch.randint(0, 4, (count,), generator=generator)
    )
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    points = torch.cat(
        [
            low + (high - low) * torch.rand((count, 5, 2), generator=generator) * 1.2,
            torch.ones((count, 5, 1)),
        ],
        dim=2,
    )
    points[:, :, 2] = torch.randint(0, 3, (count, 5), generator=generator).float()
    image = torch.arange(count) % 2
    truth = Targets(
        boxes, label.clamp(max=2), image, torch.zeros(count, dtype=torch.bool), keypoints=points
    )
    return Samples(boxes, image, label, torch.arange(count), 3, truth, torch.arange(2))


def features(generator: torch.Generator) -> dict[str, Tensor]:
    return {"p2": torch.randn((2, C, 24, 24), generator=generator)}


def test_the_loss_is_torchvisions(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    maps, drawn = features(generator), samples(make_boxes, generator, labels=[0] * 30)
    points = drawn.targets.keypoints
    assert points is not None
    loss = head.losses(maps, drawn)["keypoint"]
    logits = head(maps, drawn.boxes, drawn.image_index)
    assert logits.shape == (30, 5, 56, 56)
    # torchvision has one class with all points: those of the other class are made invisible.
    seen = [(points * torch.tensor([1, 1, 1, 0, 0])[:, None])[i : i + 1] for i in range(30)]
    wanted = keypointrcnn_loss(
        logits.contiguous(), [b[None] for b in drawn.boxes], seen, [torch.tensor([0])] * 30
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_only_the_points_of_the_own_class_count(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    maps, drawn = features(generator), samples(make_boxes, generator)
    own = drawn.targets.keypoints
    assert own is not None
    wanted = head.losses(maps, drawn)["keypoint"]
    own[drawn.labels == 0, 3:, :2] = 1.0
    own[drawn.labels == 2, :3, :2] = 1.0
    own[drawn.labels == 1] = 7.0
    own[drawn.labels == 3] = 7.0
    assert torch.equal(head.losses(maps, drawn)["keypoint"], wanted)


def test_a_cap_on_the_regions_of_an_image(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    drawn = samples(make_boxes, generator, count=60, labels=[0, 0, 1, 2, 2, 3] * 10)
    head.max_regions = 7
    learnt = head.select_regions(drawn)
    assert torch.bincount(learnt.image_index).tolist() == [7, 7]
    assert set(learnt.labels.tolist()) <= {0, 2}
    assert torch.equal(head.select_regions(drawn).boxes, learnt.boxes)
    turned = Samples(
        drawn.boxes,
        1 - drawn.image_index,
        drawn.labels,
        drawn.matched_gt,
        3,
        drawn.targets,
        drawn.seeds.flip(0),
    )
    assert torch.equal(
        head.select_regions(turned).boxes, learnt.boxes
    )  # independent of the position in the batch
    head.max_regions = 0
    assert len(head.select_regions(drawn)) == 40


@pytest.mark.parametrize("labels", [[], [1, 3, 1]])
def test_nothing_to_learn_keeps_the_graph_whole(
    head: KeypointHead,
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    labels: list[int],
) -> None:
    loss = head.losses(features(generator), samples(make_boxes, generator, len(labels), labels))[
        "keypoint"
    ]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head.parameters())


def test_predictions(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    boxes = make_boxes(6, 96, 96, generator)
    found = Regions(
        boxes, torch.tensor([0, 0, 0, 1, 1, 1]), torch.ones(6), torch.tensor([0, 1, 2, 2, 1, 0])
    )
    with torch.no_grad():
        points = head.predict(features(generator), found, torch.tensor([[96, 96]] * 2)).keypoints
    assert points is not None
    there = points[..., 2] > 0
    assert there.tolist() == [[label == 0] * 3 + [label == 2] * 2 for label in (0, 1, 2, 2, 1, 0)]
    for box, own, seen in zip(boxes, points, there, strict=True):
        assert (own[seen, :2] >= box[:2] - 1e-3).all()
        assert (own[seen, :2] <= torch.maximum(box[2:], box[:2] + 1) + 1e-3).all()
    none = head.predict(
        features(generator), found[torch.zeros(0, dtype=torch.int64)], torch.tensor([[96, 96]] * 2)
    )
    assert none.keypoints is not None
    assert none.keypoints.shape == (0, 5, 3)


@pytest.mark.parametrize("ranges", [None, [], [(0, 0), (0, 0)]])
def test_no_points_at_all(ranges: Any) -> None:
    with pytest.raises(UserError, match="needs a category with keypoints"):
        KeypointHead(MultiLevelRoIAlign({"p2": 4}, 14), ranges)


def test_boxes_alone(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    drawn = samples(make_boxes, generator)
    bare = Targets(
        drawn.targets.boxes, drawn.targets.labels, drawn.targets.image_index, drawn.targets.iscrowd
    )
    with pytest.raises(UserError, match="needs keypoints, but the data has none"):
        head.losses(
            features(generator),
            Samples(
                drawn.boxes, drawn.image_index, drawn.labels, drawn.matched_gt, 3, bare, drawn.seeds
            ),
        )


def test_the_last_layers_are_torchvisions(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    """Guards against another interpolation at the borders of the heatmaps."""
    theirs = KeypointRCNNPredictor(8, 5)
    theirs.kps_score_lowres.load_state_dict(head.deconv.state_dict())
    maps, boxes, image = features(generator), make_boxes(6, 96, 96, generator), torch.arange(6) % 2
    with torch.no_grad():
        wanted = theirs(head.convs(head.pooler(maps, boxes, image)))
        assert torch.allclose(head(maps, boxes, image), wanted, atol=1e-5)


def test_the_weight_of_the_loss(
    head: KeypointHead, make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    maps, drawn = features(generator), samples(make_boxes, generator)
    once = head.losses(maps, drawn)["keypoint"].item()
    head.loss_weight = 2.5
    assert head.losses(maps, drawn)["keypoint"].item() == pytest.approx(2.5 * once)
