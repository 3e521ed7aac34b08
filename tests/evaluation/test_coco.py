"""COCO evaluation: literals, pycocotools on random data, backends, and original image frames."""

import contextlib
import copy
import importlib.util
import io
import json
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.errors import UserError
from maskseg.evaluation.coco import CocoEvaluator
from maskseg.evaluation.coco_entries import row_entries
from maskseg.evaluation.coco_results import detection_rows, to_original, write_results
from maskseg.evaluation.table import metrics_table, summary_table
from maskseg.masks.base import rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids
from maskseg.structures import Batch, Categories, Outputs, Regions

NAMES = (
    "AP",
    "AP50",
    "AP75",
    "APs",
    "APm",
    "APl",
    "AR1",
    "AR10",
    "AR100",
    "ARs",
    "ARm",
    "ARl",
)  # in the order of COCOeval.stats
HEIGHT, WIDTH = 120, 160


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(x, y, w, h, height=HEIGHT, width=WIDTH):
    encoded = coco_mask.frPyObjects(polygon(x, y, w, h), height, width)[0]
    return {"size": [height, width], "counts": encoded["counts"].decode()}


def truth_of(boxes, categories=(1,), images=(1,)):
    """boxes: (image, category, x, y, w, h, crowd)"""
    annotations = [
        {
            "id": i,  # from 0, an id that pycocotools treats as unmatched
            "image_id": image,
            "category_id": category,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": crowd,
            "segmentation": rle(x, y, w, h) if crowd else polygon(x, y, w, h),
        }
        for i, (image, category, x, y, w, h, crowd) in enumerate(boxes)
    ]
    return {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
    }


def row(image, category, x, y, w, h, score):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "score": score,
        "segmentation": rle(x, y, w, h),
    }


def classes(*ids):
    return Categories(tuple(f"class {i}" for i in ids), ids)


def evaluate(truth, rows, ids=(1,), images=(1,), **options):
    evaluator = CocoEvaluator(truth, classes(*ids), **options)
    evaluator.add_rows(images, rows)
    return evaluator.compute()


