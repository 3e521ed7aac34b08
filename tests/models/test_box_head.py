"""The box head: losses and inference against torchvision's functions, and without regions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from maskseg.models import box_head
from maskseg.models.box_head import BoxHead, BoxHeadMLP
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.ops.boxes import encode
from maskseg.structures import Regions, Samples, Targets

K = 4
SIZES = [(100, 90), (80, 128)]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
TRUTH = [[(0, 0, 40, 50, 3)], [(50, 50, 60, 80, 1), (0, 0, 20, 20, 0)]]


def classifier(scale: float = 1.0, **settings: object) -> BoxHead:
    torch.manual_seed(0)
    head = BoxHead(MultiLevelRoIAlign({"p2": 4, "p3": 8}, 7), BoxHeadMLP(8, 7, 32), K, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        head.cls_score.weight *= 100 * scale
        head.bbox_pred.weight *= 300 * scale
    return head


@pytest.fixture
def features(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "p2": torch.randn((2, 8, 32, 32), generator=generator),
        "p3": torch.randn((2, 8, 16, 16), generator=generator),
    }


@pytest.fixture
def samples(
    make_targets: Callable[..., Targets],
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
) -> Samples:
    boxes = torch.cat([make_boxes(10, *size, generator) for size in SIZES])
    labels, matched = torch.full((20,), K), torch.zeros(20, dtype=torch.int64)
    labels[:3], labels[10:13], labels[13:15], matched[10:13], matched[13:15] = 3, 1, 0, 1, 2
    return Samples(
        boxes,
        torch.tensor([0] * 10 + [1] * 10),
        labels,
        matched,
        K,
        make_targets(TRUTH, SIZES),
        torch.arange(2),
    )


def test_losses_equal_torchvision(features: dict[str, Tensor], samples: Samples) -> None:
    head = classifier(beta=1 / 9)
    found = head.losses(features, samples)
    logits, deltas = head(features, samples.boxes, samples.image_index)
    # Background is class 0 in torchvision, which also expects box deltas for it.
    labels = torch.where(samples.labels == K, 0, samples.labels + 1)
    wanted = BoxCoder(WEIGHTS).encode([samples.targets.boxes[samples.matched_gt]], [samples.boxes])[
        0
    ]
    padded = torch.cat([torch.zeros((20, 4)), deltas.flatten(1)], dim=1)
    classes, boxes = fastrcnn_loss(logits.roll(1, dims=1), padded, [labels], [wanted])
    torch.testing.assert_close(found["box_class"], classes)
    torch.testing.assert_close(found["box_regression"], boxes)
    assert boxes.item() > 0.1


def test_beta_zero_is_the_l1_distance(features: dict[str, Tensor], samples: Samples) -> None:
    head = classifier()
    nn.init.zeros_(head.bbox_pred.weight)
    own = samples.foreground()
    wanted = encode(samples.targets.boxes[own.matched_gt], own.boxes, WEIGHTS).abs().sum() / 20
    torch.testing.assert_close(head.losses(features, samples)["box_regression"], wanted)


def proposals_of(
    make_boxes: Callable[..., Tensor], generator: torch.Generator, count: int = 60
) -> Regions:
    boxes = torch.cat([make_boxes(count, *size, generator) for size in SIZES])
    return Regions(boxes, torch.tensor([0] * count + [1] * count), torch.ones(2 * count))


def test_predict_equals_torchvision(
    features: dict[str, Tensor], make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    head = classifier(min_size=1e-2, max_detections=25, score_threshold=0.1, nms_threshold=0.4)
    proposals = proposals_of(make_boxes, generator)
    theirs = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.1, 0.4, 25)
    with torch.no_grad():
        found = head.predict(features, proposals, torch.tensor(SIZES))
        logits, deltas = head(features, proposals.boxes, proposals.image_index)
        padded = torch.cat([torch.zeros((120, 4)), deltas.flatten(1)], dim=1)
        boxes, scores, labels = theirs.postprocess_detections(
            logits.roll(1, dims=1), padded, list(proposals.boxes.split(60)), SIZES
        )
    assert (
        [len(b) for b in boxes]
        == [int((found.image_index == i).sum()) for i in range(2)]
        == [25, 25]
    )
    assert found.labels is not None
    assert found.labels.tolist() == (torch.cat(labels) - 1).tolist()
    assert len(found.labels.unique()) > 1
    torch.testing.assert_close(found.boxes, torch.cat(boxes), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.scores, torch.cat(scores))


def test_detections_are_by_image_and_descending_score(
    features: dict[str, Tensor], make_boxes: Callable[..., Tensor], generator: torch.Generator
) -> None:
    found = classifier().predict(features, proposals_of(make_boxes, generator), torch.tensor(SIZES))
    assert (found.image_index.diff() >= 0).all()
    assert all((found.scores[found.image_index == i].diff() <= 0).all() for i in range(2))
    assert found.scores.min() > 0.05


def test_class_agnostic_has_one_box_for_all_classes(
    features: dict[str, Tensor],
    samples: Samples,
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
) -> None:
    head = classifier(class_agnostic=True)
    assert head.bbox_pred.out_features == 4
    logits, deltas = head(features, samples.boxes, samples.image_index)
    assert logits.shape == (20, K + 1)
    assert deltas.shape == (20, 1, 4)
    wide = classifier()
    wide.load_state_dict(
        head.state_dict()
        | {
            "bbox_pred.weight": head.bbox_pred.weight.repeat(K, 1),
            "bbox_pred.bias": head.bbox_pred.bias.repeat(K),
        }
    )
    torch.testing.assert_close(head.losses(features, samples), wide.losses(features, samples))
    proposals = proposals_of(make_boxes, generator)
    ours, theirs = (h.predict(features, proposals, torch.tensor(SIZES)) for h in (head, wide))
    assert len(ours) > 50
    torch.testing.assert_close(ours.boxes, theirs.boxes)


@pytest.mark.parametrize("size", [1, 4])
def test_the_best_candidates_give_what_all_give(
    monkeypatch: pytest.MonkeyPatch,
    features: dict[str, Tensor],
    make_boxes: Callable[..., Tensor],
    generator: torch.Generator,
    size: int,
) -> None:
    """An image with few proposals and one with many; scores tie.

    There are more or fewer detections than initial candidates.
    """
    head = classifier(max_detections=12, score_threshold=0.0, nms_threshold=0.3)
    proposals = proposals_of(make_boxes, generator)[
        torch.tensor([*range(57, 60), *range(60, 120), *range(60, 90)]).sort().values
    ]
    with torch.no_grad():
        wanted = head.predict(features, proposals, torch.tensor(SIZES))
        candidates: list[int] = []
        detections = head._detections
        monkeypatch.setattr(
            head, "_detections", lambda *args: candidates.append(len(args[-1])) or detections(*args)
        )
        monkeypatch.setattr(box_head, "INITIAL_CANDIDATES", size)
        monkeypatch.setattr(box_head, "CANDIDATE_GROWTH", 2)
        found = head.predict(features, proposals, torch.tensor(SIZES))
    assert len(candidates) > 1
    assert candidates[0] < 30 * size
    assert torch.bincount(found.image_index).tolist() == [
        int((wanted.image_index == i).sum()) for i in range(2)
    ]
    for a, b in (
        (found.image_index, wanted.image_index),
        (found.labels, wanted.labels),
        (found.scores, wanted.scores),
    ):
        assert torch.equal(a, b)
    torch.testing.assert_close(found.boxes, wanted.boxes)


def test_deltas_of_single_pairs_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    head = classifier()
    x, row, label = (
        torch.randn((20, 32), generator=generator),
        torch.arange(0, 20, 2),
        torch.randint(K, (10,), generator=generator),
    )
    sides, found, gradients = torch.randn((10, 4), generator=generator), [], []
    for pair in (1000, 0):  # all pairs in one product, or gathered
        monkeypatch.setattr(box_head, "GATHER_COST", pair)
        monkeypatch.setattr(box_head, "GATHER_CHUNK", 3)
        found.append(head._deltas(x, row, label))
        gradients.append(
            torch.autograd.grad(
                (found[-1] * sides).sum(), (head.bbox_pred.weight, head.bbox_pred.bias)
            )
        )
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


def test_threshold_keeps_several_classes_of_a_region(features: dict[str, Tensor]) -> None:
    head = classifier(
        score_threshold=0.15, nms_threshold=0.5
    )  # one class does not suppress another
    nn.init.zeros_(head.cls_score.weight)
    nn.init.zeros_(head.bbox_pred.weight)
    proposals = Regions(torch.tensor([[0.0, 0.0, 40.0, 40.0]]), torch.tensor([1]), torch.ones(1))
    found = head.predict(
        features, proposals, torch.tensor(SIZES)
    )  # every class has a score of 1 / 5
    assert sorted(found.labels.tolist()) == [0, 1, 2, 3]
    assert found.image_index.tolist() == [1] * 4
    head.score_threshold = 0.21
    assert len(head.predict(features, proposals, torch.tensor(SIZES))) == 0


def test_a_score_at_the_threshold_is_no_detection() -> None:
    head = BoxHead(nn.Identity(), BoxHeadMLP(1, 1, 1), 1, score_threshold=0.5)  # type: ignore[arg-type]
    head.pooler = Pooled()
    for layer in (head.cls_score, head.bbox_pred):
        nn.init.zeros_(layer.weight)
    regions = Regions(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), torch.tensor([0]), torch.ones(1))
    sizes = torch.tensor([[16, 16]])
    assert len(head.predict({}, regions, sizes)) == 0  # both classes have the score 0.5
    head.score_threshold = 0.499
    assert len(head.predict({}, regions, sizes)) == 1


def test_equal_boxes_of_two_images_are_two_detections() -> None:
    # Guards against suppression across images.
    head = BoxHead(nn.Identity(), BoxHeadMLP(1, 1, 1), 1, score_threshold=0.1)  # type: ignore[arg-type]
    head.pooler = Pooled()
    for layer in (head.cls_score, head.bbox_pred):
        nn.init.zeros_(layer.weight)
    regions = Regions(
        torch.tensor([[0.0, 0.0, 8.0, 8.0]] * 4), torch.tensor([0, 0, 1, 2]), torch.ones(4)
    )
    found = head.predict({}, regions, torch.tensor([[16, 16]] * 3))
    assert found.image_index.tolist() == [0, 1, 2]


class Pooled(nn.Module):
    """A pooler that returns ones."""

    def forward(self, features: dict[str, Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        del features, image_index
        return torch.ones((len(boxes), 1, 1, 1))


def test_the_start_of_the_weights() -> None:
    """Fast R-CNN, section 3.1: standard deviations 0.01 and 0.001, as in torchvision."""
    head = BoxHead(nn.Identity(), BoxHeadMLP(4, 7, 256), 80)
    assert head.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not head.cls_score.bias.any()
    assert not head.bbox_pred.bias.any()


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("kind", ["none", "background"])
def test_without_objects_the_graph_is_whole(
    features: dict[str, Tensor],
    samples: Samples,
    unreached: Callable[[nn.Module], list[str]],
    kind: str,
    agnostic: bool,
) -> None:
    head = classifier(class_agnostic=agnostic)
    leaves = {k: v.requires_grad_() for k, v in features.items()}
    rows = torch.nonzero(samples.labels == K).squeeze(1)[: 0 if kind == "none" else 5]
    few = Samples(
        samples.boxes[rows],
        samples.image_index[rows],
        samples.labels[rows],
        samples.matched_gt[rows],
        K,
        samples.targets,
        samples.seeds,
    )
    losses = head.losses(leaves, few)
    assert all(torch.isfinite(v) for v in losses.values())
    assert losses["box_regression"].item() == 0
    assert (losses["box_class"].item() > 0) == (kind == "background")
    sum(losses.values()).backward()
    assert unreached(head) == []
    assert all(v.grad is not None for v in leaves.values())


def test_zero_proposals_give_zero_detections(features: dict[str, Tensor]) -> None:
    nothing = Regions(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    found = classifier().predict(features, nothing, torch.tensor(SIZES))
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)
    assert found.labels is not None
    assert found.labels.dtype == torch.int64


def test_boxes_outside_the_image_are_dropped(features: dict[str, Tensor]) -> None:
    head = classifier(score_threshold=0.0, nms_threshold=1.0)
    nn.init.zeros_(head.bbox_pred.weight)
    boxes = torch.tensor(
        [[92.0, 10.0, 99.0, 20.0], [80.0, 10.0, 99.0, 20.0], [89.5, 10.0, 99.0, 20.0]]
    )
    proposals = Regions(boxes, torch.zeros(3, dtype=torch.int64), torch.ones(3))
    found = head.predict(features, proposals, torch.tensor(SIZES))
    assert found.boxes.unique(dim=0).tolist() == [
        [80.0, 10.0, 90.0, 20.0],
        [89.5, 10.0, 90.0, 20.0],
    ]
    head.min_size = 1.0
    assert head.predict(features, proposals, torch.tensor(SIZES)).boxes.unique(dim=0).tolist() == [
        [80.0, 10.0, 90.0, 20.0]
    ]


def test_mlp_has_the_given_number_of_layers() -> None:
    mlp = BoxHeadMLP(8, 7, 32, layers=3)
    assert [(m.in_features, m.out_features) for m in mlp.layers] == [
        (392, 32),
        (32, 32),
        (32, 32),
    ]
    assert mlp(torch.zeros((0, 8, 7, 7))).shape == (0, 32)
    assert mlp(torch.randn((5, 8, 7, 7))).min() == 0  # the last layer has a ReLU, too


@pytest.mark.parametrize("norm", [None, "BN"])
def test_convolutions_before_the_layers_equal_torchvision(norm: str | None) -> None:
    torch.manual_seed(0)
    ours = BoxHeadMLP(8, 7, 32, layers=1, convs=2, channels=6, norm=norm).eval()
    theirs = FastRCNNConvFCHead(
        (8, 7, 7), [6, 6], [32], norm_layer=nn.BatchNorm2d if norm else None
    ).eval()
    for i, module in enumerate((*ours.convs, ours.layers[0])):
        theirs[i if i < 2 else 3].load_state_dict(module.state_dict())
    pooled = torch.randn((5, 8, 7, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(pooled), theirs(pooled))
    assert ours(pooled[:0]).shape == (0, 32)
    assert ours.train()(pooled).grad_fn is not None
    assert not list(BoxHeadMLP(8).convs)
