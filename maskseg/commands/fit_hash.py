"""Learns binary codes of a backbone's features by ITQ, from the images of a dataset alone, without labels.
Writes the model with its hash layer as a checkpoint for tools/evaluate.py experiment=... and tools/predict.py.
The keys are those of configs/fit_hash.yaml and of the checkpoint's own config.

  python tools/fit_hash.py checkpoint=runs/scenes_r18/TIME output=DIR
  python tools/fit_hash.py checkpoint=best.pt output=DIR model.segmenter.level=p3 model.segmenter.bits=16
  python tools/fit_hash.py checkpoint=best.pt output=DIR model/superpixels@model.segmenter.superpixels=egs model.segmenter.superpixels.k=310
  python tools/fit_hash.py checkpoint=best.pt output=DIR data=bsds data.root=DIR model.segmenter.radius=1
  python tools/fit_hash.py experiment=hash_bsds data.root=DIR output=DIR                  AlexNet's fc7, with ImageNet weights
"""

from __future__ import annotations

from maskseg.variants.hash import fit


def main(arguments: list[str]) -> None:
    """Entry point of `tools/fit_hash.py`."""
    fit.fit(arguments)
