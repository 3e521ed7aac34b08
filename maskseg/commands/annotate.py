"""Proposes a mask for each box of a COCO file (by=object), or for each class of each image (by=class).
Writes a COCO file with the masks; the file of the boxes is unchanged. The keys are those of configs/annotate.yaml.
tools/review.py shows the masks in a browser, to be accepted or edited.

  python tools/annotate.py data.val_json=BOXES.json data.images=DIR output=MASKS.json
  python tools/annotate.py data.val_json=BOXES.json data.images=DIR output=MASKS.json technique=grabcut iterations=5 segmentation=polygons
  python tools/annotate.py data.val_json=BOXES.json data.train_json=SOME_MASKS.json data.images=DIR output=MASKS.json technique=auto
  python tools/annotate.py data.val_json=MASKED.json data.images=DIR output=study.json technique=all        a table of all techniques, and curves

With a classifier of images, its class activation maps say where the class is:

  python tools/train.py experiment=classify_scenes
  python tools/annotate.py data.val_json=LABELS.json data.images=DIR output=MASKS.json by=class checkpoint=RUN technique=gccam_f_pf threshold=0.6
  python tools/annotate.py data.val_json=BOXES.json data.images=DIR output=MASKS.json classifier=squeezenet1_1 technique=auto
"""

from __future__ import annotations

from maskseg.annotation import annotate


def main(arguments: list[str]) -> None:
    """Entry point of `tools/annotate.py`."""
    annotate.annotate(arguments)
