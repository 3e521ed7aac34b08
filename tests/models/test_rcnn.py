"""GeneralizedRCNN: padding, batches, optional stages, and images without objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskseg.masks.predicted import MaskGrids
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.region_sampler import RegionSampler
from maskseg.models.rpn import RPN, RPNHead
from maskseg.structures import Batch, Outputs, Regions

Model = Callable[..., GeneralizedRCNN]
Batches = Callable[..., Batch]
TERMS = {"rpn_objectness", "rpn_box", "box_class", "box_regression", "mask"}
SIZES = [(90, 120), (64, 100)]
TRUTH = [
    [(10, 10, 60, 70, 0), (50, 20, 110, 80, 2), (5, 60, 40, 88, 1, True)],
    [(20, 5, 90, 50, 1)],
]


def assert_same_detections(found: Regions, wanted: Regions, atol: float) -> None:
    assert found.labels is not None
    assert wanted.labels is not None
    assert isinstance(found.masks, MaskGrids)
    assert isinstance(wanted.masks, MaskGrids)
    assert len(found) == len(wanted) > 20
    assert found.labels.tolist() == wanted.labels.tolist()
    torch.testing.assert_close(found.boxes, wanted.boxes, rtol=0, atol=atol)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=atol)
    torch.testing.assert_close(found.masks.grids, wanted.masks.grids, rtol=0, atol=atol)


def test_losses_reach_every_parameter(
    make_model: Model, make_batch: Batches, unreached: Callable[[nn.Module], list[str]]
) -> None:
    model = make_model().train()
    losses = model(make_batch(SIZES, TRUTH))
    assert set(losses) == TERMS
    assert all(v.shape == () and torch.isfinite(v) and v.item() > 0 for v in losses.values())
    sum(losses.values()).backward()
    assert unreached(model) == []


def test_losses_fall_when_one_batch_is_learnt(make_model: Model, make_batch: Batches) -> None:
    model, batch = make_model().train(), make_batch(SIZES, TRUTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    history = []
    for _ in range(12):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert max(history[-3:]) < 0.75 * history[0]


EMPTY: dict[str, list[list[tuple[float, ...]]]] = {
    "no objects": [[], []],
    "one image without": [[(10, 10, 60, 70, 0)], []],
    "all crowd": [[(0, 0, 120, 90, 0, True)], [(0, 0, 100, 64, 1, True), (5, 5, 10, 10, 0, True)]],
    "no area": [[(10, 10, 10, 40, 0)], [(5, 5, 5, 5, 1)]],
}


class NoProposals(nn.Module):
    """A proposer without proposals, but with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(
        self, features: dict[str, Tensor], batch: Batch
    ) -> tuple[Regions, dict[str, Tensor]]:
        del batch
        loss = self.weight * features["p6"].sum() * 0
        return Regions(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros(0)), {
            "proposer": loss
        }


