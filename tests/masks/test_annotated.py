"""Annotated masks and transforms, compared with pycocotools and bitmaps."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from made.bitmaps import counts_of, encode, random_masks, runs_of
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.scenes import make_scenes
from maskseg.masks.annotated import AnnotatedMasks, Polygons, RunLengths
from maskseg.masks.base import Masks, encode_rle, rle_from_counts, rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids
from maskseg.ops import rle as rle_ops
from maskseg.ops.geometry import AxisAlignedTransform

Bitmaps = np.ndarray


def annotated_masks(masks: list[Bitmaps]) -> AnnotatedMasks:
    """The masks as run lengths."""
    return AnnotatedMasks.from_file([runs_of(m) for m in masks], *masks[0].shape)


def star(
    rng: np.random.Generator, centre: tuple[float, float], radius: float, points: int = 12
) -> np.ndarray:
    """A star-shaped polygon, f64 [points, 2]."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    length = radius * rng.uniform(0.4, 1.0, points)
    return np.stack(
        [centre[0] + length * np.cos(angle), centre[1] + length * np.sin(angle)], axis=1
    )


def test_rle_round_trip() -> None:
    masks = random_masks(20, 17, 23)
    rles = [rle_from_counts(counts_of(m), 17, 23) for m in masks]
    assert [r["counts"].encode() for r in rles] == [encode(m)["counts"] for m in masks]
    np.testing.assert_array_equal(rle_to_bitmaps(rles), np.array(masks))
    assert rle_to_bitmaps([]).shape == (0, 0, 0)


def test_a_bitmap_and_its_tight_box() -> None:
    corners = [np.zeros((11, 7), dtype=bool) for _ in range(4)]
    for mask, (row, column) in zip(corners, [(0, 0), (10, 6), (10, 0), (3, 5)], strict=True):
        mask[row, column] = True
    bars = [np.zeros((11, 7), dtype=bool) for _ in range(2)]
    # runs that continue from column to column
    bars[0][:, 2:4] = True
    bars[1][-1, 1] = True
    bars[1][0, 2] = True
    for mask in (*random_masks(20, 11, 7), *corners, *bars, np.ones((11, 7), dtype=bool)):
        rle, (x, y, width, height) = encode_rle(mask)
        np.testing.assert_array_equal(rle_to_bitmaps([rle])[0], mask)
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert [x, y, x + width, y + height] == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
    assert encode_rle(np.zeros((3, 4), dtype=bool)) == (
        {"size": [3, 4], "counts": encode(np.zeros((3, 4)))["counts"].decode()},
        [0, 0, 0, 0],
    )


# Masks as run lengths


def test_run_lengths_equal_pycocotools() -> None:
    masks = random_masks(40, 19, 27)
    result = annotated_masks(masks)
    rles = [encode(m) for m in masks]
    assert isinstance(result, Masks)
    np.testing.assert_array_equal(result.area(), [m.sum() for m in masks])
    x, y, w, h = coco_mask.toBbox(rles).T
    np.testing.assert_array_equal(result.boxes(), np.stack([x, y, x + w, y + h], axis=1))
    np.testing.assert_array_equal(rle_to_bitmaps(result.to_rle()), np.array(masks))
    np.testing.assert_allclose(
        result.iou(result), coco_mask.iou(rles, rles, [0] * len(rles)), atol=1e-6
    )


