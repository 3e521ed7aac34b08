"""Suite `evaluate`: COCO rows -> the twelve numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.paste import soft_masks
from maskseg.errors import UserError
from maskseg.evaluation.coco import CocoEvaluator, check_backend
from maskseg.evaluation.coco_entries import BBOX, KINDS, SEGM
from maskseg.evaluation.coco_results import Row
from maskseg.structures import Categories

HEIGHT, WIDTH, TRUTHS, CLASSES = 480, 640, 7, 80  # COCO's usual frame, objects an image, classes
_MOST_ROUNDS = 2  # of ten seconds for each kind


def evaluate(config: Any, images: int = 500, detections: int = 100) -> dict[str, Any]:
    """Boxes and masks of simulated detections against simulated truth: pycocotools by hand, and this project's evaluation with each backend that is
    installed, from rows in memory to the twelve numbers.

    config: with `rounds` (at most 2 are done); images: 5,000 are COCO's validation set, and take ten times as long; detections: of an image.
    -> the suite's cases; agreement: the largest difference of a number.
    """
    device = torch.device("cpu")
    truth, rows = simulated(images, detections)
    categories = Categories(tuple(map(str, range(CLASSES))), tuple(range(1, CLASSES + 1)))
    cases = []
    for kind in (BBOX, SEGM):
        other = KINDS[SEGM if kind == BBOX else BBOX]
        own = [
            {k: v for k, v in row.items() if k != other} for row in rows
        ]  # with a box, loadRes would take its area for a mask's
        ways = {"pycocotools by hand": partial(by_hand, truth, own, kind)}
        ways |= {
            f"maskseg, {name}": partial(_ours, truth, own, categories, kind, name)
            for name in ("pycocotools", "faster")
            if _installed(name)
        }
        numbers: dict[str, list[float]] = {}
        things = {name: partial(_keep, numbers, name, way) for name, way in ways.items()}
        found = case(
            f"{kind}: {images} images, {detections} detections each",
            things,
            min(config.rounds, _MOST_ROUNDS),
            device,
        )
        by_peer, *others = numbers.values()
        found["agreement"] = {
            "largest difference": max(
                abs(a - b) for other in others for a, b in zip(by_peer, other, strict=True)
            )
        }
        cases.append(found)
    return {"suite": "evaluate", "machine": machine(device), "cases": cases}


def by_hand(truth: dict[str, Any], rows: list[Row], kind: str) -> list[float]:
    """The twelve numbers as pycocotools' own demo and torchvision's `references/detection` take them. Neither truth nor rows are changed."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        evaluator = COCOeval(
            known, known.loadRes([dict(row) for row in rows]), kind
        )  # loadRes writes into the rows
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [float(v) for v in evaluator.stats]


def simulated(images: int, detections: int) -> tuple[dict[str, Any], list[Row]]:
    """A COCO data set of `images` with polygons, and rows of `detections` for each: half of them are truth, each side moved by
    some hundredths of its length."""
    rng = torch.Generator().manual_seed(0)
    annotations: list[Row] = []
    rows: list[Row] = []
    for image in range(1, images + 1):
        boxes, labels = (
            soft_masks(TRUTHS, HEIGHT, WIDTH, rng).grid_boxes,
            torch.randint(CLASSES, (TRUTHS,), generator=rng),
        )
        for box, label in zip(boxes, labels.tolist(), strict=True):
            # Ids count from 1: pycocotools takes the id of a match for a truth value.
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    **_octagon(box),
                }
            )
        found = soft_masks(detections, HEIGHT, WIDTH, rng)
        moved, source = detections // 2, torch.randint(TRUTHS, (detections // 2,), generator=rng)
        found.grid_boxes[:moved] = boxes[source] + 0.06 * (boxes[:, 2:] - boxes[:, :2])[
            source
        ].repeat(1, 2) * torch.randn(moved, 4, generator=rng)
        classes = torch.randint(CLASSES, (detections,), generator=rng)
        classes[:moved] = labels[source]
        scores = torch.rand(detections, generator=rng).tolist()
        corners = found.grid_boxes.double().tolist()
        for (x0, y0, x1, y1), label, score, rle in zip(
            corners, classes.tolist(), scores, found.to_rle(), strict=True
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
    x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    corners = ((-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7), (1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7))
    polygon = [v for dx, dy in corners for v in (x + dx * w, y + dy * h)]
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 2.8 * w * h, "segmentation": [polygon]}


def _ours(
    truth: dict[str, Any], rows: list[Row], categories: Categories, kind: str, backend: str
) -> list[float]:
    evaluator = CocoEvaluator(truth, categories, backend=backend, iou_types=[kind])
    evaluator.add_rows([image["id"] for image in truth["images"]], rows)
    return list(evaluator.compute().values())


def _installed(backend: str) -> bool:
    try:
        check_backend(backend)
    except UserError:
        return False
    return True


def _keep(numbers: dict[str, list[float]], name: str, way: Callable[[], list[float]]) -> None:
    numbers[name] = way()
