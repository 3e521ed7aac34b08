"""Measures what is compared in turn in one process, many times, and prints medians and ratios. The keys are those of tools/train.py, and:
trunk, size, batch, rounds, steps, output=FILE.json and suite, one of
  trainer, inference, train, curve, roi_align, paste, evaluate, data, scaling, hash, segmentation_iou, projection, cfm, boundary, annotate

  python tools/benchmark.py                                            what logs, checks, checkpoints and pictures cost a training
  python tools/benchmark.py suite=inference data=coco data.root=DIR    pictures to masks, beside torchvision's Mask R-CNN
  python tools/benchmark.py suite=train data=coco data.root=DIR batch=2 size=320   a step, and one with proposals from a file
  python tools/benchmark.py suite=roi_align                            RoIAlign on the CPU, beside torchvision's; suite=paste: masks to RLE
  python tools/benchmark.py suite=evaluate                             COCO's numbers, beside pycocotools; hash, projection ...: segments
  python tools/benchmark.py suite=data data=coco data.root=DIR         files to batches, beside torchvision's references
  python tools/benchmark.py suite=cfm data=coco data.root=DIR          masks on features beside the backbone, and beside a pass for each segment
  python tools/benchmark.py suite=boundary experiment=scenes_cfm trainer.init=RUN output=DIR/boundary.json   what masked pixels change; pictures
  python tools/benchmark.py suite=annotate data=coco data.root=DIR     masks from boxes, beside GrabCut on the whole image
  python tools/benchmark.py suite=scaling trunk=resnet18 size=512 rounds=3   time and memory against what there is more of
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from maskseg import config
from maskseg.benchmarks.report import chart, table
from maskseg.errors import UserError
from maskseg.files import write_json

# Each is a function of that name in the module of that name.
SUITES = (
    "trainer",
    "inference",
    "train",
    "curve",
    "roi_align",
    "paste",
    "evaluate",
    "data",
    "scaling",
    "hash",
    "segmentation_iou",
    "projection",
    "cfm",
    "boundary",
    "annotate",
)


def main(arguments: list[str]) -> None:
    """Entry point of `tools/benchmark.py`."""
    composed = config.compose("benchmark", arguments)
    if composed.suite not in SUITES:
        raise UserError(f"suite must be one of {', '.join(SUITES)}, not {composed.suite!r}")
    suite = getattr(import_module(f"maskseg.benchmarks.{composed.suite}"), composed.suite)
    results = suite(composed)
    cases = results.get("cases") or results.get("axes")
    print(json.dumps(results, indent=2) if cases is None else table(results))
    if composed.output:
        write_json(Path(composed.output), results)
        if cases:
            chart(results, Path(composed.output).with_suffix(".png"))