def reference(truth, rows, kind, max_detections=100):
    """The metrics of pycocotools, called directly.

    Rows for masks have no box: with one, `loadRes` uses the area of the box as the object size.
    """
    truth, rows = copy.deepcopy(truth), copy.deepcopy(rows)
    for i, annotation in enumerate(truth["annotations"]):
        annotation["id"] = i + 1
    for r in rows:
        del r["segmentation" if kind == "bbox" else "bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(rows), kind)
        evaluator.params.maxDets = [1, 10, max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
        if max_detections == 100:
            evaluator.summarize()
    return evaluator


def random_scenes(seed, images=12, ids=(7, 3, 90), truths=14, detections=140):
    """Random ground truth and detections with tied scores.

    The ground truth has crowds, empty images and empty classes. Detections are jittered objects,
    false positives and duplicates.
    """
    rng = np.random.default_rng(seed)
    boxes, rows = [], []
    for image in range(10, 10 + images):
        for _ in range(rng.integers(0, truths)):
            w, h = np.exp(rng.uniform(np.log(5), np.log(110), 2)).round(1)
            x, y = (rng.uniform(0, 1, 2) * (WIDTH - w, HEIGHT - h)).clip(0).round(1)
            w, h = min(w, WIDTH - x), min(h, HEIGHT - y)
            boxes.append(
                (
                    image,
                    int(rng.choice(ids)),
                    float(x),
                    float(y),
                    float(w),
                    float(h),
                    int(rng.random() < 0.1),
                )
            )
        image_boxes = [b for b in boxes if b[0] == image]
        for _ in range(rng.integers(0, detections)):
            source = (
                image_boxes[rng.integers(len(image_boxes))]
                if image_boxes and rng.random() < 0.7
                else (image, ids[0], 20.0, 20.0, 30.0, 30.0, 0)
            )
            x, y, w, h = np.array(source[2:6]) + rng.normal(0, rng.choice([0.5, 3, 10]), 4)
            x, y, w, h = max(x, 0), max(y, 0), max(w, 2), max(h, 2)
            category = source[1] if rng.random() < 0.9 else int(rng.choice(ids))
            rows.append(
                row(
                    image,
                    category,
                    float(x),
                    float(y),
                    float(w),
                    float(h),
                    round(float(rng.random()), 2),
                )
            )
    return truth_of(boxes, ids, range(10, 10 + images)), rows


def test_perfect_detections():
    boxes = [(1, 1, 10, 10, 20, 20, 0), (1, 1, 60, 20, 50, 50, 0)]
    metrics = evaluate(
        truth_of(boxes), [row(1, 1, 10, 10, 20, 20, 0.9), row(1, 1, 60, 20, 50, 50, 0.8)]
    )
    for kind in ("bbox", "segm"):
        assert metrics[f"{kind}/AP"] == pytest.approx(1)
        assert metrics[f"{kind}/APs"] == pytest.approx(1)  # 400 pixels
        assert metrics[f"{kind}/APm"] == pytest.approx(1)  # 2500 pixels
        assert metrics[f"{kind}/APl"] == -1  # no object of that size
        assert metrics[f"{kind}/AR1"] == pytest.approx(0.5)  # one detection, two objects
        assert metrics[f"{kind}/AR100"] == pytest.approx(1)
    assert set(metrics) == {f"{kind}/{name}" for kind in ("bbox", "segm") for name in NAMES}


def test_false_positive_before_one_of_two_objects():
    boxes = [(1, 1, 10, 10, 20, 20, 0), (1, 1, 60, 20, 50, 50, 0)]
    metrics = evaluate(
        truth_of(boxes), [row(1, 1, 0, 90, 20, 20, 0.9), row(1, 1, 10, 10, 20, 20, 0.8)]
    )
    # precision 1/2 up to recall 0.5: 51 of the 101 recall points
    assert metrics["bbox/AP"] == pytest.approx(0.5 * 51 / 101)
    assert metrics["bbox/AR100"] == pytest.approx(0.5)


def test_iou_thresholds():
    # 20 x 20 against 20 x 14: IoU 0.7, matched at 0.50, 0.55, 0.60, 0.65, 0.70
    metrics = evaluate(truth_of([(1, 1, 10, 10, 20, 20, 0)]), [row(1, 1, 10, 10, 20, 14, 0.9)])
    assert metrics["bbox/AP"] == pytest.approx(0.5)
    assert (metrics["bbox/AP50"], metrics["bbox/AP75"]) == pytest.approx((1, 0))


def test_crowds_are_neither_missed_nor_false():
    boxes = [(1, 1, 10, 10, 20, 20, 0), (1, 1, 60, 20, 60, 60, 1)]
    inside_the_crowd = [row(1, 1, 62 + 10 * i, 30, 9, 30, 0.95) for i in range(4)]
    metrics = evaluate(truth_of(boxes), [*inside_the_crowd, row(1, 1, 10, 10, 20, 20, 0.5)])
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert metrics["segm/AP"] == pytest.approx(1)


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_no_detections(backend):
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    metrics = evaluate(truth_of([(1, 1, 10, 10, 20, 20, 0)]), [], backend=backend)
    assert metrics["bbox/AP"] == metrics["segm/AP"] == metrics["segm/AR100"] == 0.0
    assert metrics["bbox/APl"] == -1


@pytest.mark.parametrize(
    "boxes", [[], [(1, 1, 10, 10, 20, 20, 1)]], ids=["no truth", "only crowds"]
)
def test_no_ground_truth(boxes):
    assert set(evaluate(truth_of(boxes), [row(1, 1, 10, 10, 20, 20, 0.5)]).values()) == {-1.0}


def test_no_images_added():
    evaluator = CocoEvaluator(truth_of([(1, 1, 10, 10, 20, 20, 0)]), classes(1))
    assert set(evaluator.compute().values()) == {-1.0}
    assert "images: 0," in evaluator.table()


def test_only_added_images_count():
    boxes = [(1, 1, 10, 10, 20, 20, 0), (2, 1, 10, 10, 20, 20, 0)]
    truth = truth_of(boxes, images=(1, 2))
    rows = [row(1, 1, 10, 10, 20, 20, 0.5)]
    assert evaluate(truth, rows)["bbox/AP"] == pytest.approx(1)
    assert evaluate(truth, rows, images=(1, 2))["bbox/AP"] == pytest.approx(51 / 101)


def test_arbitrary_category_ids_and_labels():
    truth = truth_of(
        [(1, 90, 10, 10, 20, 20, 0), (1, 7, 60, 20, 50, 50, 0), (1, 55, 0, 0, 9, 9, 0)], (7, 55, 90)
    )
    evaluator = CocoEvaluator(truth, classes(90, 7))  # label 0 is 90; 55 is not evaluated
    evaluator.add_rows([1], [row(1, 90, 10, 10, 20, 20, 0.9)])
    assert evaluator.per_class() == {
        "bbox": {"class 90": pytest.approx(1), "class 7": 0.0},
        "segm": {"class 90": pytest.approx(1), "class 7": 0.0},
    }
    assert evaluator.compute()["bbox/AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", ["pycocotools", "auto"])
def test_equals_pycocotools(seed, backend):
    truth, rows = random_scenes(seed)
    kept_truth, kept_rows = copy.deepcopy(truth), copy.deepcopy(rows)
    evaluator = CocoEvaluator(truth, classes(7, 3, 90), backend=backend)
    evaluator.add_rows(range(10, 22), rows)
    metrics = evaluator.compute()
    for kind in ("bbox", "segm"):
        expected = reference(truth, rows, kind)
        assert 0.05 < expected.stats[0] < 0.95
        np.testing.assert_allclose(
            [metrics[f"{kind}/{n}"] for n in NAMES], expected.stats, rtol=0, atol=1e-12
        )
        for k, category in enumerate((3, 7, 90)):  # COCOeval sorts the classes
            values = expected.eval["precision"][:, :, k, 0, 2]
            assert evaluator.per_class()[kind][f"class {category}"] == pytest.approx(
                values[values > -1].mean(), abs=1e-12
            )
    assert (truth, rows) == (kept_truth, kept_rows)  # the arguments are not modified


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_detections", [100, 300, 5])
def test_faster_backend_is_equal(seed, max_detections):
    pytest.importorskip("faster_coco_eval")
    truth, rows = random_scenes(seed)
    options = {"ids": (7, 3, 90), "images": range(10, 22), "max_detections": max_detections}
    slow, fast = (
        evaluate(truth, rows, **options, backend=backend) for backend in ("pycocotools", "faster")
    )
    assert slow.keys() == fast.keys()
    np.testing.assert_allclose(list(fast.values()), list(slow.values()), rtol=0, atol=1e-12)


def test_more_than_a_hundred_detections():
    grid = [
        (x, y) for x in range(0, 150, 10) for y in range(0, 110, 10)
    ]  # 165 objects in one image
    truth = truth_of([(1, 1, x, y, 8, 8, 0) for x, y in grid])
    rows = [row(1, 1, x + 0.4 * (i % 3), y, 8, 8, 0.9 - i / 1000) for i, (x, y) in enumerate(grid)]
    at_300, at_100 = evaluate(truth, rows, max_detections=300), evaluate(truth, rows)
    assert "bbox/AR300" in at_300
    assert "bbox/AR100" not in at_300
    for kind in ("bbox", "segm"):
        direct = reference(truth, rows, kind, 300)
        assert at_300[f"{kind}/AP"] == pytest.approx(
            direct.eval["precision"][:, :, 0, 0, 2].mean(), abs=1e-12
        )
        assert at_300[f"{kind}/AR300"] == pytest.approx(
            direct.eval["recall"][:, 0, 0, 2].mean(), abs=1e-12
        )
        assert at_300[f"{kind}/AP50"] > at_100[f"{kind}/AP50"] + 0.3


def test_small_max_detections():
    metrics = evaluate(
        truth_of([(1, 1, 10, 10, 20, 20, 0)]), [row(1, 1, 10, 10, 20, 20, 0.5)], max_detections=5
    )
    assert {"bbox/AR1", "bbox/AR5"} < metrics.keys()
    assert "bbox/AR10" not in metrics


def test_image_added_twice_counts_once():
    truth = truth_of([(1, 1, 10, 10, 20, 20, 0)])
    evaluator = CocoEvaluator(truth, classes(1))
    for _ in range(2):
        evaluator.add_rows([1], [row(1, 1, 80, 10, 20, 20, 0.9), row(1, 1, 10, 10, 20, 20, 0.5)])
    assert (len(evaluator.rows), evaluator.image_ids) == (2, [1])
    assert evaluator.compute()["bbox/AP"] == pytest.approx(0.5)


def test_ground_truth_without_masks():
    truth = truth_of([(1, 1, 10, 10, 20, 20, 0)])
    truth["annotations"][0]["segmentation"] = []
    with pytest.raises(UserError, match=r"annotation 0 of image 1 has no segmentation.*bbox"):
        CocoEvaluator(truth, classes(1))
    metrics = evaluate(truth, [row(1, 1, 10, 10, 20, 20, 0.5)], iou_types=("bbox",))
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert not any(key.startswith("segm") for key in metrics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 2}, "image 2"),
        ({"category_id": 5}, "category id 5"),
        ({"score": float("nan")}, "not finite"),
        ({"segmentation": {"size": [5, 5], "counts": "i0"}}, r"\[5, 5\]"),
    ],
)
def test_invalid_rows(change, message):
    with pytest.raises(UserError, match=message):
        evaluate(truth_of([]), [row(1, 1, 10, 10, 20, 20, 0.5) | change])


