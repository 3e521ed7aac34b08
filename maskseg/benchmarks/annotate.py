"""Suite `annotate`: masks from boxes, GrabCut on a crop beside GrabCut on the whole image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maskseg.annotation.grabcut import CORE, Bools, Image, ellipse_mask, grabcut
from maskseg.annotation.jobs import annotation_jobs
from maskseg.annotation.metrics import SMALL
from maskseg.annotation.techniques import Technique
from maskseg.benchmarks.measure import case, machine
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource

Object = tuple[Image, Sequence[float], Bools]  # image, box, true mask
Cutter = Callable[[Image, Sequence[float]], Bools]


def annotate(config: Any, count: int = 20) -> dict[str, Any]:
    """The first `count` objects of over 32 x 32 pixels of the validation split, by the seeds of `gcellipse`.

    config: with `data` and `rounds`. -> the suite's case; agreement: the objects' mean IoU with the truth each way.
    """
    objects = _objects(open_data(config), count)
    ways: dict[str, Cutter] = {"whole image": _whole, "maskseg": _crop}
    things: dict[str, Callable[[], object]] = {
        name: partial(_cut_all, cut, objects) for name, cut in ways.items()
    }
    agreement = {f"IoU, {name}": _iou(cut, objects) for name, cut in ways.items()}
    name = f"{len(objects)} objects of {config.data.val_json}"
    return {
        "suite": "annotate",
        "machine": machine(torch.device("cpu")),
        "cases": [case(name, things, config.rounds, torch.device("cpu"), agreement)],
    }


def _objects(source: CocoSource, count: int) -> list[Object]:
    def all_of() -> Any:
        for job in annotation_jobs(
            source.val, source.images["val"] or "", source.max_pixels, "object", truth=True
        ):
            image = job.load() if job.wanted else None
            for wanted in job.wanted:
                truth = wanted.true_mask()
                if truth is not None and truth.sum() >= SMALL:
                    yield image, wanted.box, truth

    return list(islice(all_of(), count))


def _crop(image: Image, box: Sequence[float]) -> Bools:
    return Technique("gcellipse", CORE)(image, box).mask


def _whole(image: Image, box: Sequence[float]) -> Bools:
    technique, size = Technique("gcellipse", CORE), image.shape[:2]
    codes = technique.codes(box, technique.map(box, None, *size), *size)
    assert codes is not None
    return grabcut(
        image, codes, technique.iterations, instead=ellipse_mask(box, *size), whole=True
    ).mask


def _cut_all(cut: Cutter, objects: Sequence[Object]) -> None:
    for image, box, _ in objects:
        cut(image, box)


def _iou(cut: Cutter, objects: Sequence[Object]) -> float:
    found: list[tuple[NDArray[np.bool_], Bools]] = [
        (cut(image, box), truth) for image, box, truth in objects
    ]
    return float(np.mean([(a & b).sum() / (a | b).sum() for a, b in found])) if found else 0.0
