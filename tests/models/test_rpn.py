"""The region proposal network: anchor order, proposals, losses on known cases, no objects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.rpn import RPNHead as TorchvisionHead

from maskseg.errors import UserError
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.rpn import RPN, AnchorSampler, ProposalLimits, RPNHead
from maskseg.ops import boxes as box_ops
from maskseg.structures import Batch, Targets

STRIDES = {"p3": 8, "p4": 16}
SIZES = ((16,), (48,))
CHANNELS = 16
LIMITS = ProposalLimits(pre_nms_top_n=60, post_nms_top_n=40)


def both(seed: int = 0) -> tuple[RPN, RegionProposalNetwork]:
    """Return our RPN and torchvision's with the same weights."""
    torch.manual_seed(seed)
    theirs = RegionProposalNetwork(
        TorchvisionAnchors(SIZES, ((0.5, 1.0, 2.0),) * 2),
        TorchvisionHead(CHANNELS, 3, conv_depth=2),
        fg_iou_thresh=0.6,
        bg_iou_thresh=0.3,
        batch_size_per_image=10**6,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 80, "testing": 60},
        post_nms_top_n={"training": 50, "testing": 40},
        nms_thresh=0.7,
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0, 0.1)
    ours = RPN(
        RPNHead(CHANNELS, 3, layers=2),
        AnchorGenerator(SIZES, rounded=True, stride_from="image"),
        STRIDES,
        sampler=AnchorSampler(positive_iou=0.6, num_samples=10**6),
        train_limits=ProposalLimits(pre_nms_top_n=80, post_nms_top_n=50),
        test_limits=LIMITS,
        min_size=1e-3,
        beta=1 / 9,
    )
    names = {"cls_logits": "objectness", "bbox_pred": "deltas"}
    state = {}
    for name, tensor in theirs.head.state_dict().items():
        first, *rest = name.split(".")
        state[
            f"convs.{rest[0]}.{rest[-1]}" if first == "conv" else f"{names[first]}.{rest[-1]}"
        ] = tensor
    ours.head.load_state_dict(state)
    return ours.eval(), theirs.eval()