def test_flips_and_crops_of_run_lengths() -> None:
    masks = random_masks(20, 19, 27)
    result = annotated_masks(masks)
    stack = np.array(masks)
    flip_x = AxisAlignedTransform.flip_x(19, 27)
    flip_y = AxisAlignedTransform.flip_y(19, 27)
    cases = [
        (result.transform(flip_x), stack[:, :, ::-1]),
        (result.transform(flip_y), stack[:, ::-1]),
        (result.transform(flip_x).transform(flip_y), stack[:, ::-1, ::-1]),
        (result.transform(flip_x).transform(flip_x), stack),
        (result.transform(AxisAlignedTransform.crop(5, 3, 11, 13)), stack[:, 3:14, 5:18]),
        (
            result.transform(flip_x).transform(AxisAlignedTransform.crop(5, 3, 11, 13)),
            stack[:, 3:14, ::-1][:, :, 5:18],
        ),
        (
            result.transform(AxisAlignedTransform.crop(-2, -4, 30, 40)),
            np.pad(stack, ((0, 0), (4, 7), (2, 11))),
        ),
        (
            result.transform(AxisAlignedTransform.resize(19, 27, 57, 54)),
            stack.repeat(3, 1).repeat(2, 2),
        ),
        (
            result.transform(AxisAlignedTransform.resize(19, 27, 57, 54)).transform(
                AxisAlignedTransform.flip_x(57, 54)
            ),
            stack.repeat(3, 1).repeat(2, 2)[:, :, ::-1],
        ),
    ]
    for transformed, expected in cases:
        check_bitmaps(transformed, expected)


def check_bitmaps(result: AnnotatedMasks, expected: Bitmaps) -> None:
    """Check pixels, areas and boxes of masks on whole pixels."""
    np.testing.assert_array_equal(rle_to_bitmaps(result.to_rle()), expected)
    np.testing.assert_array_equal(result.to_bitmaps(), expected)
    np.testing.assert_allclose(result.area(), expected.sum(axis=(1, 2)), rtol=1e-6)
    x, y, w, h = coco_mask.toBbox([encode(m) for m in expected]).T
    np.testing.assert_allclose(result.boxes(), np.stack([x, y, x + w, y + h], axis=1), atol=1e-4)


@pytest.mark.parametrize("size", [(31, 44), (10, 14), (19, 54), (7, 100)])
def test_resized_run_lengths_are_sampled_at_pixel_centres(size: tuple[int, int]) -> None:
    masks = random_masks(20, 19, 27)
    result = annotated_masks(masks).transform(AxisAlignedTransform.resize(19, 27, *size))
    rows = np.floor((np.arange(size[0]) + 0.5) * 19 / size[0]).astype(int)
    columns = np.floor((np.arange(size[1]) + 0.5) * 27 / size[1]).astype(int)
    np.testing.assert_array_equal(
        rle_to_bitmaps(result.to_rle()), np.array(masks)[:, rows[:, None], columns]
    )
    scale = size[0] / 19 * size[1] / 27
    np.testing.assert_allclose(result.area(), [m.sum() * scale for m in masks], rtol=1e-5)


def test_crops_of_run_lengths_on_a_grid() -> None:
    masks = random_masks(20, 16, 16)
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(len(masks), 4)
    np.testing.assert_array_equal(
        annotated_masks(masks).crop_and_resize(boxes, 16), np.array(masks, dtype=np.float32)
    )
    np.testing.assert_array_equal(
        annotated_masks(masks).crop_and_resize(boxes + 4, 16),
        np.pad(masks, ((0, 0), (0, 4), (0, 4)))[:, 4:, 4:],
    )
    share = np.array(masks).reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    result = annotated_masks(masks).crop_and_resize(boxes, 8).numpy()
    halves = share == 0.5
    np.testing.assert_array_equal(result[~halves], share[~halves] > 0.5)
    assert result[halves].mean() == pytest.approx(0.5, abs=0.05)
    for flip, mirrored in (
        (AxisAlignedTransform.flip_x(16, 16), result[:, :, ::-1]),
        (AxisAlignedTransform.flip_y(16, 16), result[:, ::-1]),
    ):
        np.testing.assert_array_equal(
            annotated_masks(masks).transform(flip).crop_and_resize(boxes, 8), mirrored
        )