def test_other_user_errors(monkeypatch):
    truth = truth_of([])
    bare = row(1, 1, 1, 1, 2, 2, 0.5)
    del bare["segmentation"]
    with pytest.raises(UserError, match="no segmentation"):
        evaluate(truth, [bare])
    with pytest.raises(UserError, match="image 9 is not in the ground truth"):
        evaluate(truth, [], images=(1, 9))
    with pytest.raises(UserError, match="auto, pycocotools or faster"):
        CocoEvaluator(truth, classes(1), backend="fastest")
    with pytest.raises(UserError, match="iou_types"):
        CocoEvaluator(truth, classes(1), iou_types=("semantic",))
    with pytest.raises(UserError, match="no class has keypoints"):
        CocoEvaluator(truth, classes(1), iou_types=("keypoints",))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[fast\]'"):
        CocoEvaluator(truth, classes(1), backend="faster")


def test_installed_backend(monkeypatch):
    truth = truth_of([])
    if importlib.util.find_spec("faster_coco_eval"):
        assert (
            CocoEvaluator(truth, classes(1))
            .table()
            .splitlines()[0]
            .endswith(", with faster-coco-eval")
        )
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert CocoEvaluator(truth, classes(1)).table().splitlines()[0].endswith(", with pycocotools")


def test_more_masks_than_one_call_supports():
    rows = [row(1, 1, 1, 1, 2 + i % 7, 3, 0.5) for i in range(300)]
    areas = [entry["area"] for entry in row_entries("segm", rows)]
    assert areas == [coco_mask.area(r["segmentation"]) for r in rows]


