"""A page in the browser shows each annotation of a COCO file with its mask: accept it, reject it, or draw a box, paint what is object and what is
background, and cut it out again. Decisions are saved at once, as the field "review" of the annotation: accepted, rejected or edited.
Needs the extras demo and classic: pip install maskseg[demo,classic]

  python tools/review.py file=MASKS.json images=DIR
  python tools/review.py file=MASKS.json images=DIR output=REVIEWED.json
  python tools/review.py file=MASKS.json images=DIR port=8001
  python tools/review.py file=REVIEWED.json export=CLEAN.json

The last one writes a copy without what was rejected. Other keys: configs/review.yaml.
"""

from __future__ import annotations

from maskseg.annotation.review import serve


def main(arguments: list[str]) -> None:
    """Entry point of `tools/review.py`."""
    serve.review(arguments)