def shares(mask: Bitmaps, box: np.ndarray, size: int) -> np.ndarray:
    """Share of each cell of a box that a mask covers, from an integral image."""
    height, width = mask.shape
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)

    def weights(ends: np.ndarray, length: int) -> np.ndarray:
        places = ends.clip(0, length)
        low = np.minimum(places.astype(int), length - 1)
        out = np.zeros((len(ends), length + 1))
        np.add.at(out, (np.arange(len(ends)), low), 1 - (places - low))
        np.add.at(out, (np.arange(len(ends)), low + 1), places - low)
        return out

    steps = np.arange(size + 1) / size
    x, y = (box[i] + steps * (box[i + 2] - box[i]) for i in (0, 1))
    sums = weights(y, height) @ table @ weights(x, width).T
    return (
        np.diff(np.diff(sums, axis=0), axis=1) * size**2 / ((box[2] - box[0]) * (box[3] - box[1]))
    )


@pytest.mark.parametrize("size", [1, 7, 14, 28])
def test_cells_of_run_lengths_are_set_from_half_coverage(size: int) -> None:
    rng = np.random.default_rng(size)
    masks = random_masks(40, 37, 53)
    boxes = np.sort(rng.uniform(-12, 65, (len(masks), 2, 2)), axis=1).reshape(-1, 4)
    boxes[:, 2:] += 0.5
    expected = np.array([shares(m, box, size) for m, box in zip(masks, boxes, strict=True)])
    sizes = np.full(len(masks), 37), np.full(len(masks), 53)
    result = rle_ops.cell_coverage([runs_of(m).ends for m in masks], *sizes, boxes, size)
    np.testing.assert_allclose(result, expected, atol=1e-9)
    crops = annotated_masks(masks).crop_and_resize(torch.from_numpy(boxes), size).numpy()
    sure = np.abs(expected - 0.5) > 1e-4
    np.testing.assert_array_equal(crops[sure], expected[sure] > 0.5)


def test_crops_of_large_shapes_are_nearly_exact() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:600, :800]
    sides = rng.uniform(60, (390, 290), (40, 2))
    masks = [((x - 400) / a) ** 2 + ((y - 300) / b) ** 2 < 1 for a, b in sides]
    boxes = np.array([[400 - a, 300 - b, 400 + a, 300 + b] for a, b in sides]) + rng.uniform(
        -10, 10, (40, 4)
    )
    expected = np.array([shares(m, box, 28) for m, box in zip(masks, boxes, strict=True)]) >= 0.5
    crops = annotated_masks(masks).crop_and_resize(torch.from_numpy(boxes), 28).numpy()
    assert (crops != expected).mean() < 3e-3
    assert abs(crops.mean() - expected.mean()) < 5e-4


def test_crops_of_transformed_run_lengths() -> None:
    """A target does not change if the mask and the box are transformed together."""
    masks = random_masks(30, 37, 53)
    result = annotated_masks(masks)
    boxes = torch.from_numpy(
        np.sort(np.random.default_rng(0).uniform(0, 37, (len(masks), 2, 2)), axis=1).reshape(-1, 4)
    )
    expected = result.crop_and_resize(boxes, 14).numpy()
    for geometry in (
        AxisAlignedTransform.resize(37, 53, 91, 100),
        AxisAlignedTransform.crop(3, 5, 20, 30),
        AxisAlignedTransform.flip_x(37, 53),
        AxisAlignedTransform.flip_y(37, 53),
    ):
        crops = (
            result.transform(geometry)
            .crop_and_resize(geometry.boxes(boxes, clip=False), 14)
            .numpy()
        )
        mirrored = expected[
            :, :: -1 if geometry.scale_y < 0 else 1, :: -1 if geometry.scale_x < 0 else 1
        ]
        assert (crops != mirrored).mean() < 1e-3


