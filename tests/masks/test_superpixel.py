"""Unions of superpixels, compared with bitmaps, pycocotools and run-length masks."""

from __future__ import annotations

import pickle
from itertools import product

import numpy as np
import pytest
import torch
from made.bitmaps import encode, random_masks, runs_of
from pycocotools import mask as coco_mask

from maskseg.masks import superpixel
from maskseg.masks.annotated import AnnotatedMasks, RunLengths
from maskseg.masks.base import Masks, rle_iou, rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids
from maskseg.masks.superpixel import SegmentMasks
from maskseg.ops import rle
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.structures import Regions, Targets

Bitmaps = np.ndarray
SIZES = [(17, 23), (1, 1), (1, 40), (31, 1), (19, 27)]


def segments(seed: int, height: int, width: int, superpixels: int = 9, n: int = 12) -> SegmentMasks:
    """Masks over blocks, noise and pixels without a superpixel.

    The last three masks have all superpixels, none, and one without pixels.
    """
    rng = np.random.default_rng(seed)
    blocks = (
        rng.integers(-1, superpixels - 1, (height // 4 + 1, width // 5 + 1))
        .repeat(4, 0)
        .repeat(5, 1)[:height, :width]
    )
    labels = np.where(
        rng.random((height, width)) < 0.2,
        rng.integers(-1, superpixels - 1, (height, width)),
        blocks,
    )
    members = rng.random((n, superpixels)) < rng.random((n, 1))
    members[-3:] = [
        [True] * superpixels,
        [False] * superpixels,
        [False] * (superpixels - 1) + [True],
    ]
    return SegmentMasks.of_image(labels, torch.from_numpy(members))


def bitmaps_of(masks: SegmentMasks) -> list[Bitmaps]:
    """Bitmaps by definition."""
    rows = zip(masks.map_index.tolist(), masks.members.numpy(), strict=True)
    return [np.isin(masks.maps[image], np.flatnonzero(members)) for image, members in rows]


def as_runs(masks: SegmentMasks) -> AnnotatedMasks:
    """The same masks as run lengths, from their RLEs."""
    rles = masks.to_rle()
    shapes = [
        RunLengths(np.cumsum(rle.counts_from_string(r["counts"].encode())), *r["size"])
        for r in rles
    ]
    return AnnotatedMasks.cat([AnnotatedMasks.from_file([s], s.height, s.width) for s in shapes])


def check_against_bitmaps(masks: SegmentMasks) -> None:
    """Check RLEs, areas and boxes."""
    bitmaps = bitmaps_of(masks)
    rles = [encode(b) for b in bitmaps]
    assert [(r["size"], r["counts"].encode()) for r in masks.to_rle()] == [
        (list(r["size"]), r["counts"]) for r in rles
    ]
    assert masks.area().tolist() == [b.sum() for b in bitmaps]
    boxes = np.array([coco_mask.toBbox(r) for r in rles]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_array_equal(masks.boxes(), boxes)
    assert masks.area().dtype == masks.boxes().dtype == torch.float32


def test_literal() -> None:
    labels = np.array([[0, 0, 1, -1], [2, 2, 1, -1]])
    masks = SegmentMasks.of_image(labels, torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool())
    assert isinstance(masks, Masks)
    assert masks.area().tolist() == [4, 2, 0]
    assert masks.boxes().tolist() == [[0, 0, 2, 2], [2, 0, 3, 2], [0, 0, 0, 0]]
    assert rle_to_bitmaps(masks.to_rle()).tolist()[:2] == [[[1, 1, 0, 0]] * 2, [[0, 0, 1, 0]] * 2]
    assert masks.iou(masks).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert masks.label_maps()[0].tolist() == [[0, 0, 1, -1]] * 2
    cells = masks.crop_and_resize(
        torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, -1.0, 4.0, 1.0], [0.0, 0.0, 4.0, 2.0]]), 2
    )
    assert cells.tolist() == [[[1, 0], [1, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("block", [1, 50, superpixel.BLOCK])
@pytest.mark.parametrize("size", SIZES)
def test_one_image_equals_bitmaps(
    size: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(superpixel, "BLOCK", block)
    masks = segments(0, *size)
    check_against_bitmaps(masks)
    np.testing.assert_array_equal(masks.to_bitmaps(), np.array(bitmaps_of(masks)))
    torch.testing.assert_close(
        masks.iou(masks), rle_iou(masks.to_rle(), masks.to_rle()), rtol=0, atol=1e-6
    )


def test_batch_equals_bitmaps_and_can_be_indexed() -> None:
    parts = [segments(i, *size, superpixels=5 + 3 * i) for i, size in enumerate(SIZES)]
    batch = SegmentMasks.cat(parts)
    assert len(batch) == sum(map(len, parts))
    assert batch.to_rle() == [r for p in parts for r in p.to_rle()]
    check_against_bitmaps(batch)
    mixed = batch[torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))]
    check_against_bitmaps(mixed)
    check_against_bitmaps(SegmentMasks.cat([mixed, parts[0]]))
    keep = mixed.area() > 5
    assert mixed[keep].to_rle() == [
        r for r, k in zip(mixed.to_rle(), keep.tolist(), strict=True) if k
    ]
    assert mixed[torch.tensor([3, 3])].to_rle() == [mixed.to_rle()[3]] * 2
    assert mixed.maps is batch.maps
    assert mixed.to("meta") is mixed


# Overlaps


def test_iou_of_all_kinds_of_masks() -> None:
    """IoU with masks of the same map, other maps, run lengths and grids.

    Masks in frames of different sizes share no pixel.
    """
    same = segments(0, 17, 23)
    other = segments(1, 17, 23, superpixels=14)
    odd = segments(2, 19, 27, superpixels=4)
    batch = SegmentMasks.cat([same, odd, other])[
        torch.randperm(36, generator=torch.Generator().manual_seed(0))
    ]
    rng = torch.Generator().manual_seed(1)
    low = torch.rand(6, 2, generator=rng) * 10
    grids = MaskGrids(
        torch.rand(6, 4, 4, generator=rng),
        torch.cat([low, low + 9], dim=1),
        torch.tensor([[17, 23]]).expand(6, 2),
    )
    run_lengths = AnnotatedMasks.from_file([runs_of(m) for m in random_masks(8, 17, 23)], 17, 23)
    others: list[Masks] = [
        same,
        other,
        odd,
        batch,
        grids,
        run_lengths,
        AnnotatedMasks.cat([run_lengths, as_runs(odd)]),
    ]
    for first, second in product([same, other, batch, pickle.loads(pickle.dumps(batch))], others):
        rles = first.to_rle(), second.to_rle()
        same_size = torch.tensor([[a["size"] == b["size"] for b in rles[1]] for a in rles[0]])
        expected = (
            rle_iou(*rles) * same_size
        )  # pycocotools returns -1 if frames differ and boxes overlap
        torch.testing.assert_close(first.iou(second), expected, rtol=0, atol=1e-6)
        assert first.iou(second).dtype == torch.float32
    torch.testing.assert_close(run_lengths.iou(same), same.iou(run_lengths).T, rtol=0, atol=1e-6)


def test_iou_is_exact_for_many_pixels_and_under_autocast() -> None:
    labels = np.zeros((4097, 4097), dtype=np.int32)
    labels[5, 7] = 1
    masks = SegmentMasks.of_image(labels, torch.tensor([[True, False], [True, True]]))
    expected = np.float32((4097**2 - 1) / 4097**2)
    assert expected < 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masks.iou(masks).tolist() == [[1, expected], [expected, 1]]


# Transforms


@pytest.mark.parametrize("size", [(17, 23), (31, 44), (10, 14), (7, 100), (1, 1)])
def test_transformed_masks_equal_transformed_run_lengths(size: tuple[int, int]) -> None:
    masks = SegmentMasks.cat([segments(0, 17, 23), segments(1, 17, 23, superpixels=6)])
    run_lengths = as_runs(masks)
    flips = AxisAlignedTransform.flip_x(17, 23), AxisAlignedTransform.flip_y(17, 23)
    resize = AxisAlignedTransform.resize(17, 23, *size)
    for geometry in (
        *flips,
        resize,
        AxisAlignedTransform.crop(5, 3, 11, 13),
        AxisAlignedTransform.crop(-2, -4, 30, 40),
        AxisAlignedTransform.crop(90, 0, 5, 5),
    ):
        transformed = masks.transform(geometry)
        assert [m.shape for m in transformed.maps] == [(geometry.height, geometry.width)] * 2
        check_against_bitmaps(transformed)
        np.testing.assert_array_equal(
            rle_to_bitmaps(transformed.to_rle()),
            rle_to_bitmaps(run_lengths.transform(geometry).to_rle()),
        )
    for chain in (
        (*flips, resize),
        (flips[0], AxisAlignedTransform.crop(5, 3, 11, 13)),
        (flips[1], flips[1]),
        (resize, AxisAlignedTransform.flip_x(*size)),
    ):
        transformed = masks
        expected = run_lengths
        for geometry in chain:
            transformed = transformed.transform(geometry)
            expected = expected.transform(geometry)
        np.testing.assert_array_equal(
            rle_to_bitmaps(transformed.to_rle()), rle_to_bitmaps(expected.to_rle())
        )


def test_crops_sample_the_centres_of_cells() -> None:
    masks = SegmentMasks.cat([segments(0, 17, 23), segments(1, 31, 9, superpixels=6)])
    rng = np.random.default_rng(0)
    boxes = rng.uniform(-5, 20, (len(masks), 4))
    boxes[:, 2:] = boxes[:, :2] + rng.uniform(0, 25, (len(masks), 2))
    boxes[0] = (3, 3, 3, 3)
    boxes[1] = (500, -90, 700, -80)
    boxes[2] = (0, 0, 23, 17)
    boxes = boxes.astype(np.float32)
    result = masks.crop_and_resize(torch.from_numpy(boxes), 7)
    assert result.shape == (24, 7, 7)
    assert result.dtype == torch.float32
    for bitmap, box, cells in zip(
        bitmaps_of(masks), boxes.astype(float), result.numpy(), strict=True
    ):
        for row, column in product(range(7), range(7)):
            x = int(np.floor(box[0] + (column + 0.5) / 7 * (box[2] - box[0])))
            y = int(np.floor(box[1] + (row + 0.5) / 7 * (box[3] - box[1])))
            inside = 0 <= x < bitmap.shape[1] and 0 <= y < bitmap.shape[0]
            assert cells[row, column] == (inside and bitmap[y, x])
    assert not result[1].any()


def test_crops_on_the_grid_equal_the_pixels_and_run_lengths() -> None:
    masks = segments(0, 16, 16)
    whole = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(len(masks), 4)
    np.testing.assert_array_equal(masks.crop_and_resize(whole, 16), np.array(bitmaps_of(masks)))
    torch.testing.assert_close(
        masks.crop_and_resize(whole + 4, 16), as_runs(masks).crop_and_resize(whole + 4, 16)
    )
    flipped = masks.transform(AxisAlignedTransform.flip_x(16, 16)).crop_and_resize(whole, 16)
    torch.testing.assert_close(flipped, masks.crop_and_resize(whole, 16).flip(2))


# Label maps, indexing, empty masks


def test_label_maps_have_the_first_mask_of_each_pixel() -> None:
    masks = SegmentMasks.cat([segments(0, 17, 23), segments(1, 31, 9), segments(2, 4, 4)])
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(0))[
        :9
    ]  # no mask of the third map
    chosen = masks[rows]
    result = chosen.label_maps()
    bitmaps = bitmaps_of(chosen)
    assert [m.shape for m in result] == [(17, 23), (31, 9), (4, 4)]
    assert all(m.dtype == np.int32 for m in result)
    assert (result[2] == -1).all()
    for image, label_map in enumerate(result):
        for (y, x), label in np.ndenumerate(label_map):
            owners = [i for i, b in enumerate(bitmaps) if chosen.map_index[i] == image and b[y, x]]
            assert label == (owners[0] if owners else -1)


@pytest.mark.parametrize("index", [torch.tensor([7, 0, 13]), torch.arange(24) % 5 == 2])
def test_regions_and_targets_can_be_indexed(index: torch.Tensor) -> None:
    masks = SegmentMasks.cat([segments(0, 17, 23), segments(1, 17, 23)])
    regions = Regions(masks.boxes(), masks.map_index, torch.linspace(1, 0, 24), masks=masks)
    targets = Targets(
        masks.boxes(), torch.arange(24), masks.map_index, torch.zeros(24, dtype=torch.bool), masks
    )
    for chosen in (
        regions[index],
        targets[index].to("cpu"),
        pickle.loads(pickle.dumps(regions))[index],
    ):
        assert isinstance(chosen.masks, SegmentMasks)
        assert torch.equal(chosen.masks.boxes(), chosen.boxes)
        assert torch.equal(chosen.masks.map_index, chosen.image_index)
    assert regions.to("meta").masks is masks


def test_no_masks_and_no_superpixels() -> None:
    some = segments(0, 9, 11)
    blank = SegmentMasks.of_image(np.full((9, 11), -1), torch.zeros((2, 0), dtype=torch.bool))
    check_against_bitmaps(blank)
    assert blank.iou(some).tolist() == [[0.0] * 12] * 2
    assert not blank.crop_and_resize(torch.tensor([[0.0, 0.0, 11.0, 9.0]] * 2), 3).any()
    assert (blank.label_maps()[0] == -1).all()
    check_against_bitmaps(SegmentMasks.cat([blank, some, blank]))
    for empty in (
        some[torch.zeros(12, dtype=torch.bool)],
        some[torch.zeros(0, dtype=torch.int64)],
        SegmentMasks.cat([]),
    ):
        assert len(empty) == 0
        assert empty.boxes().shape == (0, 4)
        assert empty.area().shape == (0,)
        assert empty.to_rle() == []
        assert empty.to_bitmaps().shape == (0, 0, 0)
        assert empty.iou(some).shape == (0, 12)
        assert empty.iou(AnnotatedMasks.from_file([], 9, 11)).shape == (0, 0)
        assert some.iou(empty).shape == (12, 0)
        assert empty.crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
        assert len(empty.transform(AxisAlignedTransform.flip_x(9, 11))) == 0
        assert SegmentMasks.cat([empty, some]).to_rle() == some.to_rle()
    assert some.iou(AnnotatedMasks.from_file([], 9, 11)).shape == (12, 0)


def test_labels_and_members_must_match() -> None:
    members = torch.zeros((3, 4), dtype=torch.bool)
    for labels, invalid in (
        (np.array([[4]]), members),
        (np.array([[-2]]), members),
        (np.array([0]), members),
        (np.array([[0]]), members.float()),
    ):
        with pytest.raises(ValueError, match=r"superpixels are numbered|expected labels"):
            SegmentMasks.of_image(labels, invalid)