def test_prints_nothing(capfd):
    evaluate(truth_of([(1, 1, 10, 10, 20, 20, 0)]), [row(1, 1, 10, 10, 20, 20, 0.5)])
    assert capfd.readouterr() == ("", "")


def test_table():
    ids = tuple(range(1, 31))
    truth = truth_of([(1, 4, 10, 10, 20, 20, 0)], ids)
    categories = Categories(
        ("a class with a rather long name", *(f"class {i}" for i in ids[1:])), ids
    )
    evaluator = CocoEvaluator(truth, categories, backend="pycocotools")
    evaluator.add_rows([1], [row(1, 4, 10, 10, 20, 20, 0.5)])
    text = evaluator.table()
    assert (
        text.splitlines()[0]
        == "images: 1, detections: 1, evaluated: at most 100 per class and image, with pycocotools"
    )
    assert "AP50   IoU 0.50            1.000   1.000" in text
    assert "class 4                    1.000   1.000" in text
    assert "a class with a rather l…" in text
    assert max(map(len, text.splitlines())) <= 110


def test_a_table_of_many_classes_is_sorted_and_cut() -> None:
    names = [f"class {i}" for i in range(1203)]
    per_class = {
        "bbox": dict.fromkeys(names, 0.5),
        "segm": {name: (i + 1) / 2000 if i < 900 else -1.0 for i, name in enumerate(names)},
    }
    metrics = {"bbox/AP": 0.5, "segm/AP": 0.225, "segm/F1": 0.4, "segm/best_threshold": 0.65}
    text = summary_table(metrics, per_class, rest="runs/x/per_class.csv")
    lines = text.splitlines()
    assert len(lines) < 16
    assert max(map(len, lines)) <= 110
    assert lines[0].split() == ["AP", "F1", "at", "score"]
    assert lines[2].split() == ["segm", "0.225", "0.400", "0.650"]
    assert lines[4].split()[:4] == ["class", "899", "0.500", "0.450"]  # the highest
    assert lines[-2].split()[-4:] == ["class", "0", "0.500", "0.001"]  # the lowest that is defined
    assert "class 500" not in text
    assert "class 1000" not in text
    assert lines[-1] == "and 1179 more classes: runs/x/per_class.csv has all"
    few = {kind: dict(list(values.items())[:24]) for kind, values in per_class.items()}
    shown = summary_table(metrics, few, rest="runs/x/per_class.csv")
    assert all(f"class {i} " in shown for i in range(24))
    assert "more classes" not in shown
    assert "class 1000 " in metrics_table(
        {"bbox/AP": 0.5, "segm/AP": 0.2}, per_class
    )  # nothing cut
    assert summary_table({"loss": 1.0, "semantic/mIoU": 0.25}, {}) == "semantic: mIoU 0.250"