def test_perfect_targets_give_nearly_perfect_masks(tmp_path: Path) -> None:
    """The targets of the ground truth, pasted back, compared with the ground truth.

    detectron2's rule for bitmaps gives an AP of 0.957, a sample at the cell's centre 0.949.
    """
    make_scenes(tmp_path / "scenes", num_train=0, num_val=80, num_workers=0)
    file = CocoSource.from_keys(
        val_json=str(tmp_path / "scenes" / "val.json"), images=str(tmp_path / "scenes" / "images")
    ).val
    rows = []
    area = 0.0
    for index, record in enumerate(file.images):
        truth = file.annotations(index)
        keep = torch.from_numpy(np.flatnonzero(~truth.crowd))
        masks = AnnotatedMasks.from_file(truth.shapes, record.height, record.width)[keep]
        boxes = torch.from_numpy(truth.boxes)[keep].float()
        pasted = MaskGrids(
            masks.crop_and_resize(boxes, 28),
            boxes,
            torch.tensor([[record.height, record.width]]).expand(len(boxes), 2),
        )
        labels = [file.categories.ids[k] for k in truth.labels[keep.numpy()]]
        area += float((pasted.area() / masks.area() - 1).sum())
        rows += [
            {"image_id": record.id, "category_id": k, "score": 1.0, "segmentation": r}
            for k, r in zip(labels, pasted.to_rle(), strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "scenes" / "val.json"))
        evaluator = COCOeval(coco, coco.loadRes(rows), "segm")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    assert len(rows) > 300
    assert evaluator.stats[0] >= 0.955
    assert abs(area / len(rows)) < 0.005  # relative to the area of an object


# Masks as polygons


def polygons(rng: np.random.Generator, n: int, height: int, width: int) -> list[Polygons]:
    result = []
    for _ in range(n):
        centre = rng.uniform([20, 20], [width - 20, height - 20])
        parts = [star(rng, tuple(centre), 18.0) for _ in range(rng.integers(1, 3))]
        result.append(Polygons(tuple(parts)))
    return result


def test_polygons_equal_pycocotools() -> None:
    shapes = polygons(np.random.default_rng(0), 30, 80, 100)
    result = AnnotatedMasks.from_file(shapes, 80, 100)
    rles = [
        coco_mask.merge(coco_mask.frPyObjects([p.ravel().tolist() for p in s.parts], 80, 100))
        for s in shapes
    ]
    np.testing.assert_array_equal(
        rle_to_bitmaps(result.to_rle()), coco_mask.decode(rles).transpose(2, 0, 1)
    )
    np.testing.assert_array_equal(result.area(), coco_mask.area(rles))
    np.testing.assert_allclose(
        result.iou(result), coco_mask.iou(rles, rles, [0] * len(rles)), atol=1e-6
    )
    points = [np.concatenate(s.parts) for s in shapes]
    expected = np.array([[*p.min(axis=0), *p.max(axis=0)] for p in points])
    np.testing.assert_allclose(result.boxes(), expected, atol=1e-4)


def test_transformed_polygons() -> None:
    square = Polygons((np.array([[4.0, 3.0], [14.0, 3.0], [14.0, 9.0], [4.0, 9.0]]),))
    result = AnnotatedMasks.from_file([square], 20, 30)
    bitmap = np.zeros((1, 20, 30), dtype=bool)
    bitmap[0, 3:9, 4:14] = True
    check_bitmaps(result, bitmap)
    check_bitmaps(result.transform(AxisAlignedTransform.flip_x(20, 30)), bitmap[:, :, ::-1])
    check_bitmaps(result.transform(AxisAlignedTransform.flip_y(20, 30)), bitmap[:, ::-1])
    check_bitmaps(
        result.transform(AxisAlignedTransform.resize(20, 30, 40, 90)),
        bitmap.repeat(2, 1).repeat(3, 2),
    )
    check_bitmaps(result.transform(AxisAlignedTransform.crop(6, 1, 10, 12)), bitmap[:, 1:11, 6:18])
    check_bitmaps(result.transform(AxisAlignedTransform.crop(6, 5, 10, 12)), bitmap[:, 5:15, 6:18])
    check_bitmaps(
        result.transform(AxisAlignedTransform.crop(20, 10, 10, 10)),
        np.zeros((1, 10, 10), dtype=bool),
    )


