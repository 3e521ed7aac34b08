"""Predicted masks, compared with torchvision's pasting, grid_sample and torch's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from made.bitmaps import random_masks
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskseg.masks.base import Masks, decode_crop, encode_rle, rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.ops.paste import kernel, paste_crop, resample
from maskseg.ops.rle import counts_from_string

Bitmaps = np.ndarray


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On such small matrices threads cost time, a hundred times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encode(mask: Bitmaps) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def random_grids(
    seed: int, n: int = 60, height: int = 50, width: int = 70, size: int = 28
) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth random grids, boxes and frames.

    The boxes are inside, partly outside, larger than the image, and smaller than a pixel.
    """
    rng = torch.Generator().manual_seed(seed)
    grids = torch.rand(n, 1, 6, 6, generator=rng)
    grids = functional.interpolate(grids, size=(size, size), mode="bicubic").clamp(0, 1)[:, 0]
    centre = torch.rand(n, 2, generator=rng) * torch.tensor([width + 20.0, height + 20.0]) - 10
    extent = torch.rand(n, 2, generator=rng) ** 3 * torch.tensor([width * 1.5, height * 1.5])
    extent[::7] = torch.rand(len(extent[::7]), 2, generator=rng) * 0.9 + 0.05
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], dim=1)
    boxes[::5] = boxes[::5].round()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 0.05)
    boxes[-1] = torch.tensor([-100.0, -80.0, 200.0, 150.0])
    return grids, boxes, torch.tensor([[height, width]]).expand(n, 2)


def compare(result: Bitmaps, values: Tensor, threshold: float = 0.5) -> None:
    """Compare bitmaps with the values, except for pixels at the threshold."""
    clear = ((values - threshold).abs() > 1e-5).numpy()
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(result[clear], (values.numpy() >= threshold)[clear])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [14, 28])
def test_pasting_equals_torchvision(seed: int, size: int) -> None:
    grids, boxes, frames = random_grids(seed, size=size)
    result = rle_to_bitmaps(MaskGrids(grids, boxes, frames, paste_mode="torchvision").to_rle())
    visible = (
        (boxes[:, 2:] > 1).all(dim=1) & (boxes[:, 0] < 69) & (boxes[:, 1] < 49)
    )  # torchvision raises for boxes outside the image
    values = paste_masks_in_image(grids[visible][:, None], boxes[visible], (50, 70))[:, 0]
    assert (values >= 0.5).any(dim=(1, 2)).sum() > 20
    compare(result[visible.numpy()], values)
    outside = (boxes[:, 2:] < -1).any(dim=1) | (boxes[:, 0] > 71) | (boxes[:, 1] > 51)
    assert not result[outside.numpy()].any()


def whole_image(
    grids: Tensor, boxes: Tensor, height: int, width: int, mode: str = "bilinear"
) -> Tensor:
    """detectron2's `_do_paste_mask` over the whole image, in double precision."""
    x = (torch.arange(width).double() + 0.5 - boxes[:, :1].double()) / (
        boxes[:, 2:3] - boxes[:, :1]
    ).double() * 2 - 1
    y = (torch.arange(height).double() + 0.5 - boxes[:, 1:2].double()) / (
        boxes[:, 3:] - boxes[:, 1:2]
    ).double() * 2 - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3
    )
    return functional.grid_sample(
        grids.double()[:, None], grid, mode=mode, padding_mode="zeros", align_corners=False
    )[:, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [14, 28])
def test_pasting_in_continuous_coordinates(seed: int, size: int) -> None:
    grids, boxes, frames = random_grids(seed, size=size)
    result = MaskGrids(grids, boxes, frames)
    values = whole_image(grids, boxes, 50, 70)
    assert (values >= 0.5).any(dim=(1, 2)).sum() > 20
    compare(rle_to_bitmaps(result.to_rle()), values)


