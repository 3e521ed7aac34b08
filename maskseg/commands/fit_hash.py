"""Learns binary codes of a backbone's features by iterative quantization (ITQ).

ITQ uses the images of a dataset only, no labels. Writes the model with its hash layer as a
checkpoint for tools/evaluate.py experiment=... and tools/predict.py. The keys are those of
configs/fit_hash.yaml and of the checkpoint's own config.

  python tools/fit_hash.py checkpoint=runs/scenes_r18/TIME output=DIR
  python tools/fit_hash.py checkpoint=best.pt output=DIR model.segmenter.level=p3 \\
      model.segmenter.bits=16
  python tools/fit_hash.py checkpoint=best.pt output=DIR \\
      model/superpixels@model.segmenter.superpixels=egs model.segmenter.superpixels.scale=310
  python tools/fit_hash.py checkpoint=best.pt output=DIR data=bsds data.root=DIR \\
      model.segmenter.radius=1

Without a checkpoint, here from the fc7 features of AlexNet with ImageNet weights:

  python tools/fit_hash.py experiment=hash_bsds data.root=DIR output=DIR
"""

from __future__ import annotations

from maskseg.variants.hash import fit


def main(arguments: list[str]) -> None:
    """Entry point of `tools/fit_hash.py`."""
    fit.fit(arguments)