@pytest.mark.parametrize(
    ("norm", "agnostic", "append"),
    [("GN", False, False), ("GN", True, True), ("FrozenBN", False, True)],
)
@pytest.mark.parametrize("truth", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("proposals", [True, False])
def test_the_graph_is_whole_whatever_is_missing(
    make_model: Model,
    make_batch: Batches,
    unreached: Callable[[nn.Module], list[str]],
    proposals: bool,
    truth: list[list[tuple[float, ...]]],
    norm: str,
    agnostic: bool,
    append: bool,
) -> None:
    stages: dict[str, Any] = {"sampler": RegionSampler(3, 16, append_truth=append)} | (
        {} if proposals else {"proposer": NoProposals()}
    )
    model = make_model(norm=norm, class_agnostic=agnostic, **stages).train()
    losses = model(make_batch([(32, 64), (60, 50)], truth))
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert unreached(model) == []


def test_zero_proposals_predict_nothing(make_model: Model, make_batch: Batches) -> None:
    outputs = make_model(proposer=NoProposals()).predict(make_batch(SIZES))
    found = outputs.detections
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.labels is not None
    assert found.masks is not None
    assert len(found.masks) == 0
    assert outputs.segments is None
    assert outputs.semantic == {}


def test_zero_detections_have_zero_masks(make_model: Model, make_batch: Batches) -> None:
    model = make_model()
    model.classifier.score_threshold = 1.0
    found = model.predict(make_batch(SIZES)).detections
    assert len(found) == 0
    assert found.masks is not None
    assert found.masks.to_rle() == []


def test_what_is_in_the_padding_changes_nothing(make_model: Model, make_batch: Batches) -> None:
    model, batch = make_model(), make_batch(SIZES, TRUTH)
    noise = torch.randint_like(batch.images, 256)
    for image, (height, width) in zip(noise, SIZES, strict=True):
        image[:, :height, :width] = batch.images[0 if height == 90 else 1, :, :height, :width]
    noisy = replace(batch, images=noise)
    assert not torch.equal(noisy.images, batch.images)
    assert_same_detections(model.predict(noisy).detections, model.predict(batch).detections, atol=0)
    results = []
    for one in (batch, noisy):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(model(one))
    assert results[0] == results[1]


def test_padding_is_the_mean_colour(make_model: Model, make_batch: Batches) -> None:
    """Pixels of the mean color and padding are zero; other pixels are normalized per channel."""
    seen: list[Tensor] = []

    class Eye(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            seen.append(images)
            return {}

    model = make_model(backbone=Eye(), pixel_mean=(10.0, 20.0, 30.0), pixel_std=(1.0, 2.0, 4.0))
    batch = make_batch([(3, 2)], padded=(4, 4))
    batch.images[:] = 99
    batch.images[0, :, :3, :2] = torch.tensor([10, 20, 30])[:, None, None]
    batch.images[0, :, 1, 1] = torch.tensor([12, 24, 22])
    model.features(batch)
    wanted = torch.zeros((3, 4, 4))
    wanted[:, 1, 1] = torch.tensor([2.0, 2.0, -2.0])
    assert torch.equal(seen[0][0], wanted)


def test_a_batch_gives_each_image_what_it_gets_alone(
    make_model: Model, make_batch: Batches
) -> None:
    model, batch = make_model(), make_batch(SIZES)
    together = model.predict(batch).detections
    for i in range(2):
        alone = replace(
            batch,
            images=batch.images[i : i + 1],
            sizes=batch.sizes[i : i + 1],
            original_sizes=batch.original_sizes[i : i + 1],
        )
        found = model.predict(alone).detections
        assert not found.image_index.any()
        assert_same_detections(found, together[together.image_index == i], atol=1e-4)


def test_detections_lie_in_their_image(make_model: Model, make_batch: Batches) -> None:
    found = make_model().predict(make_batch(SIZES)).detections
    assert isinstance(found.masks, MaskGrids)
    assert (found.image_index.diff() >= 0).all()
    for i, (height, width) in enumerate(SIZES):
        own = found[found.image_index == i]
        assert 20 < len(own) <= 100
        assert own.boxes[:, 2].max() <= width
        assert own.boxes[:, 3].max() <= height
        assert isinstance(own.masks, MaskGrids)
        assert own.masks.frames.unique(dim=0).tolist() == [[height, width]]


def test_predict_keeps_no_gradient_and_ignores_the_truth(
    make_model: Model, make_batch: Batches
) -> None:
    model = make_model()
    outputs = model.predict(make_batch(SIZES, TRUTH))
    found = outputs.detections
    assert isinstance(found.masks, MaskGrids)
    assert not any(t.requires_grad for t in (found.boxes, found.scores, found.masks.grids))
    assert all(p.grad is None for p in model.parameters())
    assert_same_detections(found, model.predict(make_batch(SIZES)).detections, atol=0)


def test_forward_needs_targets(make_model: Model, make_batch: Batches) -> None:
    with pytest.raises(ValueError, match="needs a batch with targets"):
        make_model()(make_batch(SIZES))


def test_validation_losses_keep_no_gradient(make_model: Model, make_batch: Batches) -> None:
    model = make_model()
    with torch.no_grad():
        losses = model(make_batch(SIZES, TRUTH))
    assert set(losses) == TERMS
    assert not any(v.requires_grad for v in losses.values())


def test_without_heads_there_are_boxes_only(make_model: Model, make_batch: Batches) -> None:
    model = make_model(heads=False)
    assert set(model(make_batch(SIZES, TRUTH))) == TERMS - {"mask"}
    found = model.predict(make_batch(SIZES)).detections
    assert len(found) > 20
    assert found.masks is None


class Dense(nn.Module):
    """A fake dense head: the mean of a level."""

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None
        return {"dense": features["p2"].mean() + len(batch)}

    def predict(self, features: dict[str, Tensor], batch: Batch) -> Tensor:
        assert batch.targets is None
        return features["p2"][:, :2]


class Segments(nn.Module):
    """A fake segmenter: one segment per image, the whole image."""

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"segments": features["p3"].mean() * 0 + batch.images.float().mean()}

    def predict(self, features: dict[str, Tensor], batch: Batch) -> Regions:
        del features
        boxes = torch.cat([torch.zeros((len(batch), 2)), batch.sizes.flip(1).float()], dim=1)
        return Regions(boxes, torch.arange(len(batch)), torch.ones(len(batch)))


class Tagger(nn.Module):
    """A fake region head: its loss is the number of samples, and it changes the scores."""

    def losses(self, features: dict[str, Tensor], samples: Any) -> dict[str, Tensor]:
        return {"tags": features["p2"].mean() * 0 + len(samples)}

    def predict(self, features: dict[str, Tensor], detections: Regions, sizes: Tensor) -> Regions:
        del features
        assert sizes.tolist() == [list(s) for s in SIZES]
        return replace(detections, scores=detections.scores + 10, masks=detections.masks)


def test_dense_heads_and_a_segmenter_are_called(make_model: Model, make_batch: Batches) -> None:
    model = make_model(dense_heads={"stuff": Dense(), "depth": Dense()}, segmenter=Segments())
    batch = make_batch(SIZES, TRUTH)
    with torch.no_grad():
        losses, features = model(batch), model.features(batch)
    assert set(losses) == TERMS | {"dense", "segments"}
    torch.testing.assert_close(losses["dense"], features["p2"].mean() + 2)
    torch.testing.assert_close(losses["segments"], batch.images.float().mean())
    outputs = model.predict(batch)
    assert isinstance(outputs, Outputs)
    assert list(outputs.semantic) == ["stuff", "depth"]
    assert torch.equal(outputs.semantic["stuff"], features["p2"][:, :2])
    assert outputs.segments is not None
    assert outputs.segments.boxes.tolist() == [[0.0, 0.0, 120.0, 90.0], [0.0, 0.0, 100.0, 64.0]]


def test_region_heads_are_called_in_order(make_model: Model, make_batch: Batches) -> None:
    mask = make_model().heads["mask"]
    model = make_model(heads=False)
    plain = model.predict(make_batch(SIZES)).detections
    model.heads = nn.ModuleDict({"tag": Tagger(), "mask": mask})
    found = model.predict(make_batch(SIZES)).detections
    torch.testing.assert_close(found.scores, plain.scores + 10)
    assert found.masks is not None
    with torch.no_grad():
        assert float(model(make_batch(SIZES, TRUTH))["tags"]) > 10


def test_state_is_weights_only_and_loads(make_model: Model, make_batch: Batches) -> None:
    """Mean and std are settings, not weights; a second model with the state predicts the same."""
    model = make_model()
    state = model.state_dict()
    assert not [k for k in state if k.startswith("pixel")]
    other = make_model()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(state)
    batch = make_batch(SIZES)
    assert_same_detections(other.predict(batch).detections, model.predict(batch).detections, atol=0)


def test_a_backbone_with_fewer_levels(make_model: Model, make_batch: Batches) -> None:
    """The proposer reads only the levels in its strides."""
    model = make_model(
        proposer=RPN(RPNHead(32), AnchorGenerator(((32,), (64,))), {"p3": 8, "p5": 32})
    )
    assert set(model(make_batch(SIZES, TRUTH))) == TERMS