@pytest.mark.parametrize("seed", range(3))
def test_strings_equal_those_of_full_size_masks(seed: int) -> None:
    """The strings equal those of pycocotools for torchvision's full-size masks.

    Masks with a pixel at the threshold are skipped.
    """
    grids, boxes, _ = random_grids(seed, height=130, width=170)
    boxes = torch.cat(
        [boxes[:, :2].clamp(min=0), boxes[:, 2:].minimum(torch.tensor([170.0, 130.0]))], dim=1
    )
    visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    grids = grids[visible]
    boxes = boxes[visible]
    result = MaskGrids(
        grids, boxes, torch.tensor([[130, 170]]).expand(len(boxes), 2), paste_mode="torchvision"
    ).to_rle()
    values = paste_masks_in_image(grids[:, None], boxes, (130, 170))[:, 0]
    clear = ((values - 0.5).abs() > 1e-5).all(dim=(1, 2))
    assert clear.sum() > 30
    for i in torch.nonzero(clear).ravel().tolist():
        assert result[i] == {
            "size": [130, 170],
            "counts": encode((values[i] >= 0.5).numpy())["counts"].decode(),
        }


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["continuous", "torchvision"])
@pytest.mark.parametrize("kind", ["smooth", "noise", "hard", "steps"])
def test_masks_equal_their_crops(mode: str, interpolation: str, kind: str) -> None:
    """Masks in frames of different sizes equal the pixels of their crops.

    Also for boxes that are empty, inverted or outside.
    """
    rng = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 28):
        grids, boxes, _ = random_grids(size, size=size)
        grids = {
            "smooth": grids,
            "noise": torch.rand(grids.shape, generator=rng),
            "hard": grids.round(),
            "steps": (grids * 8).round() / 8,
        }[kind]
        boxes[::13, 2:] = boxes[::13, :2]
        boxes[1::13, 2:] -= 20
        frames = torch.randint(1, 90, (len(grids), 2), generator=rng)
        result = MaskGrids(grids, boxes, frames, mode, interpolation).to_rle()
        for rle, grid, box, (height, width) in zip(
            result, grids, boxes, frames.tolist(), strict=True
        ):
            crop, left, top = paste_crop(grid, box, height, width, mode, interpolation)
            values = torch.zeros(height, width)
            values[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
            clear = ((values - 0.5).abs() > 1e-5).numpy()
            assert rle["size"] == [height, width]
            np.testing.assert_array_equal(
                rle_to_bitmaps([rle])[0][clear], (values.numpy() >= 0.5)[clear]
            )


@pytest.mark.parametrize("mode", ["continuous", "torchvision"])
def test_columns_are_processed_in_blocks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grids, boxes, frames = random_grids(1)
    expected = MaskGrids(grids, boxes, frames, mode).to_rle()
    monkeypatch.setattr("maskseg.ops.paste_rle._COLUMNS", 50)
    assert MaskGrids(grids, boxes, frames, mode).to_rle() == expected


@pytest.mark.parametrize("mode", ["continuous", "torchvision"])
def test_masks_that_fill_touch_and_miss_the_frame(mode: str) -> None:
    full = torch.ones(28, 28)
    empty = torch.zeros(28, 28)
    boxes = torch.tensor(
        [
            [-50.0, -50, 90, 90],
            [-50, -50, 90, 90],
            [10, -50, 20, 90],
            [200, 200, 300, 300],
            [-9, 3, -5, 8],
        ]
    )
    masks = MaskGrids(
        torch.stack([full, empty, full, full, full]),
        boxes,
        torch.tensor([[30, 40]]).expand(5, 2),
        mode,
    )
    first, second, third, *others = rle_to_bitmaps(masks.to_rle())
    assert first.all()
    assert not second.any()
    assert third[:, 10:20].all()  # from the bottom of a column to the top of the next
    assert (
        third.sum() == {"continuous": 300, "torchvision": 360}[mode]
    )  # torchvision rounds the box outwards
    assert not np.any(others)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["continuous", "torchvision"])
