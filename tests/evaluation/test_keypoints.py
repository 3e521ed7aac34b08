"""Keypoint AP (OKS) compared with pycocotools, and result rows of keypoints."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.errors import UserError
from maskseg.evaluation.coco import COCO_SIGMAS, CocoEvaluator
from maskseg.evaluation.coco_results import detection_rows
from maskseg.structures import Batch, Categories, Outputs, Regions

TINY = (
    Path(__file__).parents[3]
    / "shared"
    / "data"
    / "coco_tiny"
    / "annotations"
    / "person_keypoints_val2017.json"
)


def truth(points: int, images: int = 12, seed: int = 0) -> dict[str, Any]:
    """People of all sizes, some without keypoints, some crowds."""
    rng = np.random.default_rng(seed)
    rows = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 5))):
            x, y, w, h = (float(v) for v in (*rng.uniform(0, 300, 2), *rng.uniform(15, 250, 2)))
            visible = rng.integers(0, 3, points) * int(rng.random() > 0.15)
            xy = rng.uniform((x, y), (x + w, y + h), (points, 2)).round() * (visible > 0)[:, None]
            flat = np.concatenate([xy, visible[:, None]], axis=1).ravel().tolist()
            area = w * h * 0.6
            crowd = int(rng.random() < 0.1)
            row = {
                "id": len(rows) + 1,
                "image_id": image,
                "category_id": 4,
                "bbox": [x, y, w, h],
                "area": area,
                "iscrowd": crowd,
            }
            rows.append({**row, "keypoints": flat, "num_keypoints": int((visible > 0).sum())})
    names = [f"p{i}" for i in range(points)]
    categories = [{"id": 4, "name": "person", "keypoints": names, "skeleton": []}]
    return {
        "images": [{"id": i, "height": 600, "width": 600} for i in range(1, images + 1)],
        "annotations": rows,
        "categories": categories,
    }


def detections(data: dict[str, Any], seed: int = 1) -> list[dict[str, Any]]:
    """Detections near the ground truth and elsewhere, more than 20 in one image."""
    rng = np.random.default_rng(seed)
    rows = []
    for annotation in data["annotations"]:
        for _ in range(8 if annotation["image_id"] == 3 else 2):
            points = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
            points[:, :2] += rng.normal(0, rng.choice([1, 4, 15]), points[:, :2].shape)
            points[:, 2] = rng.random(len(points))
            score = float(rng.integers(0, 40)) / 40
            rows.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": 4,
                    "bbox": annotation["bbox"],
                    "score": score,
                    "keypoints": points.ravel().tolist(),
                }
            )
    return rows


def reference(data: dict[str, Any], rows: list[dict[str, Any]], sigmas: Any) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(data))
        coco.createIndex()
        evaluation = COCOeval(
            coco,
            coco.loadRes(
                json.loads(json.dumps([{k: v for k, v in r.items() if k != "bbox"} for r in rows]))
            ),
            "keypoints",
        )
        evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ["AP", "AP50", "AP75", "APm", "APl", "AR20", "AR50", "AR75", "ARm", "ARl"]
    return {
        f"keypoints/{name}": float(v)
        for name, v in zip(names, evaluation.stats, strict=True)
        if name not in ("AR50", "AR75")
    }


def evaluator(data: dict[str, Any], rows: list[dict[str, Any]], **keys: Any) -> CocoEvaluator:
    points = tuple(data["categories"][0]["keypoints"])
    coco_evaluator = CocoEvaluator(
        data,
        Categories(("person",), (data["categories"][0]["id"],), (points,), ((),)),
        iou_types=("keypoints",),
        **keys,
    )
    coco_evaluator.add_rows([i["id"] for i in data["images"]], rows)
    return coco_evaluator


@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
@pytest.mark.parametrize("points", [5, 17, 23])
def test_metrics_equal_pycocotools(points: int, backend: str) -> None:
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    data = truth(points)
    rows = detections(data)
    sigmas = COCO_SIGMAS if points == 17 else [1 / points] * points
    expected = reference(data, rows, sigmas)
    assert 0.05 < expected["keypoints/AP"] < 0.95
    assert evaluator(data, rows, backend=backend).compute() == pytest.approx(expected, abs=1e-12)


def test_sigmas_by_key() -> None:
    data = truth(5)
    rows = detections(data)
    sigmas = [0.01, 0.02, 0.05, 0.1, 0.3]
    assert evaluator(data, rows, oks_sigmas=sigmas).compute() == pytest.approx(
        reference(data, rows, sigmas), abs=1e-12
    )
    # Sigmas for another number of keypoints do not apply.
    assert evaluator(data, rows, oks_sigmas=[0.1] * 9).sigmas(5) == (0.2,) * 5


def test_exact_detections_of_real_people() -> None:
    if not TINY.exists():
        pytest.skip(f"{TINY} does not exist")
    data = json.loads(TINY.read_text())
    rows = [
        {
            "image_id": a["image_id"],
            "category_id": 1,
            "bbox": a["bbox"],
            "score": 0.9,
            "keypoints": a["keypoints"],
        }
        for a in data["annotations"]
    ]
    rows = [
        r
        for r, a in zip(rows, data["annotations"], strict=True)
        if a["num_keypoints"] and not a["iscrowd"]
    ]
    metrics = evaluator(data, rows).compute()
    assert metrics["keypoints/AP"] == pytest.approx(1.0)
    assert metrics == pytest.approx(reference(data, rows, COCO_SIGMAS), abs=1e-12)


def test_no_detection_is_zero() -> None:
    metrics = evaluator(truth(5), []).compute()
    assert metrics["keypoints/AP"] == 0


def test_a_row_without_keypoints_is_reported() -> None:
    data = truth(5)
    row = {"image_id": 1, "category_id": 4, "bbox": [0, 0, 5, 5], "score": 0.5}
    with pytest.raises(UserError, match="a result row of image 1 has no keypoints"):
        evaluator(data, [row])


def test_rows_are_in_original_pixels_with_the_keypoints_of_the_class() -> None:
    categories = Categories(
        ("hand", "stone", "face"), (3, 5, 9), (("a", "b"), (), ("c",)), ((), (), ())
    )
    points = torch.tensor(
        [
            [[10.5, 20.5, 0.5], [0.0, 0.0, 0.25], [0, 0, 0]],
            [[0, 0, 0]] * 3,
            [[0, 0, 0], [0, 0, 0], [30.0, 8.0, 0.75]],
        ]
    )
    boxes = torch.tensor([[0.0, 0.0, 40.0, 40.0]] * 3)
    points[2, 2, 0] = 41.0  # just outside the image: not clipped
    regions = Regions(
        boxes,
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([0, 1, 2]),
        keypoints=points,
    )
    batch = Batch(
        torch.zeros((1, 3, 64, 64), dtype=torch.uint8),
        torch.tensor([[40, 40]]),
        torch.tensor([[20, 80]]),
        [7],
        ["a.png"],
    )
    rows = detection_rows(batch, Outputs(regions), categories)
    # Twice as wide, half as high, then pixel indices.
    assert rows[0]["keypoints"] == [20.5, 9.75, 0.5, -0.5, -0.5, 0.25]
    assert "keypoints" not in rows[1]
    assert rows[2]["keypoints"] == [81.5, 3.5, 0.75]