def test_crops_of_polygons_equal_a_fine_bitmap() -> None:
    """Cells that a polygon covers by more or less than a half, at 16 times the resolution."""
    rng = np.random.default_rng(1)
    shapes = polygons(rng, 30, 80, 100)
    size = 28
    fine = 16
    result = AnnotatedMasks.from_file(shapes, 80, 100)
    boxes = result.boxes() + torch.from_numpy(rng.uniform(-6, 6, (30, 4))).float()
    targets = result.crop_and_resize(boxes, size).numpy()
    for target, shape, box in zip(targets, shapes, boxes.numpy().astype(float), strict=True):
        scale = size * fine / (box[2:] - box[:2])
        parts = [((p - box[:2]) * scale).ravel().tolist() for p in shape.parts]
        whole = coco_mask.decode(
            coco_mask.merge(coco_mask.frPyObjects(parts, size * fine, size * fine))
        )
        share = whole.reshape(size, fine, size, fine).mean(axis=(1, 3))
        assert set(np.unique(target)) <= {0.0, 1.0}
        assert (
            (target == 1) != (share >= 0.5)
        ).mean() < 0.03  # pycocotools rounds polygons to a fifth of a cell
        assert (target[share > 0.95] == 1).mean() > 0.995
        assert (target[share < 0.05] == 0).mean() > 0.995


def test_polygons_and_run_lengths_give_similar_targets() -> None:
    rng = np.random.default_rng(2)
    shapes = polygons(rng, 20, 80, 100)
    exact = AnnotatedMasks.from_file(shapes, 80, 100)
    big = exact.transform(AxisAlignedTransform.resize(80, 100, 640, 800)).to_rle()
    sampled = AnnotatedMasks.from_file(
        [
            RunLengths(np.cumsum(rle_ops.counts_from_string(r["counts"].encode())), 640, 800)
            for r in big
        ],
        640,
        800,
    )
    boxes = exact.boxes()
    a = exact.crop_and_resize(boxes, 28)
    b = sampled.crop_and_resize(boxes * 8, 28)
    # The areas agree. Differences are due to pycocotools, which rounds polygons to a fifth of a
    # cell, in detectron2 too.
    assert abs((b.mean() - a.mean()) / a.mean()) < 0.002
    assert (a != b).float().mean() < 0.01


def test_aligned_targets_are_exact() -> None:
    square = Polygons((np.array([[4.0, 3.0], [14.0, 3.0], [14.0, 9.0], [4.0, 9.0]]),))
    both = AnnotatedMasks.from_file([square, square], 20, 30)
    bitmap = np.zeros((20, 30), dtype=bool)
    bitmap[3:9, 4:14] = True
    both = AnnotatedMasks.cat([both, AnnotatedMasks.from_file([runs_of(bitmap)], 20, 30)])
    boxes = torch.tensor([[4.0, 3.0, 14.0, 9.0], [4.0, 0.0, 24.0, 12.0], [4.0, 0.0, 24.0, 12.0]])
    result = both.crop_and_resize(boxes, 4).numpy()
    assert result[0].all()
    expected = [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(result[1], expected)
    np.testing.assert_array_equal(result[2], expected)


def test_empty_boxes_and_boxes_outside() -> None:
    shapes = [
        Polygons((np.array([[4.0, 3.0], [14.0, 3.0], [14.0, 9.0]]),)),
        runs_of(np.ones((20, 30), dtype=bool)),
    ] * 2
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0]] * 2 + [[500.0, -90.0, 700.0, -80.0]] * 2)
    result = AnnotatedMasks.from_file(shapes, 20, 30).crop_and_resize(boxes, 14)
    assert result.shape == (4, 14, 14)
    assert not result[2:].any()


