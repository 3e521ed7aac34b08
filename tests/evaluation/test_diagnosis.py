"""Diagnosis: literals of each outcome, and matches and curves compared with COCOeval."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.errors import UserError
from maskseg.evaluation.coco import CocoEvaluator
from maskseg.evaluation.coco_entries import compressed_rle
from maskseg.evaluation.diagnosis import confusion_matrix, diagnose, worst
from maskseg.structures import Categories

HEIGHT, WIDTH = 120, 160
CAT = 3  # category ids; the labels are 0 and 1
DOG = 7
ANIMALS = Categories(("cat", "dog"), (CAT, DOG))


def polygon(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def rle(x, y, w, h, height=HEIGHT, width=WIDTH):
    return compressed_rle(polygon(x, y, w, h), height, width)


def truth(image, category, x, y, w, h, *, crowd=0, mask=True):
    """An annotation; the mask fills the box."""
    shape = [] if not mask else rle(x, y, w, h) if crowd else polygon(x, y, w, h)
    return {
        "id": 1,
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": crowd,
        "segmentation": shape,
    }


def row(image, category, x, y, w, h, score, mask=None):
    """A result row; mask: xywh of the filled area, None for the box, False for no mask."""
    result = {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "score": score}
    if mask is not False:
        result["segmentation"] = rle(*(mask or (x, y, w, h)))
    return result


def only(truths, rows, **options):
    """The diagnosis of the only image."""
    (diagnosis,) = diagnose(truths, rows, ANIMALS, image_ids=[1], **options)
    return diagnosis


def outcomes(truths, rows, **options):
    return [f.outcome for f in only(truths, rows, **options).findings]


def test_correct():
    (finding,) = only([truth(1, CAT, 10, 10, 40, 40)], [row(1, CAT, 10, 10, 40, 40, 0.9)]).findings
    assert finding.outcome == "correct"
    assert (finding.truth["category_id"], finding.row["score"]) == (CAT, 0.9)
    assert (finding.box_iou, finding.mask_iou) == (1.0, 1.0)


def test_every_error():
    truths = [
        truth(1, CAT, 10, 10, 20, 20),
        truth(1, CAT, 50, 10, 20, 20),
        truth(1, DOG, 90, 10, 20, 20),
    ]
    rows = [
        row(1, DOG, 10, 10, 20, 20, 0.9),
        row(1, DOG, 90, 10, 20, 20, 0.8, mask=(90, 10, 20, 8)),
        row(1, CAT, 10, 80, 20, 20, 0.7),
    ]
    diagnosis = only(truths, rows)
    assert [f.outcome for f in diagnosis.findings] == ["wrong class", "bad mask", "false", "missed"]
    wrong, bad, false, missed = diagnosis.findings
    assert (wrong.truth, wrong.row, wrong.mask_iou) == (truths[0], rows[0], None)
    assert (bad.truth, bad.row) == (truths[2], rows[1])
    assert bad.mask_iou == pytest.approx(0.4)
    assert (false.truth, false.row, false.box_iou) == (None, rows[2], 0.0)
    assert (missed.truth, missed.row) == (truths[1], None)
    assert diagnosis.num_errors == 4
    assert diagnosis.summary == "missed 1, false 1, wrong class 1, bad mask 1"
    assert diagnosis.with_outcome("missed") == (missed,)


def test_thresholds():
    truths = [truth(1, CAT, 0, 0, 20, 20)]
    half = row(1, CAT, 0, 0, 20, 10, 0.5)  # box IoU 0.5, mask IoU 0.5, all just enough
    assert outcomes(truths, [half]) == ["correct"]
    assert outcomes(truths, [half], score=0.51) == ["missed"]
    assert outcomes(truths, [half], iou=0.51) == ["false", "missed"]
    assert outcomes(truths, [half], mask_iou=0.51) == ["bad mask"]


def test_each_object_is_matched_once_and_by_the_highest_score():
    truths = [truth(1, CAT, 10, 10, 20, 20)]
    rows = [row(1, CAT, 10, 10, 20, 20, 0.6), row(1, CAT, 10, 10, 20, 18, 0.9)]
    first, second = only(truths, rows).findings
    assert (first.outcome, first.row["score"]) == ("correct", 0.9)
    assert (second.outcome, second.row["score"]) == ("false", 0.6)


def test_objects_of_the_same_class_take_precedence():
    truths = [truth(1, DOG, 10, 10, 20, 20), truth(1, CAT, 10, 10, 20, 16)]
    first, second = only(
        truths, [row(1, CAT, 10, 10, 20, 20, 0.9), row(1, CAT, 10, 10, 20, 20, 0.8)]
    ).findings
    assert (first.outcome, first.truth) == (
        "correct",
        truths[1],
    )  # although the box of the dog has a higher IoU
    assert (second.outcome, second.truth) == ("wrong class", truths[0])


def test_the_object_with_the_highest_iou_is_matched():
    truths = [truth(1, CAT, 10, 10, 20, 16), truth(1, CAT, 10, 10, 20, 20)]
    correct, missed = only(truths, [row(1, CAT, 10, 10, 20, 20, 0.9)]).findings
    assert (correct.truth, missed.truth) == (truths[1], truths[0])


def test_crowds():
    truths = [truth(1, CAT, 0, 0, 100, 60, crowd=1)]
    inside, half, outside = (
        row(1, CAT, 10, 10, 20, 20, 0.9),
        row(1, DOG, 90, 10, 20, 20, 0.8),
        row(1, CAT, 91, 10, 20, 20, 0.7),
    )
    diagnosis = only(truths, [inside, half, outside])
    assert [(f.outcome, f.row) for f in diagnosis.findings] == [
        ("false", outside)
    ]  # the crowd is not missed
    truths.append(truth(1, CAT, 10, 10, 20, 20))
    assert outcomes(truths, [inside, half]) == ["correct"]  # an object in a crowd counts


@pytest.mark.parametrize(("in_truth", "in_row"), [(True, False), (False, None), (False, False)])
def test_boxes_only(in_truth, in_row):
    (finding,) = only(
        [truth(1, CAT, 10, 10, 20, 20, mask=in_truth)],
        [row(1, CAT, 10, 10, 20, 20, 0.9, mask=in_row)],
    ).findings
    assert (finding.outcome, finding.mask_iou) == ("correct", None)


RUNS = [
    10 * HEIGHT + 10,
    *[20, HEIGHT - 20] * 19,
    20,
    HEIGHT * (WIDTH - 30) + HEIGHT - 30,
]  # of the same square, column by column


@pytest.mark.parametrize(
    "shape",
    [polygon(10, 10, 20, 20), rle(10, 10, 20, 20), {"size": [HEIGHT, WIDTH], "counts": RUNS}],
)
def test_all_encodings_of_masks(shape):
    annotation = truth(1, CAT, 10, 10, 20, 20) | {"segmentation": shape}
    (finding,) = only([annotation], [row(1, CAT, 10, 10, 20, 20, 0.9)]).findings
    assert finding.mask_iou == 1


def test_a_mask_of_another_size():
    annotation = truth(1, CAT, 10, 10, 20, 20) | {"segmentation": rle(10, 10, 20, 20, 100, 100)}
    with pytest.raises(UserError, match=r"image 1 .*\[120, 160\].*\[100, 100\]"):
        only([annotation], [row(1, CAT, 10, 10, 20, 20, 0.9)])


def test_selected_images_and_classes():
    truths = [truth(1, CAT, 0, 0, 9, 9), truth(2, CAT, 0, 0, 9, 9), truth(1, 99, 50, 50, 9, 9)]
    rows = [row(3, DOG, 0, 0, 9, 9, 0.9), row(1, 99, 50, 50, 9, 9, 0.9)]
    assert [(d.image_id, d.summary) for d in diagnose(truths, rows, ANIMALS)] == [
        (1, "missed 1"),
        (2, "missed 1"),
        (3, "false 1"),
    ]
    seen = diagnose(truths, rows, ANIMALS, image_ids=[8, 1])
    assert [(d.image_id, d.summary, d.num_errors) for d in seen] == [(1, "missed 1", 1), (8, "", 0)]
    assert diagnose([], [], ANIMALS) == []


def test_boxes_without_area():
    assert outcomes(
        [truth(1, CAT, 5, 5, 0, 0, mask=False)], [row(1, CAT, 5, 5, 0, 0, 0.9, mask=False)]
    ) == ["false", "missed"]


def test_confusion_matrix():
    truths = [
        truth(1, CAT, 10, 10, 20, 20),
        truth(1, CAT, 50, 10, 20, 20),
        truth(1, DOG, 90, 10, 20, 20),
        truth(2, DOG, 0, 0, 20, 20),
    ]
    rows = [
        row(1, CAT, 10, 10, 20, 20, 0.9),
        row(1, DOG, 50, 10, 20, 20, 0.8),
        row(1, DOG, 90, 10, 20, 20, 0.7, mask=(90, 10, 20, 5)),  # a bad mask
        row(1, DOG, 10, 90, 20, 20, 0.6),
        row(2, CAT, 90, 90, 20, 20, 0.6),
        row(2, CAT, 50, 90, 20, 20, 0.6),
    ]
    matrix = confusion_matrix(diagnose(truths, rows, ANIMALS), ANIMALS)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 1], [2, 1, 0]]
    assert confusion_matrix([], ANIMALS).tolist() == [[0] * 3] * 3


def test_worst():
    truths = [
        truth(image, CAT, 20 * i, 0, 15, 15)
        for image, count in {1: 1, 2: 3, 3: 0, 4: 3, 5: 2}.items()
        for i in range(count)
    ]
    rows = [row(5, DOG, 20 * i, 50, 15, 15, 0.9) for i in range(2)]
    diagnoses = diagnose(truths, rows, ANIMALS, image_ids=range(1, 7))
    selected = worst(reversed(diagnoses))
    assert [(d.image_id, d.summary) for d in selected] == [
        (5, "missed 2, false 2"),
        (2, "missed 3"),
        (4, "missed 3"),
        (1, "missed 1"),
    ]
    assert [d.image_id for d in worst(diagnoses, 2)] == [5, 2]
    assert worst([]) == []
    many = diagnose([truth(i, CAT, 0, 0, 9, 9) for i in range(30)], [], ANIMALS)
    assert [d.image_id for d in worst(many)] == list(range(20))


def random_data(seed, images=6, classes=(CAT, DOG), max_objects=25):
    """Random ground truth, and rows: jittered objects, of a random class, or false positives."""
    rng = np.random.default_rng(seed)
    truths, rows = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, max_objects)):
            x, y, w, h = (
                int(v)
                for v in (
                    rng.integers(0, 120),
                    rng.integers(0, 80),
                    rng.integers(5, 40),
                    rng.integers(5, 40),
                )
            )
            category = int(rng.choice(classes))
            truths.append(truth(image, category, x, y, w, h) | {"id": len(truths) + 1})
            for _ in range(rng.integers(0, 3)):
                dx, dy, dw, dh = rng.integers(-4, 5, 4).tolist()
                box = max(x + dx, 0), max(y + dy, 0), max(w + dw, 1), max(h + dh, 1)
                rows.append(
                    row(
                        image,
                        category if rng.random() < 0.8 else int(rng.choice(classes)),
                        *box,
                        float(rng.random()),
                    )
                )
    return truths, rows


def coco_eval(truths, rows, kind, images, classes):
    """The evaluation of pycocotools, called directly.

    Rows for masks have no box: with one, `loadRes` uses the area of the box as the object size.
    """
    rows = [
        {k: v for k, v in r.items() if k != ("segmentation" if kind == "bbox" else "bbox")}
        for r in rows
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO()
        sizes = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in images]
        data.dataset = {
            "images": sizes,
            "annotations": [dict(t) for t in truths],
            "categories": [{"id": c} for c in classes],
        }
        data.createIndex()
        evaluator = COCOeval(data, data.loadRes(rows), kind)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


@pytest.mark.parametrize("seed", range(4))
def test_matches_equal_coco_for_one_class(seed):
    truths, rows = random_data(seed, classes=(CAT,))
    rows = [r for r in rows if r["score"] >= 0.3]
    evaluator = coco_eval(truths, rows, "bbox", range(1, 7), (CAT,))
    matched = {}
    for entry in evaluator.evalImgs:
        if entry is not None and entry["aRng"] == [0, 1e10]:
            matched[entry["image_id"]] = int((entry["dtMatches"][0] > 0).sum())
    for diagnosis in diagnose(truths, rows, ANIMALS, score=0.3, mask_iou=0):
        assert len(diagnosis.with_outcome("correct")) == matched.get(diagnosis.image_id, 0)
        in_image = [t for t in truths if t["image_id"] == diagnosis.image_id]
        num_missed = len(in_image) - matched.get(diagnosis.image_id, 0)
        assert len(diagnosis.with_outcome("missed")) == num_missed


@pytest.mark.parametrize("seed", range(4))
def test_everything_is_counted_once(seed):
    truths, rows = random_data(seed)
    findings = [f for d in diagnose(truths, rows, ANIMALS, score=0.5) for f in d.findings]
    assert sorted(f.truth["id"] for f in findings if f.truth) == [t["id"] for t in truths]
    assert sorted(f.row["score"] for f in findings if f.row) == sorted(
        r["score"] for r in rows if r["score"] >= 0.5
    )
    for f in findings:
        assert (f.outcome == "missed") == (f.row is None)
        assert (f.outcome == "false") == (f.truth is None)
        if f.mask_iou is not None:
            a, b = compressed_rle(f.truth["segmentation"], HEIGHT, WIDTH), f.row["segmentation"]
            assert f.mask_iou == coco_mask.iou([a], [b], [0])[0, 0]
            assert (f.outcome == "correct") == (f.mask_iou >= 0.5)


def test_more_objects_than_a_byte_can_count():
    truths = [truth(1, CAT, 8 * (i % 20), 6 * (i // 20), 7, 5) for i in range(400)]
    rows = [row(1, CAT, *t["bbox"], 0.9) for t in truths]
    assert set(outcomes(truths, rows)) == {"correct"}
    assert len(outcomes(truths, rows)) == 400


@pytest.mark.parametrize(("iou", "index"), [(0.5, 0), (0.55, 1), (0.75, 5), (0.95, 9)])
def test_pr_curves_equal_coco(iou, index):
    truths, rows = random_data(7)
    categories = Categories(("cat", "dog", "cow"), (CAT, DOG, 9))
    data = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, 7)],
        "annotations": truths,
    }
    evaluator = CocoEvaluator(data, categories)
    evaluator.add_rows(range(1, 7), rows)
    curves = evaluator.pr_curves(iou)
    assert list(curves) == ["bbox", "segm"]
    for kind, classes in curves.items():
        assert list(classes) == ["cat", "dog", "cow"]
        expected = coco_eval(truths, rows, kind, range(1, 7), categories.ids).eval["precision"][
            index, :, :, 0, -1
        ]
        np.testing.assert_allclose(
            np.stack(list(classes.values()), axis=1), expected, rtol=0, atol=1e-12
        )
        assert (classes["cow"] == -1).all()
        assert classes["cat"].shape == (101,)
    if iou == 0.5:
        assert evaluator.compute()["segm/AP50"] == pytest.approx(
            np.mean([curves["segm"][name].mean() for name in ("cat", "dog")])
        )


def test_pr_curves_are_copies():
    data = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH}],
        "annotations": [truth(1, CAT, 10, 10, 20, 20)],
    }
    evaluator = CocoEvaluator(data, ANIMALS, iou_types=["bbox"])
    evaluator.add_rows([1], [row(1, CAT, 10, 10, 20, 20, 0.9, mask=False)])
    curves = evaluator.pr_curves()
    assert list(curves) == ["bbox"]
    np.testing.assert_allclose(curves["bbox"]["cat"], np.ones(101))
    curves["bbox"]["cat"][:] = 0
    assert evaluator.compute()["bbox/AP50"] == pytest.approx(1)


@pytest.mark.parametrize("iou", [0.45, 0.52, 1.0])
def test_pr_curves_at_another_threshold(iou):
    evaluator = CocoEvaluator({"images": [], "annotations": []}, ANIMALS)
    with pytest.raises(ValueError, match=r"0\.55"):
        evaluator.pr_curves(iou)
