"""Values from the tests of other frameworks, for the same inputs.

Each test names its source. Random inputs follow from a seed and the order of the draws in that
framework.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maskseg.interop.detectron2 import reorder_anchors
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.box_head import BoxHead
from maskseg.models.rpn import RPN, ProposalLimits, RPNHead
from maskseg.ops import boxes as box_ops
from maskseg.structures import Batch, Regions, Samples, Targets

SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)


def draw_resnet50() -> None:
    """Draw the random numbers that detectron2 draws for the default backbone, stem to res5.

    Each convolution draws torch's default initialization; then those of a block draw He's, the
    shortcut last.
    """

    def msra(*convs: nn.Conv2d) -> None:
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")

    def conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, kernel, bias=False)

    msra(conv(3, 64, 7))
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for _ in range(blocks):
            shortcut = [conv(inputs, 4 * width, 1)] if inputs != 4 * width else []
            convs = conv(inputs, width, 1), conv(width, width, 3), conv(width, 4 * width, 1)
            msra(*convs, *shortcut)
            inputs = 4 * width


def detectron2_head(widths: list[int]) -> RPNHead:
    """Return the head with detectron2's initialization, its anchors in our order."""
    layers, inputs = [], 1024
    for width in widths:
        layers.append(nn.Conv2d(inputs, width, 3, padding=1))
        inputs = width
    per_cell = len(SIZES) * len(RATIOS)
    outputs = [nn.Conv2d(inputs, per_cell, 1), nn.Conv2d(inputs, 4 * per_cell, 1)]
    for layer in [*layers, *outputs]:
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(layer.bias, 0)
    with torch.random.fork_rng():
        head = RPNHead(8, per_cell, layers=0)
    head.convs, head.objectness, head.deltas = nn.ModuleList(layers), outputs[0], outputs[1]
    state = {f"proposer.head.{name}": tensor for name, tensor in head.state_dict().items()}
    reordered = reorder_anchors(state, len(SIZES), len(RATIOS))
    head.load_state_dict(
        {name.removeprefix("proposer.head."): tensor for name, tensor in reordered.items()}
    )
    return head


@pytest.mark.parametrize(
    ("widths", "wanted"),
    [
        ([1024], (0.08011703193, 0.101470276)),  # tests/modeling/test_rpn.py: RPNTest.test_rpn
        ([64] * 5, (0.08122821152, 0.10064548254)),  # RPNTest.test_rpn_larger_num_convs
    ],
)
def test_rpn_of_detectron2(widths: list[int], wanted: tuple[float, float]) -> None:
    torch.manual_seed(121)
    draw_resnet50()
    head = detectron2_head(widths)
    torch.rand(2, 20, 30)
    features = {"c4": torch.rand(2, 1024, 1, 2)}
    rpn = RPN(
        head,
        AnchorGenerator([list(SIZES)], RATIOS),
        {"c4": 16},
        train_limits=ProposalLimits(pre_nms_top_n=12000, post_nms_top_n=2000),
        normalize_by="quota",
    )
    boxes = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0]])
    targets = Targets(
        boxes,
        torch.zeros(2, dtype=torch.int64),
        torch.tensor([0, 1]),
        torch.zeros(2, dtype=torch.bool),
    )
    sizes = torch.tensor([[10, 10], [20, 30]])
    batch = Batch(
        torch.zeros((2, 3, 20, 30), dtype=torch.uint8), sizes, sizes, [0, 1], ["", ""], targets
    )
    proposals, losses = rpn(features, batch)
    assert losses["rpn_objectness"].item() == pytest.approx(wanted[0], rel=1e-5)
    assert losses["rpn_box"].item() == pytest.approx(wanted[1], rel=1e-5)
    if widths == [1024]:  # with five layers, all logits are nearly zero
        own = proposals[proposals.image_index == 0]
        torch.testing.assert_close(
            own.boxes, torch.tensor([[0, 0, 10, 10], [7.2702, 0, 10, 10]]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            own.scores.logit(), torch.tensor([0.1596, -0.0007]), atol=1e-4, rtol=0
        )


class Rows(nn.Module):
    """A pooler that returns one row of features per region."""

    def forward(self, features: dict[str, Tensor], boxes: Tensor, image_index: Tensor) -> Tensor:
        del boxes, image_index
        return features["rows"]


class Nothing(nn.Module):
    width = 8

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def test_fast_rcnn_of_detectron2() -> None:
    """tests/modeling/test_fast_rcnn.py: FastRCNNTest.test_fast_rcnn."""
    torch.manual_seed(132)
    scores, deltas = nn.Linear(8, 6), nn.Linear(8, 20)
    nn.init.normal_(scores.weight, std=0.01)
    nn.init.normal_(deltas.weight, std=0.001)
    for layer in (scores, deltas):
        nn.init.constant_(layer.bias, 0)
    rows = torch.rand(2, 8)
    head = BoxHead(Rows(), Nothing(), 5)  # type: ignore[arg-type]
    head.cls_score, head.bbox_pred = scores, deltas
    truth = torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0]])
    labels, image = torch.tensor([1, 2]), torch.tensor([0, 0])
    targets = Targets(truth, labels, image, torch.zeros(2, dtype=torch.bool))
    proposals = torch.tensor([[0.8, 1.1, 3.2, 2.8], [2.3, 2.5, 7.0, 8.0]])
    samples = Samples(
        proposals,
        image,
        labels,
        torch.tensor([0, 1]),
        5,
        targets,
        torch.zeros(1, dtype=torch.int64),
    )
    losses = head.losses({"rows": rows}, samples)
    assert losses["box_class"].item() == pytest.approx(1.7951188087, rel=1e-5)
    assert losses["box_regression"].item() == pytest.approx(4.0357131958, rel=1e-5)
    assert isinstance(
        head.predict(
            {"rows": rows}, Regions(proposals, image, torch.ones(2)), torch.tensor([[10, 10]])
        ),
        Regions,
    )


def test_box_coding_of_mmdetection() -> None:
    """test_task_modules/test_coder/test_delta_xywh_bbox_coder.py in tests/test_models.

    Decoding, then clipping to 32 x 32 pixels.
    """
    rois = torch.tensor(
        [[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]]
    )
    deltas = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 2.0, -1.0], [0.7, -1.9, -0.5, 0.3]]
    )
    wanted = torch.tensor(
        [
            [0.0, 0.0, 1.0, 1.0],
            [0.1409, 0.1409, 2.8591, 2.8591],
            [0.0, 0.3161, 4.1945, 0.6839],
            [5.0, 5.0, 5.0, 5.0],
        ]
    )
    found = box_ops.clip(
        box_ops.decode(deltas, rois, (1.0, 1.0, 1.0, 1.0)), torch.tensor([[32, 32]]).expand(4, 2)
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