def test_a_box_of_half_a_pixel() -> None:
    """A box narrower than a pixel is not widened to one pixel."""
    left = np.zeros((10, 12), dtype=bool)
    left[:, :5] = True
    shapes = [
        runs_of(left),
        Polygons((np.array([[0.0, 0.0], [5.0, 0.0], [5.0, 10.0], [0.0, 10.0]]),)),
    ]
    boxes = torch.tensor([[4.75, 2.0, 5.25, 8.0]] * 2)
    for target in AnnotatedMasks.from_file(shapes, 10, 12).crop_and_resize(boxes, 8).numpy():
        assert target[:, :4].all()
        assert not target[:, 4:].any()


def test_indexing_and_empty_masks() -> None:
    masks = random_masks(3, 9, 11)
    result = annotated_masks(masks)
    chosen = np.array([3, 0])
    np.testing.assert_array_equal(
        rle_to_bitmaps(result[torch.tensor([3, 0])].to_rle()), np.array(masks)[chosen]
    )
    keep = torch.tensor([True, False, True, False, True])
    np.testing.assert_array_equal(
        rle_to_bitmaps(result[keep].to_rle()), np.array(masks)[keep.numpy()]
    )
    for empty in (
        AnnotatedMasks.from_file([], 9, 11),
        result[torch.zeros(0, dtype=torch.int64)],
        AnnotatedMasks.cat([]),
    ):
        assert len(empty) == 0
        assert empty.boxes().shape == (0, 4)
        assert empty.area().shape == (0,)
        assert empty.to_rle() == []
        assert empty.to_bitmaps().shape == (0, 0, 0)
        assert empty.iou(result).shape == (0, 5)
        assert empty.crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
        assert len(empty.transform(AxisAlignedTransform.flip_x(9, 11))) == 0
    assert len(AnnotatedMasks.cat([result, result[keep]])) == 8


# Transforms


def test_transform_of_boxes() -> None:
    boxes = torch.tensor([[2.0, 3.0, 10.0, 7.0], [0.0, 0.0, 30.0, 20.0]])
    assert AxisAlignedTransform.flip_x(20, 30).boxes(boxes).tolist() == [
        [20, 3, 28, 7],
        [0, 0, 30, 20],
    ]
    assert AxisAlignedTransform.flip_y(20, 30).boxes(boxes).tolist() == [
        [2, 13, 10, 17],
        [0, 0, 30, 20],
    ]
    assert AxisAlignedTransform.resize(20, 30, 40, 15).boxes(boxes).tolist() == [
        [1, 6, 5, 14],
        [0, 0, 15, 40],
    ]
    assert AxisAlignedTransform.crop(5, 4, 10, 12).boxes(boxes).tolist() == [
        [0, 0, 5, 3],
        [0, 0, 12, 10],
    ]
    assert AxisAlignedTransform.crop(12, 8, 5, 5).boxes(boxes[:1]).tolist() == [[0, 0, 0, 0]]
    assert AxisAlignedTransform.flip_x(20, 30).boxes(torch.zeros(0, 4)).shape == (0, 4)
    assert AxisAlignedTransform.resize(20, 30, 41, 61) == AxisAlignedTransform(
        61 / 30, 0.0, 41 / 20, 0.0, 41, 61
    )


def test_points_on_the_border_of_a_frame_are_not_dropped() -> None:
    points = torch.tensor(
        [
            [
                [0.0, 0.0, 2.0],
                [30.0, 20.0, 2.0],
                [30.001, 5.0, 2.0],
                [5.0, -0.001, 1.0],
                [3.0, 4.0, 0.0],
            ]
        ]
    )
    transformed = AxisAlignedTransform.flip_x(20, 30).points(points)[0]
    assert transformed.tolist() == [
        [30.0, 0.0, 2.0],
        [0.0, 20.0, 2.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
    ]
