"""Anchors: equality with torchvision, and known values of detectron2."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from maskseg.errors import UserError
from maskseg.models.anchors import AnchorGenerator

STRIDES = (4, 8, 16, 32, 64)
CPU = torch.device("cpu")


def shapes_of(height: int, width: int) -> list[tuple[int, int]]:
    """p2 .. p5 divide exactly, p6 is every second cell of p5."""
    levels = [(height // s, width // s) for s in STRIDES[:4]]
    return [*levels, (-(-levels[-1][0] // 2), -(-levels[-1][1] // 2))]


@pytest.mark.parametrize(("height", "width"), [(256, 320), (800, 1088), (480, 640), (96, 32)])
@pytest.mark.parametrize(
    "sizes",
    [
        ((32,), (64,), (128,), (256,), (512,)),
        ((24, 33), (64, 70), (128, 150), (256, 300), (512, 600)),
    ],
)
def test_equal_to_torchvision(height: int, width: int, sizes: tuple[tuple[int, ...], ...]) -> None:
    shapes = shapes_of(height, width)
    theirs = TorchvisionAnchors(sizes, ((0.5, 1.0, 2.0),) * 5)
    wanted = theirs(
        ImageList(torch.zeros((1, 3, height, width)), [(height, width)]),
        [torch.zeros((1, 1, *s)) for s in shapes],
    )[0]
    ours = AnchorGenerator(sizes, rounded=True, stride_from="image")
    found = ours(shapes, STRIDES, (height, width), CPU)
    assert [len(a) for a in found] == [h * w * ours.per_cell for h, w in shapes]
    assert [ours.per_cell] * 5 == theirs.num_anchors_per_location()
    assert torch.equal(torch.cat(found), wanted)


def test_stride_rules_differ_where_a_level_does_not_divide_the_image() -> None:
    shapes = shapes_of(800, 1088)
    assert shapes[4] == (13, 17)
    by_level = AnchorGenerator(rounded=True)(shapes, STRIDES, (800, 1088), CPU)
    by_image = AnchorGenerator(rounded=True, stride_from="image")(shapes, STRIDES, (800, 1088), CPU)
    assert all(torch.equal(a, b) for a, b in zip(by_level[:4], by_image[:4], strict=True))
    centre = [(a[4][-1, :2] + a[4][-1, 2:]).div(2).tolist() for a in (by_level, by_image)]
    assert centre == [[16 * 64.0, 12 * 64.0], [16 * 64.0, 12 * 61.0]]


def test_cell_anchors_of_detectron2() -> None:
    """detectron2's `generate_cell_anchors` for size 32 and ratios 0.5, 1, 2 (from its tests)."""
    found = AnchorGenerator(((32,),))([(1, 2)], [4], (4, 8), CPU)[0]
    cell = torch.tensor(
        [
            [-22.6274, -11.3137, 22.6274, 11.3137],
            [-16.0, -16.0, 16.0, 16.0],
            [-11.3137, -22.6274, 11.3137, 22.6274],
        ]
    )
    torch.testing.assert_close(found[:3], cell, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        found[3:], cell + torch.tensor([4.0, 0.0, 4.0, 0.0]), rtol=0, atol=1e-4
    )


def test_order_is_row_column_anchor_and_offset_is_a_part_of_the_stride() -> None:
    found = AnchorGenerator(((8,),), aspect_ratios=(1.0,), offset=0.5)(
        [(2, 3)], [16], (32, 48), CPU
    )[0]
    centres = ((found[:, :2] + found[:, 2:]) / 2).tolist()
    assert centres == [
        [8.0, 8.0],
        [24.0, 8.0],
        [40.0, 8.0],
        [8.0, 24.0],
        [24.0, 24.0],
        [40.0, 24.0],
    ]
    assert found.dtype == torch.float32
    assert (found[:, 2:] - found[:, :2]).unique().tolist() == [8.0]


def test_ratio_is_height_over_width_and_keeps_the_area() -> None:
    found = AnchorGenerator(((30, 60),), aspect_ratios=(0.25, 4.0))([(1, 1)], [8], (8, 8), CPU)[0]
    sides = found[:, 2:] - found[:, :2]
    torch.testing.assert_close(
        sides, torch.tensor([[60.0, 15.0], [120.0, 30.0], [15.0, 60.0], [30.0, 120.0]])
    )


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match="level or image, not 'pixel'"):
        AnchorGenerator(stride_from="pixel")
    with pytest.raises(UserError, match="same number of sizes"):
        AnchorGenerator(((32,), (64, 80)))
    with pytest.raises(UserError, match="has 5 levels, the proposer reads 2"):
        AnchorGenerator()([(4, 4), (2, 2)], [4, 8], (16, 16), CPU)
