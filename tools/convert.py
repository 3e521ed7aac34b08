"""Turns torchvision's and detectron2's weights into checkpoints, and back: python tools/convert.py source=... weights=... output=..."""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("convert"))
