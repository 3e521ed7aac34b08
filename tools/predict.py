"""Runs a trained model on pictures: python tools/predict.py checkpoint=... input=... output=DIR"""

from __future__ import annotations

import sys

from maskseg import cli, trained

USAGE = """
Draws what a model finds in pictures, and writes it as COCO results (predictions.json); of models that cut pictures into segments or label pixels
also those (NAME_segments.png, segments.json; NAME_classes.png, NAME_ids.png).

  python tools/predict.py checkpoint=runs/scenes_r18/TIME input=photo.jpg output=DIR
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR
  python tools/predict.py checkpoint=best.pt input='FOLDER/*.png' output=DIR min_score=0.7
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR trainer.device=cpu
  python tools/predict.py checkpoint=best.pt input=FOLDER output=DIR model.classifier.nms_threshold=0.4

Other keys: those of the checkpoint's own config (config.yaml beside it).
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(trained.predict, USAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