def test_values_that_are_not_finite(mode: str) -> None:
    """Outputs of a diverged model do not raise here: the checks of the results report them."""
    grids, boxes, frames = random_grids(0, n=6)
    boxes[0] = float("nan")
    boxes[1, 2] = float("inf")
    boxes[2, 0] = -float("inf")
    boxes[3, 3] = 1e30
    grids[4, 3] = float("nan")
    grids[5] = float("inf")
    for rle in MaskGrids(grids, boxes, frames, mode).to_rle():
        assert rle["size"] == [50, 70]
        assert counts_from_string(rle["counts"].encode()).sum() == 50 * 70


def test_thresholds_of_zero_and_more_than_one() -> None:
    grids, boxes, frames = random_grids(0)
    grids = grids.clamp(min=0.01)
    everything = rle_to_bitmaps(MaskGrids(grids, boxes, frames, threshold=0.0).to_rle())
    values = whole_image(grids, boxes, 50, 70).numpy()
    assert everything[values > 1e-5].all()
    assert everything[values == 0].mean() < 1e-3  # pixels where the outermost value fades to 0
    assert not MaskGrids(grids, boxes, frames, threshold=1.1).area().any()


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_thresholds(seed: int, threshold: float) -> None:
    grids, boxes, frames = random_grids(seed)
    result = MaskGrids(grids, boxes, frames, threshold=threshold)
    compare(rle_to_bitmaps(result.to_rle()), whole_image(grids, boxes, 50, 70), threshold)


