"""Suite `evaluate`: COCO results to the twelve COCO metrics."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.paste import soft_masks
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.errors import UserError
from maskseg.evaluation.coco import CocoEvaluator, GroundTruth, check_backend
from maskseg.evaluation.coco_entries import BBOX, KINDS, SEGM
from maskseg.evaluation.coco_results import Row
from maskseg.structures import Categories

# COCO's usual image size, mean number of objects per image, and number of classes.
HEIGHT = 480
WIDTH = 640
OBJECTS = 7
CLASSES = 80
_MAX_ROUNDS = 2  # of ten seconds for each kind


def evaluate(config: Config, images: int = 500, detections: int = 100) -> SuiteResult:
    """Evaluate boxes and masks of simulated detections against simulated ground truth.

    Compares direct calls of pycocotools with `CocoEvaluator` and each installed backend, from
    results in memory to the twelve metrics.

    Args:
        config: with `rounds`, of which at most 2 are done.
        images: number of images. COCO's validation set has 5,000, which take ten times as long.
        detections: detections per image.

    Returns the suite's cases; agreement: the largest difference of a metric.
    """
    device = torch.device("cpu")
    truth, rows = simulate(images, detections)
    categories = Categories(tuple(map(str, range(CLASSES))), tuple(range(1, CLASSES + 1)))
    cases = []
    for kind in (BBOX, SEGM):
        other = KINDS[SEGM if kind == BBOX else BBOX]
        # Given a box, loadRes would use its area as the area of the mask.
        results = [{k: v for k, v in row.items() if k != other} for row in rows]
        functions = {"pycocotools by hand": partial(by_hand, truth, results, kind)}
        for name in ("pycocotools", "faster"):
            if _is_installed(name):
                functions[f"maskseg, {name}"] = partial(
                    _ours, truth, results, categories, kind, name
                )
        metrics: dict[str, list[float]] = {}
        runs = {
            name: partial(_store, metrics, name, function) for name, function in functions.items()
        }
        result = case(
            f"{kind}: {images} images, {detections} detections each",
            runs,
            min(config.rounds, _MAX_ROUNDS),
            device,
        )
        expected, *others = metrics.values()
        differences = []
        for values in others:
            differences += [abs(a - b) for a, b in zip(expected, values, strict=True)]
        result["agreement"] = {"largest difference": max(differences)}
        cases.append(result)
    return {"suite": "evaluate", "machine": machine(device), "cases": cases}


def by_hand(truth: GroundTruth, rows: list[Row], kind: str) -> list[float]:
    """Compute the twelve metrics as pycocotools' demo and torchvision's `references/detection` do.

    The arguments are not modified.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        results = coco.loadRes([dict(row) for row in rows])  # copies: loadRes modifies its rows
        evaluator = COCOeval(coco, results, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(v) for v in evaluator.stats]


def simulate(images: int, detections: int) -> tuple[GroundTruth, list[Row]]:
    """Simulate a COCO dataset with polygons, and `detections` results per image.

    Half of the detections are ground-truth boxes with each side moved by a few percent.

    Returns the dataset and the results.
    """
    rng = torch.Generator().manual_seed(0)
    annotations: list[Row] = []
    rows: list[Row] = []
    for image in range(1, images + 1):
        boxes = soft_masks(OBJECTS, HEIGHT, WIDTH, rng).grid_boxes
        labels = torch.randint(CLASSES, (OBJECTS,), generator=rng)
        for box, label in zip(boxes, labels.tolist(), strict=True):
            # pycocotools treats match id 0 as "unmatched", so ids start at 1.
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    **_octagon(box),
                }
            )
        masks = soft_masks(detections, HEIGHT, WIDTH, rng)
        moved = detections // 2
        source = torch.randint(OBJECTS, (moved,), generator=rng)
        sides = (boxes[:, 2:] - boxes[:, :2])[source].repeat(1, 2)
        noise = torch.randn(moved, 4, generator=rng)
        masks.grid_boxes[:moved] = boxes[source] + 0.06 * sides * noise
        classes = torch.randint(CLASSES, (detections,), generator=rng)
        classes[:moved] = labels[source]
        scores = torch.rand(detections, generator=rng).tolist()
        corners = masks.grid_boxes.double().tolist()
        for (x0, y0, x1, y1), label, score, rle in zip(
            corners, classes.tolist(), scores, masks.to_rle(), strict=True
        ):
            bbox = [x0, y0, x1 - x0, y1 - y0]
            rows.append(
                {
                    "image_id": image,
                    "category_id": label + 1,
                    "bbox": bbox,
                    "score": score,
                    "segmentation": rle,
                }
            )
    return {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": c + 1, "name": str(c)} for c in range(CLASSES)],
    }, rows


def _octagon(box: Tensor) -> Row:
    x0, y0, x1, y1 = box.tolist()
    x = (x0 + x1) / 2
    y = (y0 + y1) / 2
    w = (x1 - x0) / 2
    h = (y1 - y0) / 2
    corners = ((-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7), (1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7))
    polygon: list[float] = []
    for dx, dy in corners:
        polygon += (x + dx * w, y + dy * h)
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 2.8 * w * h, "segmentation": [polygon]}


def _ours(
    truth: GroundTruth, rows: list[Row], categories: Categories, kind: str, backend: str
) -> list[float]:
    evaluator = CocoEvaluator(truth, categories, backend=backend, iou_types=[kind])
    evaluator.add_rows([image["id"] for image in truth["images"]], rows)
    return list(evaluator.compute().values())


def _is_installed(backend: str) -> bool:
    try:
        check_backend(backend)
    except UserError:
        return False
    return True


def _store(metrics: dict[str, list[float]], name: str, function: Callable[[], list[float]]) -> None:
    metrics[name] = function()
