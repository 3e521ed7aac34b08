"""RoIAlign of masked maps, compared with torchvision on the product of map and mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from maskseg.ops import roi_align as module


def by_products(
    feature: Tensor,
    stride: int,
    boxes: Tensor,
    image: Tensor,
    masks: Tensor,
    size: int,
    ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign of each region's product of map and mask, by torchvision."""
    index = torch.zeros(1, 1)
    result = [
        roi_align(
            feature[i][None] * mask,
            torch.cat([index, box[None]], dim=1),
            (size, size),
            1 / stride,
            ratio,
            aligned,
        )
        for i, box, mask in zip(image.tolist(), boxes, masks, strict=True)
    ]
    return torch.cat(result)


def masked_roi_align(
    feature: Tensor,
    stride: int,
    boxes: Tensor,
    image: Tensor,
    masks: Tensor,
    size: int,
    ratio: int,
    aligned: bool,
) -> Tensor:
    """Masked RoIAlign on one level; masks: [R, h, w]."""

    def mask_at_cells(_: int, region: Tensor, cell: Tensor) -> Tensor:
        return masks.flatten(1)[region, cell]

    return module.masked_roi_align(
        [feature],
        [stride],
        boxes,
        image,
        torch.zeros_like(image),
        mask_at_cells,
        module.BinGrid(size, ratio, aligned),
    )[0]


@pytest.mark.parametrize(("size", "ratio", "aligned"), [(6, 2, True), (3, 1, False), (1, 0, True)])
def test_output_and_gradient_equal_those_of_products(size: int, ratio: int, aligned: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    feature = torch.randn((2, 5, 14, 17), generator=generator).requires_grad_()
    boxes = torch.rand((20, 4), generator=generator) * 80
    boxes[:, 2:] += boxes[:, :2] + 1
    image = torch.randint(0, 2, (20,), generator=generator)
    masks = (torch.rand((20, 14, 17), generator=generator) > 0.4).float()
    out = masked_roi_align(feature, 8, boxes, image, masks, size, ratio, aligned)
    expected = by_products(feature, 8, boxes, image, masks, size, ratio, aligned)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    towards = torch.randn(out.shape, generator=generator)
    (gradient,) = torch.autograd.grad(out, feature, towards)
    (expected_gradient,) = torch.autograd.grad(expected, feature, towards)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_masks_of_ones_and_of_zeros() -> None:
    feature = torch.randn(1, 3, 8, 8)
    boxes = torch.tensor([[2.0, 3.0, 40.0, 50.0], [0.0, 0.0, 64.0, 64.0]])
    image = torch.zeros(2, dtype=torch.int64)
    masks = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    out = masked_roi_align(feature, 8, boxes, image, masks, 4, 2, True)
    torch.testing.assert_close(
        out[:1], roi_align(feature, [boxes[:1]], (4, 4), 1 / 8, 2, True), atol=1e-5, rtol=1e-5
    )
    assert not out[1].any()


def test_no_regions() -> None:
    image = torch.zeros(0, dtype=torch.int64)
    out = masked_roi_align(
        torch.randn(1, 3, 8, 8, requires_grad=True),
        8,
        torch.zeros(0, 4),
        image,
        torch.zeros(0, 8, 8),
        6,
        2,
        True,
    )
    assert out.shape == (0, 3, 6, 6)
    out.sum().backward()


def test_each_region_reads_its_level_and_image() -> None:
    generator = torch.Generator().manual_seed(1)
    strides = [8, 16, 32]
    shapes = [(12, 16), (6, 8), (3, 4)]
    maps = [torch.randn((2, 3, *shape), generator=generator).requires_grad_() for shape in shapes]
    boxes = torch.rand((40, 4), generator=generator) * 60
    boxes[:, 2:] += boxes[:, :2] + 1
    # No region is on the second level.
    image = torch.randint(0, 2, (40,), generator=generator)
    level = torch.randint(0, 2, (40,), generator=generator) * 2
    masks = [(torch.rand((40, *shape), generator=generator) > 0.4).float() for shape in shapes]
    calls = []

    def mask_at_cells(i: int, region: Tensor, cell: Tensor) -> Tensor:
        calls.append((i, set(region.tolist())))
        return masks[i].flatten(1)[region, cell]

    result, unmasked = module.masked_roi_align(
        maps,
        strides,
        boxes,
        image,
        level,
        mask_at_cells,
        module.BinGrid(4, 2, aligned=True),
        unmasked_rows=torch.arange(1, 40, 3),
    )
    assert torch.equal(
        unmasked, module.roi_align_levels(maps, strides, boxes, image, level, 4, 2, True)[1::3]
    )
    assert calls == [(i, set(torch.nonzero(level == i).flatten().tolist())) for i in range(3)]
    expected = torch.empty_like(result)
    for i, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        rows = torch.nonzero(level == i).squeeze(1)
        if len(rows):
            expected[rows] = by_products(
                feature, stride, boxes[rows], image[rows], masks[i][rows], 4, 2, True
            )
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    towards = torch.randn(result.shape, generator=generator)
    used = [maps[0], maps[2]]
    for gradient, expected_gradient in zip(
        torch.autograd.grad(result, used, towards),
        torch.autograd.grad(expected, used, towards),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)
