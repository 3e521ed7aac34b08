"""Measures the speed of parts of the package, and compares them with alternatives.

The cases of a suite run in turn in one process, many times; medians and ratios are printed. The
keys are those of tools/train.py, and: trunk, size, batch, rounds, steps, output=FILE.json and
suite, which is one of

  trainer, inference, train, curve, roi_align, paste, evaluate, data, scaling, hash,
  segmentation_iou, projection, cfm, boundary, annotate

The overhead of logs, checks, checkpoints and plots in a training:
  python tools/benchmark.py

From images to masks, compared with torchvision's Mask R-CNN:
  python tools/benchmark.py suite=inference data=coco data.root=DIR

A training step, and a step with proposals from a file:
  python tools/benchmark.py suite=train data=coco data.root=DIR batch=2 size=320

RoIAlign on the CPU, compared with torchvision's (suite=paste: from masks to RLE):
  python tools/benchmark.py suite=roi_align

The COCO metrics, compared with pycocotools (hash, projection ...: segments):
  python tools/benchmark.py suite=evaluate

From files to batches, compared with torchvision's references:
  python tools/benchmark.py suite=data data=coco data.root=DIR

Masking features, compared with the backbone, and with one pass of the backbone for each segment:
  python tools/benchmark.py suite=cfm data=coco data.root=DIR

How masked pixels change the features, with images:
  python tools/benchmark.py suite=boundary experiment=scenes_cfm trainer.init=RUN \\
      output=DIR/boundary.json

Masks from boxes, compared with GrabCut on the whole image:
  python tools/benchmark.py suite=annotate data=coco data.root=DIR

Growth of time and memory with the sizes and numbers of images, detections, objects and classes:
  python tools/benchmark.py suite=scaling trunk=resnet18 size=512 rounds=3
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from maskseg import config as configs
from maskseg.benchmarks.report import chart, table
from maskseg.errors import UserError, warn_if_not_drawn
from maskseg.files import write_json
from maskseg.files.outputs import check_outputs, record_outputs

# For each suite, `maskseg.benchmarks` has a module with a function of the same name.
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
    config = configs.compose("benchmark", arguments, print)
    if config.suite not in SUITES:
        raise UserError(f"suite must be one of {', '.join(SUITES)}, not {config.suite!r}")
    if config.output:
        output = Path(config.output)
        outputs = [output, output.with_suffix(".png")]
        check_outputs(outputs, tool="benchmark", overwrite=config.overwrite)
    suite = getattr(import_module(f"maskseg.benchmarks.{config.suite}"), config.suite)
    results = suite(config)
    cases = results.get("cases") or results.get("axes")
    print(json.dumps(results, indent=2) if cases is None else table(results))
    if config.output:
        output = Path(config.output)
        with record_outputs([output, output.with_suffix(".png")], "benchmark"):
            write_json(output, results)
            if cases:
                with warn_if_not_drawn(str(output.with_suffix(".png"))):
                    chart(results, output.with_suffix(".png"))
