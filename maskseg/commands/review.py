"""Serves a web page on which the proposed masks of a COCO file are reviewed.

The page shows each annotation with its mask. Accept the mask, reject it, or draw a box, paint
strokes of object and background, and segment it again. Decisions are saved at once, in the field
"review" of the annotation: accepted, rejected or edited. Needs the extras demo and classic:
pip install -e '.[demo,classic]'

  python tools/review.py file=MASKS.json images=DIR
  python tools/review.py file=MASKS.json images=DIR output=REVIEWED.json
  python tools/review.py file=MASKS.json images=DIR port=8001

Write a copy without the rejected annotations:

  python tools/review.py file=REVIEWED.json export=CLEAN.json

Other keys: configs/review.yaml.
"""

from __future__ import annotations

from maskseg.annotation.review import serve


def main(arguments: list[str]) -> None:
    """Entry point of `tools/review.py`."""
    serve.review(arguments)
