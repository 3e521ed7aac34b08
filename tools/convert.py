"""Turns torchvision's and detectron2's weights into checkpoints, and back: python tools/convert.py source=... weights=... output=..."""

from __future__ import annotations

import sys

from maskseg import cli
from maskseg.conversion import convert

USAGE = """
A checkpoint for tools/evaluate.py, tools/predict.py, maskseg.load and trainer.init, out of a file of another framework; or the other way.
The file is only read: nothing in it is run. docs/weights.md says which models are known.

  python tools/convert.py source=torchvision weights=maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth output=mask_r50.pt
  python tools/convert.py source=detectron2 weights=model_final_f10217.pkl output=mask_r50.pt
  python tools/convert.py source=detectron2 weights=model_final.pth output=mine.pt categories=train.json
  python tools/convert.py source=torchvision weights=finetuned.pth output=mine.pt model.backbone.trunk.norm_eps=0.0
  python tools/convert.py source=maskseg weights=runs/NAME/TIME output=for_torchvision.pth

Other keys: model=... (one of configs/model) and model.*, where the tensors do not tell.
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(convert, USAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
