"""Bounded memory for a data set of the size of COCO: 5,000 images with 100 masks each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 4 * 1024**3

SIMULATION = """
import json, resource, sys, time
import torch
from maskseg.evaluation.coco import CocoEvaluator
from maskseg.masks.predicted import MaskGrids
from maskseg.structures import Batch, Categories, Outputs, Regions

backend = sys.argv[1]
images = int(sys.argv[2])
per_image = 100
classes = 80
height = 480
width = 640
step = 4
torch.set_num_threads(1)
torch.manual_seed(0)
frame = torch.tensor([width, height], dtype=torch.float32)

def boxes(n):
    extent = torch.exp(torch.empty(n, 2).uniform_(2.3, 5.8)).minimum(frame)
    low = torch.rand(n, 2) * (frame - extent)
    return torch.cat([low, low + extent], dim=1)

axis = torch.linspace(-1, 1, 28)
radius = (axis[:, None] ** 2 + axis**2).sqrt()
noise = torch.nn.functional.interpolate(torch.randn(256, 1, 7, 7), size=28, mode="bicubic")[:, 0]
blobs = torch.sigmoid(4 * (0.8 - radius) + noise)

annotations = []
truths = {}
for image in range(1, images + 1):
    true_boxes = boxes(7)
    labels = torch.randint(classes, (7,))
    truths[image] = true_boxes, labels
    for (x0, y0, x1, y1), label in zip(true_boxes.tolist(), labels.tolist()):
        x = (x0 + x1) / 2
        y = (y0 + y1) / 2
        w = (x1 - x0) / 2
        h = (y1 - y0) / 2
        polygon = [x - w, y, x - 0.7 * w, y - 0.7 * h, x, y - h, x + 0.7 * w, y - 0.7 * h]
        polygon += [x + w, y, x + 0.7 * w, y + 0.7 * h, x, y + h]
        annotations.append({
            "id": len(annotations), "image_id": image, "category_id": label + 1, "iscrowd": 0,
            "area": 3 * w * h, "bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": [polygon],
        })
truth = {
    "images": [{"id": i, "height": height, "width": width} for i in truths],
    "annotations": annotations,
    "categories": [{"id": c + 1, "name": str(c)} for c in range(classes)],
}
categories = Categories(tuple(map(str, range(classes))), tuple(range(1, classes + 1)))
evaluator = CocoEvaluator(truth, categories, backend=backend)

start = time.perf_counter()
for first in range(1, images + 1, step):
    ids = list(range(first, min(first + step, images + 1)))
    n = len(ids) * per_image
    detected = []
    labels = []
    for i in ids:  # half are jittered objects
        source = torch.randint(7, (per_image // 2,))
        detected.append(truths[i][0][source] + 6 * torch.randn(per_image // 2, 4))
        detected.append(boxes(per_image // 2))
        labels += [truths[i][1][source], torch.randint(classes, (per_image // 2,))]
    detected = torch.cat(detected).clamp(min=0).minimum(frame.repeat(2))
    low = detected[:, :2]
    detected = torch.cat([low, torch.maximum(detected[:, 2:], low)], dim=1)
    frames = torch.tensor([[height, width]]).expand(n, 2)
    masks = MaskGrids(blobs[torch.randint(256, (n,))], detected, frames)
    image_index = torch.arange(len(ids)).repeat_interleave(per_image)
    regions = Regions(detected, image_index, torch.rand(n), torch.cat(labels), masks)
    sizes = torch.tensor([[height, width]] * len(ids))
    batch = Batch(torch.zeros(len(ids), 3, 1, 1), sizes, sizes, ids, [""] * len(ids))
    evaluator.update(batch, Outputs(regions))
accumulated = time.perf_counter()
peak_accumulated = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
metrics = evaluator.compute()
print(json.dumps({
    "rows": len(evaluator.rows),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "peak_accumulated": peak_accumulated,
    "seconds_update": accumulated - start,
    "seconds_compute": time.perf_counter() - accumulated,
    "metrics": metrics,
}))
"""


def simulate(backend: str, images: int) -> dict:
    command = [sys.executable, "-c", SIMULATION, backend, str(images)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_five_thousand_images_fit(backend: str) -> None:
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    result = simulate(backend, 5000)
    print({k: v for k, v in result.items() if k != "metrics"})
    assert result["rows"] == 500_000
    assert 0 < result["metrics"]["segm/AP"] < result["metrics"]["bbox/AR100"] < 1
    assert result["peak"] < LIMIT
