"""Suite `annotate`: masks from boxes, by GrabCut on a crop and on the whole image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch

from maskseg.annotation.grabcut import SURE_FG_THRESHOLD, Bools, Image, ellipse_mask, grabcut
from maskseg.annotation.jobs import annotation_jobs
from maskseg.annotation.metrics import SMALL
from maskseg.annotation.techniques import Technique
from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource

Object = tuple[Image, Sequence[float], Bools]  # image, box, true mask
Cutter = Callable[[Image, Sequence[float]], Bools]


def annotate(config: Config, count: int = 20) -> SuiteResult:
    """Annotate the first `count` objects of the validation split above 32 x 32 pixels.

    The seeds of GrabCut are those of technique `gcellipse`.

    config: with `data` and `rounds`.

    Returns the suite's case; agreement: the mean IoU of the masks with the ground truth.
    """
    objects = _objects(open_data(config), count)
    methods: dict[str, Cutter] = {"whole image": _whole, "maskseg": _crop}
    runs: dict[str, Callable[[], object]] = {
        name: partial(_cut_all, cut, objects) for name, cut in methods.items()
    }
    agreement = {f"IoU, {name}": _iou(cut, objects) for name, cut in methods.items()}
    name = f"{len(objects)} objects of {config.data.val_json}"
    return {
        "suite": "annotate",
        "machine": machine(torch.device("cpu")),
        "cases": [case(name, runs, config.rounds, torch.device("cpu"), agreement)],
    }


def _objects(source: CocoSource, count: int) -> list[Object]:
    def iterate() -> Iterator[Object]:
        for job in annotation_jobs(
            source.val,
            source.split("val").images or "",
            source.reading.max_pixels,
            "object",
            ground_truth=True,
        ):
            if not job.requests:
                continue
            image = job.load()
            for request in job.requests:
                truth = request.ground_truth_mask()
                if request.box is not None and truth is not None and truth.sum() >= SMALL:
                    yield image, request.box, truth

    return list(islice(iterate(), count))


def _crop(image: Image, box: Sequence[float]) -> Bools:
    return Technique("gcellipse", SURE_FG_THRESHOLD)(image, box).mask


def _whole(image: Image, box: Sequence[float]) -> Bools:
    technique = Technique("gcellipse", SURE_FG_THRESHOLD)
    height, width = image.shape[:2]
    values = technique.foreground_map(box, None, height, width)
    trimap = technique.trimap(box, values, height, width)
    assert trimap is not None
    fallback = ellipse_mask(box, height, width)
    result = grabcut(image, trimap, technique.iterations, fallback=fallback, full_image=True)
    return result.mask


def _cut_all(cut: Cutter, objects: Sequence[Object]) -> None:
    for image, box, _ in objects:
        cut(image, box)


def _iou(cut: Cutter, objects: Sequence[Object]) -> float:
    """Mean IoU with the ground truth, 0 without objects."""
    ious = []
    for image, box, truth in objects:
        mask = cut(image, box)
        ious.append((mask & truth).sum() / (mask | truth).sum())
    return float(np.mean(ious)) if ious else 0.0