def maps_of(batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, _, height, width = batch.images.shape
    return {
        k: torch.randn((n, CHANNELS, height // s, width // s), generator=generator)
        for k, s in STRIDES.items()
    }


TRUTH = [
    [(10, 12, 40, 50, 0), (60, 20, 76, 30, 1)],
    [(5, 5, 60, 60, 2), (30, 50, 50, 80, 0), (2, 90, 20, 100, 1)],
]


@pytest.mark.parametrize("training", [False, True])
def test_proposals_and_losses_equal_torchvision(
    make_batch: Callable[..., Batch], training: bool
) -> None:
    ours, theirs = both()
    ours.train(training)
    theirs.train(training)
    batch = make_batch([(100, 96), (128, 80)], TRUTH)
    features = maps_of(batch)
    proposals, losses = ours(features, batch)
    targets = [
        {"boxes": torch.tensor([row[:4] for row in rows], dtype=torch.float32)} for rows in TRUTH
    ]
    images = ImageList(batch.images, [(100, 96), (128, 80)])
    wanted, their_losses = theirs(images, features, targets if training else None)
    assert (
        [int((proposals.image_index == i).sum()) for i in range(2)]
        == [len(w) for w in wanted]
        == [50 if training else 40] * 2
    )
    torch.testing.assert_close(proposals.boxes, torch.cat(wanted), rtol=0, atol=1e-3)
    if training:
        torch.testing.assert_close(losses["rpn_objectness"], their_losses["loss_objectness"])
        torch.testing.assert_close(losses["rpn_box"], their_losses["loss_rpn_box_reg"])


def test_proposals_are_sorted_clipped_and_apart(make_batch: Callable[..., Batch]) -> None:
    ours, _ = both()
    proposals, losses = ours(
        maps_of(make_batch([(100, 96), (128, 80)])), make_batch([(100, 96), (128, 80)])
    )
    assert losses == {}
    assert (proposals.image_index.diff() >= 0).all()
    for i, (height, width) in enumerate([(100, 96), (128, 80)]):
        own = proposals[proposals.image_index == i]
        assert (own.scores.diff() <= 0).all()
        assert own.scores.min() >= 0
        assert own.scores.max() <= 1
        assert own.boxes.min() >= 0
        assert own.boxes[:, 0::2].max() <= width
        assert own.boxes[:, 1::2].max() <= height
    assert not proposals.boxes.requires_grad


def test_suppression_is_within_a_level(make_batch: Callable[..., Batch]) -> None:
    """NMS is per level: two levels with equal anchors propose the same box twice."""
    head = FixedHead()
    rpn = RPN(
        head, AnchorGenerator(((16,), (16,)), aspect_ratios=(1.0,)), {"a": 32, "b": 32}
    ).eval()
    batch = make_batch([(64, 64)])
    maps = {k: torch.zeros((1, 1, 2, 2)) for k in ("a", "b")}
    proposals, _ = rpn(maps, batch)
    assert len(proposals) == 8
    rpn.anchors = AnchorGenerator(((16, 16), (16, 16)), aspect_ratios=(1.0,))
    head.per_cell = 2
    assert len(rpn(maps, batch)[0]) == 8


class FixedHead(nn.Module):
    """A head with the given logits and deltas (default: zeros) as parameters."""

    def __init__(self, logits: Tensor | None = None, deltas: Tensor | None = None) -> None:
        super().__init__()
        self.per_cell = 1
        self.logits = None if logits is None else nn.Parameter(logits)
        self.deltas = None if deltas is None else nn.Parameter(deltas)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        n, _, h, w = feature.shape
        logits = torch.zeros((n, h * w * self.per_cell)) if self.logits is None else self.logits
        return logits, torch.zeros((*logits.shape, 4)) if self.deltas is None else self.deltas


def test_head_order_is_the_anchors_order() -> None:
    """Each of the two anchors of a cell uses its own channels."""
    head = RPNHead(1, per_cell=2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.convs[0].weight[0, 0, 1, 1] = 1
        head.objectness.weight[:, 0, 0, 0] = torch.tensor([1.0, 10.0])
        head.deltas.weight[:, 0, 0, 0] = torch.arange(8.0) + 1
    feature = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[None, None]
    logits, deltas = head(feature)
    assert logits.tolist() == [[1, 10, 2, 20, 3, 30, 4, 40, 5, 50, 6, 60]]
    assert deltas.shape == (1, 12, 4)
    assert deltas[0, 3].tolist() == [10, 12, 14, 16]  # second anchor of the second cell
    half = RPNHead(1, 2).to(torch.bfloat16)(feature.to(torch.bfloat16))
    assert {half[0].dtype, half[1].dtype} == {torch.float32}


def grid_rpn(logits: Tensor, deltas: Tensor | None = None, **settings: object) -> RPN:
    """4 x 4 anchors of 16 pixels a side that tile a 64-pixel image."""
    return RPN(
        FixedHead(logits, deltas),
        AnchorGenerator(((16,),), aspect_ratios=(1.0,), offset=0.5),
        {"p4": 16},
        **settings,
    )  # type: ignore[arg-type]


MAPS = {"p4": torch.zeros((1, 1, 4, 4))}


def test_losses_literal(make_batch: Callable[..., Batch]) -> None:
    """A ground truth is anchor 5, shifted by 4 pixels: it is positive, the 15 others negative."""
    batch = make_batch([(64, 64)], [[(20, 16, 36, 32, 0)]])
    rpn = grid_rpn(
        torch.zeros((1, 16)),
        torch.zeros((1, 16, 4)),
        sampler=AnchorSampler(positive_iou=0.5, negative_iou=0.3),
    )
    losses = rpn(MAPS, batch)[1]
    assert losses["rpn_objectness"].item() == pytest.approx(0.693147, abs=1e-5)
    assert losses["rpn_box"].item() == pytest.approx(
        (4 / 16) / 16, abs=1e-6
    )  # L1 of dx only, over 16 sampled anchors
    sum(losses.values()).backward()
    assert torch.sign(rpn.head.logits.grad)[0].tolist() == [
        -1.0 if i == 5 else 1.0 for i in range(16)
    ]
    assert torch.nonzero(rpn.head.deltas.grad[0]).tolist() == [[5, 0]]


def test_normalize_by_quota(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([(64, 64)], [[(20, 16, 36, 32, 0)]])
    sampler = AnchorSampler(num_samples=256)
    sampled, quota = (
        grid_rpn(torch.zeros((1, 16)), sampler=sampler, normalize_by=divisor)(MAPS, batch)[1]
        for divisor in ("sampled", "quota")
    )
    for name in sampled:
        assert quota[name].item() == pytest.approx(sampled[name].item() * 16 / 256)


def test_beta_of_the_smooth_loss(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([(64, 64)], [[(20, 16, 36, 32, 0)]])
    sampler = AnchorSampler(positive_iou=0.5)
    losses = grid_rpn(torch.zeros((1, 16)), sampler=sampler, beta=1.0)(MAPS, batch)[1]
    assert losses["rpn_box"].item() == pytest.approx(0.5 * 0.25**2 / 16)


def sampled_anchors(rpn: RPN, batch: Batch) -> list[int]:
    """Return the sign of each anchor's gradient: -1 positive, 1 negative, 0 not sampled."""
    rpn.head.logits.grad = None
    rpn(MAPS, batch)[1]["rpn_objectness"].backward()
    return [int(g) for g in torch.sign(rpn.head.logits.grad)[0].tolist()]


def test_crowds_are_no_truth_and_what_they_cover_is_no_negative(
    make_batch: Callable[..., Batch],
) -> None:
    crowd = (0, 0, 40, 64, 0, True)  # covers the first two columns, half of the third
    rpn = grid_rpn(torch.zeros((1, 16)))
    assert sampled_anchors(rpn, make_batch([(64, 64)], [[crowd]])) == [0, 0, 1, 1] * 4
    wider = (0, 0, 41, 64, 0, True)
    assert sampled_anchors(rpn, make_batch([(64, 64)], [[wider]])) == [0, 0, 0, 1] * 4
    # A ground truth inside the crowd still counts.
    assert sampled_anchors(rpn, make_batch([(64, 64)], [[crowd, (16, 16, 32, 32, 1)]])) == [
        0,
        0,
        1,
        1,
        0,
        -1,
        1,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
        1,
        1,
    ]
    # A ground truth with the same box as the crowd is positive, not ignored.
    same = (16, 16, 32, 32, 0, True)
    assert sampled_anchors(rpn, make_batch([(64, 64)], [[same, same[:5]]]))[5] == -1


@pytest.mark.parametrize(
    "truth",
    [
        [[], []],
        [[(0, 0, 128, 128, 0, True)], [(0, 0, 128, 128, 0, True)]],
        [[], [(5, 5, 60, 60, 1)]],
    ],
)
def test_without_objects_the_graph_is_whole(
    make_batch: Callable[..., Batch],
    unreached: Callable[[nn.Module], list[str]],
    truth: list[list[tuple[float, ...]]],
) -> None:
    ours, _ = both()
    batch = make_batch([(128, 128)] * 2, truth)
    losses = ours.train()(maps_of(batch), batch)[1]
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert unreached(ours) == []
    objects = any(row[5:] == () or not row[5] for rows in truth for row in rows)
    assert (losses["rpn_box"].item() > 0) == objects


def test_a_truth_without_area_is_harmless(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([(64, 64)], [[(20, 20, 20, 40, 0), (30, 30, 30, 30, 1)]])
    rpn = grid_rpn(torch.zeros((1, 16)))
    assert sampled_anchors(rpn, batch) == [1] * 16
    assert rpn(MAPS, batch)[1]["rpn_box"].item() == 0


def test_broken_and_small_boxes_are_no_proposals(make_batch: Callable[..., Batch]) -> None:
    logits, deltas = torch.zeros((1, 16)), torch.zeros((1, 16, 4))
    logits[0, 1] = float("nan")
    deltas[0, 2, 0] = float("inf")
    deltas[0, 3, 0] = 10.0  # out of the image
    deltas[0, 4, 2] = -3.0  # 16 -> 0.8 pixels wide
    batch = make_batch([(64, 64)])
    everything = grid_rpn(logits, deltas).eval()(MAPS, batch)[0]
    assert len(everything) == 13
    assert torch.isfinite(everything.boxes).all()
    assert len(grid_rpn(logits, deltas, min_size=1.0).eval()(MAPS, batch)[0]) == 12


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_an_infinite_logit_is_no_certain_proposal(
    make_batch: Callable[..., Batch], value: float
) -> None:
    # Guards against a test of the sigmoid, which is finite.
    logits = torch.zeros((1, 16))
    logits[0, 5] = value
    found = grid_rpn(logits).eval()(MAPS, make_batch([(64, 64)]))[0]
    assert len(found) == 15
    assert found.scores.tolist() == [0.5] * 15


def test_no_proposal_survives(make_batch: Callable[..., Batch]) -> None:
    rpn = grid_rpn(torch.zeros((1, 16)), min_size=1000.0).eval()
    proposals, losses = rpn(MAPS, make_batch([(64, 64)], [[(20, 16, 36, 32, 0)]]))
    assert len(proposals) == 0
    assert proposals.boxes.shape == (0, 4)
    assert all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize(("training", "count"), [(True, 3), (False, 5)])
def test_limits_of_training_and_of_testing(
    make_batch: Callable[..., Batch], training: bool, count: int
) -> None:
    rpn = grid_rpn(
        torch.arange(16.0)[None],
        train_limits=ProposalLimits(pre_nms_top_n=4, post_nms_top_n=3),
        test_limits=ProposalLimits(pre_nms_top_n=6, post_nms_top_n=5),
    ).train(training)
    proposals, _ = rpn(MAPS, make_batch([(64, 64)]))
    assert len(proposals) == count
    torch.testing.assert_close(proposals.scores, torch.arange(15.0, 15.0 - count, -1).sigmoid())
    few = grid_rpn(
        torch.arange(16.0)[None], test_limits=ProposalLimits(pre_nms_top_n=2, post_nms_top_n=5)
    ).eval()
    assert len(few(MAPS, make_batch([(64, 64)]))[0]) == 2


def test_quota_and_share_of_positives(make_batch: Callable[..., Batch]) -> None:
    truth = [
        (x, y, x + 16, y + 16, 0) for x in range(0, 64, 16) for y in range(0, 64, 32)
    ]  # eight anchors are positive
    batch = make_batch([(64, 64)], [truth])
    sampler = AnchorSampler(num_samples=8, positive_fraction=0.25)
    signs = sampled_anchors(grid_rpn(torch.zeros((1, 16)), sampler=sampler), batch)
    assert (signs.count(-1), signs.count(1)) == (2, 6)


def test_matched_truth_is_the_anchors_own_image(make_targets: Callable[..., Targets]) -> None:
    """Two images with the same anchors: the anchors are trained on the boxes of their own image."""
    targets = make_targets(
        [[(0, 0, 16, 16, 0)], [(16, 16, 32, 32, 0), (48, 48, 64, 62, 0)]], [(64, 64)] * 2
    )
    rpn = grid_rpn(torch.zeros((1, 16)))
    anchors = rpn.anchors([(4, 4)], [16], (64, 64), torch.device("cpu"))[0]
    deltas = torch.zeros((2, 16, 4))
    deltas[1, 15] = box_ops.encode(
        torch.tensor([[48.0, 48.0, 64.0, 62.0]]), anchors[15:], (1, 1, 1, 1)
    )[0]
    losses = rpn.losses(torch.zeros((2, 16)), deltas, anchors, targets, torch.arange(2))
    assert losses["rpn_box"].item() == pytest.approx(0, abs=1e-6)
    assert (
        rpn.losses(torch.zeros((2, 16)), deltas.flip(0), anchors, targets, torch.arange(2))[
            "rpn_box"
        ].item()
        > 0.001
    )
    assert torchvision.ops.box_iou(anchors[15:], targets.boxes[2:]).item() > 0.7


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match="sampled or quota, not 'mean'"):
        grid_rpn(torch.zeros((1, 16)), normalize_by="mean")
    with pytest.raises(UserError, match="per_cell must be 2"):
        RPN(RPNHead(CHANNELS, 3), AnchorGenerator(SIZES, aspect_ratios=(0.5, 1.0)), STRIDES)


def test_the_start_of_the_weights() -> None:
    """Standard deviation 0.01 and zero bias, as in torchvision and detectron2."""
    head = RPNHead(64, 3, layers=2)
    for layer in (*head.convs, head.objectness, head.deltas):
        assert isinstance(layer, nn.Conv2d)
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert layer.bias is not None
        assert not layer.bias.any()


def test_a_proposal_of_just_the_least_size_is_kept(make_batch: Callable[..., Batch]) -> None:
    """Like torchvision's `remove_small_boxes`."""
    batch = make_batch([(64, 64)])
    found = grid_rpn(torch.zeros((1, 16))).eval()(MAPS, batch)[0]
    least = (found.boxes[:, 2:] - found.boxes[:, :2]).min().item()
    assert len(grid_rpn(torch.zeros((1, 16)), min_size=least).eval()(MAPS, batch)[0]) == len(found)
    assert len(grid_rpn(torch.zeros((1, 16)), min_size=least + 0.01).eval()(MAPS, batch)[0]) < len(
        found
    )
