"""The threshold of the best F1, compared with counts of pycocotools at every threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.evaluation.coco import CocoEvaluator
from maskseg.evaluation.confidence import Matches, best_metrics, score_curves
from maskseg.structures import Categories

ANIMALS = Categories(("cat", "dog", "never shown"), (3, 7, 9))
Entry = dict[str, Any]


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def random_data(seed: int) -> tuple[dict[str, list[Entry]], list[Entry]]:
    """A ground truth with crowds, and detections near its objects, with ties of their scores."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "height": 100, "width": 120} for i in range(1, 7)]
    annotations: list[Entry] = []
    rows: list[Entry] = []
    for image in images[:5]:
        for _ in range(rng.integers(1, 8)):
            x, y, side = (float(v) for v in rng.integers(2, 60, 3))
            side = 10 + side / 2
            category = int(rng.choice((3, 7)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": int(rng.random() < 0.15),
                    "segmentation": square(x, y, side),
                }
            )
            for _ in range(rng.integers(0, 3)):
                shift = float(rng.normal(0, 3))
                wrong = rng.random() < 0.2
                rows.append(
                    detection(image["id"], 3 if wrong else category, x + shift, y, side, rng)
                )
    rows.append(detection(6, 9, 5, 5, 30, rng))  # of a class and an image without ground truth
    categories = [{"id": 3}, {"id": 7}, {"id": 9}]
    return {"images": images, "annotations": annotations, "categories": categories}, rows


def detection(
    image: int, category: int, x: float, y: float, side: float, rng: np.random.Generator
) -> Entry:
    from maskseg.evaluation.coco_entries import compressed_rle

    x = min(max(x, 0.0), 119 - side)
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "score": float(rng.integers(1, 20)) / 20,
        "segmentation": compressed_rle(square(x, y, side), 100, 120),
    }


def f1_by_pycocotools(
    truth: dict[str, list[Entry]], rows: list[Entry], kind: str, threshold: float
) -> float:
    """F1 at IoU 0.50 of the rows of at least a score, from the matches of pycocotools."""
    dataset, results = COCO(), COCO()
    categories = [{"id": i} for i in ANIMALS.ids]
    dataset.dataset = {**truth, "categories": categories}
    dataset.createIndex()
    kept = []
    for i, row in enumerate(r for r in rows if r["score"] >= threshold):
        kept.append({**row, "id": i + 1, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0})
    results.dataset = {"images": truth["images"], "annotations": kept, "categories": categories}
    results.createIndex()
    evaluation = COCOeval(dataset, results, kind)
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.params.maxDets = [100]
    evaluation.evaluate()
    hits = false = 0
    for image in evaluation.evalImgs:
        if image is not None:
            counted = ~np.array(image["dtIgnore"][0], dtype=bool)
            matched = np.array(image["dtMatches"][0]) > 0
            hits += int((counted & matched).sum())
            false += int((counted & ~matched).sum())
    objects = sum(not a["iscrowd"] for a in truth["annotations"])
    return 2 * hits / (hits + false + objects) if hits + false + objects else 0.0


@pytest.mark.parametrize("kind", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_has_the_highest_f1(
    seed: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, rows = random_data(seed)
    kinds = ["bbox", "segm"] if kind == "segm" else ["bbox"]
    evaluator = CocoEvaluator(truth, ANIMALS, backend="pycocotools", iou_types=kinds)
    evaluator.add_rows(range(1, 7), rows)
    metrics = evaluator.best_scores()
    assert set(metrics) == {
        f"{kind}/{name}" for name in ("F1", "precision", "recall", "best_threshold")
    }
    thresholds = sorted({row["score"] for row in rows})
    f1 = {value: f1_by_pycocotools(truth, rows, kind, value) for value in thresholds}
    best = metrics[f"{kind}/best_threshold"]
    assert f1[best] == pytest.approx(max(f1.values()))
    assert metrics[f"{kind}/F1"] == pytest.approx(max(f1.values()))
    precision, recall = metrics[f"{kind}/precision"], metrics[f"{kind}/recall"]
    assert 2 * precision * recall / (precision + recall) == pytest.approx(metrics[f"{kind}/F1"])
    curves = evaluator.score_curves()
    assert list(curves) == ["", "cat", "dog"]  # false detections of the third class count for all
    together = curves[""]
    # Scores that only detections in crowds have are no thresholds of the curves.
    assert set(together.scores.tolist()) <= set(thresholds)
    assert (np.diff(together.scores) < 0).all()
    np.testing.assert_allclose(together.f1, [f1[value] for value in together.scores.tolist()])
    capsys.readouterr()


def test_literal_values() -> None:
    scores = np.array([0.9, 0.8, 0.8, 0.7, 0.2])
    curves = score_curves(Matches(scores, np.array([True, False, True, True, False]), 4))
    assert curves.scores.tolist() == [0.9, 0.8, 0.7, 0.2]
    assert curves.precision.tolist() == [1.0, 2 / 3, 3 / 4, 3 / 5]
    assert curves.recall.tolist() == [0.25, 0.5, 0.75, 0.75]
    assert curves.f1.tolist() == [2 / 5, 4 / 7, 6 / 8, 6 / 9]
    assert best_metrics("segm", curves) == {
        "segm/F1": 0.75,
        "segm/precision": 0.75,
        "segm/recall": 0.75,
        "segm/best_threshold": 0.7,
    }


@pytest.mark.parametrize("objects", [0, 3])
@pytest.mark.parametrize("detections", [0, 2])
def test_without_a_correct_detection_there_is_no_threshold(objects: int, detections: int) -> None:
    nothing = Matches(np.full(detections, 0.5), np.zeros(detections, dtype=bool), objects)
    curves = score_curves(nothing)
    assert curves.best is None
    assert set(best_metrics("bbox", curves).values()) == {-1.0}