# Detections of a model: from the padded batch to the original images.


def batch_of(sizes, originals):
    padded = [-(-max(s[d] for s in sizes) // 32) * 32 for d in (0, 1)]
    return Batch(
        images=torch.zeros(len(sizes), 3, *padded, dtype=torch.uint8),
        sizes=torch.tensor(sizes),
        original_sizes=torch.tensor(originals),
        image_ids=[10 + i for i in range(len(sizes))],
        file_names=["" for _ in sizes],
    )


def regions_of(batch, boxes, image_index, labels, scores):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    frames = torch.tensor(batch.images.shape[-2:]).expand(len(boxes), 2)
    masks = MaskGrids(torch.ones(len(boxes), 28, 28), boxes, frames)
    return Regions(
        boxes,
        torch.tensor(image_index, dtype=torch.int64),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        masks,
    )


def test_to_original_scales_and_clips():
    batch = batch_of([(96, 128), (60, 128)], [(HEIGHT, WIDTH), (30, 64)])
    boxes = [
        [8, 16, 40, 48],
        [100, 40, 128, 80],
        [10, 70, 30, 90],
    ]  # the second extends into the padding, the third lies in it
    regions = regions_of(batch, boxes, [0, 1, 1], [0, 0, 0], [0.9, 0.8, 0.7])
    first = to_original(regions, 0, (96, 128), (HEIGHT, WIDTH))
    torch.testing.assert_close(first.boxes, torch.tensor([[10.0, 20.0, 50.0, 60.0]]))
    second = to_original(regions, 1, batch.sizes[1].tolist(), batch.original_sizes[1].tolist())
    torch.testing.assert_close(
        second.boxes, torch.tensor([[50.0, 20.0, 64.0, 30.0], [5.0, 30.0, 15.0, 30.0]])
    )
    bitmaps = rle_to_bitmaps(second.masks.to_rle())
    assert bitmaps.shape == (2, 30, 64)
    assert bitmaps[0].sum() == bitmaps[0, 20:30, 50:64].sum() == 14 * 10
    assert bitmaps[1].sum() == 0
    torch.testing.assert_close(first.masks.boxes(), first.boxes)


def test_to_original_round_trip():
    generator = torch.Generator().manual_seed(0)
    size, original = (333, 500), (427, 640)
    low = torch.rand(40, 2, generator=generator) * torch.tensor([400.0, 300.0])
    boxes = torch.cat(
        [low, low + torch.rand(40, 2, generator=generator) * torch.tensor([240.0, 127.0])], dim=1
    )
    scale = torch.tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)
    batch = batch_of([size], [original])
    regions = regions_of(batch, (boxes * scale).tolist(), [0] * 40, [0] * 40, [0.5] * 40)
    torch.testing.assert_close(
        to_original(regions, 0, size, original).boxes, boxes, rtol=0, atol=1e-3
    )


def test_detection_rows_of_a_padded_batch():
    batch = batch_of([(96, 128), (60, 128), (120, 80)], [(HEIGHT, WIDTH), (30, 64), (240, 160)])
    regions = regions_of(
        batch,
        [[8, 16, 40, 48], [8, 8, 9, 12], [40, 100, 80, 120]],
        [0, 0, 2],
        [1, 0, 1],
        [0.9, 0.8, 0.7],
    )
    rows = detection_rows(batch, Outputs(regions), classes(7, 3))
    assert [(r["image_id"], r["category_id"]) for r in rows] == [(10, 3), (10, 7), (12, 3)]
    assert [r["bbox"] for r in rows] == [[10, 20, 40, 40], [10, 10, 1.25, 5], [80, 200, 80, 40]]
    assert [r["score"] for r in rows] == regions.scores.tolist()
    assert [r["segmentation"]["size"] for r in rows] == [
        [HEIGHT, WIDTH],
        [HEIGHT, WIDTH],
        [240, 160],
    ]
    assert coco_mask.area(rows[2]["segmentation"]) == 80 * 40
    json.dumps(rows)
    assert all(
        "segmentation" not in r
        for r in detection_rows(batch, Outputs(regions), classes(7, 3), masks=False)
    )


def test_update_end_to_end():
    sizes, originals = [(96, 128), (60, 80)], [(HEIGHT, WIDTH), (HEIGHT, WIDTH)]
    batch = batch_of(sizes, originals)
    truth = truth_of([(10, 3, 10, 20, 40, 40, 0), (11, 7, 20, 20, 60, 80, 0)], (3, 7), (10, 11, 12))
    regions = regions_of(batch, [[8, 16, 40, 48], [10, 10, 40, 50]], [0, 1], [1, 0], [0.9, 0.8])
    evaluator = CocoEvaluator(truth, classes(7, 3))
    evaluator.update(batch, Outputs(regions))
    metrics = evaluator.compute()
    assert evaluator.image_ids == [10, 11]
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(1)


def test_update_without_detections():
    batch = batch_of([(96, 128)], [(HEIGHT, WIDTH)])
    evaluator = CocoEvaluator(truth_of([(10, 1, 1, 1, 50, 50, 0)], images=(10,)), classes(1))
    evaluator.update(batch, Outputs(regions_of(batch, [], [], [], [])))
    assert evaluator.compute()["segm/AP"] == 0.0


def test_update_without_labels():
    batch = batch_of([(96, 128)], [(HEIGHT, WIDTH)])
    proposals = Regions(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.ones(1))
    with pytest.raises(ValueError, match="labels"):
        detection_rows(batch, Outputs(proposals), classes(1))


def test_write_results(tmp_path):
    rows, path = (
        [row(1, 1, 10, 10, 20, 20, 0.5), row(2, 1, 1, 2, 3, 4, 0.25)],
        tmp_path / "new" / "results.json",
    )
    for written in (rows, []):  # the second replaces the first
        write_results(path, written)
        assert json.loads(path.read_text()) == written
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_write_results_leaves_no_partial_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON"):
        write_results(path, [{"score": float("nan")}])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(UserError, match="cannot write"):
        write_results(path / "below a file.json", [])
