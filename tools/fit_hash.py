"""A hash layer for a backbone, without labels: python tools/fit_hash.py checkpoint=... output=..."""

from __future__ import annotations

import sys

from maskseg import cli, segmenting

USAGE = """
Learns binary codes of a backbone's features by ITQ, from the images of a data set alone, and writes the model with its hash layer as a checkpoint for
tools/evaluate.py experiment=... and tools/predict.py. The keys are those of configs/fit_hash.yaml and of the checkpoint's own config.

  python tools/fit_hash.py checkpoint=runs/scenes_r18/TIME output=DIR
  python tools/fit_hash.py checkpoint=best.pt output=DIR model.segmenter.level=p3 model.segmenter.bits=16
  python tools/fit_hash.py checkpoint=best.pt output=DIR model/superpixels@model.segmenter.superpixels=egs model.segmenter.superpixels.k=310
  python tools/fit_hash.py checkpoint=best.pt output=DIR data=bsds data.root=DIR model.segmenter.radius=1
  python tools/fit_hash.py experiment=hash_bsds data.root=DIR output=DIR                  AlexNet's fc7, with ImageNet weights
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(segmenting.fit, USAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