def test_areas_boxes_and_iou() -> None:
    grids, boxes, frames = random_grids(0)
    result = MaskGrids(grids, boxes, frames)
    assert isinstance(result, Masks)
    bitmaps = rle_to_bitmaps(result.to_rle())
    np.testing.assert_array_equal(result.to_bitmaps(), bitmaps)
    np.testing.assert_array_equal(result.area(), bitmaps.sum(axis=(1, 2)))
    x, y, w, h = coco_mask.toBbox([encode(m) for m in bitmaps]).T
    np.testing.assert_array_equal(result.boxes(), np.stack([x, y, x + w, y + h], axis=1))
    flat = bitmaps.reshape(len(bitmaps), -1).astype(float)
    both = flat @ flat.T
    union = flat.sum(1)[:, None] + flat.sum(1) - both
    np.testing.assert_allclose(
        result.iou(result), np.where(union > 0, both / np.maximum(union, 1), 0), atol=1e-6
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_transforms(interpolation: str) -> None:
    grids, boxes, frames = random_grids(3)
    result = MaskGrids(grids, boxes.double().float(), frames, interpolation=interpolation)
    bitmaps = rle_to_bitmaps(result.to_rle())
    for geometry, expected in (
        (AxisAlignedTransform.flip_x(50, 70), bitmaps[:, :, ::-1]),
        (AxisAlignedTransform.flip_y(50, 70), bitmaps[:, ::-1]),
        (AxisAlignedTransform.crop(11, 7, 30, 40), bitmaps[:, 7:37, 11:51]),
    ):
        transformed = result.transform(geometry)
        assert transformed.frames.tolist() == [[geometry.height, geometry.width]] * len(result)
        assert (rle_to_bitmaps(transformed.to_rle()) != expected).mean() < 1e-4


def test_crop_and_resize() -> None:
    grids, boxes, frames = random_grids(4)
    result = MaskGrids(grids, boxes, frames)
    torch.testing.assert_close(
        result.crop_and_resize(boxes, 28), grids, atol=2e-3, rtol=0
    )  # single precision in the smallest boxes
    other = boxes + (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) * torch.tensor([0.1, -0.2, 0.3, 0.1])
    steps = (torch.arange(14) + 0.5) / 14
    points = (
        other[:, None, :2]
        + steps[:, None] * (other[:, None, 2:] - other[:, None, :2])
        - boxes[:, None, :2]
    ) / (boxes[:, None, 2:] - boxes[:, None, :2])
    grid = (
        torch.stack(torch.broadcast_tensors(points[:, None, :, 0], points[:, :, None, 1]), dim=3)
        * 2
        - 1
    )
    expected = functional.grid_sample(grids[:, None], grid, align_corners=False)[:, 0]
    torch.testing.assert_close(result.crop_and_resize(other, 14), expected, atol=1e-3, rtol=0)


def test_no_masks() -> None:
    grids, boxes, frames = random_grids(0)
    empty = MaskGrids(grids, boxes, frames)[torch.zeros(0, dtype=torch.int64)]
    assert len(empty) == 0
    assert empty.to_rle() == []
    assert empty.to_bitmaps().shape == (0, 0, 0)
    assert empty.boxes().shape == (0, 4)
    assert empty.area().shape == (0,)
    assert empty.crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
    assert empty.transform(AxisAlignedTransform.flip_x(50, 70)).frames.shape == (0, 2)
    assert len(MaskGrids(grids, boxes, frames)[torch.arange(60) < 7]) == 7


# Resampling


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "new"), [(14, 37), (28, 112), (28, 15)])
def test_kernels_equal_torch(interpolation: str, size: int, new: int) -> None:
    grids = torch.rand(
        3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    steps = ((torch.arange(new, dtype=torch.float64) + 0.5) * size / new - 0.5).expand(3, new)
    result = resample(grids, steps, steps, interpolation)
    expected = functional.interpolate(
        grids[:, None], size=(new, new), mode=interpolation, align_corners=False
    )[:, 0]
    inner = (steps[0] >= 1) & (
        steps[0] <= size - 2
    )  # beyond, torch repeats the border, `resample` uses zeros
    assert inner.sum() > 5
    torch.testing.assert_close(result[:, inner][:, :, inner], expected[:, inner][:, :, inner])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resampling_with_zeros_outside(interpolation: str) -> None:
    grids = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    boxes = torch.tensor([[-3.0, 2.0, 40.0, 31.0]]).expand(4, 4)
    u = ((torch.arange(50, dtype=torch.float64) + 0.5 + 3) / 43 * 9 - 0.5).expand(4, 50)
    v = ((torch.arange(45, dtype=torch.float64) + 0.5 - 2) / 29 * 9 - 0.5).expand(4, 45)
    torch.testing.assert_close(
        resample(grids, u, v, interpolation), whole_image(grids, boxes, 45, 50, interpolation)
    )


def test_kernels_sum_to_one() -> None:
    for interpolation in ("bilinear", "bicubic"):
        shift = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None]
        weights = kernel(shift - torch.arange(-3, 5, dtype=torch.float64), interpolation)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(11, dtype=torch.float64))
    with pytest.raises(ValueError, match="bilinear or bicubic"):
        kernel(torch.zeros(1), "nearest")
    with pytest.raises(ValueError, match="continuous or torchvision"):
        paste_crop(torch.zeros(2, 2), torch.tensor([0.0, 0.0, 2.0, 2.0]), 4, 4, "other", "bilinear")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_a_value_at_the_threshold_is_inside(threshold: float, interpolation: str) -> None:
    grids = torch.full((1, 28, 28), threshold)
    boxes = torch.tensor([[10.0, 12.0, 38.0, 40.0]])
    masks = MaskGrids(
        grids, boxes, torch.tensor([[60, 50]]), interpolation=interpolation, threshold=threshold
    )
    bitmap = rle_to_bitmaps(masks.to_rle())[0]
    assert bitmap[13:39, 11:37].all()
    if interpolation == "bilinear":  # a pixel at the border is at the centre of a cell
        assert bitmap.sum() == 28 * 28
        assert bitmap[12:40, 10:38].all()


def test_crops_are_the_bitmaps_within_their_boxes() -> None:
    full = np.ones((5, 7), dtype=bool)
    for mask in [*random_masks(40), full, ~full]:
        rle, (x, y, width, height) = encode_rle(mask)
        crop, left, top = decode_crop(rle)
        assert crop.shape == (height, width)
        assert (left, top) == (x, y)
        assert np.array_equal(crop, mask[y : y + height, x : x + width])
