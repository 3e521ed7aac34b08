"""Proposes a mask for each box of a COCO file (by=object) or each class of an image (by=class).

Writes a COCO file with the masks; the file with the boxes is not changed. What has a mask keeps it,
unless masks=all. tools/review.py shows the
masks in a browser, where they can be accepted or edited. The keys are those of
configs/annotate.yaml.

  python tools/annotate.py data.val_json=BOXES.json data.images=DIR output=MASKS.json
  python tools/annotate.py data.val_json=BOXES.json data.images=DIR output=MASKS.json \\
      technique=grabcut iterations=5 segmentation=polygons
  python tools/annotate.py data.val_json=BOXES.json data.train_json=SOME_MASKS.json \\
      data.images=DIR output=MASKS.json technique=auto

A comparison of all techniques with existing masks, as a table and curves:

  python tools/annotate.py data.val_json=MASKED.json data.images=DIR output=study.json technique=all

With an image classifier, whose class activation maps show where a class is:

  python tools/train.py experiment=classify_scenes
  python tools/annotate.py data.val_json=LABELS.json data.images=DIR output=MASKS.json by=class \\
      checkpoint=RUN technique=gccam_f_pf threshold=0.6
  python tools/annotate.py data.val_json=BOXES.json data.images=DIR output=MASKS.json \\
      classifier=squeezenet1_1 technique=auto
"""

from __future__ import annotations

from maskseg.annotation import annotate


def main(arguments: list[str]) -> None:
    """Entry point of `tools/annotate.py`."""
    annotate.annotate(arguments)
