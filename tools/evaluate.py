"""Evaluates a trained model: python tools/evaluate.py checkpoint=... output=DIR"""

from __future__ import annotations

import sys

from maskseg import cli, segmenting, trained

USAGE = """
COCO evaluation of a checkpoint, on the data it was validated with or on other data.
Writes metrics.json, per_class.json, detections.json, validation.png and other pictures; of models that cut images into segments or label pixels
also segmentation_iou/... and semantic/... .

  python tools/evaluate.py checkpoint=runs/scenes_r18/TIME output=DIR
  python tools/evaluate.py checkpoint=best.pt output=DIR split=train evaluation.max_images=500
  python tools/evaluate.py checkpoint=best.pt output=DIR data=custom data.val_json=VAL.json data.images=IMAGES
  python tools/evaluate.py checkpoint=best.pt output=DIR evaluation.backend=faster trainer.precision=bf16
  python tools/evaluate.py checkpoint=best.pt output=DIR model.classifier.max_detections=300 model.classifier.score_threshold=0.01

With experiment=... segments are evaluated beside other ways to cut an image; keys of configs/segments.yaml, and the experiment's:

  python tools/evaluate.py experiment=hash_bsds data.root=DIR data.split=test output=DIR
  python tools/evaluate.py experiment=hash_bsds data.root=DIR output=DIR checkpoint=HASH sweep=[100,200]
  python tools/evaluate.py experiment=scenes_hash_r18 checkpoint=HASH output=DIR base=egs sweep=[250,400,700]

Other keys: those of the checkpoint's own config (config.yaml beside it).
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(_evaluate, USAGE, argv)


def _evaluate(words: list[str]) -> None:
    if any(word.startswith("experiment=") for word in words):
        segmenting.evaluate(words)
    else:
        trained.evaluate(words)


if __name__ == "__main__":
    sys.exit(main())
